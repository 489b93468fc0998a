"""Texts that appear while a model writes them."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence

from torch import Tensor

from eval.model_choice import OpenModel
from gpt2_ddp.data.tokenizer import Tokenizer, tokenizer_of_model, vocabulary_of
from gpt2_ddp.evaluation.sampling import Continuation, Drawing
from gpt2_ddp.system.cli import tell
from gpt2_ddp.system.console import printable, refused_output


class Screen:
    """Stdout of the first rank. A terminal gets control characters as escapes; a file or a pipe gets what was written.

    A terminal would obey them: a model that has read escape sequences could move its cursor or set its title.
    """

    def __init__(self, *, speaks: bool, is_all: bool) -> None:
        """`is_all` tells that the texts go nowhere else."""
        self._speaks, self._is_all = speaks, is_all
        self._is_terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Show `text` at once."""
        if self._speaks:
            sys.stdout.write(printable(text) if self._is_terminal else text)
            sys.stdout.flush()

    def is_useless(self) -> bool:
        """Whether what is shown reaches nobody, as where the reader of a pipe has seen enough, and was for no other."""
        return self._is_all and self._speaks and refused_output() is not None


class TextStream:
    """A text that is shown token by token; a character of several tokens appears when its last has come."""

    def __init__(self, encoding: Tokenizer, screen: Screen) -> None:
        self._encoding, self._screen = encoding, screen
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Sequence[int]) -> None:
        """Show what `tokens` make whole."""
        self._screen.show(self._decoder.decode(self._encoding.decode_bytes(tokens)))

    def end(self) -> None:
        """Show what is left of a character that never came, and end the line."""
        self._screen.show(self._decoder.decode(b"", final=True) + "\n")


class Writer:
    """A model and the texts that it writes on, all from one prompt. The first appears as it comes, the others, drawn
    beside it, when it has ended.
    """

    def __init__(
        self,
        opened: OpenModel,
        prompt: str,
        drawing: Drawing,
        *,
        count: int = 1,
        at_most: int | None = None,
    ) -> None:
        """`at_most` is how many tokens each text gets in all, where that is known."""
        encoding = tokenizer_of_model(opened.path)
        self._eot = encoding.eot_token
        ids = [self._eot, *encoding.encode_ordinary(prompt)]  # as documents begin in training
        length = opened.sequence_length
        if len(ids) > length:
            opened.warn(f"of the prompt's {len(ids)} tokens only the last {length} are read")
        self.opened, self._encoding, self._slides = opened, encoding, len(ids) > length
        self._text = Continuation(
            opened.gpt,
            [ids] * count,
            drawing,
            sequence_length=length,
            autocast=opened.precision.autocast(),
            at_most=at_most,
            vocabulary=vocabulary_of(encoding),
        )

    def write(self, screen: Screen, max_new_tokens: int, *, headings: Sequence[str]) -> bool:
        """Write and show the texts, each under its own of `headings`; whether Ctrl-C ended them where they were."""
        screen.show(headings[0])
        interrupted = self._stream(screen, self._text.ids[0, 1:].tolist(), max_new_tokens)
        for heading, text in zip(headings[1:], self.texts()[1:], strict=True):
            screen.show(f"{heading}{text}\n")
        return interrupted

    def go_on(self, screen: Screen, line: str, max_new_tokens: int, *, shown: str = "") -> None:
        """Write on from the text so far and `line`, and show what is new after `shown`; Ctrl-C ends it where it is."""
        self._text.append(self._encoding.encode_ordinary(line))
        self._stream(screen, self._encoding.encode_ordinary(shown), max_new_tokens)
        if int(self._text.ids[0, -1]) == self._eot:
            tell("(the document has ended; what follows begins another)")
        if not self._slides and self._text.ids.shape[1] > self._text.length:
            self._slides = True
            self.opened.warn(f"from here on only the last {self._text.length} tokens are read, and anew for each one")

    def texts(self) -> list[str]:
        """Each document, to its end or as far as it was written."""
        return [self._decoded(until_eot(row, self._eot)) for row in self._text.ids.tolist()]

    def whole_text(self) -> str:
        """All of the first text, with the end of text between its documents."""
        return self._decoded(self._text.ids[0, 1:].tolist())

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._encoding.decode_bytes(tokens).decode("utf-8", "replace")

    def _stream(self, screen: Screen, begun: Sequence[int], max_new_tokens: int) -> bool:
        stream, ended = TextStream(self._encoding, screen), False
        stream.add(begun)

        def show(tokens: Tensor) -> bool:
            nonlocal ended
            ended = ended or int(tokens[0]) == self._eot
            if not ended:
                stream.add([int(tokens[0])])
            return screen.is_useless()

        try:
            self._text.write(max_new_tokens, stop_at_eot=True, on_token=show)
            return False
        except KeyboardInterrupt:
            return True
        finally:
            stream.end()


def until_eot(row: Sequence[int], eot: int) -> Sequence[int]:
    """The document that `row` begins with, without its marks."""
    return row[1 : row.index(eot, 1) if eot in row[1:] else len(row)]
