"""A run is a list of stages. State -> build -> go on: a start, a switch and a resume are this one path."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from relora.checkpoint.master_weights import place_masters
from relora.checkpoint.state import State
from relora.checkpoint.weights import first_weights, load_weights, model_weights
from relora.config import Config
from relora.config.derived import lora_config
from relora.engines import Engine, TrainState
from relora.method.choices import StageName
from relora.method.inject import inject_lora
from relora.method.lora import lora_layers
from relora.method.names import named_parameters
from relora.method.optimizer import build_optimizer
from relora.method.optimizer_state import Slot
from relora.method.reinit import draw_lora_A
from relora.method.restart import begin_carried
from relora.method.schedule import Schedule
from relora.method.store import Store
from relora.model.liger import use_liger_kernels
from relora.model.model import empty_model, recompute_activations


@dataclass(frozen=True)
class Stage:
    """Updates up to step `end`, all of one kind."""

    name: StageName
    end: int

    @property
    def is_low_rank(self) -> bool:
        return self.name == "low_rank"


def stages(schedule: Schedule) -> list[Stage]:
    """The stages of a run in order; a full-rank one comes first if the run has one."""
    full = [Stage("full_rank", schedule.warm_start_steps)] if schedule.warm_start_steps else []
    return full + ([Stage("low_rank", schedule.max_steps)] if schedule.has_low_rank_stage else [])


def build(stage: Stage, state: State, *, config: Config, hf_config: PretrainedConfig, engine: Engine) -> TrainState:
    """Model and optimizer of `stage`, holding what `state` holds, on the engine.

    A fresh state draws or downloads the weights; one of another stage gives its weights alone; one of this
    stage gives everything.
    """
    model = empty_model(config.model, hf_config)
    make_trainable(model, stage, config, draw_index=engine.draw_index)
    live = engine.prepare(model, partial(optimizer_for, config=config))
    place_masters(live.model, engine, folder=Path(config.output_dir) if config.lora.master == "disk" else None)
    weights = first_weights(config, hf_config, engine.world) if state.stage is None else state.weights
    load_weights(live.model, weights, engine.store, factors=state.stage == stage.name)
    if stage.is_low_rank and state.stage != stage.name and config.relora.carry_residual:
        begin_carried(live.model, seed=config.seed, store=engine.store)
    if state.stage == stage.name:
        _load_quantized(live, state, engine.store)
        _load_optimizer(live, state, engine.store)
        if state.state_index != engine.draw_index:
            _draw_own(live, state.cycle, config, engine)
    for name, tensor in state.extra.items():
        engine.outer.load(name, tensor.to(engine.world.device))
    if not state.extra:
        engine.begin(live)
    return live


def make_trainable(model: PreTrainedModel, stage: Stage, config: Config, *, draw_index: int = 0) -> None:
    """Make a plain model, in place, the one that `stage` trains."""
    if config.model.liger_kernel:
        use_liger_kernels(model)
    if stage.is_low_rank:
        inject_lora(model, lora_config(config), seed=config.seed, reinit=config.relora.reinit, draw_index=draw_index)
    else:
        freeze_untrained(model, config.training.trainable)
    if config.model.gradient_checkpointing:
        recompute_activations(model)
    model.train()


def switch(live: TrainState, engine: Engine, step: int, skipped: int) -> State:
    """What a stage hands to the next: its weights. The optimizer, the gradients and the hooks stay behind."""
    engine.release(live)
    return State(step, skipped, stage="full_rank", weights=model_weights(live.model, engine.store))


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


def _draw_own(live: TrainState, cycle: int, config: Config, engine: Engine) -> None:
    """At a restart a rank that was not there before takes another's state, but searches in a subspace of its own."""
    for name, layer in lora_layers(live.model).items():
        A = draw_lora_A(
            layer.r,
            layer.in_features,
            reinit=config.relora.reinit,
            seed=config.seed,
            index=cycle,
            name=name,
            draw_index=engine.draw_index,
        )
        engine.store.write(layer.lora_A, A)


def optimizer_for(model: nn.Module, config: Config) -> Optimizer:
    """The optimizer of the configuration over what `model` trains."""
    optim = config.optim
    return build_optimizer(
        model,
        name=optim.name,
        learning_rate=optim.learning_rate,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_epsilon=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
    )


def _load_quantized(live: TrainState, state: State, store: Store) -> None:
    """What the model computes with; where factors carry the rest of the exact W it does not follow from the master."""
    parameters: Mapping[str, nn.Parameter] = named_parameters(live.model)
    for name, codes in state.quantized.items():
        for part in store.local_copies(parameters[name]).values():
            part.values.copy_(part.of(codes))


def _load_optimizer(live: TrainState, state: State, store: Store) -> None:
    parameters: Mapping[str, nn.Parameter] = named_parameters(live.model)
    for name, moments in state.moments.items():
        parameter = parameters[name]
        store.make_state(live.optimizer, parameter, {slot: Slot.of(values) for slot, values in moments.items()})
        for slot, values in moments.items():
            store.write_slot(live.optimizer, parameter, slot, values)
        if name in state.steps:  # an optimizer may keep no count
            store.write_step(live.optimizer, parameter, state.steps[name])
