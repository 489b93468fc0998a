"""Data sets through the `datasets` library: from the Hugging Face hub, its cache, or a local directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from gpt2_ddp.system.errors import UserError, user_error
from gpt2_ddp.system.files import replace_file

from .formats import require_text
from .sources import DatasetRows, DatasetStream, Source

NETWORK_SECONDS = 10.0
PARQUET_COPY = "refs/convert/parquet"
"""The branch where the hub keeps data sets that came in another form as Parquet files, a folder a configuration."""
LOG_IN = "give your token by HF_TOKEN, or by `hf auth login`"


def hub_source(
    name: str, *, config: str | None, split: str, revision: str | None, streaming: bool, text_field: str
) -> Source:
    """The column `text_field` of a data set.

    Raises:
        UserError: where the data set, its split or its column is not there, or the hub cannot be reached.
    """
    folder = config if revision == PARQUET_COPY else None
    revision = resolved_revision(name, revision)
    chosen = None if folder else config
    data = load(name, config=chosen, split=split, revision=revision, streaming=streaming, folder=folder)
    if data.features:
        require_text(data.features.arrow_schema, text_field, name)
    parts = [name, config, split, f"field {text_field}", "streamed" if streaming else None]
    title = ", ".join(part for part in parts if part)
    column = data.select_columns([text_field])
    if streaming:
        return DatasetStream(name=title, revision=revision, stream=column, field=text_field)
    return DatasetRows(name=title, revision=revision, rows=column, field=text_field)


def resolved_revision(name: str, revision: str | None) -> str:
    """The commit that `revision` (a branch or tag, `main` by default) names now; of a directory, a digest of its files.

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
        raise UserError(f"{name}: has no --revision {revision}; leave it out, or choose another") from error
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


def load(
    name: str,
    *,
    config: str | None,
    split: str,
    revision: str,
    streaming: bool = False,
    folder: str | None = None,
) -> Any:
    """The datasets.Dataset, or IterableDataset if `streaming`; of `folder` in it alone, if given.

    Raises:
        UserError: for whatever the library cannot find or read, in one line.
    """
    local = Path(name).is_dir()
    with _one_line(name):
        return datasets.load_dataset(
            name,
            config,
            split=split,
            data_dir=folder,
            revision=None if local else revision or None,
            streaming=streaming,
        )


def write_hellaswag(name: str, *, split: str, revision: str | None, path: Path) -> int:
    """HellaSwag's examples as JSON lines; the number of them. The file appears when it is whole.

    Raises:
        UserError: for an example that is not as in HellaSwag, and as `load`.
    """
    data = load(name, config=None, split=split, revision=resolved_revision(name, revision))
    lines = [json.dumps(_hellaswag_example(row, f"{name}, row {number}")) for number, row in enumerate(data)]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(f"{line}\n" for line in lines))
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
            f"data_prep hub {owner} --revision {PARQUET_COPY}, or a folder of Parquet files"
        )
    if "datasets dtype equivalent" in told:
        return "; python -m data_prep text reads Parquet files with columns of any type"
    return ""
