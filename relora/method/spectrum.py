"""Singular values and effective rank of what was learned."""

import torch
from torch import Tensor


def factor_singular_values(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Singular values of scale * B @ A, descending, without forming the product.

    Args:
        A: (r, d_in).
        B: (d_out, r).

    Returns:
        (r,) in float64. B = Q_B R_B and A^T = Q_A R_A give the values of R_B R_A^T.
    """
    # float64 on the CPU: not every device has it, and what is left to decompose is only (r, r).
    R_B = torch.linalg.qr(B.float(), mode="r").R.cpu().double()
    R_A = torch.linalg.qr(A.float().T, mode="r").R.cpu().double()
    values: Tensor = torch.linalg.svdvals(R_B @ R_A.T)
    return values * scale


def effective_rank(singular_values: Tensor) -> float:
    """exp(entropy of the normalised singular values) (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    p = singular_values / total
    return torch.exp(torch.special.entr(p).sum()).item()


def numerical_rank(matrix: Tensor, *, relative_to_largest: float = 1e-4) -> int:
    """Number of singular values above `relative_to_largest` times the largest, in float64."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > relative_to_largest * values[0]).sum())
