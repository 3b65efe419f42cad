"""Write files and folders atomically, whenever the process is killed; read JSON with care; questions about paths."""

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from relora.errors import DISK_IS_FULL, disk_errors_name

DAMAGED = ".damaged"
DRAFTS = ".*.draft"
MAX_DEPTH, MAX_VALUES, MAX_BITS = 60, 100_000, 128  # of data that are read: beyond, something is wrong with them
MAX_NAME, MAX_PATH = 255, 4095  # bytes, of Linux
FILE_SUFFIXES = frozenset(
    [
        *(".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
        *(".txt", ".text", ".csv", ".tsv", ".parquet", ".arrow", ".py", ".md"),
        *(".gz", ".zst", ".xz", ".bz2", ".zip", ".tar"),
    ]
)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` in one step: a reader sees the old file or the new one, never a part.

    A link at `path` is replaced, not followed; a folder there is set aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
    try:
        # "x" creates the file or fails: nobody's draft, and no link that lies there, is written through.
        with disk_errors_name(path), draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            set_aside(path)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk (fsync)."""
    with disk_errors_name(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish_folder(draft: Path, final: Path) -> None:
    """Rename a finished draft folder to its final name, after everything in it is on disk.

    A folder of that name, or a link but not its target, is replaced; a file is set aside. What is replaced is removed
    when the new folder is there, so that a kill leaves one of them whole, if under another name.
    """
    replaced = draft.with_name(f"{draft.name}-replaced")
    remove(replaced)
    for inside in draft.rglob("*"):
        sync(inside)
    sync(draft)
    if final.is_symlink() or final.is_dir():
        final.rename(replaced)
    elif final.exists():
        set_aside(final)  # not written by us
    draft.rename(final)
    sync(final.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link, never what the link points to; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the few lines of text that stand for one which Git LFS has not downloaded."""
    # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    head = b"version https://git-lfs.github.com/spec/"
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(head)) == head and path.stat().st_size < 1024


def set_aside(path: Path) -> Path:
    """Rename `path` to its `name_aside`, and return the new path."""
    aside = name_aside(path)
    path.rename(aside)
    sync(path.parent)
    return aside


def name_aside(path: Path) -> Path:
    """The path beside, of its name + ".damaged", with a number if that is taken."""
    names = (f"{path.name}{DAMAGED}{f'-{number}' if number > 1 else ''}" for number in count(1))
    return next(aside for name in names if not ((aside := path.with_name(name)).exists() or aside.is_symlink()))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name: a hard link, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def json_of(content: bytes) -> Any:
    """The JSON value of `content`.

    Raises:
        ValueError: it is not JSON in UTF-8, or nested too deep.
    """
    try:
        return json.loads(content.decode("utf-8"))  # of bytes alone it would guess UTF-16
    except RecursionError:
        raise ValueError("nested too deep") from None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """The sha256 of a JSON value, in hex, whatever the order of its keys; tuples and sets count as lists."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


def plain_json_of(content: bytes) -> Any:
    """The JSON value of a file of somebody else.

    Raises:
        ValueError: as `json_of`, or `plain_problem` has something against it.
    """
    value = json_of(content)
    problem = plain_problem(value)
    if problem is not None:
        raise ValueError(problem)
    return value


def plain_problem(value: Any) -> str | None:
    """Why `value`, read from a file, could not be handled like any other; None for plain data of bounded size.

    Plain data are mappings with string keys, lists, Unicode text, numbers, booleans and null: what JSON can hold. A
    value that is shared counts as often as it can be reached, as every reader of the tree would meet it.
    """
    level, num_values = [value], 1
    for _ in range(MAX_DEPTH):
        keys = [key for item in level if isinstance(item, dict) for key in item]
        for item in (*level, *keys):
            if isinstance(item, str) and not _is_unicode(item):
                return f"{ascii(item)[:80]} is not Unicode text"
            if isinstance(item, int) and item.bit_length() > MAX_BITS:
                return f"an integer of {item.bit_length()} bits; {MAX_BITS} are the most"
            if not isinstance(item, dict | list | str | int | float | None):
                return f"a value of type {type(item).__name__}, which JSON cannot hold"
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for children in inner for child in children]
        num_values += len(level)
        if not level:
            return None
        if num_values > MAX_VALUES:
            return f"more than {MAX_VALUES:,} values, aliases included"
    return f"nested deeper than {MAX_DEPTH} levels"


def _is_unicode(text: str) -> bool:
    """Whether `text` can be written to a file: no half of a surrogate pair, and no null character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def expand_path(text: str) -> str:
    """`text` with a leading ~ and $VARIABLES replaced; what exists under the very name is left as it is.

    Raises:
        ValueError: a variable is not set, ~ is of nobody, or no file system could hold the name.
    """
    if not _is_unicode(text):
        raise ValueError(f"{ascii(text)[:80]} is not Unicode text")
    path = text
    if not (_is_too_long(text) or os.path.lexists(text)):
        unset = [name for name in re.findall(r"\$\{?(\w+)", text) if name not in os.environ]
        if unset:
            raise ValueError(f"the environment variable {unset[0]} is not set")
        path = os.path.expanduser(os.path.expandvars(text))  # noqa: PTH111  # Path would drop a leading ./
        if path.startswith("~"):
            raise ValueError(f"{path.split('/')[0]} is nobody's home folder")
    if _is_too_long(path):
        raise ValueError(f"too long for a path: at most {MAX_NAME} bytes a name and {MAX_PATH} in all")
    return path


def _is_too_long(path: str) -> bool:
    names = [len(name.encode()) for name in path.split("/")]
    return max(names) > MAX_NAME or sum(names) + len(names) > MAX_PATH


def folder_problems(setting: str, path: str) -> list[str]:
    """Why no folder can be created at `path`: a file is in the way.

    Args:
        setting: the path as the user gave it, such as `output_dir = runs/x`.
    """
    places = (Path(path), *Path(path).absolute().parents)
    nearest = next(place for place in places if place.exists() or place.is_symlink())
    if nearest.is_symlink() and not nearest.exists():
        return [f"{setting}: {nearest} is a link to {nearest.readlink()}, which is not there"]
    if nearest.is_dir():
        return []
    return [f"{setting}: is a file" if nearest == Path(path) else f"{setting}: {nearest} is a file, not a folder"]


def mount_point(path: Path) -> Path:
    """Where the disk that holds `path`, or would hold it, is mounted."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists() and place.is_mount())


def write_problems(setting: str, path: str) -> list[str]:
    """Why no file can be written to the folder `path`, tried in it or in the nearest folder that exists.

    Args:
        setting: the path as the user gave it, such as `output_dir = runs/x`.

    Raises:
        OSError: the disk is full, which is no mistake of the setting.
    """
    problems = folder_problems(setting, path)
    if problems:
        return problems
    nearest = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    try:
        # The system alone knows: permissions, a file system that is read-only or full, limits of the user.
        with disk_errors_name(nearest), tempfile.TemporaryDirectory(dir=nearest, prefix=".relora-") as folder:
            (Path(folder) / "test").write_bytes(b"test")
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise OSError(error.errno, error.strerror, str(nearest)) from None  # not the name of the trial
        return [f"{setting}: {nearest} cannot be written to ({error.strerror or error})"]
    return []


def looks_like_a_path(name: str) -> bool:
    """Whether `name` means a file or folder here, so that the hub is not asked for it.

    A hub id is `name` or `owner/name` of letters, digits and `-_.`. A name that could be either is a path if it
    exists, if its first folder does, or if it ends like a file.
    """
    first, _, rest = name.partition("/")
    could_be_an_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None
    return (
        not could_be_an_id
        or Path(name).suffix.lower() in FILE_SUFFIXES
        or os.path.lexists(name)
        or (rest != "" and Path(first).is_dir())
    )


def missing_folder(name: str) -> str | None:
    """Why `name` is no folder here though it looks like a path; None if it is one, or may be a hub id."""
    if Path(name).is_dir() or not looks_like_a_path(name):
        return None
    first, _, rest = name.partition("/")
    if os.path.lexists(name):
        return "is not a folder"
    if rest and first not in ("", ".", "..") and Path(first).is_dir():
        return f"there is no such folder (the hub is not asked for it, because there is a folder {first} here)"
    return "there is no such folder"
