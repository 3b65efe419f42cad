"""The matrix functions against singular values and eigenvalues in float64."""

import pytest
import torch
from torch import Tensor

from relora.method.matrix_functions import RIDGE, inverse_root, matrix_sign, norm_bound

SHAPES = [(1, 5), (8, 40), (32, 32), (64, 200)]


def with_values(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Two matrices (m, n) of these singular values, and their U V^T, in float64."""
    torch.manual_seed(0)
    m = len(values)
    U, V = (torch.linalg.qr(torch.randn(2, size, m, dtype=torch.float64)).Q for size in (m, n))
    return U * values @ V.mT, U @ V.mT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_the_sign_is_that_of_the_singular_vectors(shape: tuple[int, int], size: float) -> None:
    X, expected = with_values(torch.logspace(0, -2, shape[0], dtype=torch.float64), shape[1])
    sign = matrix_sign((size * X).float())
    torch.testing.assert_close(sign.double(), expected, atol=1e-5, rtol=0)


def test_small_singular_values_end_between_0_and_1_and_nothing_above() -> None:
    values = torch.tensor([1, 1e-1, 3e-3, 1e-4, 1e-5, 0], dtype=torch.float64)
    X, _ = with_values(values, 30)
    found = torch.linalg.svdvals(matrix_sign(X.float()).double())
    assert found.max() < 1 + 1e-5
    for matrix in found:
        torch.testing.assert_close(matrix[:3], torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
        assert 0.3 < matrix[3] < 0.9 and 0.03 < matrix[4] < 0.2 and matrix[5] < 1e-2
    assert not matrix_sign(torch.zeros(2, 3, 7)).any()


@pytest.mark.parametrize(("r", "smallest"), [(1, 1), (8, 0.1), (32, 1e-2), (16, 0)])
def test_the_inverse_root_is_that_of_the_eigenvalues(r: int, smallest: float) -> None:
    X, _ = with_values(torch.linspace(1, smallest, r, dtype=torch.float64), r)
    S = 7e-9 * X @ X.mT
    ridge = RIDGE * torch.linalg.matrix_norm(S, keepdim=True) * torch.eye(r)
    values, vectors = torch.linalg.eigh(S + ridge)
    expected = vectors * values.rsqrt()[:, None] @ vectors.mT
    off = torch.linalg.matrix_norm(inverse_root(S.float()).double() - expected) / torch.linalg.matrix_norm(expected)
    assert off.max() < 2e-3
    assert inverse_root(torch.zeros(2, r, r)).isfinite().all()


@pytest.mark.parametrize("values", [[1.0], [1.0] * 128, [1.0, 0.99, 0.5], [1e-18, 0.0], [3e18, 1.0]])
def test_the_bound_is_no_less_than_the_largest_eigenvalue_and_little_more(values: list[float]) -> None:
    X, _ = with_values(torch.tensor(values, dtype=torch.float64), len(values))
    S = X @ X.mT
    ratio = norm_bound(S.float()).double().flatten() / torch.linalg.matrix_norm(S, 2)
    assert ratio.min() > 1 - 1e-5
    assert ratio.max() < len(values) ** (1 / 128) + 1e-4
    assert norm_bound(torch.zeros(2, 3, 3)).max() < 1e-37
