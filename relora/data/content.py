"""The sha256 of files, each read in full on its first use on a machine, afterwards recognised without that.

A file is the one that was read while the file system says so (size, times of change, inode; the time of the last change
of status, ctime, cannot be set by a user) and while sampled blocks of it are the same.
"""

import hashlib
import json
import os
import platform
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from relora.files import sha256_of, sha256_of_json, write_json

BLOCK_BYTES = 2**16
BLOCKS_PER_FILE = 16
FILES_SAMPLED = 256


def cache_folder() -> Path:
    """Where everything that can be made again is stored: $RELORA_CACHE, else ~/.cache/relora."""
    return Path(os.environ.get("RELORA_CACHE") or "~/.cache/relora").expanduser()


def usable_cores() -> int:
    """The cores that this process may use, which the scheduler of a cluster may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def content_hashes(files: Sequence[Path]) -> list[str]:
    """The sha256 of each file, in their order; of those known to this machine without reading them in full.

    Raises:
        OSError: a file cannot be read.
    """
    paths = [str(path.absolute()) for path in files]
    record = cache_folder() / "content" / f"{sha256_of_json([platform.node(), paths])[:20]}.json"
    with ExitStack() as stack:
        with suppress(OSError):  # no cache can be written: then every use is the first
            record.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(record.with_suffix(".lock")))
        known = read_record(record)
        sampled = set(random.SystemRandom().sample(paths, min(FILES_SAMPLED, len(paths))))
        with ThreadPoolExecutor(min(8, usable_cores())) as threads:
            now = dict(
                zip(paths, threads.map(lambda p: entry_of(p, known.get(p), check=p in sampled), paths), strict=True)
            )
        if now != known:
            with suppress(OSError):
                write_json(record, now)
    return [now[path]["sha256"] for path in paths]


def read_record(path: Path) -> dict[str, Any]:
    """What is recorded of files by name; nothing where there is no record, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def entry_of(path: str, known: Any, *, check: bool) -> dict[str, Any]:
    """What there is to know of a file: `known` if it is still true, else found out by reading all of it.

    Args:
        check: compare the sampled blocks too, beside what the file system says.
    """
    stat = Path(path).stat()
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    is_known = isinstance(known, dict) and known.keys() == {"stat", "blocks", "sha256"} and known["stat"] == seen
    if is_known and not check:
        return dict(known)
    blocks = hash_of_blocks(path, stat.st_size)
    if is_known and known["blocks"] == blocks:
        return dict(known)
    return {"stat": seen, "blocks": blocks, "sha256": sha256_of(Path(path))}


def hash_of_blocks(path: str, size: int) -> str:
    """sha256 of evenly spread blocks of a file, the first and the last among them; of all of it if it is small."""
    digest = hashlib.sha256()
    last = max(0, size - BLOCK_BYTES)
    with Path(path).open("rb", buffering=0) as file:
        for start in sorted({number * last // (BLOCKS_PER_FILE - 1) for number in range(BLOCKS_PER_FILE)}):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
