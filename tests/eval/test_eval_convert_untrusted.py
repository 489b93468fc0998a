"""Files for `python -m eval convert` that are damaged, lie or mean harm: one line, nothing run, no memory for it."""

from __future__ import annotations

import os
import pickle
import re
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import foreign_models as foreign
import pytest
import torch
from foreign_models import Shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.convert import read_source
from gpt2_ddp.system.errors import user_error

FUZZ = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "60")),
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MOST_MEMORY = 100 << 20
SMALL = Shape(vocab=65)
ARRAYS = foreign.weights(SMALL)


@contextmanager
def refused(path: Path, said: str = "") -> Iterator[None]:
    """Within it, an error that names the file, in a line, after little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError)) as raised:
        yield
    line = user_error(raised.value)
    assert line is not None, "a traceback"
    assert len(line) < 600
    assert str(path) in line
    assert re.search(said, line), line
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


HUGE = {"layers": 1 << 10, "channels": 1 << 16, "heads": 1 << 10, "vocab": 1 << 22, "padded": 1 << 22}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"magic": 20240520}, "has magic 20240520 and version 3: a model of llm.c has 20240326"),
        ({"version": 1}, r"version 1: .* 3 \(float32\) or 5 \(bfloat16\)"),
        ({"version": 5}, "its header asks for .*: it is cut off"),
        ({"layers": 3}, "its header asks for"),
        ({"layers": -1}, "n_layer is -1"),
        ({"channels": 1 << 30}, "n_embd is 1073741824"),
        ({"heads": 3}, "not a multiple of n_head 3"),
        ({"heads": 0}, "n_head is 0"),
        ({"vocab": 129}, "a vocabulary of 129 cannot be padded to 128"),
        ({"padded": 1 << 30}, "a vocabulary of 65 cannot be padded to 1073741824"),
        ({"positions": 1 << 20}, "its header asks for"),
        (HUGE, r"its header asks for \d{14}"),
    ],
    ids=str,
)
def test_a_header_of_llm_c_that_lies(tmp_path: Path, header: dict[str, int], said: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(foreign.llm_c(SMALL, ARRAYS, **header))
    with refused(path, said):
        read_source(str(path))


@pytest.mark.parametrize("size", [4, 1023, 1024, 5000, -1, +1])
def test_a_file_of_llm_c_that_is_cut_off_or_longer(tmp_path: Path, size: int) -> None:
    path, content = tmp_path / "model.bin", foreign.llm_c(SMALL, ARRAYS)
    path.write_bytes(content + b"\0" if size == 1 else content[:size])
    with refused(path, "begins with 1024" if 0 < size < 1024 and size != 1 else "its header asks for"):
        read_source(str(path))


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda ran: Calls(os.mkdir, str(ran)), "posix mkdir"),
        (lambda ran: Calls(exec, f"open({str(ran)!r}, 'w')"), "exec"),
        (lambda _: Calls(bytearray, 1 << 40), "bytearray"),  # torch's own list lets this be called
        (lambda _: Calls(torch.FloatTensor, 1 << 40), "torch FloatTensor"),
        (lambda _: ARRAYS["ln_f.bias"][0], "numpy.* scalar"),
    ],
    ids=["mkdir", "exec", "memory", "tensor", "numpy"],
)
def test_nothing_in_a_pickle_is_called(tmp_path: Path, call: Callable[[Path], Any], name: str) -> None:
    path, ran = tmp_path / "ckpt.pt", tmp_path / "ran"
    torch.save(foreign.nanogpt(SMALL, foreign.state_dict(ARRAYS), best_val_loss=call(ran)), path)
    with refused(path, f"cannot be read safely: its pickle asks for '.*{name}'.* save its weights anew: torch.save"):
        read_source(str(path))
    assert not ran.exists()


def test_the_mend_that_is_told_works(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save({"model": foreign.state_dict(ARRAYS), "config": SMALL.fields()}, path)
    model, tokenizer, notes = read_source(str(path))
    assert (tokenizer, notes) == ({}, [])
    assert torch.equal(model.ln_f.bias, torch.from_numpy(ARRAYS["ln_f.bias"]))


Model = dict[str, Any]


def widened(model: Model) -> None:
    model["transformer.wte.weight"] = model["lm_head.weight"] = torch.zeros(1, 1).expand(1 << 22, 1 << 16)


def without(name: str) -> Callable[[Model], object]:
    return lambda model: model.pop(f"transformer.{name}")


def put(name: str, value: object) -> Callable[[Model], object]:
    return lambda model: model.update({name: value})


LAST = "transformer.ln_f.bias"
LIES: dict[str, tuple[Callable[[Model], object], dict[str, Any], str]] = {
    "missing": (without("h.1.ln_2.bias"), {}, "lacks 1 tensors, 'h.1.ln_2.bias'"),
    "unknown": (put("transformer.h.0.rotary", torch.zeros(2)), {}, "'h.0.rotary' is no part"),
    "misshapen": (put(LAST, torch.zeros(9)), {}, r"has shape \(9,\)"),
    "whole-numbers": (put(LAST, torch.zeros(8, dtype=torch.int64)), {}, "'ln_f.bias' is no tensor of floating"),
    "no-tensor": (put(LAST, "x"), {}, "'ln_f.bias' is no tensor of floating"),
    "no-memory": (put(LAST, torch.zeros(8, device="meta")), {}, "asks for 'torch._utils _rebuild_meta_tensor_no"),
    "untied": (put("lm_head.weight", torch.zeros(65, 8)), {}, "lm_head is not its wte"),
    "more-layers": (dict, {"n_layer": 3}, "lacks 12 tensors"),
    "a-thousand-layers": (dict, {"n_layer": 1024}, "29 tensors, too few for 1024 layers"),
    "no-size": (dict, {"n_embd": None}, "n_embd is None"),
    "a-list": (dict, {"n_layer": [2]}, "n_layer is \\[2\\]"),
    "huge": (dict, {"n_layer": 1 << 40}, "n_layer is 1099511627776"),
    "widened": (widened, {"vocab_size": 1 << 22, "n_embd": 1 << 16}, "has shape"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_of_nanogpt_that_lies(tmp_path: Path, lie: str) -> None:
    change, fields, said = LIES[lie]
    path, model = tmp_path / "ckpt.pt", dict(foreign.state_dict(ARRAYS))
    change(model)
    checkpoint = foreign.nanogpt(SMALL, model)
    checkpoint["model_args"] |= fields
    torch.save(checkpoint, path)
    with refused(path, said):
        read_source(str(path))


def test_tensors_that_claim_more_than_the_file_has(tmp_path: Path) -> None:
    """Each is a number, told to be a whole matrix: 64 of 65,536 channels would be 12 TB."""
    path, shape = tmp_path / "ckpt.pt", Shape(vocab=65, layers=1, heads=1, channels=1 << 16)
    c = shape.channels
    sizes = {"wte": (65, c), "wpe": (12, c), "ln_f": (c,), "h.0.ln_1": (c,), "h.0.ln_2": (c,)}
    sizes |= {"h.0.attn.c_attn": (3 * c, c), "h.0.attn.c_proj": (c, c)}
    sizes |= {"h.0.mlp.c_fc": (4 * c, c), "h.0.mlp.c_proj": (c, 4 * c)}
    model = {f"{name}.weight": torch.zeros(1).expand(size) for name, size in sizes.items()}
    torch.save(foreign.nanogpt(shape, model), path)
    with refused(path, r"its tensors claim more than the \d+ bytes that it has"):
        read_source(str(path))


def old_format(path: Path) -> None:
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt/data.pkl", pickle.dumps({"model": {}}, protocol=2))
        archive.writestr("ckpt/data/0", bytes(8 << 20))


def another_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


def newer_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", pickle.dumps(Calls(os.mkdir, "x"), protocol=4))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (old_format, "begins with b'.*a zip, since PyTorch 1.6"),
        (compressed, "holds parts that are larger than itself"),
        (another_zip, "is a zip, but not one of torch.save"),
        (newer_pickle, r"torch.save does not write \(STACK_GLOBAL\)"),
        (lambda path: torch.save([1, 2], path), "holds a list, not a checkpoint"),
        (lambda path: torch.save({"state": {}}, path), "is neither nanoGPT's .* nor build-nanogpt's"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), r"is no whole file of torch.save \(BadZipFile"),
        (lambda path: path.write_bytes(struct.pack("<i", 20240326)), "has 4 bytes"),
        (lambda path: path.touch(), "begins with b''"),
    ],
)
def test_another_file(tmp_path: Path, write: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "file"
    write(path)
    with refused(path, said):
        read_source(str(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "ckpt.pt"
    torch.save(foreign.nanogpt(SMALL, foreign.state_dict(ARRAYS)), path)
    return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_any_damage_is_one_line_or_another_model(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    """Where the pickle, the directory of the zip or the numbers are other bytes, or the file ends early."""
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        end = whole.index(b"PK\x07\x08") if b"PK\x07\x08" in whole else 3000
        at = at % min(end, len(whole))  # the pickle comes first
    new = data.draw(st.one_of(st.none(), st.binary(min_size=1, max_size=8)))
    path = tmp_path / "ckpt.pt"
    path.write_bytes(whole[:at] if new is None else whole[:at] + new + whole[at + len(new) :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model, _, _ = read_source(str(path))
        assert model.config.n_embd == 8
    except (ValueError, OSError) as error:
        line = user_error(error)
        assert line is not None
        assert str(path) in line
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY
