"""The one place where an update goes into its W."""

from collections.abc import Callable

import torch
from torch import Tensor

from relora.method.lora import LoRALinear, lora_delta
from relora.method.spectrum import effective_rank, factor_singular_values
from relora.method.store import Store


@torch.no_grad()
def merge_layer(
    layer: LoRALinear, store: Store, *, outer: Callable[[Tensor], Tensor] | None = None
) -> tuple[float, float]:
    """W += delta, added in at least fp32 and rounded once to W's dtype, in place.

    Only the factors are gathered: each process forms the delta of the rows that it holds of W. Holds three
    further tensors of that size while it runs.

    Args:
        outer: what an outer optimizer makes of delta before it is added.

    Returns:
        (merge error |(W_new - W_old) - delta|_F / |delta|_F as read back, effective rank of delta).

    Raises:
        RuntimeError: what is read back is further from what was written than the rounding of W's dtype.
    """
    if layer.kept is not None:
        layer.kept.drop()
    A, B = store.read(layer.lora_A), store.read(layer.lora_B)
    [W, *others] = store.copies(layer.weight).values()
    assert not others, "a frozen weight has one copy"
    width = layer.out_features if layer.transposed else layer.in_features
    first, last = W.start // width, -(-(W.start + W.values.numel()) // width)
    delta = lora_delta(A, B, layer.scale, transposed=layer.transposed, rows=slice(first, last))
    delta = delta.flatten()[W.start - first * width :][: W.values.numel()].view(W.values.shape).to(W.values.device)
    if outer is not None:
        delta = outer(delta)
    old = W.values.to(delta.dtype, copy=True)
    W.values.copy_(old + delta)
    missed = (W.values - old).sub_(delta)
    squares = torch.stack([tensor.square().sum() for tensor in (old, delta, missed)]).double()
    size_old, size, error = store.total(layer.weight, squares).sqrt().tolist()
    # Half a unit in the last place of each sum, and as much of each difference; a factor of two to spare.
    if not error <= 2 * torch.finfo(W.values.dtype).eps * (size_old + size):
        raise RuntimeError(f"a merge of norm {size:.3g} into a weight of {size_old:.3g} reads back {error:.3g} off")
    return error / size if size > 0 else error, effective_rank(factor_singular_values(A, B, layer.scale))
