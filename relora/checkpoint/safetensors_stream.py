"""safetensors files written tensor by tensor.

The library writes tensors that are all in memory at once. Here each is collected from the processes, written, and
released before the next. Format: https://huggingface.co/docs/safetensors. Reading is left to the library.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from relora.engines.state_entry import Entry
from relora.errors import disk_errors_name

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


def write_tensors(path: Path, entries: Sequence[Entry]) -> str:
    """Write a safetensors file and return its sha256."""
    digest = hashlib.sha256()
    with disk_errors_name(path), path.open("wb") as file:
        header = _header(entries)
        file.write(header)
        digest.update(header)
        for entry in entries:  # one tensor after the other: only one is gathered at a time
            values = entry.fetch().detach()
            assert (values.shape, values.dtype) == (entry.shape, entry.dtype), entry.name
            block = values.cpu().contiguous().flatten().view(torch.uint8).numpy().data
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _header(entries: Sequence[Entry]) -> bytes:
    """Its length in 8 bytes, then JSON with dtype, shape and place of each tensor, padded to whole 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.num_bytes
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
