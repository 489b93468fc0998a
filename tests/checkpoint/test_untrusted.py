"""A checkpoint from anybody: whatever its files hold, the trainer answers with one line, and reads nothing else.

Each file is fuzzed through the functions that the trainer reads it with. (Shards, data manifests and HellaSwag files
have theirs beside their own tests.) More examples: HYPOTHESIS_EXAMPLES=5000.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from drivers import warm
from drivers.trainer import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import checkpoint, tree

from gpt2_ddp.build.resume import require_same_run
from gpt2_ddp.checkpoint.choice import newest_good
from gpt2_ddp.checkpoint.files import MANIFEST, faults, read_tensors
from gpt2_ddp.checkpoint.state import TrainState, read_state
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model import huggingface
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.optim.optimizers import load_optimizer_tensors
from gpt2_ddp.optim.rule import AdamW
from gpt2_ddp.optim.spikes import SpikeGuard
from gpt2_ddp.optim.updates import SkipCount
from gpt2_ddp.system.errors import user_error

FUZZ = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "150")),
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LONGEST_LINE = 2000
MOST_MEMORY = 300 << 20

NUMBERS = st.one_of(
    st.integers(-(1 << 70), 1 << 70), st.sampled_from([-1, 0, 1, 1 << 31, 1 << 62, 1 << 63]), st.floats(), st.booleans()
)
NAMES = st.one_of(
    st.sampled_from(
        ["model.safetensors", "../secret", "/etc/passwd", "..", ".", "", "a/b", "x" * 300, "a\0b", "\ud800"]
    ),
    st.text(max_size=20),
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=8,
)


@contextmanager
def one_line() -> Iterator[None]:
    """Within it nothing fails but with an error that the trainer tells in one line, and memory does not explode."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except (ValueError, OSError) as error:
        line = user_error(error)
        assert line is not None, "a traceback"
        assert len(line.splitlines()) == 1
        assert len(line) < LONGEST_LINE
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


@pytest.fixture(scope="module")
def stopped(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, of step 4."""
    out_dir = tmp_path_factory.mktemp("stopped") / "run"
    warm.train(out_dir, data_dir, "--dtype", "float16", faults={"stop_after": {"step": 4}}, status=75)
    return out_dir


@pytest.fixture
def target(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that checkpoint."""
    (tmp_path / "secret").write_text("secret")
    return Path(shutil.copytree(checkpoint(stopped, 4), tmp_path / "checkpoints" / "step_00000004"))


def sign(path: Path) -> None:
    """Write the manifest that fits the files, as somebody with evil intent would."""
    entries = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
        if file.name != MANIFEST
    }
    (path / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}))
    assert faults(path) == []


@st.composite
def changed(draw: st.DrawFn, original: Any) -> Any:
    """`original` with one of its parts, at any depth, taken out, doubled under another name or replaced."""
    if isinstance(original, dict) and original and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(original)))
        rest = {key: value for key, value in original.items() if key != name}
        how = draw(st.sampled_from(["inside", "inside", "without", "renamed"]))
        if how == "inside":
            return rest | {name: draw(changed(original[name]))}
        return rest if how == "without" else rest | {draw(NAMES): original[name]}
    return draw(VALUES)


def check_manifest(path: Path, content: bytes) -> None:
    (path / MANIFEST).write_bytes(content)
    for fault in faults(path):
        assert len(fault) < LONGEST_LINE
        assert fault.isprintable()
    before = tree(path.parent.parent)
    with one_line():
        newest_good(path.parent)
    assert tree(path.parent.parent) == before


@FUZZ
@given(data=st.data())
def test_a_manifest_of_anything(target: Path, data: st.DataObject) -> None:
    content = data.draw(st.one_of(st.binary(max_size=200), VALUES.map(lambda value: json.dumps(value).encode())))
    check_manifest(target, content)


@FUZZ
@given(data=st.data())
def test_a_manifest_that_is_nearly_right(target: Path, data: st.DataObject) -> None:
    sign(target)
    value = data.draw(changed(json.loads((target / MANIFEST).read_text())))
    check_manifest(target, json.dumps(value).encode())


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "link", "../step_00000004/config.json"])
def test_no_file_outside_belongs_to_a_checkpoint(target: Path, name: str) -> None:
    (target / "link").symlink_to(target.parent.parent / "secret")
    content = (target / name).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / MANIFEST).write_text(json.dumps({"version": 1, "files": {name: entry}}))
    assert faults(target) == [f"{name!r} is no file of the checkpoint"]


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"\xff\xfe", b" " * (17 << 20)]
)
def test_json_that_is_made_to_hurt(target: Path, content: bytes) -> None:
    check_manifest(target, content)
    (target / "trainer_state.json").write_bytes(content)
    with one_line(), pytest.raises(ValueError, match=r"trainer_state\.json"):
        read_state(target)


