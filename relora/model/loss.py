"""The cross-entropy of a batch, without a copy of its logits in fp32.

In float32 the logits, their log-softmax and its gradient would each be twice the logits in bf16, the largest tensors
of a small model's update. Here they exist for a chunk of rows at a time. torch's `linear_cross_entropy` goes further
and never holds all logits, but needs the weight of the output head: it would bypass what models do to their logits
(scales, soft caps), and the hooks through which FSDP2 and ZeRO-3 gather that weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from relora.data.batches import IGNORED_LABEL

# Logits in float32 at a time: 2^23 numbers, 32 MiB, some hundred rows of a usual vocabulary.
CHUNK_NUMBERS = 2**23


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] over the rows whose target is not IGNORED_LABEL.

    Args:
        logits: (rows, vocabulary), any float dtype; saved for the backward pass as they are, and not changed.
        targets: (rows,) int64.

    Returns:
        A scalar, computed in float32, or float64 for logits in float64.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """Saves the logits in their own dtype; the softmax is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.chunk_rows = max(1, CHUNK_NUMBERS // logits.shape[1])
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for first in range(0, len(logits), ctx.chunk_rows):
            rows = slice(first, first + ctx.chunk_rows)
            values = logits[rows].to(total.dtype)
            total += F.cross_entropy(values, targets[rows], ignore_index=IGNORED_LABEL, reduction="sum")
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """(softmax - one at the target) * grad, rounded to the dtype of the logits."""
        logits, targets = ctx.saved_tensors
        result, wide = torch.empty_like(logits), torch.promote_types(logits.dtype, torch.float32)
        for first in range(0, len(logits), ctx.chunk_rows):
            rows = slice(first, first + ctx.chunk_rows)
            has_label = (targets[rows] != IGNORED_LABEL)[:, None]  # (chunk, 1)
            values = torch.softmax(logits[rows], dim=-1, dtype=wide)  # (chunk, vocabulary)
            minus_one = -torch.ones_like(has_label, dtype=values.dtype)
            values.scatter_add_(-1, targets[rows].clamp(min=0)[:, None], minus_one)
            result[rows] = values.mul_(has_label * grad)
        return result, None
