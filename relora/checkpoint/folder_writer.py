"""A folder of tensors: safetensors files and their manifest, under a temporary name until it is complete."""

import errno
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora.checkpoint.format import FORMAT, MANIFEST, TEMPORARY_PREFIX, FileFacts, Manifest, sealed
from relora.checkpoint.load import read_manifest
from relora.checkpoint.safetensors_stream import write_tensors
from relora.engines.state_entry import Entry
from relora.files import link_or_copy, publish_folder, remove, write_json

SHARD_BYTES, MIB = 2**30, 2**20


@dataclass(frozen=True)
class FrozenFiles:
    """The groups of frozen weights, and the checkpoint that has their files already; None if they are to be written."""

    groups: tuple[str, ...]
    source: Path | None


class FolderWriter:
    """Tensors -> safetensors files of about SHARD_BYTES -> a manifest, under a temporary name until it is published.

    Args:
        writes: False only fetches the tensors, for the process that writes them.
    """

    def __init__(self, final: Path, *, writes: bool) -> None:
        self.final, self.temporary = final, final.with_name(f"{TEMPORARY_PREFIX}{final.name}")
        self.writes = writes
        self.files: dict[str, FileFacts] = {}
        self.tensors: dict[str, str] = {}
        if writes:
            remove(self.temporary)
            self.temporary.mkdir(parents=True)

    def write(self, group: str, entries: Sequence[Entry]) -> None:
        """Write `entries`, in order, to files of this group."""
        if not self.writes:
            for entry in entries:
                entry.fetch()
            return
        for number, shard in enumerate(shards_of(entries), start=1):
            path = self.temporary / f"{group}-{number:05d}.safetensors"
            sha256 = write_tensors(path, shard)
            self.files[path.name] = FileFacts(group=group, bytes=path.stat().st_size, sha256=sha256)
            self.tensors |= dict.fromkeys((entry.name for entry in shard), path.name)

    def reserve(self, num_bytes: int) -> None:
        """OSError now, before anything is written, if the disk has no room for `num_bytes`."""
        if not self.writes:
            return
        free = shutil.disk_usage(self.temporary).free
        if free < num_bytes:
            needed = f"No space left on device, {num_bytes / MIB:,.0f} MiB are needed"
            raise OSError(errno.ENOSPC, needed, str(self.final))

    def link(self, frozen: FrozenFiles) -> None:
        """Share the files of frozen weights, if another checkpoint has them."""
        if frozen.source is None or not self.writes:
            return
        manifest = read_manifest(frozen.source)
        files = {name: facts for name, facts in manifest.files.items() if facts.group in frozen.groups}
        for name in files:
            link_or_copy(frozen.source / name, self.temporary / name)
        self.files |= files
        self.tensors |= {name: file for name, file in manifest.tensors.items() if file in files}

    def publish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest, with `facts` in it, and rename the folder to its final name."""
        if self.writes:
            files = {name: of_file.model_dump() for name, of_file in self.files.items()}
            manifest = {"format": FORMAT, **facts, "files": files, "tensors": self.tensors}
            write_json(self.temporary / MANIFEST, sealed(manifest))
            publish_folder(self.temporary, self.final)


def is_unchanged(folder: Path, manifest: Manifest, groups: Sequence[str]) -> bool:
    """Whether no file of `groups` was lost or written to since the manifest that stands beside it.

    Goes by size and time, not by content: it is asked at each save.
    """
    written_ns = (folder / MANIFEST).stat().st_mtime_ns
    for name, facts in manifest.files.items():
        if facts.group in groups:
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts.bytes or path.stat().st_mtime_ns > written_ns:
                return False
    return True


def shards_of(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries in order, cut after each that fills a file to SHARD_BYTES."""
    shards: list[list[Entry]] = []
    num_bytes = SHARD_BYTES  # of the last file: full, as there is none yet
    for entry in entries:
        if num_bytes >= SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(entry)
        num_bytes += entry.num_bytes
    return shards
