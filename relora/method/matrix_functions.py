"""Functions of matrices by products of matrices alone, batched: a GPU computes singular values slowly, one at a time.

The polynomials p(x) = a x + b x^3 + c x^5 are those of Polar Express (arXiv 2505.16932) for singular values from 1e-3
to 1: each is the best approximation of 1 on what those before it leave. In turn they map [1e-3, 1] to 1, within 1e-12,
and what is smaller into [0, 1]. The inverse root comes from the same polynomials: where x^2 is an eigenvalue of S, the
product of all p(x) / x is 1 / x (the coupled iteration of Higham, Functions of Matrices, chapter 6).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# All but the last are meant for values up to this: one that rounding has left a little above 1 comes back to it.
_CUSHION = 1.01
RIDGE = 1e-5  # of `inverse_root`: its root is above 1e-3
_NUM_SQUARINGS = 6


def matrix_sign(X: Tensor) -> Tensor:
    """U V^T of X = U diag(S) V^T, (..., m, n) with m <= n; of norm at most 1, and 0 for X = 0.

    Singular values below 1e-3 |X|_F do not reach 1: noise is not made a direction like the others.
    """
    X = X / _norm(X)
    for a, b, c in _polynomials():
        square = X @ X.mT  # (..., m, m)
        X = torch.baddbmm(X, torch.baddbmm(square, square, square, beta=b, alpha=c), X, beta=a)
    return X


def inverse_root(S: Tensor) -> Tensor:
    """(S + RIDGE |S|_F I)^-1/2 of symmetric S (batch, r, r) without negative eigenvalues; finite for S = 0."""
    size = _norm(S)
    one = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    square, root = S / size + RIDGE * one, one.expand_as(S)
    for a, b, c in _polynomials():
        factor = torch.baddbmm(b * square + a * one, square, square, alpha=c)  # p(x) / x
        root, square = root @ factor, factor @ square @ factor
    result: Tensor = root * size.rsqrt()
    return result


def norm_bound(S: Tensor) -> Tensor:
    """(batch, 1, 1): the largest eigenvalue of symmetric S (batch, r, r) without negative ones, or a little more.

    |S|_2^k = |S^k|_2 <= |S^k|_F with k = 64: at most r^(1/128) times too large, 1.04 for r = 128. No less than the
    smallest number.
    """
    bound, power = torch.ones_like(S[:, :1, :1]), S
    for exponent in range(_NUM_SQUARINGS + 1):
        size = _norm(power)
        power = power / size
        bound, power = bound * size ** (0.5**exponent), power @ power
    return bound


def _norm(X: Tensor) -> Tensor:
    """(..., 1, 1): the Frobenius norm, whose squares neither overflow nor vanish; no less than the smallest number."""
    tiny = torch.finfo(X.dtype).tiny
    largest = X.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    norm: Tensor = largest * torch.linalg.matrix_norm(X / largest, keepdim=True)
    return norm.clamp_min(tiny)


def _polynomials() -> Iterator[tuple[float, float, float]]:
    *first, last = _POLYNOMIALS
    yield from ((a / _CUSHION, b / _CUSHION**3, c / _CUSHION**5) for a, b, c in first)
    yield last
