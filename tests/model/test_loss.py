"""The cross-entropy in chunks against torch's own, and what it holds in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from relora.data.batches import IGNORED_LABEL
from relora.model import loss
from relora.model.loss import summed_cross_entropy

ROWS, WIDTH = 13, 11


@pytest.fixture(params=[1, 5, 13, 100], ids=lambda rows: f"{rows} rows at a time")
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", request.param * WIDTH)


def drawn(dtype: torch.dtype = torch.float64, *, rows: int = ROWS, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Logits and targets, every third of which is no label."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(width, (rows,), generator=generator)
    targets[::3] = IGNORED_LABEL
    return logits.to(dtype).requires_grad_(), targets


def both(logits: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient: ours, and those of torch in float64 at once."""
    found = []
    for function, of in ((summed_cross_entropy, logits), (torchs, logits.detach().double().requires_grad_())):
        value = function(of, targets)
        [grad] = torch.autograd.grad(0.37 * value, of)
        found.append((value, grad))
    return found


def torchs(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")


@pytest.mark.usefixtures("_chunks")
def test_equals_torchs_in_float64() -> None:
    [(value, grad), (theirs, their_grad)] = both(*drawn())
    torch.testing.assert_close(value, theirs, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad, their_grad, rtol=1e-13, atol=1e-16)
    assert torch.autograd.gradcheck(summed_cross_entropy, drawn())


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_its_dtypes(dtype: torch.dtype) -> None:
    [(value, grad), (theirs, their_grad)] = both(*drawn(dtype))
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value.double(), theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), their_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.usefixtures("_chunks")
def test_without_a_label_all_is_zero() -> None:
    logits, _ = drawn(torch.float32)
    value = summed_cross_entropy(logits, torch.full((ROWS,), IGNORED_LABEL))
    value.backward()
    assert value == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.usefixtures("_chunks")
def test_an_impossible_label_is_an_infinite_loss_with_finite_gradients() -> None:
    logits, targets = drawn(torch.float32)
    with torch.no_grad():
        logits[1, targets[1]] = -torch.inf
    value = summed_cross_entropy(logits, targets)
    value.backward()
    assert value == torch.inf
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.usefixtures("_chunks")
def test_under_autocast_and_without_gradients() -> None:
    logits, targets = drawn(torch.bfloat16)
    expected = summed_cross_entropy(logits, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(summed_cross_entropy(logits, targets), expected)
    with torch.no_grad():
        assert torch.equal(summed_cross_entropy(logits, targets), expected)


class Largest(TorchDispatchMode):
    """The largest number of entries of a tensor that an operator made in each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.of[tensor.dtype] = max(self.of.get(tensor.dtype, 0), tensor.numel())
        return result


def test_in_float32_there_are_only_some_rows_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 8 * WIDTH)
    logits, targets = drawn(torch.bfloat16, rows=64)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_cross_entropy(logits, targets).backward()
    assert largest.of[torch.float32] == 8 * WIDTH
    assert largest.of[torch.bfloat16] == 64 * WIDTH, "the gradient, once"
    assert [tensor.data_ptr() for tensor in kept] == [logits.data_ptr(), targets.data_ptr()]
