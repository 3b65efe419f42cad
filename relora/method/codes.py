"""Moments in the 8-bit codes of bitsandbytes (block-wise dynamic quantisation, arXiv 2110.02861).

Of each moment there are codes (state1, state2: uint8, of the parameter's shape), the scale of every 256 of them in a
row (absmax1, absmax2), and the table of their values (qmap1, qmap2). An entry is table[code] * scale. Code 0 is not
zero: in the table of the first moment it is -0.993. Parameters of fewer than 4096 entries have plain float32 moments.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
# The slot of the codes -> those of their scales and their table.
BESIDE = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}
OF_CODES = frozenset(name for names in BESIDE.values() for name in names)


def coded_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of the coded moments in an optimizer's state of one parameter; empty if its moments are plain."""
    coded = [slot for slot in BESIDE if slot in state and state[slot].dtype == torch.uint8]
    return {name: state[name] for slot in coded for name in (slot, *BESIDE[slot])}


def decoded(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The float32 moment that the codes mean, in their shape."""
    values = table[codes.flatten().int()]
    return values.mul_(scales.repeat_interleave(BLOCK)[: values.numel()]).view(codes.shape)


def cleared(codes: Tensor, scales: Tensor, table: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) with zero where `mask` is set, and every other entry exactly as it was.

    The scale of a block that is cleared as a whole is zero too, as in a fresh state.
    """
    zero = int(table.abs().argmin())
    kept = F.pad(~mask.flatten(), (0, -mask.numel() % BLOCK)).view(-1, BLOCK).any(1)
    return codes.masked_fill(mask, zero), scales * kept
