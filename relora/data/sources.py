"""Kinds of sources: an entry of `data.sources` -> a `datasets.Dataset` with one column `text`.

A kind of your own is a subclass of `Source`, or a function from the section to one, named in the configuration by
`path: module:attribute`.
"""

import difflib
import glob
import os
import platform
import re
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetsError

from relora.config.input_sections import DataSection, SourceSection
from relora.data.local_files import files_identity, find_files, is_local, split_names
from relora.data.readers import first_fault, read_files
from relora.errors import DISK_ERRORS, raise_if_any
from relora.files import sha256_of_json
from relora.hub import unreachable
from relora.method.registry import CUSTOM, resolve

TEXT = "text"
# Raised by reading files or asking the hub; bugs (TypeError, KeyError, ...) pass through.
READING_ERRORS = (DatasetsError, ValueError, OSError, pa.ArrowException)


class Source(ABC):
    """The documents of one entry of `data.sources`."""

    def __init__(self, section: SourceSection) -> None:
        self.section = section

    def problems(self) -> list[str]:
        """Mistakes that can be seen without reading the documents, such as a missing file."""
        return []

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that decides the documents of `load`, as JSON: prepared data are reused while it is the same.

        Raises:
            ValueError: it cannot be found out, with the reason.
        """

    @abstractmethod
    def load(self, text_field: str, num_proc: int) -> Dataset:
        """The documents in their order, in one column `text`; null where a row has no text.

        Args:
            text_field: the column that holds the text, `data.text_field`.
            num_proc: how many processes may read.

        Raises:
            ValueError: they cannot be read, with the reason.
        """


class StdlibSource(Source):
    """`python-stdlib`: every *.py file of Python's standard library but its tests, one document each."""

    excluded = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
    folder = Path(sysconfig.get_path("stdlib"))

    def problems(self) -> list[str]:
        problems = [] if self.files else ["this Python came without its sources (*.py)"]
        if self.section.split != "train":
            problems.append(f"it has only the split 'train', not {self.section.split!r}")
        return problems

    def identity(self) -> dict[str, Any]:
        return {"python": platform.python_version(), **files_identity(self.files, self.folder)}

    def load(self, text_field: str, num_proc: int) -> Dataset:  # noqa: ARG002  # files of code have no columns
        texts = []
        for path in self.files:
            with tokenize.open(path) as file:  # in the encoding that the file declares (PEP 263)
                texts.append(file.read())
        return Dataset.from_dict({TEXT: texts})

    @cached_property
    def files(self) -> list[Path]:
        """The files that are not empty, sorted."""
        return [
            path
            for path in sorted(self.folder.rglob("*.py"))
            if self.excluded.isdisjoint(path.relative_to(self.folder).parts) and path.stat().st_size
        ]


class LocalFilesSource(Source):
    """A file, a folder or a glob of parquet, arrow, json, jsonl, csv, tsv or text files."""

    def __init__(self, section: SourceSection) -> None:
        super().__init__(section)
        self.files, self._problems = find_files(section)

    def problems(self) -> list[str]:
        return self._problems

    def identity(self) -> dict[str, Any]:
        files = self.files
        assert files is not None, self._problems
        paths = files.of_splits(dict.fromkeys(split_names(self.section.split)))
        root = Path(os.path.commonpath([path.parent.absolute() for path in paths]))
        return {
            "reader": files.reader,
            "split": self.section.split,
            **files_identity(paths, root),
        }

    def load(self, text_field: str, num_proc: int) -> Dataset:
        files = self.files
        assert files is not None, self._problems
        wanted = {
            name: [glob.escape(str(path.absolute())) for path in files.by_split[name]]
            for name in split_names(self.section.split)
        }
        column = TEXT if files.reader == "text" else text_field
        processes = min(num_proc, *map(len, wanted.values()))
        try:
            loaded = read_files(
                files.reader,
                wanted,
                split=self.section.split,
                column=column,
                cache=cache_of({**self.identity(), "column": column}),
                num_proc=processes if processes > 1 else None,
            )
        except READING_ERRORS as error:
            raise_for_cache(error, wanted_files=files.of_splits(wanted))
            fault = first_fault(files.of_splits(wanted), files.reader)
            named = f"{fault}: " if fault else ""
            raise ValueError(f"{named}not readable as {files.reader}: {root_cause(error)}") from error
        return text_column(loaded, column)


class HubSource(Source):
    """A dataset of the Hugging Face hub, or a local folder with a configuration (`name`) of its own."""

    def __init__(self, section: SourceSection) -> None:
        super().__init__(section)
        self.is_folder = is_local(section.path)
        self.path = str(Path(section.path).expanduser()) if self.is_folder else section.path

    def identity(self) -> dict[str, Any]:
        # The builder knows its configuration and the commit (hash) without loading; of a folder, times of change.
        builder = self._ask(datasets.load_dataset_builder)
        return self._content | {
            "path": self.section.path,
            "split": self.section.split,
            "config": builder.config_id,
            "hash": builder.hash,
        }

    def load(self, text_field: str, num_proc: int) -> Dataset:
        loaded = self._ask(datasets.load_dataset, split=self.section.split, num_proc=num_proc)
        return text_column(loaded, text_field)

    @cached_property
    def _content(self) -> dict[str, Any]:
        """What a local folder holds; nothing for a dataset of the hub. Raises OSError if a file cannot be read."""
        if not self.is_folder:
            return {}
        folder = Path(self.path).absolute()
        return files_identity([path for path in sorted(folder.rglob("*")) if path.is_file()], folder)

    def _ask(self, function: Callable[..., Any], **keys: Any) -> Any:
        """Call a loader of `datasets` for this source; ValueError with the reason if it fails."""
        try:
            if self.is_folder:
                keys["cache_dir"] = str(cache_of(self._content))
            return function(self.path, self.section.name, revision=self.section.revision, **keys)
        except READING_ERRORS as error:
            raise_for_cache(error)
            where = "" if self.is_folder else "no such file or folder here, and the hub gave no such dataset: "
            raise ValueError(f"{where}{unreachable(error) or root_cause(error)}") from error


