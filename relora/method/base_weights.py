"""How a frozen weight W is stored: in its own dtype, rounded to a coarser one, or quantized to an 8- or 4-bit grid.

The quantized formats are bitsandbytes' (docs/dependencies.md says why): every block of 64 entries has a scale. int8 is
linear; nf4 is the normal-float grid of QLoRA (arXiv 2305.14314). A merge into a coarse format loses any update finer
than its grid, so an exact fp32 master is held beside it and takes the merges.
"""

import importlib
import importlib.util
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from relora.method.choices import BaseDtype

INSTALL = "pip install 'relora[quantization]'"
_BLOCK = 64
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ENTRIES_PER_BYTE = {"int8": 1, "nf4": 2}
# The dtypes that bitsandbytes' kernels write: another one is left without values, and without an error.
_DEQUANTIZED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored.

    Attributes:
        name: None for a weight that stays in its own dtype.
        shape: of W, in the layout of its layer.

    Raises:
        ModuleNotFoundError: the format is int8 or nf4, and bitsandbytes is missing.
    """

    name: BaseDtype | None
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.is_quantized:
            problem = quantization_problem(self.name or "")
            if problem is not None:
                raise ModuleNotFoundError(problem)
            # Importing registers its operators, which torch.compile can trace. It warns of a missing kernel for
            # products that nothing here calls.
            logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
            importlib.import_module("bitsandbytes")

    @property
    def is_quantized(self) -> bool:
        """Whether W is stored as one flat uint8 tensor: the fp32 scales of all blocks, then the quantized entries."""
        return self.name in _ENTRIES_PER_BYTE

    @property
    def needs_master(self) -> bool:
        """Whether a merge into the stored W would lose part of the update, so that there must be an exact master."""
        return self.is_quantized or self.name == "bfloat16"

    def quantize(self, values: Tensor) -> Tensor:
        """`values` as they are stored, rounded once.

        Args:
            values: of `shape`, any float dtype.

        Returns:
            Of `shape` in a float dtype, or (num_bytes,) in uint8.
        """
        if self.name is None:
            return values
        if not self.is_quantized:
            return values.to(_FLOATS[self.name])
        ops, flat = torch.ops.bitsandbytes, values.to(torch.float32).flatten()
        if self.name == "nf4":
            entries, scales = ops.quantize_4bit(flat, _BLOCK, "nf4", torch.uint8)
        else:
            entries, scales = ops.quantize_blockwise(flat, _int8_grid(flat.device), _BLOCK)
        return torch.cat([scales.float().view(torch.uint8), entries.flatten()])

    def dequantize(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """W of `shape` in `dtype`, from `quantize`'s result; that very tensor where nothing has to be done."""
        if not self.is_quantized:
            return stored.to(dtype)
        ops, numel = torch.ops.bitsandbytes, math.prod(self.shape)
        num_scale_bytes = 4 * -(-numel // _BLOCK)
        scales, entries = stored[:num_scale_bytes].view(torch.float32), stored[num_scale_bytes:]
        written = dtype if dtype in _DEQUANTIZED else torch.float32
        if self.name == "nf4":
            # On the CPU the library begins a new block in each row, and shares rows out to threads: so rows of
            # whole blocks, (numel / 64, 64), where W has them.
            rows = [numel] if numel % _BLOCK else [numel // _BLOCK, _BLOCK]
            values: Tensor = ops.dequantize_4bit(entries.view(-1, 1), scales, _BLOCK, "nf4", rows, written)
        else:
            values = ops.dequantize_blockwise(entries, scales, _int8_grid(entries.device), _BLOCK, written)
        return values.view(self.shape).to(dtype)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Size of the stored W.

        Args:
            dtype: of the stored W, unless it is quantized: then its entries and 4 bytes of scale for each block count.
        """
        numel = math.prod(self.shape)
        if not self.is_quantized:
            return numel * dtype.itemsize
        return -(-numel // _ENTRIES_PER_BYTE[self.name or ""]) + 4 * -(-numel // _BLOCK)


def quantization_problem(name: str) -> str | None:
    """Why the weight format `name` cannot be used here, or None: bitsandbytes is an optional extra."""
    if name not in _ENTRIES_PER_BYTE or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return f"{name} needs bitsandbytes: {INSTALL}"


def _int8_grid(device: torch.device) -> Tensor:
    """The 256 values of an int8 entry for a scale of 1: -1, -126/127, ..., 1; the last one twice."""
    steps = torch.arange(-127, 129, dtype=torch.float32, device=device) / 127
    return steps.clamp_(max=1)
