"""The one place where an update is formed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def lora_delta(A: Tensor, B: Tensor, scale: float, *, transposed: bool, rows: slice = slice(None)) -> Tensor:
    """scale * B @ A in the layout of the weight, in at least fp32 whatever surrounds the call.

    Args:
        A: (r, d_in).
        B: (d_out, r).
        rows: of the weight, for a process that holds only these.
    """
    if transposed:
        A = A[:, rows]
    else:
        B = B[rows]
    dtype = torch.promote_types(A.dtype, torch.float32)
    with _full_precision(A.device.type):
        delta = (B.to(dtype) @ A.to(dtype)).mul_(scale)
    return delta.T if transposed else delta


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Neither autocast nor TF32: either would round what is merged to 8 or 10 bits."""
    # Not allow_tf32: reading it raises once anyone has set fp32_precision, and writing it back undoes "medium".
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = precision
