"""The one place where an update goes into its W."""

import torch

from relora.method.lora import LoRALinear, lora_delta
from relora.method.spectrum import effective_rank, factor_singular_values
from relora.method.store import Store


@torch.no_grad()
def merge_layer(layer: LoRALinear, store: Store) -> tuple[float, float]:
    """W += delta, added in at least fp32 and rounded once to W's dtype, in place.

    Holds three further tensors of the layer's size while it runs.

    Returns:
        (merge error |(W_new - W_old) - delta|_F / |delta|_F as read back, effective rank of delta).
    """
    A, B = store.read(layer.lora_A), store.read(layer.lora_B)
    delta = lora_delta(A, B, layer.scale, transposed=layer.transposed)
    old = store.read(layer.weight).to(delta.dtype, copy=True)
    store.write(layer.weight, old + delta)
    size, missed = delta.norm(), (store.read(layer.weight) - old).sub_(delta).norm()
    error = (missed / size).item() if size > 0 else missed.item()
    return error, effective_rank(factor_singular_values(A, B, layer.scale))
