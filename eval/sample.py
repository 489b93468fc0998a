"""`python -m eval sample`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.model_choice import Computing, load_choice
from eval.writing import Screen, Writer
from gpt2_ddp.distributed.context import DistContext, open_context
from gpt2_ddp.evaluation.sampling import Drawing
from gpt2_ddp.system.errors import UserError

STDIN = Path("-")


@dataclass(frozen=True, kw_only=True)
class Sample(Computing):
    """Text that a model writes, as it comes. The same seed gives the same text."""

    model: tuple[str, ...]
    """A run, a checkpoint, a Hugging Face directory, or a published name: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    distilgpt2. Of several, each writes on from the same prompt with the same seed, one under the other."""
    prompt: str = ""
    """What the text begins with; nothing is the start of a document."""
    prompt_file: Path | None = None
    """A file with the prompt, - for standard input; the end of its last line is left out."""
    interactive: bool = False
    """Go on: what you type is added as it stands, its spaces too, and the model writes on from there. An empty line or
    the end of the input ends it; Ctrl-C ends what is being written."""
    count: int = 1
    """How many texts; the first appears as it comes, the others after it."""
    max_new_tokens: int = 100
    """Tokens after the prompt, or after each line; a text that ends earlier is shorter."""
    temperature: float = 1.0
    """Below 1 likely tokens get likelier; 0 always takes the likeliest."""
    top_k: int | None = 50
    """Draw among the k likeliest tokens."""
    top_p: float = 1.0
    """Of these, draw among the fewest that have this probability together; 1 leaves none out."""
    seed: int = 42
    """Decides the draws."""

    def run(self) -> None:
        """Show the texts, and write the JSON if asked to."""
        drawing = self._checked()
        with open_context(self.device) as context:
            if self.interactive and context.world_size > 1:
                raise UserError("--interactive reads what you type: run it without torchrun")
            prompt = context.run_on_main(self._prompt)
            writers = self._writers(context, prompt, drawing)
            screen = Screen(speaks=context.is_main, is_all=self.json is None)
            interrupted = (self._converse if self.interactive else self._write)(writers, screen, prompt)
            texts = [[writer.whole_text()] if self.interactive else writer.texts() for writer in writers]
            each = [{"model": name, "samples": found} for name, found in zip(self.model, texts, strict=True)]
            numbers = {"samples": texts[0]} if len(each) == 1 else {"models": each}
            writers[0].opened.write_json(self.json, {"prompt": prompt, **numbers})
        if interrupted:
            raise KeyboardInterrupt

    def _checked(self) -> Drawing:
        if not self.model:
            raise UserError("--model: give one or more")
        if self.count < 1:
            raise UserError(f"--count {self.count}: give 1 or more")
        if self.max_new_tokens < 0:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: give 0 or more")
        if self.prompt and self.prompt_file:
            raise UserError("--prompt and --prompt-file: give one of them")
        if self.interactive and self.count > 1:
            raise UserError(f"--interactive goes on with one text: leave out --count {self.count}")
        if self.interactive and self.prompt_file == STDIN:
            raise UserError("--prompt-file - reads all of standard input and leaves nothing for --interactive")
        return Drawing(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)

    def _prompt(self) -> str:
        """
        Raises:
            UserError: where it is not UTF-8.
            OSError: where the file cannot be read.
        """
        if self.prompt_file is None:
            return self.prompt
        from_stdin = self.prompt_file == STDIN
        read = (sys.stdin.buffer.read() if sys.stdin else b"") if from_stdin else self.prompt_file.read_bytes()
        try:
            text = read.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            where = "standard input" if from_stdin else self.prompt_file
            raise UserError(f"{where}: not UTF-8 from byte {error.start} on") from None
        return text.removesuffix("\n").removesuffix("\r")

    def _writers(self, context: DistContext, prompt: str, drawing: Drawing) -> list[Writer]:
        """One for each model; all are loaded before any writes."""
        opened = [load_choice(self, model, context) for model in self.model]
        at_most = None if self.interactive else self.max_new_tokens
        begun = "" if self.interactive else prompt
        return [Writer(one, begun, drawing, count=self.count, at_most=at_most) for one in opened]

    def _names(self) -> list[str]:
        """What stands over each model's texts; nothing over those of a single one."""
        return [f"=== {name}\n" for name in self.model] if len(self.model) > 1 else [""]

    def _write(self, writers: Sequence[Writer], screen: Screen, _: str) -> bool:
        """The texts of each model; whether Ctrl-C ended them."""
        headings = [f"--- sample {number} of {self.count}\n" for number in range(1, self.count + 1)]
        for name, writer in zip(self._names(), writers, strict=True):
            if screen.is_useless():
                break
            screen.show(name)
            if writer.write(screen, self.max_new_tokens, headings=headings):
                return True
        return False

    def _converse(self, writers: Sequence[Writer], screen: Screen, prompt: str) -> bool:
        """Write on from the prompt, if there is one, and from each line that is typed; whether Ctrl-C ended that."""
        try:
            line, shown = (prompt, prompt) if prompt else (next_line(), "")
            while line and not screen.is_useless():
                for name, writer in zip(self._names(), writers, strict=True):
                    screen.show(name)
                    writer.go_on(screen, line, self.max_new_tokens, shown=shown)
                line, shown = next_line(), ""
        except KeyboardInterrupt:
            return True
        return False


def next_line() -> str:
    """What is typed next, without its end; "" where nothing more comes.

    Raises:
        UserError: where it is not UTF-8.
    """
    asks = sys.stdin is not None and sys.stdin.isatty()
    try:
        return input("> " if asks else "") if sys.stdin else ""
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: a line that is not {error.encoding.upper()}") from None
