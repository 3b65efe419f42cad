"""`manifest.json`: the content of a folder of prepared data. Written last, so that its presence means complete data."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from relora.errors import UserError
from relora.files import parse_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """One Arrow file, named relative to the folder."""

    name: str
    bytes: int
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
    """

    format_version: int
    content_hash: str
    made_from: dict[str, Any]
    tokenizer_hash: str
    vocab_size: int
    token_dtype: Literal["uint16", "uint32"]
    eos_token_id: int
    sources: tuple[SourceRecord, ...]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of complete data, None if there is none. Raises UserError if it is damaged or files are missing."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError([f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}; prepare again"])
    try:
        manifest = Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise UserError([f"{path}: damaged manifest: {error.errors()[0]['loc']}; delete the folder"]) from error
    check_present(folder, manifest)
    return manifest


def check_present(folder: Path, manifest: Manifest) -> None:
    """Raise UserError unless every file of the manifest is there in its full size."""
    files = [file for source in manifest.sources for stream in (source.train, source.eval) for file in stream.files]
    for file in files:
        path = folder / file.name
        size = path.stat().st_size if path.exists() else None
        if size != file.bytes:
            state = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
            raise UserError([f"prepared data in {folder} are damaged: {file.name} {state}; delete the folder"])


def read_json(path: Path) -> Any:
    """The JSON value of a file of ours. Raises UserError if it is damaged."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError([f"{path}: not JSON ({error}); delete the folder"]) from error
