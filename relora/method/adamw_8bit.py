"""AdamW with moments of eight bits an entry, by bitsandbytes.

Each moment is stored as 8-bit indices into a table of 256 values, and one scale for each block of 256 entries.
Parameters of few entries keep float32 moments under the same names. Index 0 does not stand for the value 0, so a reset
cannot simply fill with zeros.
"""

import importlib
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from relora.method.base_weights import INSTALL
from relora.method.optimizer_state import OptimizerKind, QuantizedMoments

BLOCK = 256
# Name of a moment -> names of its scales (one a block) and of its table (256,).
COMPANIONS = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}


def dequantize(indices: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The moment in float32: table[index] * scale of the block.

    Args:
        indices: uint8, of the parameter's shape.
        scales: float32, (ceil(numel / 256),).
        table: float32, (256,).
    """
    values = table[indices.flatten().int()]  # (numel,)
    return values.mul_(scales.repeat_interleave(BLOCK)[: values.numel()]).view(indices.shape)


def clear(indices: Tensor, scales: Tensor, table: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(indices, scales) that mean zero where `mask` is set; every other entry exactly as it was.

    The scale of a block that is cleared as a whole is zero too, as in a fresh state.
    """
    index_of_zero = int(table.abs().argmin())
    # (num_blocks, 256), padded with False: has the block an entry that stays?
    stays = F.pad(~mask.flatten(), (0, -mask.numel() % BLOCK)).view(-1, BLOCK).any(1)
    return indices.masked_fill(mask, index_of_zero), scales * stays


def build(groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    optimizer: Optimizer = importlib.import_module("bitsandbytes.optim").AdamW8bit(groups, **settings)
    return optimizer


ADAMW_8BIT = OptimizerKind(
    build=build,
    quantized=QuantizedMoments(COMPANIONS, dequantize, clear),
    library="bitsandbytes",
    install=INSTALL,
)
