"""What prepared data are made from, and so where they are kept."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from relora.config.schema import DataSection, SourceSection
from relora.data.local_files import (
    STDLIB,
    find_files,
    is_configured_folder,
    is_local,
    split_names,
    stdlib_files,
    stdlib_folder,
)
from relora.data.local_files import (
    problems as file_problems,
)
from relora.data.manifest import FORMAT_VERSION
from relora.data.sources import READING_ERRORS, root_cause
from relora.data.tokenizer import check_trainable, check_vocabulary, load_tokenizer, tokenizer_hash
from relora.errors import UserError, raise_if_any

Recipe = dict[str, Any]


def checked_tokenizer(
    data: DataSection, *, vocab_size: int, tokenizer: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """The given tokenizer, None if one is to be trained. Raises UserError: all that is wrong with it and the files."""
    problems = file_problems(data)
    given = None
    try:
        if tokenizer is not None:
            key = "model.name_or_path" if data.tokenizer is None else "data.tokenizer"
            given = load_tokenizer(tokenizer, key=key, trust_remote_code=trust_remote_code)
            problems += check_vocabulary(f"{key} = {tokenizer!r}", given, vocab_size)
        else:
            problems += check_trainable(vocab_size)
    except UserError as error:
        problems += error.problems
    raise_if_any(problems)
    return given


def recipe_of(data: DataSection, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> Recipe:
    """All that decides which tokens come out, and nothing else. Raises UserError if a hub data set is out of reach."""
    return {
        "format_version": FORMAT_VERSION,
        "text_field": data.text_field,
        "eval_fraction": data.eval_fraction,
        "tokenizer": f"byte-level BPE of {vocab_size}" if tokenizer is None else tokenizer_hash(tokenizer),
        "sources": [identity(source, f"data.sources[{k}]") for k, source in enumerate(data.sources)],
    }


def identity(source: SourceSection, key: str) -> Recipe:
    if source.path == STDLIB:
        files = stdlib_files()
        return {
            "python": platform.python_version(),
            **files_identity(files, stdlib_folder(), with_mtime=False),
        }
    if not is_local(source.path) or is_configured_folder(source):
        return hub_identity(source, key)
    found = find_files(source)
    files = found.of_splits(dict.fromkeys(split_names(source.split)))
    root = Path(os.path.commonpath([path.parent.absolute() for path in files]))
    return {"reader": found.reader, "split": source.split, **files_identity(files, root, with_mtime=True)}


def files_identity(files: Sequence[Path], root: Path, *, with_mtime: bool) -> Recipe:
    """Names below root, sizes and times of change; not where root is, so that a folder may be mounted elsewhere."""
    lines = []
    for path in files:
        stat = path.stat()
        name = path.absolute().relative_to(root).as_posix()
        lines.append([name, stat.st_size, stat.st_mtime_ns if with_mtime else None])
    return {"num_files": len(files), "bytes": sum(line[1] for line in lines), "files": digest(lines)}


def hub_identity(source: SourceSection, key: str) -> Recipe:
    """The commit (hash) and the configuration, which `datasets` finds out without loading the data."""
    path = str(Path(source.path).expanduser()) if is_local(source.path) else source.path
    try:
        builder = datasets.load_dataset_builder(path, source.name, revision=source.revision)
    except READING_ERRORS as error:
        where = "" if is_local(source.path) else "no such file or folder here, and the hub gave no such data set: "
        raise UserError([f"{key}.path = {source.path!r}: {where}{root_cause(error)}"]) from error
    return {"path": source.path, "split": source.split, "config": builder.config_id, "hash": builder.hash}


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_of(data: DataSection, recipe: Recipe) -> Path:
    """prepared_dir, or a folder of the cache that is named by what the data are made from."""
    if data.prepared_dir is not None:
        return Path(data.prepared_dir).expanduser()
    cache = Path(os.environ.get("RELORA_CACHE") or "~/.cache/relora").expanduser()
    return cache / "prepared" / digest(recipe)[:20]


def check_same(folder: Path, found: Recipe, wanted: Recipe) -> None:
    """Raise UserError naming what differs, if the folder's data were made from something else."""
    changes = list(differences("", found, wanted))
    if changes:
        raise UserError(
            [
                f"data.prepared_dir = {str(folder)!r}: holds data made from something else ({'; '.join(changes[:5])}); "
                "choose another folder or delete this one"
            ]
        )


def differences(key: str, found: Any, wanted: Any) -> Iterator[str]:
    if isinstance(found, list) and isinstance(wanted, list):
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in [*found, *(name for name in wanted if name not in found)]:
            yield from differences(f"{key}.{name}" if key else str(name), found.get(name), wanted.get(name))
    elif found != wanted:
        yield f"{key}: was {found!r}, is {wanted!r}"
