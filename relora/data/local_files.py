"""The local files of a source: which they are, and problems that can be seen without reading them."""

import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesDict, get_data_patterns

from relora.config.input_sections import SourceSection
from relora.data.content import content_hashes
from relora.files import looks_like_a_path, sha256_of_json

READERS = {  # file extension -> reader
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
    ".arrow": "arrow",
}
# Text as well, but what lies beside files of the kinds above in a folder is about them: a README, a licence, a script.
MORE_TEXT = (
    *(".md", ".rst", ".html", ".htm", ".tex", ".log"),
    *(".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".sh"),
)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
UNCOMPRESSED = ("parquet", "arrow")
KNOWN_EXTENSIONS = (
    f"{', '.join(READERS)} and as plain text {', '.join(MORE_TEXT)} (all but .parquet and .arrow also with "
    f"{', '.join(COMPRESSIONS)})"
)
# datasets stores a document in one Arrow string, whose offsets have 32 bits.
MAX_DOCUMENT_BYTES = 2**31 - 1


@dataclass(frozen=True)
class LocalFiles:
    """The files of one source: their reader and, by split, their sorted paths without empty files."""

    reader: str
    by_split: dict[str, tuple[Path, ...]]

    def of_splits(self, names: Iterable[str]) -> tuple[Path, ...]:
        return tuple(path for name in names for path in self.by_split[name])


def is_local(path: str) -> bool:
    """Whether a source's path means local files, and not a data set of the hub."""
    return glob.has_magic(path) or reader_of(Path(path)) is not None or looks_like_a_path(path)


def find_files(source: SourceSection) -> tuple[LocalFiles | None, list[str]]:
    """The local files of a source, or None and the reason why they cannot be read."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        by_split, problems = files_of_folder(path, source.split)
    elif path.exists():
        by_split, problems = {"train": [path]}, []
    elif glob.has_magic(source.path):
        matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207  # Path.glob takes no absolute ones
        by_split = {"train": [match for match in matches if match.is_file()]}
        problems = [] if by_split["train"] else ["no file matches this pattern"]
    else:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        return None, [f"no such file or folder{f'; nearest is {close[0]!r}' if close else ''}"]
    problems = problems or file_problems(by_split, source.split)
    if problems:
        return None, problems
    reader = str(reader_of(next(file for files in by_split.values() for file in files)))
    return LocalFiles(reader, {split: non_empty(files) for split, files in by_split.items()}), []


def files_of_folder(folder: Path, split: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Split -> files, by the naming rule of datasets (train/, test-*.jsonl, ...), else all under 'train'; problems.

    Names such as `libfoo-dev.txt` divide nothing where no file is named `train` and no other split is asked for.
    """
    visible = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )
    known = [path for path in visible if reader_of(path, READERS)] or [path for path in visible if reader_of(path)]
    if not known:
        seen = sorted({path.suffix or path.name for path in visible})
        return {}, [f"folder without {KNOWN_EXTENSIONS} files" + (f"; it holds {seen[:5]}" if seen else "")]
    base = glob.escape(folder.resolve().as_posix())
    patterns = get_data_patterns(base)
    if list(patterns) == ["train"] and patterns["train"] == ["**"]:
        return {"train": known}, []
    by_name = DataFilesDict.from_local_or_remote(patterns, base_path=base)
    in_split = {name: {Path(file).resolve() for file in files} for name, files in by_name.items()}
    by_split = {name: [path for path in known if path.resolve() in files] for name, files in in_split.items()}
    by_split = {str(name): files for name, files in by_split.items() if files}
    if "train" not in by_split and set(split_names(split)) == {"train"}:
        return {"train": known}, []
    outside = [path for path in known if not any(path in files for files in by_split.values())]
    if not outside:
        return by_split, []
    return by_split, [
        f"datasets finds the splits {sorted(by_split)} by file name, and {len(outside)} files belong to none "
        f"(such as {outside[0].name}); choose the files with a glob, such as {folder}/**/*{outside[0].suffix}"
    ]


def file_problems(by_split: dict[str, list[Path]], split: str) -> list[str]:
    """The first problem of the files themselves: their split, their kind, their size, their permissions."""
    unknown = [name for name in split_names(split) if name not in by_split]
    if unknown:
        return [f"split = {split!r}, but its files hold only {sorted(by_split)}"]
    problems = reader_problems([path for paths in by_split.values() for path in paths])
    if problems:
        return problems
    wanted = [path for name in split_names(split) for path in non_empty(by_split[name])]
    if not wanted:
        return ["empty: its files hold no bytes"]
    unreadable = [path for path in wanted if not os.access(path, os.R_OK)]
    if unreadable:
        return [f"{unreadable[0]} may not be read (permission denied)"]
    return length_problems(wanted)


def reader_problems(files: Sequence[Path]) -> list[str]:
    """Why no single reader of `datasets` can read all of these files."""
    unknown = [path for path in files if reader_of(path) is None]
    if unknown:
        return [f"unknown extension of {unknown[0].name}; known are {KNOWN_EXTENSIONS}"]
    if any(path.suffix == ".zst" for path in files) and not datasets.config.ZSTANDARD_AVAILABLE:
        return [".zst files need the package zstandard (pip install zstandard)"]
    kinds = Counter(str(reader_of(path)) for path in files)
    if len(kinds) > 1:
        return [f"files of several kinds {dict(sorted(kinds.items()))}; choose one with a glob such as *.txt"]
    return []


def length_problems(files: Sequence[Path]) -> list[str]:
    """The first text file that is too long for one document."""
    for path in files:
        size = path.stat().st_size
        if reader_of(path) == "text" and size > MAX_DOCUMENT_BYTES:
            return [
                f"a text file is one document and may not exceed 2 GiB, {path.name} has {size / 2**30:.1f} GiB; "
                "split it, or use jsonl with a document per line"
            ]
    return []


def reader_of(path: Path, readers: Mapping[str, str] = READERS | dict.fromkeys(MORE_TEXT, "text")) -> str | None:
    """The reader of a file by its extension, without that of its compression; None if it has none of `readers`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if is_compressed:
        suffixes = suffixes[:-1]
    reader = readers.get(suffixes[-1]) if suffixes else None
    return None if is_compressed and reader in UNCOMPRESSED else reader


def split_names(split: str) -> list[str]:
    """The splits in an expression of datasets: "train[:10%]+test" -> ["train", "test"]."""
    return [re.split(r"\[", part.strip())[0] for part in split.split("+")]


def non_empty(files: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(path for path in files if path.stat().st_size)


def files_identity(files: Sequence[Path], root: Path) -> dict[str, Any]:
    """Names below root, sizes and content, as JSON; not root itself, so that a folder may be moved.

    Raises:
        OSError: a file cannot be read.
    """
    lines = [
        [path.absolute().relative_to(root).as_posix(), path.stat().st_size, sha256]
        for path, sha256 in zip(files, content_hashes(files), strict=True)
    ]
    return {"num_files": len(files), "bytes": sum(line[1] for line in lines), "files": sha256_of_json(lines)}
