"""From canonical tensors to a model, for training and for export."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from relora.checkpoint.state import State, Weights
from relora.config import Config, UserError
from relora.config.derived import lora_config
from relora.engines import Engine
from relora.method.inject import inject_lora, merge_lora
from relora.method.lora import factor_names, wrapped_names
from relora.method.names import canonical, named_parameters
from relora.method.store import Store, TorchStore
from relora.method.targets import modules_in_full, task_heads
from relora.method.usage import ModelUsage, usage_of_wrapped
from relora.model.model import build_model, empty_model, skeleton
from relora.model.tasks import Task


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state (not caches such as rotary tables), by canonical name."""
    persistent = model.state_dict().keys()
    return {canonical(name): buffer for name, buffer in model.named_buffers() if name in persistent}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights, store: Store, *, factors: bool = True) -> None:
    """Fill the parameters and persistent buffers of `model`, in place, one tensor at a time.

    Args:
        factors: whether the LoRA factors are filled too; they stay as they were drawn otherwise.

    Raises:
        UserError: the names or shapes of the state are not those of the model.
    """
    parameters, buffers = named_parameters(model), persistent_buffers(model)
    left_alone = set() if factors else factor_names(model)
    wanted = [name for name in (*parameters, *buffers) if name not in left_alone]
    differing = sorted(set(wanted) ^ weights.names)
    if differing:
        raise UserError([f"the saved state is of another model: {len(differing)} names differ, such as {differing[0]}"])
    for name in wanted:
        values = weights.take(name)
        shape = buffers[name].shape if name in buffers else store.shape(parameters[name])
        if values.shape != shape:
            there, here = tuple(values.shape), tuple(shape)
            raise UserError([f"the saved state is of another model: {name} is {there} there, {here} here"])
        if name in buffers:
            buffers[name].copy_(values)
        else:
            store.write(parameters[name], values)


def merged_model(states: Sequence[State], config: Config, hf_config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """The plain model in float32 on the CPU that computes what the run computes.

    Args:
        states: the state of the run, or of each of the processes that train separately: the result is their mean.
    """
    models = (_merged(state, config, hf_config, task) for state in states)
    mean = next(models)
    for count, model in enumerate(models, start=2):
        for parameter, other in zip(mean.parameters(), model.parameters(), strict=True):
            parameter.data.lerp_(other.data, 1 / count)  # the mean of `count` models
    return mean.eval()


def _merged(state: State, config: Config, hf_config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """The plain model of one state."""
    model = empty_model(config.model, hf_config, task)
    if state.stage == "low_rank":
        # A checkpoint says which layers are wrapped, and holds the exact weights. Nothing is computed before the merge.
        usage = ModelUsage(unfit=usage_of_wrapped(model, wrapped_names(state.weights.names)))
        inject_lora(model, replace(lora_config(config), base_dtype=None, kernels="torch"), usage=usage)
    load_weights(model, state.weights, TorchStore())
    if state.stage == "low_rank":
        merge_lora(model)
    return model


def trained_heads(model: nn.Module, config: Config) -> set[str]:
    """Names of the parameters in heads that train in full: pretrained weights of a body alone do not have them."""
    training, in_full = config.training, task_heads(model)
    if training.method != "full" and not config.relora.warm_start_steps:
        heads, wanted = set(in_full), modules_in_full(model, lora_config(config))
        in_full = [module for module in wanted if module.split(".")[0] in heads]
    pattern = training.trainable if training.method == "full" else None
    names = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{module}." for module in in_full))}
    return {name for name in names if pattern is None or re.search(pattern, name)}


def first_weights(config: Config, hf_config: PretrainedConfig, engine: Engine) -> Weights:
    """The weights that a run begins with, drawn or downloaded by process 0 alone; taking one sends it to all."""
    if engine.world.process_index == 0:
        fresh = partial(trained_heads, config=config)
        model = build_model(config.model, hf_config, engine.task, seed=config.seed, may_lack=fresh)
    else:
        model = skeleton(config.model, hf_config, engine.task)
    tensors = {name: parameter.detach() for name, parameter in named_parameters(model).items()}
    tensors |= persistent_buffers(model)  # on all processes but the first without values

    def take(name: str) -> Tensor:
        return engine.world.broadcast(tensors.pop(name), 0)

    return Weights(tensors.keys(), take)


def model_weights(model: nn.Module, store: Store) -> Weights:
    """The weights of a model whose stage has ended, each released when it is taken."""
    parameters, buffers = named_parameters(model), persistent_buffers(model)

    def take(name: str) -> Tensor:
        return buffers.pop(name) if name in buffers else store.read(parameters.pop(name))

    return Weights(parameters.keys() | buffers.keys(), take)
