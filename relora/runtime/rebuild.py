"""A model out of a state: the one way from canonical tensors to modules, for training and for export."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from relora.config import ModelSection, UserError
from relora.method.inject import inject_lora, merge_lora
from relora.method.lora import LoRAConfig
from relora.method.names import canonical, named_parameters
from relora.model import empty_model
from relora.runtime.state import State


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state (not caches such as rotary tables), by canonical name."""
    kept = model.state_dict().keys()
    return {canonical(name): buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill every parameter and persistent buffer of `model`, in place, one tensor at a time.

    Raises:
        UserError: the names or shapes of the state are not those of the model.
    """
    wanted: dict[str, Tensor] = {**named_parameters(model), **persistent_buffers(model)}
    differing = sorted(wanted.keys() ^ weights.keys())
    if differing:
        raise UserError([f"the saved state is of another model: {len(differing)} names differ, such as {differing[0]}"])
    for name, target in wanted.items():
        values = weights[name]
        if values.shape != target.shape:
            raise UserError(
                [
                    f"the saved state is of another model: {name} is {tuple(values.shape)} there, "
                    f"{tuple(target.shape)} here"
                ]
            )
        target.copy_(values)


def merged_model(state: State, section: ModelSection, hf_config: PretrainedConfig, lora: LoRAConfig) -> PreTrainedModel:
    """The plain model in float32 on the CPU that computes what the run computes at `state`."""
    model = empty_model(section, hf_config)
    if state.stage == "relora":
        inject_lora(model, lora)
    load_weights(model, state.weights)
    if state.stage == "relora":
        merge_lora(model)
    return model.eval()
