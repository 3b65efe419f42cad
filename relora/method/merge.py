"""The one place where an update goes into its W."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from relora.method.lora import LoRALinear, lora_delta
from relora.method.store import Shard, Store


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


Factors = tuple[Tensor, Tensor]
Carry = Callable[[Tensor], Factors]


@dataclass(frozen=True)
class Merge:
    """What the merge of one layer came to, as read back.

    Attributes:
        merge_error: |(W_new - W_old) - delta|_F / |delta|_F of the W that the model computes with, what the next
            factors carry included.
        master_error: the same of the exact W.
        effective_rank: of delta.
        carried: the factors (A, B) of what the stored W has no room for, to go on from; None if they are drawn.
    """

    merge_error: float
    master_error: float
    effective_rank: float
    carried: Factors | None = None


@torch.no_grad()
def merge_layer(
    layer: LoRALinear,
    store: Store,
    *,
    outer: Callable[[Tensor], Tensor] | None = None,
    carry: Carry | None = None,
) -> Merge:
    """W += delta, added in at least fp32 and rounded once to W's dtype, in place.

    Only the factors are gathered where W is exact: each process forms the delta of the rows that it holds. A coarser
    stored W is made anew from its master, of which one layer is then whole on every process. Holds three
    further tensors of the size of W while it runs, five beside a coarser one.

    Args:
        outer: what an outer optimizer makes of delta before it is added.
        carry: as in `carry_residual`; None where the next factors are drawn.

    Raises:
        RuntimeError: what is read back is further from what was written than the rounding of W's dtype.
    """
    if layer.cache is not None:
        layer.cache.drop()
    A, B = store.read(layer.lora_A), store.read(layer.lora_B)
    exact = store.master(layer.weight)
    delta = _delta_of_part(layer, A, B, exact)
    if outer is not None:
        delta = outer(delta)
    rank = effective_rank(factor_singular_values(A, B, layer.scale))
    if layer.master is None:
        error = _add(exact, delta, store)
        return Merge(error, error, rank)
    seen = store.dequantized(layer.weight).clone()
    master_error = _add(exact, delta, store)
    store.write(layer.weight, store.read(layer.weight))
    now = store.dequantized(layer.weight)
    carried = None if carry is None else carry_residual(layer, store, carry)
    if carried is not None:
        now = now + lora_delta(*carried, layer.scale, transposed=layer.transposed)
    if exact.is_partial:
        delta = lora_delta(A, B, layer.scale, transposed=layer.transposed)
    delta = delta.view(now.shape).to(now)
    missed = (now - seen).sub_(delta)
    return Merge(_ratio(missed.norm().item(), delta.norm().item()), master_error, rank, carried)


@torch.no_grad()
def carry_residual(layer: LoRALinear, store: Store, carry: Carry) -> Factors:
    """Take what a coarser stored W lacks of the exact one into factors, as far as they can hold it.

    The exact W is then less by their product, so that nothing counts twice: W + delta is what it was.

    Args:
        carry: makes factors (A, B) of what is lacking, which has the layout of W.
    """
    stored = store.dequantized(layer.weight)
    A, B = carry(store.read(layer.weight).to(stored) - stored)
    exact = store.master(layer.weight)
    kept = lora_delta(A, B, layer.scale, transposed=layer.transposed)
    exact.values.sub_(exact.of(kept).to(exact.values))
    return A, B


def _delta_of_part(layer: LoRALinear, A: Tensor, B: Tensor, part: Shard) -> Tensor:
    """The entries of delta that belong to `part` of W, in its shape and on its device."""
    width = layer.out_features if layer.transposed else layer.in_features
    first, last = part.start // width, -(-(part.start + part.values.numel()) // width)
    delta = lora_delta(A, B, layer.scale, transposed=layer.transposed, rows=slice(first, last))
    mine = delta.flatten()[part.start - first * width :][: part.values.numel()]
    return mine.view(part.values.shape).to(part.values.device)


def _add(part: Shard, delta: Tensor, store: Store) -> float:
    """Add to an exact W, and return |(W_new - W_old) - delta|_F / |delta|_F as read back."""
    old = part.values.to(delta.dtype, copy=True)
    part.values.copy_(old + delta)
    missed = (part.values - old).sub_(delta)
    squares = torch.stack([tensor.square().sum() for tensor in (old, delta, missed)]).double()
    size_old, size, error = store.reduce(part, squares).sqrt().tolist()
    # Half a unit in the last place of each sum, and as much of each difference; a factor of two to spare.
    if not error <= 2 * torch.finfo(part.values.dtype).eps * (size_old + size):
        raise RuntimeError(f"a merge of norm {size:.3g} into a weight of {size_old:.3g} reads back {error:.3g} off")
    return _ratio(error, size)


def _ratio(error: float, size: float) -> float:
    return error / size if size > 0 else error