# Paths that name a kind of source. Others are local files or hub ids.
SOURCES: Mapping[str, Callable[[SourceSection], Source]] = {"python-stdlib": StdlibSource}


def find_source(section: SourceSection, key: str) -> tuple[Source | None, list[str]]:
    """The source that a section describes, or None and why a user's own kind cannot be used.

    Args:
        key: the section's place in the configuration, such as `data.sources[0]`.
    """
    if section.path in SOURCES:
        return SOURCES[section.path](section), []
    if is_custom(section):
        return _custom_source(section, f"{key}.path")
    has_configuration = section.name is not None and Path(section.path).expanduser().is_dir()
    if is_local(section.path) and not has_configuration:
        return LocalFilesSource(section), []
    return HubSource(section), []


def _custom_source(section: SourceSection, key: str) -> tuple[Source | None, list[str]]:
    """The source that a user's class or function makes of the section, or None and the problem."""
    try:
        source = resolve(key, section.path, SOURCES)(section)
    except ValueError as error:
        reason = str(error)
        return None, [reason if reason.startswith(key) else f"{key} = {section.path}: {reason}"]
    except Exception as error:  # a user's own code may raise anything
        return None, [f"{key} = {section.path}: {root_cause(error)}"]
    if not isinstance(source, Source):
        return None, [f"{key} = {section.path}: must make a relora.data.sources.Source, not a {type(source).__name__}"]
    return source, []


def find_sources(data: DataSection) -> tuple[list[Source], list[str]]:
    """The sources in their order, and all that can be seen to be wrong with them without reading the documents."""
    sources, problems = [], []
    for number, section in enumerate(data.sources):
        key = f"data.sources[{number}]"
        source, found = find_source(section, key)
        problems += found
        if source is not None:
            sources.append(source)
            problems += [f"{key}.path = {section.path!r}: {problem}" for problem in source.problems()]
    return sources, problems


def problems(data: DataSection) -> list[str]:
    """One line for each source that can be seen to be wrong without reading its documents."""
    return find_sources(data)[1]


def load_sources(sources: Sequence[Source], text_field: str, num_proc: int) -> list[Dataset]:
    """One dataset per source, in their order. Raises UserError with the problems of all of them."""
    loaded, problems = [], []
    for number, source in enumerate(sources):
        try:
            loaded.append(text_column(source.load(text_field, num_proc), TEXT))
        except READING_ERRORS as error:
            problems.append(f"data.sources[{number}].path = {source.section.path!r}: {error}")
    raise_if_any(problems)
    return loaded


def is_custom(section: SourceSection) -> bool:
    """Whether the path is `module:attribute`, and not the name of a file."""
    return re.fullmatch(CUSTOM, section.path) is not None and not Path(section.path).exists()


def text_column(loaded: Dataset, column: str) -> Dataset:
    """One column of a dataset under the name `text`. Raises ValueError if it is missing or holds no strings."""
    if not isinstance(loaded, Dataset):
        raise ValueError(f"must give a datasets.Dataset, not a {type(loaded).__name__}")
    if column not in loaded.column_names:
        close = difflib.get_close_matches(column, loaded.column_names, n=1)
        hint = f"; nearest is {close[0]!r}" if close else ""
        raise ValueError(f"data.text_field = {column!r}: it has only the columns {loaded.column_names}{hint}")
    if loaded.num_rows == 0 or loaded.data.column(column).null_count == loaded.num_rows:
        raise ValueError(f"no documents ({loaded.num_rows} rows, all without a text)")
    feature = loaded.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"data.text_field = {column!r}: it holds {feature} there, not strings")
    texts = loaded.select_columns([column])
    return texts if column == TEXT else texts.rename_column(column, TEXT)


def cache_of(content: dict[str, Any]) -> Path:
    """A folder for what `datasets` makes of files of this content.

    It knows a file by its name and time of change, and would take what it made of another one; here it finds no other.
    """
    return Path(datasets.config.HF_DATASETS_CACHE) / "relora" / sha256_of_json(content)[:20]


def root_cause(error: BaseException) -> str:
    """The type and the first line of the error that all the others wrap, in another process too."""
    while error.__cause__ is not None and type(error.__cause__).__name__ != "RemoteTraceback":
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def raise_for_cache(error: BaseException, wanted_files: Sequence[Path] = ()) -> None:
    """Raise ValueError if behind `error`, which datasets raised, is a cache that cannot be written to.

    Args:
        wanted_files: the source's own files, which are only read.
    """
    own, cache = {path.absolute() for path in wanted_files}, Path(datasets.config.HF_DATASETS_CACHE)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            path = Path(os.fsdecode(cause.filename or ""))
            if path in (cache, *cache.parents) or (cause.errno in DISK_ERRORS and path not in own):
                raise ValueError(
                    f"datasets cannot write to its cache {str(cache)!r} ({os.strerror(cause.errno)}); the variable "
                    "HF_DATASETS_CACHE or HF_HOME chooses another folder"
                ) from error
        cause = cause.__cause__ or cause.__context__
