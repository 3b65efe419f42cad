"""A source of the configuration -> a `datasets.Dataset` with one column `text`."""

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetsError

from relora.config.schema import DataSection, SourceSection
from relora.data.local_files import (
    STDLIB,
    LocalFiles,
    find_files,
    is_configured_folder,
    is_local,
    split_names,
    stdlib_texts,
)
from relora.errors import UserError, raise_if_any

TEXT = "text"
# What reading someone's files or asking the hub raises; bugs (TypeError, KeyError, ...) pass through.
READING_ERRORS = (DatasetsError, ValueError, OSError, pa.ArrowException)


def load_sources(data: DataSection, num_proc: int) -> list[Dataset]:
    """One data set per source, in their order. Raises UserError with the problems of all of them."""
    loaded, problems = [], []
    for number, source in enumerate(data.sources):
        try:
            loaded.append(load_source(source, f"data.sources[{number}]", data.text_field, num_proc))
        except UserError as error:
            problems += error.problems
    raise_if_any(problems)
    return loaded


def load_source(source: SourceSection, key: str, text_field: str, num_proc: int) -> Dataset:
    """The documents of one source in one column `text`, some perhaps null."""
    if source.path == STDLIB:
        return Dataset.from_dict({TEXT: stdlib_texts()})
    if not is_local(source.path) or is_configured_folder(source):
        return only_text(load_hub(source, key, num_proc), source, key, text_field)
    files = find_files(source)
    column = TEXT if files.reader == "text" else text_field
    return only_text(load_files(files, source, key, num_proc), source, key, column)


def load_hub(source: SourceSection, key: str, num_proc: int) -> Dataset:
    path = str(Path(source.path).expanduser()) if is_local(source.path) else source.path
    try:
        return datasets.load_dataset(path, source.name, split=source.split, revision=source.revision, num_proc=num_proc)
    except READING_ERRORS as error:
        where = "" if is_local(source.path) else "no such file or folder here, and the hub gave no such data set: "
        raise UserError([f"{key}.path = {source.path!r}: {where}{root_cause(error)}"]) from error


def load_files(files: LocalFiles, source: SourceSection, key: str, num_proc: int) -> Dataset:
    wanted = {
        name: [glob.escape(str(path.absolute())) for path in files.by_split[name]] for name in split_names(source.split)
    }
    options = {"sample_by": "document"} if files.reader == "text" else {}
    processes = min(num_proc, *map(len, wanted.values()))
    try:
        return datasets.load_dataset(
            files.reader,
            data_files=wanted,
            split=source.split,
            num_proc=processes if processes > 1 else None,
            **options,
        )
    except READING_ERRORS as error:
        culprit = broken_file(files.of_splits(wanted), files.reader)
        named = f"{culprit}: " if culprit else ""
        raise UserError(
            [f"{key}.path = {source.path!r}: {named}not readable as {files.reader}: {root_cause(error)}"]
        ) from error


def broken_file(files: Sequence[Path], reader: str) -> Path | None:
    """The file that makes reading fail, None if its beginning does not show it."""
    if len(files) == 1:
        return files[0]
    for path in files:
        try:
            stream = datasets.load_dataset(
                reader, data_files=[glob.escape(str(path.absolute()))], split="train", streaming=True
            )
            next(iter(stream))
        except StopIteration:
            continue
        except READING_ERRORS:
            return path
    return None


def root_cause(error: BaseException) -> str:
    """The first line of the error that all the others wrap."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def only_text(loaded: Dataset, source: SourceSection, key: str, column: str) -> Dataset:
    """The column of texts alone, under the name `text`, as strings. Raises UserError if there is none."""
    if column not in loaded.column_names:
        close = difflib.get_close_matches(column, loaded.column_names, n=1)
        hint = f"; nearest is {close[0]!r}" if close else ""
        raise UserError(
            [f"data.text_field = {column!r}: {key} ({source.path}) has only the columns {loaded.column_names}{hint}"]
        )
    if loaded.num_rows == 0 or loaded.data.column(column).null_count == loaded.num_rows:
        raise UserError([f"{key}.path = {source.path!r}: no documents ({loaded.num_rows} rows, all without a text)"])
    feature = loaded.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise UserError([f"data.text_field = {column!r}: {key} ({source.path}) holds {feature} there, not strings"])
    texts = loaded.select_columns([column])
    return texts if column == TEXT else texts.rename_column(column, TEXT)