def take_up(target: Path) -> None:
    """What a trainer does with trainer_state.json."""
    found = read_state(target)
    require_same_run(TrainConfig(data_dir=Path("data")), found, "fingerprint", Path("runs/x"))
    skips, guard = SkipCount(torch.device("cpu")), SpikeGuard(6.0, 3)
    state = TrainState(skips=skips, guard=guard, scaler=torch.amp.GradScaler("cpu"))
    state.load_state_dict(found)
    guard.sees_spike(torch.tensor(1.0))
    skips.add(torch.tensor(True))
    json.dumps(state.state_dict())


@FUZZ
@given(data=st.data())
def test_a_trainer_state_that_is_nearly_right(target: Path, stopped: Path, data: st.DataObject) -> None:
    original = json.loads((checkpoint(stopped, 4) / "trainer_state.json").read_text())
    (target / "trainer_state.json").write_text(json.dumps(data.draw(changed(original))))
    with one_line():
        take_up(target)


def pack(header: bytes, content: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + content


def unpack(file: Path) -> tuple[Any, bytes]:
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def load_optimizer(target: Path) -> None:
    model = GPT(TINY).init_weights(0)
    optimizer = AdamW(weight_decay=0.1, beta1=0.9, beta2=0.95).make(model, DistContext())
    load_optimizer_tensors(model, optimizer, read_tensors(target / "optimizer.safetensors"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def load_weights(target: Path) -> None:
    huggingface.load_model(target)


READERS: dict[str, Callable[[Path], None]] = {
    "optimizer.safetensors": load_optimizer,
    "model.safetensors": load_weights,
}


@pytest.mark.parametrize("name", READERS)
@FUZZ
@given(data=st.data())
def test_tensors_with_a_header_that_is_nearly_right(
    target: Path, stopped: Path, name: str, data: st.DataObject
) -> None:
    """Other shapes, other dtypes, offsets that overlap or leave gaps or point past the end."""
    header, content = unpack(checkpoint(stopped, 4) / name)
    dtypes = st.sampled_from(["F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "C64", "F4", "???"])
    other = data.draw(st.sampled_from(sorted(header)))
    part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "any"]))
    if part == "any" or other == "__metadata__":
        header = data.draw(changed(header))
    elif part == "dtype":
        header[other]["dtype"] = data.draw(dtypes)
    else:
        header[other][part] = data.draw(st.lists(NUMBERS, max_size=3))
    (target / name).write_bytes(pack(json.dumps(header).encode(), content))
    with one_line():
        READERS[name](target)


@pytest.mark.parametrize("name", READERS)
@FUZZ
@given(content=st.binary(max_size=64), length=st.one_of(st.none(), st.integers(0, (1 << 64) - 1)))
def test_tensors_of_anything(target: Path, name: str, content: bytes, length: int | None) -> None:
    (target / name).write_bytes(pack(content, b"", length))
    with one_line(), pytest.raises((ValueError, OSError)):
        READERS[name](target)


@FUZZ
@given(data=st.data())
def test_a_model_config_that_is_nearly_right(target: Path, stopped: Path, data: st.DataObject) -> None:
    original = json.loads((checkpoint(stopped, 4) / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(data.draw(changed(original))))
    with one_line():
        load_weights(target)


def larger_state(path: Path) -> None:
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(state | {"step": 1 << 80}))


def fewer_moments(path: Path) -> None:
    tensors = read_tensors(path / "optimizer.safetensors")
    header: dict[str, Any] = {}
    content = b""
    for name, tensor in list(tensors.items())[1:]:
        data = tensor.numpy().tobytes()
        offsets = [len(content), len(content) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        content += data
    (path / "optimizer.safetensors").write_bytes(pack(json.dumps(header).encode(), content))


def huge_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(pack(b"{}", b"", 1 << 62))


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (larger_state, "step cannot be 1208925819614629174706176"),
        (fewer_moments, "the optimizer state lacks"),
        (huge_header, "model.safetensors is not a whole safetensors file"),
        (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json: No such file or directory"),
    ],
)
def test_the_trainer_refuses_a_forged_checkpoint_in_one_line(
    stopped: Path, data_dir: Path, tmp_path: Path, forge: Callable[[Path], None], said: str
) -> None:
    """The manifest fits, so that nothing is broken: the fault is found where the file is read."""
    out_dir = tmp_path / "run"
    shutil.copytree(stopped, out_dir)
    forge(checkpoint(out_dir, 4))
    sign(checkpoint(out_dir, 4))
    done = warm.train(out_dir, data_dir, "--dtype", "float16", status=2)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
