"""Everything that is known of a run before it starts, as one value."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from transformers import PretrainedConfig

from relora.config import Config
from relora.config.derived import Plan, derived_numbers
from relora.plan.advice import restart_advice, room_advice, route_advice, saving_advice
from relora.plan.fits import COMMON_GPUS_GIB, GIB, RESERVED_SHARE, Fit, Line, divisors_of, fit, line_through
from relora.plan.flops import (
    LayerWork,
    UpdateFlops,
    break_even_rank,
    full_rank_update,
    low_rank_update,
    num_merged,
)
from relora.plan.memory import StageMemory, StageModel, assemble, stage_model
from relora.plan.rehearsal import Rehearsal, rehearse
from relora.plan.sharing import Launch, Traffic, traffic
from relora.plan.work import layer_work
from relora.stages import Stage, stages

# The least batch whose peak is on the line: with fewer samples the gradients may be what is most.
LEAST_ON_LINE = 2


@dataclass(frozen=True)
class Compute:
    """FLOPs of an update over all processes; `low_rank` and what follows is None without a low-rank stage.

    Attributes:
        expected_ratio: time of a low-rank update over a full-rank one, if products took all of it.
        merged_layers: how many of the wrapped layers compute with W + delta.
        break_even_rank: the largest r at which low rank costs no more.
    """

    full_rank: UpdateFlops
    low_rank: UpdateFlops | None = None
    expected_ratio: float | None = None
    merged_layers: int | None = None
    wrapped_layers: int | None = None
    break_even_rank: int | None = None


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
        numbers: what the settings amount to, with restarts and reachable rank.
        models: the census of each stage.
        memory: of one process, by stage.
        sent: bytes that one process sends, by stage.
        lines: peak over the batch, by stage.
    """

    launch: Launch
    numbers: dict[str, Any]
    models: dict[str, StageModel]
    memory: dict[str, StageMemory]
    compute: Compute
    sent: dict[str, Traffic]
    lines: dict[str, Line]
    fits: list[Fit]
    advice: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "peaks": {name: {"update": memory.update, "peak": memory.peak} for name, memory in self.memory.items()}
        }


def forecast(
    config: Config, hf_config: PretrainedConfig, launch: Launch, *, device_gib: float | None = None
) -> Forecast:
    """Look ahead. Nothing is allocated, nothing is read but the model's configuration.

    Args:
        device_gib: memory of one device, beside that of the common ones.

    Raises:
        ValueError: the global batch cannot be divided over the processes.
    """
    config = _as_launched(config, launch)
    plan, numbers = Plan(config), derived_numbers(config, launch.num_processes)
    models, memory, lines = dict[str, StageModel](), dict[str, StageMemory](), dict[str, Line]()
    for stage in stages_beside_full_rank(plan):
        models[stage.name] = stage_model(stage, config, hf_config)
        memory[stage.name], lines[stage.name] = _look(stage, config, hf_config, launch, models[stage.name])
    compute = _compute(config, layer_work(config, hf_config, device_type="cuda" if launch.on_gpu else "cpu"))
    of_the_run: dict[str, Line] = {stage.name: lines[stage.name] for stage in stages(plan)}
    divisors = divisors_of(config.training.global_batch_size, launch.num_processes)
    sizes = sorted({*COMMON_GPUS_GIB, *([device_gib] if device_gib is not None else [])})
    return Forecast(
        launch=launch,
        numbers=numbers | _reachable(config, launch, models),
        models=models,
        memory=memory,
        compute=compute,
        sent={name: traffic(launch, config, model.parts) for name, model in models.items()},
        lines=lines,
        fits=[fit(gib, of_the_run, divisors) for gib in sizes],
        advice=[*restart_advice(config), *_advice(config, memory, compute, device_gib)],
    )


def _as_launched(config: Config, launch: Launch) -> Config:
    """W + delta is kept only where W is whole between two passes, and no compiler decides what is."""
    if launch.engine in ("one", "ddp") and not config.model.torch_compile:
        return config
    return config.model_copy(update={"lora": config.lora.model_copy(update={"keep_merged": False})})


def stages_beside_full_rank(plan: Plan) -> list[Stage]:
    """A full-rank stage, whether the run has one or it is only what low rank is held against, then the low-rank one."""
    low = [Stage("relora", plan.max_steps)] if plan.has_low_rank_stage else []
    return [Stage("warm_start", plan.warm_start_steps or plan.max_steps), *low]


def _look(
    stage: Stage, config: Config, hf_config: PretrainedConfig, launch: Launch, model: StageModel
) -> tuple[StageMemory, Line]:
    """The memory at the configured batch, and how it grows with the batch on a GPU."""
    batch = config.training.per_device_batch_size

    @cache
    def rehearsed(batch_size: int, on_gpu: bool) -> Rehearsal:
        return rehearse(stage, config, hf_config, batch_size=batch_size, on_gpu=on_gpu)

    def at(batch_size: int, here: Launch) -> StageMemory:
        return assemble(stage, config, here, model, rehearsed(batch_size, here.on_gpu))

    small, on_gpu = max(batch, LEAST_ON_LINE), replace(launch, on_gpu=True)
    line = line_through(at(small, on_gpu), at(2 * small, on_gpu), small, 2 * small)
    return at(batch, launch), line


def _compute(config: Config, work: LayerWork) -> Compute:
    training = config.training
    num_tokens = training.per_device_batch_size * config.data.sequence_length
    num_calls = training.global_batch_size // training.per_device_batch_size
    full = full_rank_update(work, num_calls=num_calls, num_tokens=num_tokens)
    if training.method == "full":
        return Compute(full)
    low = low_rank_update(work, num_calls=num_calls, num_tokens=num_tokens, r=config.lora.r)
    return Compute(
        full,
        low,
        expected_ratio=low.total / full.total,
        merged_layers=num_merged(work, num_tokens=num_tokens, r=config.lora.r),
        wrapped_layers=len(work.wrapped),
        break_even_rank=break_even_rank(work, num_tokens=num_tokens),
    )


def _reachable(config: Config, launch: Launch, models: Mapping[str, StageModel]) -> dict[str, Any]:
    """The rank that the sum of all updates can have, and how many layers it fills."""
    if "relora" not in models:
        return {}
    together = launch.num_processes if config.relora.sync == "restart" else 1
    rank = (Plan(config).restarts_done(config.training.max_steps) + 1) * config.lora.r * together
    sides = [min(shape) for shape in models["relora"].census.wrapped_layers.values()]
    return {"reachable_rank": rank, "full_rank_layers": sum(rank >= side for side in sides)}


def _advice(
    config: Config, memory: Mapping[str, StageMemory], compute: Compute, device_gib: float | None
) -> Iterator[str]:
    room = None if device_gib is None else device_gib * GIB * (1 - RESERVED_SHARE)
    for stage in stages(Plan(config)):
        yield from room_advice(stage.name, memory[stage.name].peak, room=room)
    if compute.break_even_rank is not None and compute.expected_ratio is not None:
        yield from route_advice(config, break_even=compute.break_even_rank, ratio=compute.expected_ratio)
        yield from saving_advice(memory["warm_start"].peak, memory["relora"].peak)
