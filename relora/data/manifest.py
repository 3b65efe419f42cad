"""`manifest.json`: the content of a folder of prepared data. Written last, so that its presence means complete data.

What it says is checked by its own hash, and every file by its size and its sha256.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from relora.data.content import content_hashes
from relora.errors import UserError
from relora.files import json_of, sha256_of_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


class DamagedError(UserError):
    """Prepared data that are not what was written. They are a cache: whoever has the sources makes them again."""


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """One Arrow file, named relative to the folder."""

    name: str
    bytes: int
    sha256: str
    documents: int
    tokens: int


class StreamRecord(Record):
    """The documents of one source on one side of the split, in their order."""

    documents: int
    tokens: int
    files: tuple[FileRecord, ...]


class SourceRecord(Record):
    """One source: its section of the configuration without the weight, and both sides of the split."""

    spec: dict[str, Any]
    train: StreamRecord
    eval: StreamRecord
    skipped_nulls: int
    skipped_empty: int


class Manifest(Record):
    """The content of the folder.

    Attributes:
        content_hash: of the tokens and the borders of the documents, the same on every node.
        made_from: the cache key.
        tokenizer_files: the sha256 of each file of the tokenizer's folder.
        largest_id: of all tokens; a model needs an embedding for it.
        hash: of everything else in the manifest.
    """

    format_version: int
    content_hash: str
    made_from: dict[str, Any]
    tokenizer_hash: str
    tokenizer_files: dict[str, str]
    vocab_size: int
    largest_id: int
    token_dtype: Literal["uint16", "uint32"]
    eos_token_id: int
    sources: tuple[SourceRecord, ...]
    hash: str


def hash_of_json(content: dict[str, Any]) -> str:
    """The sha256 of a JSON mapping without its entry `hash`, which holds this."""
    return sha256_of_json({key: value for key, value in content.items() if key != "hash"})


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of complete data, None if there is none. Raises DamagedError if it is not what was written."""
    path = folder / MANIFEST
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DamagedError([f"{path}: format_version is {version!r}, this program writes and reads {FORMAT_VERSION}"])
    if content.get("hash") != hash_of_json(content):
        raise DamagedError([f"{path}: was changed after it was written (its hash of itself differs)"])
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise DamagedError([f"{path}: damaged manifest: {error.errors()[0]['loc']}"]) from error


def verify(folder: Path, manifest: Manifest, tokenizer_folder: str) -> None:
    """Raise DamagedError unless every file of the manifest is there as it was written.

    Every byte is read on the first use on a machine; afterwards the size, the times and sampled blocks.
    """
    streams = [stream for source in manifest.sources for stream in (source.train, source.eval)]
    wanted = {file.name: file.sha256 for stream in streams for file in stream.files}
    for file in (file for stream in streams for file in stream.files):
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            state = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
            raise DamagedError([f"prepared data in {folder} are damaged: {file.name} {state}"])
    wanted |= {f"{tokenizer_folder}/{name}": sha256 for name, sha256 in manifest.tokenizer_files.items()}
    try:
        found = content_hashes([folder / name for name in wanted])
    except OSError as error:
        raise DamagedError([f"prepared data in {folder} are damaged: {error}"]) from error
    changed = [name for (name, sha256), seen in zip(wanted.items(), found, strict=True) if sha256 != seen]
    if changed:
        raise DamagedError(
            [f"prepared data in {folder} are damaged: the content of {', '.join(changed[:4])} has changed"]
        )


def read_json(path: Path) -> Any:
    """The JSON value of a file of ours. Raises DamagedError if it is none, FileNotFoundError if there is no file."""
    try:
        return json_of(path.read_bytes())
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise DamagedError([f"{path}: cannot be read as JSON ({error})"]) from error
