"""The update of one layer, formed in full precision."""

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

    Returns:
        (d_out, d_in), or (d_in, d_out) if `transposed`; fewer rows with `rows`.
    """
    if transposed:
        A = A[:, rows]
    else:
        B = B[rows]
    dtype = torch.promote_types(A.dtype, torch.float32)
    with full_precision(A.device.type):
        delta = (B.to(dtype) @ A.to(dtype)).mul_(scale)
    return delta.T if transposed else delta


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Disable autocast, and TF32 and bf16 in fp32 products: they would round an update to 8 or 10 bits.

    `torch.set_float32_matmul_precision` sets these precisions, on a GPU and, through oneDNN, on a CPU.
    """
    # Not allow_tf32: reading it raises once anyone has set fp32_precision, and writing it back undoes "medium".
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
