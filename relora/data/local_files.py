"""Which local files a source names, and what is cheaply seen to be wrong with them."""

import difflib
import glob
import os
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, get_data_patterns

from relora.config.schema import DataSection, SourceSection

STDLIB = "python-stdlib"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def stdlib_files() -> tuple[Path, ...]:
    """Every non-empty *.py of the standard library but its tests and what was installed, sorted."""
    folder = stdlib_folder()
    return tuple(
        path
        for path in sorted(folder.rglob("*.py"))
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts) and path.stat().st_size
    )


def stdlib_texts() -> list[str]:
    """The text of each file, read in the encoding that it declares (PEP 263)."""
    texts = []
    for path in stdlib_files():
        with tokenize.open(path) as file:
            texts.append(file.read())
    return texts


READERS = {  # file extension -> module of datasets.load_dataset
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}
COMPRESSIONS = (".gz", ".zst")
# datasets keeps a document in one Arrow string, whose offsets are 32 bits wide.
LONGEST_DOCUMENT_BYTES = 2**31 - 1


@dataclass(frozen=True)
class LocalFiles:
    """The files of one source: their reader and, by split, their sorted paths (none empty)."""

    reader: str
    by_split: dict[str, tuple[Path, ...]]
    num_empty: int

    def of_splits(self, names: Iterable[str]) -> tuple[Path, ...]:
        return tuple(path for name in names for path in self.by_split[name])


def reader_of(path: Path) -> str | None:
    """The module of `datasets` that reads this file, None where none of ours does."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    reader = READERS.get(suffixes[-1]) if suffixes else None
    return None if reader == "parquet" and path.suffix != ".parquet" else reader


def split_names(split: str) -> list[str]:
    """The splits that an expression of datasets reads: "train[:10%]+test" -> ["train", "test"]."""
    return [re.split(r"\[", part.strip())[0] for part in split.split("+")]


def is_local(path: str) -> bool:
    """Whether a source's path means files here; what cannot be told from a hub id is one unless it exists."""
    name = Path(path).expanduser()
    looks_like_files = glob.has_magic(path) or path.startswith((".", "/", "~")) or reader_of(name) is not None
    return looks_like_files or name.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)


def problems(data: DataSection) -> list[str]:
    """One line for each source that can be seen to be wrong without reading it."""
    found = []
    for number, source in enumerate(data.sources):
        try:
            check_source(source)
        except ValueError as problem:
            found.append(f"data.sources[{number}].path = {source.path!r}: {problem}")
    return found


def check_source(source: SourceSection) -> None:
    """Raise ValueError with the reason if this source's files cannot be what is wanted."""
    if source.path == STDLIB:
        if not stdlib_files():
            raise ValueError("this Python came without its sources (*.py)")
        if source.split != "train":
            raise ValueError(f"it has only the split 'train', not {source.split!r}")
    elif is_local(source.path) and not is_configured_folder(source):
        find_files(source)


def is_configured_folder(source: SourceSection) -> bool:
    """A folder together with `name` is a data set of datasets.load_dataset's own making."""
    return source.name is not None and Path(source.path).expanduser().is_dir()


def find_files(source: SourceSection) -> LocalFiles:
    """The local files of a source. Raises ValueError with the reason if they cannot be read."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = files_of_folder(path)
    elif path.exists():
        found = {"train": [path]}
    elif glob.has_magic(source.path):
        found = {"train": files_of_glob(path)}
    else:
        raise ValueError(f"no such file or folder{nearest_name(path)}")
    return wanted_files(found, source.split)


def wanted_files(found: dict[str, list[Path]], split: str) -> LocalFiles:
    check_split(split, sorted(found))
    everything = [path for paths in found.values() for path in paths]
    reader = common_reader(everything)
    full = {name: tuple(p for p in paths if p.stat().st_size) for name, paths in found.items()}
    wanted = [path for name in split_names(split) for path in full[name]]
    if not wanted:
        raise ValueError("empty: its files hold no bytes")
    check_readable(wanted)
    check_length(wanted, reader)
    return LocalFiles(reader, full, len(everything) - sum(map(len, full.values())))


def files_of_folder(folder: Path) -> dict[str, list[Path]]:
    """Split -> files, by the rule of datasets (train/, test-*.jsonl, ...); else all of them are 'train'."""
    known = [path for path in visible_files(folder) if reader_of(path)]
    if not known:
        seen = sorted({path.suffix or path.name for path in visible_files(folder)})
        raise ValueError(f"folder without {known_extensions()} files" + (f"; it holds {seen[:5]}" if seen else ""))
    base = glob.escape(folder.resolve().as_posix())
    patterns = get_data_patterns(base)
    if list(patterns) == ["train"] and patterns["train"] == ["**"]:
        return {"train": known}
    by_name = DataFilesDict.from_local_or_remote(patterns, base_path=base)
    by_split = {split: {Path(file).resolve() for file in files} for split, files in by_name.items()}
    splits = {split: [p for p in known if p.resolve() in files] for split, files in by_split.items()}
    splits = {split: files for split, files in splits.items() if files}
    check_all_placed(known, splits)
    return splits


def check_all_placed(known: Sequence[Path], splits: dict[str, list[Path]]) -> None:
    placed = {path for files in splits.values() for path in files}
    homeless = [path for path in known if path not in placed]
    if homeless:
        raise ValueError(
            f"datasets finds the splits {sorted(splits)} by file name, and {len(homeless)} files belong to none "
            f"(such as {homeless[0].name}); choose the files with a glob"
        )


def visible_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )


def files_of_glob(pattern: Path) -> list[Path]:
    matches = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))  # noqa: PTH207  # Path.glob takes no absolute ones
    files = [path for path in matches if path.is_file()]
    if not files:
        raise ValueError("no file matches this pattern")
    return files


def common_reader(files: Sequence[Path]) -> str:
    unknown = [path for path in files if reader_of(path) is None]
    if unknown:
        raise ValueError(f"unknown extension of {unknown[0].name}; known are {known_extensions()}")
    if any(path.suffix == ".zst" for path in files) and not datasets.config.ZSTANDARD_AVAILABLE:
        raise ValueError(".zst files need the package zstandard (pip install zstandard)")
    kinds = Counter(str(reader_of(path)) for path in files)
    if len(kinds) > 1:
        raise ValueError(f"files of several kinds {dict(sorted(kinds.items()))}; choose one with a glob such as *.txt")
    return next(iter(kinds))


def known_extensions() -> str:
    return ", ".join(READERS) + " (all but parquet also with .gz or .zst)"


def check_split(split: str, available: Sequence[str]) -> None:
    unknown = [name for name in split_names(split) if name not in available]
    if unknown:
        raise ValueError(f"split = {split!r}, but its files hold only {list(available)}")


def check_readable(files: Sequence[Path]) -> None:
    for path in files:
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} may not be read (permission denied)")


def check_length(files: Sequence[Path], reader: str) -> None:
    for path in files if reader == "text" else ():
        if path.stat().st_size > LONGEST_DOCUMENT_BYTES:
            raise ValueError(
                f"a text file is one document and may not exceed 2 GiB, {path.name} has "
                f"{path.stat().st_size / 2**30:.1f} GiB; split it, or use jsonl with a document a line"
            )


def nearest_name(path: Path) -> str:
    """The entry of the same folder with the most similar name, as the end of a sentence."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; nearest is {close[0]!r}" if close else ""
