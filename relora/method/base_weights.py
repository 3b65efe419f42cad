"""How a frozen weight W is stored: as it came, rounded to a coarser type, or as codes on a 8- or 4-bit grid.

The codes are bitsandbytes' (docs/dependencies.md says why): blocks of 64 entries share a scale. int8 is linear; nf4 is
the normal-float grid of QLoRA (arXiv 2305.14314). A grid forgets what is finer than it; whoever merges into it keeps
an exact fp32 master beside it.
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
_CODES_PER_BYTE = {"int8": 1, "nf4": 2}


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored.

    Attributes:
        name: None for a weight that stays in the dtype in which it came.
        shape: of W, in the layout of its layer.

    Raises:
        ModuleNotFoundError: the grid is int8 or nf4, and bitsandbytes is missing.
    """

    name: BaseDtype | None
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.is_quantized:
            problem = quantization_problem(self.name or "")
            if problem is not None:
                raise ModuleNotFoundError(problem)
            _load_bitsandbytes()

    @property
    def is_quantized(self) -> bool:
        """Whether W is kept as codes: one flat uint8 tensor, the scales of the blocks first."""
        return self.name in _CODES_PER_BYTE

    @property
    def needs_master(self) -> bool:
        """Whether a merge into what is stored would lose part of it, so that there must be an exact master."""
        return self.is_quantized or self.name == "bfloat16"

    def quantize(self, values: Tensor) -> Tensor:
        """What is stored of `values`, rounded once.

        Args:
            values: of `shape`, any float dtype.
        """
        if self.name is None:
            return values
        if not self.is_quantized:
            return values.to(_FLOATS[self.name])
        ops, flat = torch.ops.bitsandbytes, values.to(torch.float32).flatten()
        if self.name == "nf4":
            codes, scales = ops.quantize_4bit(flat, _BLOCK, "nf4", torch.uint8)
        else:
            codes, scales = ops.quantize_blockwise(flat, _linear_map(flat.device), _BLOCK)
        return torch.cat([scales.float().view(torch.uint8), codes.flatten()])

    def dequantize(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """W of `shape` in `dtype`, out of what is stored. Shares its memory where nothing has to be done."""
        if not self.is_quantized:
            return stored.to(dtype)
        ops, num_scale_bytes = torch.ops.bitsandbytes, 4 * self._num_blocks
        scales, codes = stored[:num_scale_bytes].view(torch.float32), stored[num_scale_bytes:]
        if self.name == "nf4":
            values: Tensor = ops.dequantize_4bit(codes.view(-1, 1), scales, _BLOCK, "nf4", self._flat, dtype)
        else:
            values = ops.dequantize_blockwise(codes, scales, _linear_map(codes.device), _BLOCK, dtype)
        return values.view(self.shape)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """What is stored takes so much, in the dtype `dtype` unless it is codes: those of all blocks, and scales."""
        numel = math.prod(self.shape)
        if not self.is_quantized:
            return numel * dtype.itemsize
        return -(-numel // _CODES_PER_BYTE[self.name or ""]) + 4 * self._num_blocks

    @property
    def _flat(self) -> list[int]:
        """A shape of so many entries whose rows hold whole blocks: on the CPU the library begins a new one in each row,
        and shares rows out to threads.
        """
        numel = math.prod(self.shape)
        return [numel] if numel % _BLOCK else [numel // _BLOCK, _BLOCK]

    @property
    def _num_blocks(self) -> int:
        return -(-math.prod(self.shape) // _BLOCK)


def quantization_problem(name: str) -> str | None:
    """Why weights cannot be stored so here, or an optimizer not be used: the library of their codes is an extra."""
    if name not in (*_CODES_PER_BYTE, "adamw_8bit") or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return f"{name} needs bitsandbytes: {INSTALL}"


def _load_bitsandbytes() -> None:
    """Register its operators, which torch.compile can trace."""
    # It warns of a kernel for products that nothing here calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    importlib.import_module("bitsandbytes")


def _linear_map(device: torch.device) -> Tensor:
    """The 256 values of an int8 code for a scale of 1: -1, -126/127, ..., 1."""
    steps = torch.arange(-127, 129, dtype=torch.float32, device=device) / 127
    return steps.clamp_(max=1)
