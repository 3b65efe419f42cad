"""Write files and folders atomically, whenever the process is killed; small questions about paths."""

import hashlib
import json
import os
import secrets
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from relora.errors import disk_errors_name

DAMAGED = ".damaged"
DRAFTS = ".*.draft"


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` in one step: a reader sees the old file or the new one, never a part.

    A link at `path` is replaced, not followed; a folder there is set aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
    try:
        # "x" creates the file or fails: nobody's draft, and no link that lies there, is written through.
        with disk_errors_name(path), draft.open("x", encoding="utf-8") as file:
            file.write(text)
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
    """Rename `path` to its name + ".damaged", with a number if that is taken, and return the new path."""
    for number in count(1):
        aside = path.with_name(f"{path.name}{DAMAGED}{f'-{number}' if number > 1 else ''}")
        if not (aside.exists() or aside.is_symlink()):
            break
    path.rename(aside)
    sync(path.parent)
    return aside


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


def looks_like_a_path(name: str) -> bool:
    """Whether `name` cannot be a hub id. Asking the hub for it would only cost time, much of it without a network."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
