"""Design section 2 and style.md's limits, read from the source; and that importing does nothing."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from architecture import BESIDE, FLOOR, PATH_LIMIT, SOURCES, code_lines, imported, path_to_a_checkpoint, reached, room
from running import ROOT, environment

ALL_FILES = [*SOURCES.values(), *sorted((ROOT / "tests").rglob("*.py")), *sorted(ROOT.glob("*.py"))]

FOREIGN_PICKLES = "eval.torch_files"
"""The module that reads what other trainers have pickled, with `weights_only`. Nothing of ours is a pickle."""


def test_every_room_is_there_and_has_its_floor() -> None:
    assert {room(module) for module in SOURCES} - {""} == FLOOR.keys()
    assert not {"utils", "helpers", "common", "misc"} & {name.split(".")[-1] for name in SOURCES}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module: str) -> None:
    package, found = module.split(".")[0], imported(module)
    if module == "gpt2_ddp":
        assert found == set()
    elif package == "gpt2_ddp":
        here = FLOOR[room(module)]
        others = {other for other in found if room(other) != room(module)}
        assert {other for other in others if not room(other) or FLOOR[room(other)] >= here} == set()
    elif package == "data_prep":
        ours = {other for other in found if other.startswith("data_prep")}
        assert {room(other) for other in found - ours} <= {"system", "model", "data"}
    elif package == "eval":
        assert not {room(other) for other in reached(module)} & {"run", "build", "periodic", "train", "bench"}
        assert {other.split(".")[0] for other in found} <= {"gpt2_ddp", "eval"}
    else:
        assert {other.split(".")[0] for other in found} <= {"launch"}


def test_the_path_from_flags_to_a_checkpoint_is_short() -> None:
    assert sum(map(code_lines, path_to_a_checkpoint())) < PATH_LIMIT
    assert {f"gpt2_ddp.{name}" for name in BESIDE} <= reached("gpt2_ddp.train") | {"gpt2_ddp.evaluation"}


def test_no_module_imports_itself_in_a_circle() -> None:
    assert [module for module in SOURCES if module in reached(module)] == []


@pytest.mark.parametrize(
    ("module", "unwanted"), [("eval.__main__", ["gpt2_ddp.train"]), ("launch.__main__", ["gpt2_ddp", "eval"])]
)
def test_what_a_command_really_loads(module: str, unwanted: list[str]) -> None:
    script = f"import sys, {module}; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


IMPORT_TWICE = """
import importlib, os, random, signal, sys
modules = sys.argv[1:]
for name in modules:  # the first time brings along libraries that do what they like
    importlib.import_module(name)
import numpy, torch

def world():
    handlers = [signal.getsignal(number) for number in range(1, signal.NSIG) if number not in (9, 19)]
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    generators = torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state())
    return dict(os.environ), handlers, threads, precision, generators, torch.is_grad_enabled(), os.getcwd()

done = []
def watch(event, arguments):
    writes = event == "open" and not isinstance(arguments[2], type(None)) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event.split(".")[0] in ("subprocess", "socket", "ctypes") or event in ("os.mkdir", "os.putenv"):
        done.append((event, arguments))

before = world()
for name in [name for name in sys.modules if name.split(".")[0] in ("gpt2_ddp", "data_prep", "eval", "launch")]:
    del sys.modules[name]
sys.addaudithook(watch)
for name in modules:
    importlib.import_module(name)
found = list(done)
assert not found, found
assert world() == before
"""


def test_a_wheel_holds_all_of_the_package_and_works_far_from_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    isolated = [] if importlib.util.find_spec("setuptools") is None else ["--no-build-isolation"]
    checkout = shutil.copytree(ROOT / "gpt2_ddp", tmp_path / "checkout" / "gpt2_ddp").parent  # building writes there
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    subprocess.run([*pip, "wheel", *isolated, "--no-deps", f"--wheel-dir={tmp_path}", checkout], check=True)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", f"--target={tmp_path / 'site'}", wheel], check=True)
    modules = [name for name in SOURCES if room(name)]
    script = f"import importlib\nfor name in {modules}: print(importlib.import_module(name).__file__)\n"
    script += "from gpt2_ddp.evaluation import reference\nassert reference.read_references(); print(reference.FILE)"
    env = environment() | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {Path(line).is_relative_to(tmp_path / "site") for line in done.stdout.splitlines()} == {True}
    command = [sys.executable, "-m", "gpt2_ddp.train", "--max-steps=0"]
    refused = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--max-steps 0 must be at least 1" in refused.stderr


def test_importing_does_nothing() -> None:
    command = [sys.executable, "-B", "-c", IMPORT_TWICE, *SOURCES]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert {f.name: length for f in functions if (length := f.end_lineno - f.lineno + 1) > 50} == {}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_source_keeps_to_the_rules(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text())
    assert ast.get_docstring(tree) or not tree.body, "a module says what it is"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: a global is mutated"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            banned = {"save"} if module == FOREIGN_PICKLES else {"load", "save"}
            assert node.value.id != "torch" or node.attr not in banned, "no pickle"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in map(ast.unparse, node.keywords), "a pickle that may run code"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "dill", "cloudpickle", "joblib"}, "no pickle"
    for node in filter(is_dataclass, ast.walk(tree)):
        keywords = itertools.chain.from_iterable(getattr(d, "keywords", []) for d in node.decorator_list)
        chosen = {keyword.arg for keyword in keywords}
        assert "frozen" not in chosen or "kw_only" in chosen, f"{node.name}: the fields of a value go by name"


def is_dataclass(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)
