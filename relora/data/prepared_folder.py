"""The folder of prepared data: whose it is, whether it is complete, begun, damaged, or somebody else's.

    .lock              held while a process prepares; the others wait
    unfinished.json    written before anything else, deleted after the manifest
    tokenizer/         in one step
    tokens/            file by file
    manifest.json      last

Each file is written in one step, so that a process killed at any time leaves what it had finished, or a draft.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relora.data.cache_key import CacheKey, key_problems
from relora.data.dataset import TOKENIZER_FOLDER, PreparedData, verified
from relora.data.manifest import MANIFEST, DamagedError, hash_of_json, read_json
from relora.data.tokenize import TOKENS_FOLDER
from relora.errors import DISK_IS_FULL, UserError, raise_if_any
from relora.files import DRAFTS, name_aside, write_json

LOCK = ".lock"
UNFINISHED = "unfinished.json"
logger = logging.getLogger(__name__)


def complete(folder: Path, key: CacheKey, *, sets_aside: bool) -> PreparedData | None:
    """The data that the folder holds, None if they are still to be prepared.

    Args:
        key: of the data that are wanted.
        sets_aside: move damaged data out of the way, for which this process must hold the lock; else they just count
            as none.

    Raises:
        UserError: the folder holds something else, finished or not.
    """
    try:
        prepared = verified(folder)
        if prepared is not None:
            found = prepared.manifest.made_from
            if key["tokenizer"] == prepared.manifest.tokenizer_hash:  # trained on the sources then, given now
                found = found | {"tokenizer": key["tokenizer"]}
            raise_if_any(key_problems(folder, found, key))
            return prepared
        begun = read_unfinished(folder)
        if begun is not None:
            raise_if_any(key_problems(folder, begun["made_from"], key))
        elif folder.is_dir() and not all(is_draft(path) for path in folder.iterdir()):
            raise_if_any(stranger_problems(folder))
            raise DamagedError([f"prepared data in {folder} are damaged: {MANIFEST} is missing"])
    except DamagedError as damage:
        if sets_aside:
            set_aside(folder, damage)
    return None


def is_draft(path: Path) -> bool:
    """Whether a file is the lock, or what a process killed in mid-write leaves: it says nothing about the folder."""
    return path.name == LOCK or path.match(DRAFTS)


def stranger_problems(folder: Path) -> list[str]:
    """A line if something in the folder is none of ours, which must be kept where it is."""
    ours = {MANIFEST, UNFINISHED, TOKENS_FOLDER, TOKENIZER_FOLDER, f"{TOKENIZER_FOLDER}.tmp"}
    strangers = [path.name for path in folder.iterdir() if not is_draft(path) and path.name not in ours]
    if not strangers and (folder / TOKENS_FOLDER).is_dir():
        return []
    example = min(strangers, default=TOKENIZER_FOLDER)
    return [
        f"data.prepared_dir = {str(folder)!r}: holds other files and no {MANIFEST} (such as {example}); "
        "choose an empty folder"
    ]


def set_aside(folder: Path, damage: DamagedError) -> None:
    """Move damaged data, all but the lock, to a folder beside, so that they can be prepared again."""
    aside = name_aside(folder)
    try:
        aside.mkdir()
        for path in folder.iterdir():
            if path.name != LOCK:
                path.rename(aside / path.name)
    except OSError as error:
        raise UserError([f"{damage}; they cannot be set aside: {error}"]) from error
    logger.warning("%s; they are kept as %s and prepared again", damage, aside)


@contextmanager
def lock_of(folder: Path, prepared_dir: str | None) -> Iterator[None]:
    """Let one process at a time prepare a folder; the others wait here, and then find it complete.

    Args:
        prepared_dir: the setting, None where the folder is one of the cache.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another process that is preparing %s", folder)
            lock.acquire()
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise
        cache = f"the cache {str(folder)!r} (data.prepared_dir or the variable RELORA_CACHE chooses another folder)"
        setting = cache if prepared_dir is None else f"data.prepared_dir = {str(folder)!r}"
        raise UserError([f"{setting}: not a folder to write to: {error}"]) from error
    try:
        yield
    finally:
        lock.release()


def read_unfinished(folder: Path) -> dict[str, Any] | None:
    """The record of a preparation that was begun, None if there is none. Raises DamagedError if it was changed."""
    path = folder / UNFINISHED
    try:
        content = read_json(path)
    except FileNotFoundError:  # none, or finished in this moment
        return None
    hashed = content.get("hash") if isinstance(content, dict) else None
    if hashed is None or hashed != hash_of_json(content):
        raise DamagedError([f"{path}: was changed after it was written (its hash of itself differs)"])
    return dict(content)


def write_unfinished(folder: Path, key: CacheKey, num_pieces: list[int]) -> dict[str, Any]:
    """Record what a preparation has begun to write, before it writes anything else."""
    content: dict[str, Any] = {"made_from": key, "num_pieces": num_pieces}
    content["hash"] = hash_of_json(content)
    write_json(folder / UNFINISHED, content)
    return content
