"""The one place where an update goes into its W, or out of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from relora.method.delta import lora_delta
from relora.method.lora import LoRALinear
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


@dataclass(frozen=True)
class Merge:
    """How well the merge of one layer went, as read back.

    Attributes:
        merge_error: |(W_new - W_old) - delta|_F / |delta|_F of the W that the model computes with, together with the
            product of new factors that begin at B != 0.
        master_error: the same of the exact W.
        effective_rank: of delta.
    """

    merge_error: float
    master_error: float
    effective_rank: float


@dataclass(frozen=True)
class Offset:
    """New factors with B != 0, whose product has been taken out of W.

    Attributes:
        product: scale * B @ A in the layout of W; None where W is stored exactly.
        error: Frobenius norm of what the exact W lacks after that, by rounding.
    """

    product: Tensor | None
    error: float


@torch.no_grad()
def merge_layer(
    layer: LoRALinear,
    store: Store,
    *,
    transform_delta: Callable[[Tensor], Tensor] | None = None,
    start: Callable[[], Offset | None] | None = None,
) -> Merge:
    """W += delta, added in at least fp32 and rounded once to W's dtype, in place.

    Only the factors are gathered where W is exact: each process forms the delta of the rows that it holds. A coarser
    stored W is made anew from its master, of which one layer is then whole on every process. Holds three
    further tensors of the size of W while it runs, five beside a coarser one.

    Args:
        transform_delta: gives what is added instead of delta, shard by shard (an outer optimizer).
        start: writes the next factors once W holds the update; returns their offset if B != 0.

    Raises:
        RuntimeError: what is read back is further from what was written than the rounding of W's dtype.
    """
    if layer.cache is not None:
        layer.cache.drop()
    A, B = store.read(layer.lora_A), store.read(layer.lora_B)  # (r, d_in), (d_out, r)
    rank = effective_rank(factor_singular_values(A, B, layer.scale))
    exact = store.master(layer.weight)
    delta = delta_of_shard(layer, A, B, exact)
    if transform_delta is not None:
        delta = transform_delta(delta)
    seen = None if layer.master is None else store.dequantized(layer.weight).clone()
    size, error = _add(exact, delta, store)
    if seen is not None:
        store.write(layer.weight, store.read(layer.weight))  # from the master, rounded once
    offset = start() if start is not None else None
    if seen is None:
        offset_error = offset.error if offset is not None else 0.0
        return Merge(_ratio(error + offset_error, size), _ratio(error, size), rank)
    if exact.is_partial:
        delta = lora_delta(A, B, layer.scale, transposed=layer.transposed)
    return Merge(_seen_error(layer, store, seen, delta, offset), _ratio(error, size), rank)


def preview_merge(
    layer: LoRALinear, store: Store, transform_delta: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """The exact full W as `merge_layer` is going to leave it, to the bit, and the transformed delta. Writes nothing.

    Returns:
        W in the layout of the layer, and this process's shard of what `transform_delta` returned, None without it.
    """
    exact = store.master(layer.weight)
    delta = delta_of_shard(layer, store.read(layer.lora_A), store.read(layer.lora_B), exact)
    if transform_delta is not None:
        delta = transform_delta(delta)
    merged = replace(exact, values=(exact.values.to(delta.dtype) + delta).to(exact.values.dtype))
    shape = store.shape(layer.weight)
    full = store.gather(shape, merged) if merged.is_partial else merged.values.view(shape)
    return full, delta if transform_delta is not None else None


def take_out(layer: LoRALinear, A: Tensor, B: Tensor, store: Store) -> Offset:
    """Exact W -= scale * B @ A, so that W and factors with B != 0 are together what W was. Rounds no coarser W.

    Raises:
        RuntimeError: as in `merge_layer`.
    """
    exact = store.master(layer.weight)
    _, error = _add(exact, -delta_of_shard(layer, A, B, exact), store)
    product = None if layer.master is None else lora_delta(A, B, layer.scale, transposed=layer.transposed)
    return Offset(product, error)


def delta_of_shard(layer: LoRALinear, A: Tensor, B: Tensor, part: Shard) -> Tensor:
    """The entries of delta that belong to `part` of W, in its shape and on its device.

    A shard may begin and end within a row. Entries 7 to 12 of a W with rows of 5, for example, lie in rows 1 and 2:
    these are formed, and the first 2 of their 10 entries are cut off.
    """
    width = layer.out_features if layer.transposed else layer.in_features
    first, last = part.start // width, -(-(part.start + part.values.numel()) // width)
    delta = lora_delta(A, B, layer.scale, transposed=layer.transposed, rows=slice(first, last))
    mine = delta.flatten()[part.start - first * width :][: part.values.numel()]
    return mine.view(part.values.shape).to(part.values.device)


def _add(part: Shard, delta: Tensor, store: Store) -> tuple[float, float]:
    """Add to the exact W; returns |delta|_F and |(W_new - W_old) - delta|_F as read back, over all shards."""
    old = part.values.to(delta.dtype, copy=True)
    part.values.copy_(old + delta)
    missed = (part.values - old).sub_(delta)
    squares = torch.stack([tensor.square().sum() for tensor in (old, delta, missed)]).double()
    size_old, size, error = store.reduce(part, squares).sqrt().tolist()
    # Half a unit in the last place of each sum, and as much of each difference; a factor of two to spare.
    if not error <= 2 * torch.finfo(part.values.dtype).eps * (size_old + size):
        raise RuntimeError(f"a merge of norm {size:.3g} into a weight of {size_old:.3g} reads back {error:.3g} off")
    return size, error


def _seen_error(layer: LoRALinear, store: Store, seen: Tensor, delta: Tensor, offset: Offset | None) -> float:
    """|(W_new - W_old) - delta|_F / |delta|_F of a coarser W, as the model computes with it.

    Args:
        seen: W_old, dequantized.
    """
    now = store.dequantized(layer.weight)
    if offset is not None and offset.product is not None:
        now = now + offset.product.to(now)
    delta = delta.view(now.shape).to(now)
    missed = (now - seen).sub_(delta)
    return _ratio(missed.norm().item(), delta.norm().item())


def _ratio(error: float, size: float) -> float:
    return error / size if size > 0 else error
