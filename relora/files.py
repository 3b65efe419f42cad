"""Write files and folders atomically, whenever the process is killed; small questions about paths."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from relora.errors import disk_errors_name


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with disk_errors_name(path), draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
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

    Whatever has the name is replaced: a folder, a file, or a link, whose target is left alone. It is removed when the
    new folder is there, so that a kill leaves one of them whole, if under another name.
    """
    replaced = draft.with_name(f"{draft.name}-replaced")
    remove(replaced)
    for inside in draft.rglob("*"):
        sync(inside)
    sync(draft)
    if os.path.lexists(final):
        final.rename(replaced)
    draft.rename(final)
    sync(final.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link but not what it points to; nothing there is fine."""
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


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name: a hard link, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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
    nearest = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
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
