"""`python -m eval sample` for people: on a terminal, from a file or a pipe, line by line, of several models."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from drivers.terminal import Terminal
from hellaswag_examples import opinionated_model, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.sample import Sample
from eval.writing import Screen, TextStream
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.evaluation.sampling import Drawing, generate
from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.huggingface import load_model
from gpt2_ddp.model.vocabulary import EOT
from gpt2_ddp.system.console import lost_output, speak_safely

SPOKEN = "Tea: 日本 👩\u200d👧!\x1b[31m red\x07\x9b2J\r end\tof it\n"
"""What the model below writes: characters of several tokens, and control characters."""


def reciting_model(tokens: list[int], block_size: int = 2048) -> GPT:
    """A model whose likeliest token depends on its position alone: `tokens`, one after the other, and again."""
    model = GPT(GPTConfig(block_size=block_size, n_layer=1, n_head=2, n_embd=64)).init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name:
                parameter.zero_()
        for position in range(block_size):
            model.wpe.weight[position] = 100 * model.wte.weight[tokens[position % len(tokens)]]
    return model


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = load_tokenizer().encode_ordinary(SPOKEN)
    pieces = [load_tokenizer().decode_bytes([token]) for token in tokens]
    assert sum(piece.decode(errors="replace").endswith("\ufffd") for piece in pieces) > 3
    return write_model(tmp_path_factory.mktemp("reciting") / "model", reciting_model(tokens))


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("opinionated") / "model", opinionated_model(block_size=160))


def sample(*models: Path, **flags: object) -> None:
    Sample(model=tuple(map(str, models)), device="cpu", dtype="float32", **flags).run()  # type: ignore[arg-type]


def test_on_a_terminal_the_text_comes_piece_by_piece_and_goes_on_until_an_empty_line(
    reciting: Path, tmp_path: Path
) -> None:
    """One session: from the prompt, Ctrl-C in what follows a line, another line, an empty one."""
    spoken = load_tokenizer().encode_ordinary(SPOKEN)
    file, begun = tmp_path / "talk.json", "A \x1b[2Jcup."
    flags = ["--model", reciting, "--device", "cpu", "--dtype", "float32", "--temperature", 0, "--json", file]
    flags += ["--interactive", "--prompt", begun, "--max-new-tokens", 1900]
    terminal = Terminal("-m", "eval", "sample", *flags)
    try:
        terminal.read_until(r"A \\x1b\[2Jcup\.")
        terminal.read_until("(?s)end\tof it.*end\tof it")
        assert "> " not in terminal.text()  # it is being written, many hundreds of tokens are to come
        pieces = len([chunk for chunk in terminal.chunks if chunk])
        terminal.type(b"\x03")
        seen = len(terminal.read_until("\n> $"))
        terminal.type(b" and then\n")
        terminal.read_until("red", after=seen)
        terminal.type(b"\x03")
        terminal.read_until("\n> $", after=seen)
        terminal.type(b"\n")
        assert terminal.end() == 0
    finally:
        terminal.running.kill()
    shown = terminal.text()
    assert pieces > 5
    assert all(chunk.decode() for chunk in terminal.chunks if chunk)  # no character in two pieces
    assert not set("\x1b\x07\x9b\r") & set(shown.replace("^C", ""))
    assert "日本 👩\u200d👧!\\x1b[31m red\\x07\\x9b2J\\r end\tof it" in shown
    [text] = json.loads(file.read_text())["samples"]
    assert text.startswith(begun)
    assert " and then" in text
    position = len(load_tokenizer().encode_ordinary(begun)) % len(spoken)
    first = text.removeprefix(begun).split(" and then")[0].rstrip("\ufffd")
    assert len(first) > len(SPOKEN)
    assert load_tokenizer().decode(spoken[position:] + spoken * 100).startswith(first)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"])), st.integers(0, EOT - 1))
def test_a_streamed_text_is_the_whole_one_in_whole_characters(text: str, broken_by: int) -> None:
    encoding, shown = load_tokenizer(), list[str]()
    tokens = encoding.encode_ordinary(text)
    tokens[len(tokens) // 2 : len(tokens) // 2] = [broken_by]

    class Recorder(Screen):
        def show(self, text: str) -> None:
            shown.append(text)

    stream = TextStream(encoding, Recorder(speaks=True, is_all=True))
    for token in tokens:
        stream.add([token])
    stream.end()
    assert "".join(shown) == encoding.decode(tokens) + "\n"


@contextmanager
def stdin(contents: bytes) -> Iterator[None]:
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(contents), encoding="utf-8")
    try:
        yield
    finally:
        sys.stdin = before


@pytest.mark.parametrize(
    ("contents", "prompt"),
    [(b"The fox\n", "The fox"), (b"\xef\xbb\xbfOne\r\n\r\n", "One\r\n"), ("naïve\n".encode(), "naïve"), (b"", "")],
)
def test_a_prompt_from_a_file_and_from_standard_input(
    opinionated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: bytes, prompt: str
) -> None:
    (tmp_path / "prompt.txt").write_bytes(contents)
    shown = []
    for flags in ({"prompt": prompt}, {"prompt_file": tmp_path / "prompt.txt"}, {"prompt_file": Path("-")}):
        with stdin(contents):
            sample(opinionated, max_new_tokens=5, json=tmp_path / "found.json", **flags)
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["prompt"] == prompt
        shown.append((found, capsys.readouterr().out))
    assert shown[0] == shown[1] == shown[2]
    assert shown[0][1] == f"--- sample 1 of 1\n{found['samples'][0]}\n"
    assert found["samples"][0].startswith(prompt)


def test_what_no_terminal_gets_is_every_byte_that_was_written(
    reciting: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    length = len(load_tokenizer().encode_ordinary(SPOKEN))
    sample(reciting, temperature=0, max_new_tokens=length)
    assert capfdbinary.readouterr().out == f"--- sample 1 of 1\n{SPOKEN}\n".encode()


def test_several_models_write_on_from_one_prompt_with_one_seed(
    reciting: Path, opinionated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, flags = tmp_path / "found.json", {"prompt": "The fox", "count": 2, "max_new_tokens": 6, "top_p": 0.9}
    alone = []
    for model in (opinionated, reciting):
        sample(model, json=file, **flags)
        alone.append((json.loads(file.read_text())["samples"], capsys.readouterr().out))
    sample(opinionated, reciting, opinionated, json=file, **flags)
    found, shown = json.loads(file.read_text()), capsys.readouterr().out
    models = [opinionated, reciting, opinionated]
    assert found == {
        "prompt": "The fox",
        "models": [
            {"model": str(model), "samples": samples}
            for model, (samples, _) in zip(models, [*alone, alone[0]], strict=True)
        ],
    }
    texts = [text for _, text in [*alone, alone[0]]]
    assert shown == "".join(f"=== {model}\n{text}" for model, text in zip(models, texts, strict=True))


def test_top_p_is_that_of_generate(opinionated: Path, tmp_path: Path) -> None:
    sample(opinionated, prompt="A", max_new_tokens=20, top_k=None, top_p=0.5, json=tmp_path / "found.json")
    prompt = [EOT, *load_tokenizer().encode("A")]
    rows = [
        generate(load_model(opinionated), prompt, max_new_tokens=20, top_p=top_p, seed=42, stop_at_eot=True)[0]
        for top_p in (0.5, 1.0)
    ]
    texts = [load_tokenizer().decode(row[1:].tolist()).removesuffix("<|endoftext|>") for row in rows]
    assert json.loads((tmp_path / "found.json").read_text())["samples"] == texts[:1]
    assert texts[0] != texts[1]


def test_lines_from_a_pipe_go_on_with_one_text_past_what_the_model_reads(
    opinionated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And several models get the same lines; without a prompt the first line is one."""
    flags = {"interactive": True, "temperature": 0, "max_new_tokens": 9, "sequence_length": 24}
    with stdin(b"One two\n three four\n five six\n\nnot read\n"):
        sample(opinionated, opinionated, json=tmp_path / "found.json", **flags)
    ids, said = [EOT], list[str]()
    for line in ("One two", " three four", " five six"):
        ids += load_tokenizer().encode_ordinary(line)
        begun = len(ids)
        [ids] = generate(
            load_model(opinionated), ids, max_new_tokens=9, temperature=0, sequence_length=24, stop_at_eot=True
        ).tolist()
        said += [f"=== {opinionated}\n{load_tokenizer().decode(ids[begun:])}\n"] * 2
    assert EOT not in ids[1:]
    captured = capsys.readouterr()
    assert captured.out == "".join(said)
    assert captured.err.count("warning: from here on only the last 24 tokens are read, and anew for each one\n") == 2
    [one, two] = json.loads((tmp_path / "found.json").read_text())["models"]
    assert one == two == {"model": str(opinionated), "samples": [load_tokenizer().decode(ids[1:])]}


