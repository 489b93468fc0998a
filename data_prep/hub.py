"""Data sets through the `datasets` library: from the Hugging Face hub, its cache, or a local directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from gpt2_ddp.data.manifest import Manifest
from gpt2_ddp.system.errors import UserError, user_error
from gpt2_ddp.system.files import replace_file

from .formats import require_text
from .sources import DatasetRows, DatasetStream, Source

NETWORK_SECONDS = 10.0
PARQUET_COPY = "refs/convert/parquet"
"""The branch where the hub keeps data sets that came in another form as Parquet files, a folder a configuration."""
COMMIT = re.compile("[0-9a-f]{40}")
LOG_IN = "give your token by HF_TOKEN, or by `hf auth login`"


def hub_source(
    name: str,
    *,
    config: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
    text_field: str,
    begun: Manifest | None = None,
) -> Source:
    """The column `text_field` of a data set.

    Where `begun` is of the same data set, its version is read on, whatever the newest is by now; without anything that
    the network must tell where it is complete. The version of the Parquet copy has its branch before an `@`.

    Raises:
        UserError: where the data set, its split or its column is not there, the hub cannot be reached, or `revision` is
            another version than that of `begun`.
    """
    parts = [name, config, split, f"field {text_field}", "streamed" if streaming else None]
    title = ", ".join(part for part in parts if part)
    is_directory = Path(name).is_dir()
    same = begun if begun and begun.source == title and not is_directory else None
    had = same.revision if same else ""
    branch, _, commit = had.rpartition("@")
    goes_on = same is not None and revision in (None, commit, branch)
    if same and same.complete and goes_on:
        return DatasetRows(name=title, revision=had, rows=None, field=text_field)
    is_copy = PARQUET_COPY in (revision, branch if goes_on else None)
    asked = resolved_revision(name, (commit or None) if goes_on else revision)
    folder = _copied_folder(name, config, split, asked) if is_copy else None
    builder = opened(name, config=None if folder else config, revision=asked, folder=folder)
    version = asked if is_directory else f"{PARQUET_COPY}@{builder.hash}" if is_copy else str(builder.hash)
    if had and version != had:
        if not (is_copy and builder.hash == had):  # as it was written before the branch was
            raise UserError(
                f"{name}: --out was prepared with version {had}, and --revision {revision} is {version}; leave it "
                f"out or give --revision {branch or had} to go on, or choose another --out"
            )
        version = had
    data = rows(builder, name, split=split, streaming=streaming)
    if data.features:
        require_text(data.features.arrow_schema, text_field, name)
    column = data.select_columns([text_field])
    if streaming:
        return DatasetStream(name=title, revision=version, stream=column, field=text_field)
    return DatasetRows(name=title, revision=version, rows=column, field=text_field)


def _copied_folder(name: str, config: str | None, split: str, revision: str) -> str | None:
    """The folder of `config`, or of the only configuration, in the hub's Parquet copy of a data set, or a directory as
    that is; `config` for a directory without folders.

    Raises:
        UserError: where several are there and none is named, or another; and without a network, where the library does
            not find again what it has in its cache of a folder.
    """
    is_directory = Path(name).is_dir()
    if huggingface_hub.constants.HF_HUB_OFFLINE and not is_directory:
        raise UserError(f"{name}: its Parquet copy is read with a network only, whatever the cache holds of it")
    found = _folders(name, revision, "")
    if is_directory and not found:
        return config
    if config not in found and not (config is None and len(found) == 1):
        raise UserError(f"{name}: its Parquet copy has {', '.join(found)}: choose one by --config")
    chosen = config or found[0]
    partial = [folder for folder in _folders(name, revision, chosen) if folder.startswith("partial-")]
    if any(folder.removeprefix("partial-") in split for folder in partial):
        print(f"{name}: its Parquet copy holds only the first part of {chosen}, in {', '.join(partial)}")
    return chosen


def _folders(name: str, revision: str, path: str) -> list[str]:
    """The names of the folders in a folder of a data set."""
    if Path(name).is_dir():
        return sorted(entry.name for entry in (Path(name) / path).iterdir() if entry.is_dir())
    with _one_line(name):
        tree = huggingface_hub.HfApi().list_repo_tree(name, path or None, revision=revision, repo_type="dataset")
        return sorted(Path(entry.path).name for entry in tree if isinstance(entry, huggingface_hub.hf_api.RepoFolder))


def resolved_revision(name: str, revision: str | None) -> str:
    """The commit that `revision` (a branch or tag, `main` by default) names now; of a directory, a digest of its files.

    In the hub's offline mode, nobody knows: `revision`, or "".

    Raises:
        UserError: if the hub cannot be reached or has no such data set.
    """
    if Path(name).is_dir():
        return _directory_digest(Path(name))
    try:
        api = huggingface_hub.HfApi()
        commit = api.dataset_info(name, revision=revision, timeout=NETWORK_SECONDS).sha
    except GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{name}"
        raise UserError(f"{name}: for those only who asked for it on {page}; ask there, then {LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name}: has no --revision {revision}; leave it out or choose another, and where --out was begun with it, "
            "another --out"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name}: not on the hub, or private; look at the name, or {LOG_IN}") from error
    except OfflineModeIsEnabled:  # the user says that the data set is in the cache
        return revision or ""
    except huggingface_hub.errors.HFValidationError as error:
        raise UserError(f"{name}: neither a directory here nor a data set's name: {error}") from error
    except Exception as error:  # which network library fails, and how, depends on huggingface_hub's version
        raise UserError(
            f"{name}: no network to the Hugging Face hub ({type(error).__name__}: {error}); run this where there is "
            "one, with HF_HUB_OFFLINE=1 if the data set is in the cache, or give a directory of its files"
        ) from error
    return str(commit)


def opened(name: str, *, config: str | None, revision: str, folder: str | None = None) -> Any:
    """The datasets.DatasetBuilder, whose `hash` is the commit; of `folder` in the data set alone, if given.

    Raises:
        UserError: for whatever the library cannot find or read, in one line; and where it takes another commit than
            `revision`: without a network it takes the newest that is in its cache.
    """
    is_directory = Path(name).is_dir()
    if (Path(name) / datasets.config.DATASET_STATE_JSON_FILENAME).exists():
        raise UserError(f"{name}: written by save_to_disk; write it by to_parquet, and give that file")
    with _one_line(name):
        asked = None if is_directory else revision or None
        builder = datasets.load_dataset_builder(name, config, data_dir=folder, revision=asked)
    if asked and COMMIT.fullmatch(asked) and builder.hash != asked:
        raise UserError(
            f"{name}: the newest copy in Hugging Face's cache is version {builder.hash}, not {asked}; run this where "
            "there is a network"
        )
    return builder


def rows(builder: Any, name: str, *, split: str, streaming: bool = False) -> Any:
    """The datasets.Dataset, downloaded, or IterableDataset if `streaming`. Raises as `opened`."""
    with _one_line(name):
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def write_hellaswag(name: str, *, split: str, revision: str | None, path: Path) -> int:
    """HellaSwag's examples as JSON lines; the number of them. The file appears when it is whole.

    Raises:
        UserError: for an example that is not as in HellaSwag, for another file at `path`, and as `opened`.
    """
    data = rows(opened(name, config=None, revision=resolved_revision(name, revision)), name, split=split)
    lines = [json.dumps(_hellaswag_example(row, f"{name}, row {number}")) for number, row in enumerate(data)]
    contents = "".join(f"{line}\n" for line in lines).encode()
    if path.is_file() and path.read_bytes() != contents:
        raise UserError(f"{path} is there with other contents; choose another --out, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, contents)
    return len(lines)


def _hellaswag_example(row: dict[str, Any], where: str) -> dict[str, Any]:
    texts = ("activity_label", "ctx_a", "ctx_b", "ctx", "source_id")
    missing = [field for field in (*texts, "ind", "endings", "label") if field not in row]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}; is this HellaSwag?")
    if str(row["label"]) not in ("0", "1", "2", "3") or len(row["endings"]) != 4:
        raise UserError(
            f"{where}: label {row['label']!r} of {len(row['endings'])} endings; the test split has no labels"
        )
    return {
        "ind": row["ind"],
        **{field: row[field] for field in texts[:4]},
        "endings": list(row["endings"]),
        "label": int(row["label"]),
        "source_id": row["source_id"],
    }


def _directory_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(os.fsencode(f"{path.relative_to(directory)}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Whatever the `datasets` library, or one of the libraries that it reads and downloads with, ends with."""
    try:
        yield
    except Exception as error:
        if user_error(error) and isinstance(error, OSError):  # the file system's refusal names the file
            raise
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        told = ": ".join(" ".join(str(part).split()) or type(part).__name__ for part in (error, cause) if part)
        raise UserError(f"{name}: {told}{_mend(name, told)}") from error


def _mend(name: str, told: str) -> str:
    """What the library's own words leave open."""
    if "script" in told or "custom code" in told:
        owner = "OWNER/NAME" if Path(name).is_dir() else name
        return (
            " (a program that makes the data set, and is not run). Take the Parquet copy that the hub keeps: python -m "
            f"data_prep hub {owner} --revision {PARQUET_COPY} --config C, or a folder of Parquet files"
        )
    if "datasets dtype equivalent" in told:
        return "; python -m data_prep text reads Parquet files with columns of any type"
    return ""
