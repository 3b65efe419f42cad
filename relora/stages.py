"""A run is a list of stages. State -> build -> go on: a start, a switch and a resume are this one path."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from relora.config import Config
from relora.config.derived import Plan, lora_config
from relora.method.inject import inject_lora
from relora.method.names import named_parameters
from relora.method.optimizer import build_optimizer
from relora.method.schedule import StageName
from relora.model import build_model, empty_model
from relora.runtime.engines import Engine, Live
from relora.runtime.rebuild import load_weights, persistent_buffers
from relora.runtime.state import Clock, State


@dataclass(frozen=True)
class Stage:
    """Updates up to step `end`, all of one kind."""

    name: StageName
    end: int

    @property
    def is_low_rank(self) -> bool:
        return self.name == "relora"


def stages(plan: Plan) -> list[Stage]:
    """The stages of a run in order; a full-rank one comes first if the run has one."""
    full = [Stage("warm_start", plan.warm_start_steps)] if plan.warm_start_steps else []
    return full + ([Stage("relora", plan.max_steps)] if plan.has_low_rank_stage else [])


def build(stage: Stage, state: State, *, config: Config, hf_config: PretrainedConfig, engine: Engine) -> Live:
    """Model and optimizer of `stage`, holding what `state` holds, on the engine.

    A fresh state draws or downloads the weights; one of another stage gives its weights alone; one of this
    stage gives everything.
    """
    model = _model(stage, state, config, hf_config)
    state.free()
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    wrapped = engine.prepare(model, compiled=config.model.torch_compile)
    optim = config.optim
    optimizer = build_optimizer(
        model,
        name=optim.name,
        learning_rate=optim.learning_rate,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_epsilon=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
    )
    live = Live(model=model, wrapped=wrapped, optimizer=optimizer)
    if state.stage == stage.name:
        _load_optimizer(live, state, engine)
    return live


def switch(live: Live, engine: Engine, clock: Clock) -> State:
    """What a stage hands to the next: its weights. The optimizer, the gradients and the hooks stay behind."""
    tensors: dict[str, Tensor] = dict(persistent_buffers(live.model))
    tensors |= {name: engine.store.read(parameter) for name, parameter in named_parameters(live.model).items()}
    return State(clock=clock, stage="warm_start", weights={name: values.cpu() for name, values in tensors.items()})


def freeze_untrained(model: nn.Module, trainable: str | None) -> None:
    """Method full: train every parameter, or those whose name `trainable` (a regex) is found in.

    Raises:
        ValueError: it is found in no name.
    """
    names = named_parameters(model)
    chosen = [name for name in names if trainable is None or re.search(trainable, name)]
    if not chosen:
        raise ValueError(f"training.trainable = {trainable}: found in no parameter's name, such as {next(iter(names))}")
    for name, parameter in names.items():
        parameter.requires_grad_(name in chosen)


def _model(stage: Stage, state: State, config: Config, hf_config: PretrainedConfig) -> PreTrainedModel:
    if state.stage is None:
        model = build_model(config.model, hf_config, seed=config.seed)
    else:
        model = empty_model(config.model, hf_config)
        if state.stage != stage.name:
            load_weights(model, state.weights)
    if stage.is_low_rank:
        inject_lora(model, lora_config(config), seed=config.seed, reinit=config.relora.reinit)
    else:
        freeze_untrained(model, config.training.trainable)
    if state.stage == stage.name:
        load_weights(model, state.weights)
    return model


def _load_optimizer(live: Live, state: State, engine: Engine) -> None:
    parameters: Mapping[str, nn.Parameter] = named_parameters(live.model)
    for name, moments in state.moments.items():
        engine.write_state(live.optimizer, parameters[name], moments, state.steps[name])