def test_ctrl_c_ends_with_what_was_written(
    reciting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show, seen = Screen.show, list[str]()

    def interrupting(screen: Screen, text: str) -> None:
        show(screen, text)
        seen.append(text)
        if "red" in "".join(seen):
            monkeypatch.setattr(Screen, "show", show)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Screen, "show", interrupting)
    with pytest.raises(KeyboardInterrupt):
        sample(reciting, reciting, temperature=0, count=2, max_new_tokens=400, json=tmp_path / "found.json")
    written = SPOKEN[: SPOKEN.index("red") + 3]
    shown = f"=== {reciting}\n--- sample 1 of 2\n{written}\n--- sample 2 of 2\n{written}\n"
    assert capsys.readouterr().out == shown
    found = json.loads((tmp_path / "found.json").read_text())["models"]
    assert [entry["samples"] for entry in found] == [[written, written], ["", ""]]


def test_a_reader_that_has_seen_enough_ends_it_quietly(reciting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the 100,000 tokens, and before another model writes."""
    drawn, draw = list[int](), Drawing.draw

    def counting(drawing: Drawing, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(len(logits))
        return draw(drawing, logits, generator)

    monkeypatch.setattr(Drawing, "draw", counting)
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        speak_safely()
        os.close(reader)
        sample(reciting, reciting, temperature=0, max_new_tokens=100_000)
        assert lost_output() is None
        monkeypatch.undo()
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prompt": "a", "prompt_file": Path("b")}, "--prompt and --prompt-file: give one of them"),
        ({"interactive": True, "count": 2}, "leave out --count 2"),
        ({"interactive": True, "prompt_file": Path("-")}, "leaves nothing for --interactive"),
        ({"max_new_tokens": -1}, "--max-new-tokens -1: give 0 or more"),
        ({"top_p": 0.0}, "top-p 0.0: give more than 0 and at most 1"),
        ({"prompt_file": Path("nowhere.txt")}, r"No such file .*nowhere\.txt"),
        ({"prompt_file": Path("-")}, "standard input: not UTF-8 from byte 2 on"),
        ({"interactive": True}, "standard input: a line that is not UTF-8"),
    ],
)
def test_what_cannot_be_is_refused(opinionated: Path, flags: dict[str, object], message: str) -> None:
    with stdin(b"ab\xff\n"), pytest.raises((ValueError, OSError), match=message):
        sample(opinionated, **flags)
    with pytest.raises(ValueError, match="--model: give one or more"):
        sample()
