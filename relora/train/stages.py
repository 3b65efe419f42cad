"""A run is a list of stages. State -> build -> train: a start, a switch and a resume are this one path."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from relora.checkpoint.format import History
from relora.checkpoint.master_weights import place_masters
from relora.checkpoint.state import State
from relora.checkpoint.weights import first_weights, load_weights, model_weights
from relora.config import Config
from relora.config.derived import lora_config, reinit_policy, schedule_of
from relora.engines import Engine, TrainState
from relora.errors import raise_if_any
from relora.method.choices import StageName
from relora.method.inject import inject_lora
from relora.method.lora import factor_names, wrapped_names
from relora.method.names import named_parameters
from relora.method.optimizer import build_optimizer
from relora.method.optimizer_state import Slot
from relora.method.registry import resolve_object
from relora.method.reset import RESETS, Reset, problems_before_training
from relora.method.restart import start_factors
from relora.method.schedule import Schedule
from relora.method.state_rules import counters_beside_state
from relora.method.store import Store
from relora.method.usage import ModelUsage, usage_in_source, usage_of_wrapped
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


def build(
    stage: Stage,
    state: State,
    *,
    config: Config,
    hf_config: PretrainedConfig,
    engine: Engine,
    usage: ModelUsage | None = None,
) -> TrainState:
    """Model and optimizer of `stage` with the values of `state`, on the engine.

    A fresh state draws or downloads the weights; one of another stage gives its weights alone; one of this stage gives
    everything, also which layers are wrapped.

    Args:
        usage: how the model uses its layers; None for what its source tells.
    """
    resumes = state.stage == stage.name
    # 1. The model as the stage trains it, still without values, and its optimizer, on the engine.
    model = empty_model(config.model, hf_config, engine.task)
    usage = usage_in_source(model) if usage is None else usage
    if resumes and stage.is_low_rank:
        usage = replace(usage, unfit={**usage_of_wrapped(model, wrapped_names(state.weights.names)), **usage.unfit})
    make_trainable(model, stage, config, usage)
    engine.some_gradients_missing = usage.routed
    live = engine.prepare(model, lambda prepared: optimizer_for(prepared, config))
    raise_if_any(state_problems(live, stage, config, engine.store))
    place_masters(live.model, engine, folder=Path(config.output_dir) if config.lora.master == "disk" else None)
    # 2. Weights, and new factors unless they come from this stage.
    weights = first_weights(config, hf_config, engine) if state.stage is None else state.weights
    load_weights(live.model, weights, engine.store, factors=resumes)
    if stage.is_low_rank and not resumes:
        start_factors(
            live.model,
            seed=config.seed,
            reinit=reinit_policy(config),
            carry_residual=config.relora.carry_residual,
            store=engine.store,
            draw_index=engine.draw_index,
        )
    # 3. The rest of this stage's own state.
    if resumes:
        _load_own_state(live, state, engine.store)
    engine.begin(live, state.extra, cycle=state.cycle, draw_index=state.state_index if resumes else engine.draw_index)
    return live


def state_problems(live: TrainState, stage: Stage, config: Config, store: Store) -> list[str]:
    """Why the optimizer's state could not be saved, or not be reset by a restart. Known before there is any."""
    trained = {name: p for name, p in named_parameters(live.model).items() if p.requires_grad}
    counters = counters_beside_state(live.optimizer, trained.values(), store)
    if counters:
        return [
            f"optim.name = {config.optim.name}: counts updates beside the state of the parameters "
            f"({', '.join(counters)}), which no checkpoint holds: a resumed run would be another one"
        ]
    if not stage.is_low_rank or schedule_of(config).restart_every is None:
        return []
    reset = resolve_object("relora.optimizer_reset", config.relora.optimizer_reset, RESETS, Reset)  # type: ignore[type-abstract]
    factors = {name: p for name, p in trained.items() if name in factor_names(live.model)}
    found = problems_before_training(live.optimizer, factors, reset, store)
    own = config.optim.factors
    chosen = f"optim.name = {config.optim.name}" if own is None else f"optim.factors = {own}"
    return [f"{chosen}, relora.optimizer_reset: {problem}" for problem in found]


def make_trainable(model: PreTrainedModel, stage: Stage, config: Config, usage: ModelUsage | None = None) -> None:
    """Make a plain model, in place, the one that `stage` trains. Its weights need no values yet."""
    usage = usage_in_source(model) if usage is None else usage
    if config.model.liger_kernel:
        use_liger_kernels(model)
    if stage.is_low_rank:
        inject_lora(model, lora_config(config), reinit=None, usage=usage)  # `start_factors` draws the factors
    else:
        freeze_untrained(model, config.training.trainable, usage)
    if config.model.gradient_checkpointing:
        recompute_activations(model)
    model.train()


def freeze_untrained(model: nn.Module, trainable: str | None, usage: ModelUsage) -> None:
    """Method full: train the parameters that the architecture trains, or those that the regex `trainable` is found in.

    Parameters that get no gradient are frozen too.

    Raises:
        ValueError: it matches no name.
    """
    names = named_parameters(model)
    chosen = {name for name in names if trainable is None or re.search(trainable, name)}
    if not chosen:
        raise ValueError(
            f"training.trainable = {trainable}: matches no parameter name (names look like {next(iter(names))})"
        )
    chosen -= usage.idle if trainable is not None else usage.idle | usage.frozen
    for name, parameter in names.items():
        parameter.requires_grad_(name in chosen)


def switch(live: TrainState, engine: Engine, *, step: int, history: History) -> State:
    """Release the full-rank stage's optimizer and gradients, and return its weights for the next stage."""
    engine.release(live)
    return State(step=step, history=history, stage="full_rank", weights=model_weights(live.model, engine.store))


def optimizer_for(model: nn.Module, config: Config) -> Optimizer:
    """The optimizer of the configuration over the trainable parameters of `model`."""
    optim = config.optim
    return build_optimizer(
        model,
        name=optim.name,
        learning_rate=optim.learning_rate,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_epsilon=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        factors=optim.factors,
        factors_learning_rate=optim.factors_learning_rate,
        muon_learning_rate=optim.muon_learning_rate,
    )


def _load_own_state(live: TrainState, state: State, store: Store) -> None:
    """Load the state of the same stage: quantized weights as they are stored, and the optimizer's.

    Quantized weights do not follow from the master where factors carry a residual.
    """
    parameters: Mapping[str, nn.Parameter] = named_parameters(live.model)
    for name, values in state.quantized.items():
        for shard in store.local_copies(parameters[name]).values():
            shard.values.copy_(shard.of(values))
    # Each trained parameter gets its moments, and its step count if the optimizer keeps one.
    for name, moments in state.moments.items():
        parameter = parameters[name]
        slots, step = {slot: Slot.of(values) for slot, values in moments.items()}, state.steps.get(name)
        store.make_state(live.optimizer, parameter, slots, step=step)
        for slot, values in moments.items():
            store.write_slot(live.optimizer, parameter, slot, values)
        if step is not None:  # under ZeRO several parameters share one state, which may exist already
            store.write_step(live.optimizer, parameter, step)
