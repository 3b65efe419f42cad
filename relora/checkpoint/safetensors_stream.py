"""safetensors files written tensor by tensor.

The library writes what is in memory all at once. Here a tensor is put together from the ranks, written, and let
go of before the next: https://huggingface.co/docs/safetensors (format). Reading is the library's.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written. `fetch` is called when its turn comes, by every rank."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    fetch: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def entry_of(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that is there already."""
    return Entry(name, tensor.shape, tensor.dtype, lambda: tensor)


def write_tensors(path: Path, entries: Sequence[Entry]) -> str:
    """Write a safetensors file and return its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in chain([_header(entries)], _contents(entries)):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        places = [at, at + entry.num_bytes]
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": places}
        at += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _contents(entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    for entry in entries:
        values = entry.fetch().detach()
        assert (values.shape, values.dtype) == (entry.shape, entry.dtype), entry.name
        yield values.cpu().contiguous().flatten().view(torch.uint8).numpy().data
