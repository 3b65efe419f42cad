"""The exact fp32 weights beside coarser ones, in a `state_dict`.

They are no buffers: they stay in host memory, or in mapped files, when a model moves to a device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from relora.method.store import FrozenLayer, Shard

MASTER = "master"


def add_master(layer: FrozenLayer, state: dict[str, Any], prefix: str) -> None:
    """Put the master of a layer into its state: in the shape of W, or this process's shard of it, flat."""
    if layer.master is not None:
        values = layer.master.values
        state[prefix + MASTER] = values if layer.master.is_partial else values.view(layer.weight_format.shape)


@torch.no_grad()
def take_master(
    layer: FrozenLayer, state: Mapping[str, Any], prefix: str, *, assign: bool, missing: list[str], errors: list[str]
) -> dict[str, Any]:
    """Set the master of a layer from a state, whichever format that was saved in.

    The exact W is the master of the state, or its W if that is float32 or float64. A layer that holds W exactly takes
    it as its W; one that stores it otherwise than the state stores its own W anew.

    Args:
        assign: as in `load_state_dict`.
        missing, errors: lists to which what is wrong is added.

    Returns:
        The state that is left for the parameters.
    """
    rest, key = dict(state), prefix + MASTER
    stored: Tensor | None = rest.get(prefix + "weight")
    exact: Tensor | None = rest.pop(key, None)
    if exact is None and stored is not None and stored.is_floating_point() and stored.dtype.itemsize >= 4:
        exact = stored
    if layer.master is None:
        return rest if exact is None else rest | {prefix + "weight": exact}
    if exact is None:
        missing.append(key)
        return rest
    shape, values, weight = torch.Size(layer.weight_format.shape), layer.master.values, layer.weight
    if exact.shape != shape and exact.shape != values.shape:
        errors.append(f"size mismatch for {key}: {tuple(exact.shape)} in the state, {tuple(shape)} in the model")
        return rest
    if exact.shape == shape and (stored is None or (stored.dtype, stored.shape) != (weight.dtype, weight.shape)):
        rest[prefix + "weight"] = layer.weight_format.quantize(exact if weight.is_meta else exact.to(weight.device))
    mine = layer.master.of(exact) if exact.shape == shape else exact
    if assign or values.is_meta:
        layer.master = Shard(mine.detach().float().cpu().clone(), layer.master.start, layer.master.is_partial)
    else:
        values.copy_(mine)
    return rest
