"""The forecast of a run, as one value: numbers, memory, FLOPs, traffic, the batch that fits, and advice."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from relora.config import Config
from relora.config.derived import derived_numbers, lora_config, rank_of_a_cycle, schedule_of
from relora.forecast.dry_run import dry_run_update
from relora.forecast.engine_costs import Launch, SentBytes, can_cache_merged, num_independent_updates, sent_bytes
from relora.forecast.flops import (
    LayerWork,
    UpdateFlops,
    break_even_rank,
    full_rank_update,
    layer_work,
    low_rank_update,
    num_merged,
)
from relora.forecast.memory import (
    COMMON_GPUS_GIB,
    GIB,
    RESERVED_SHARE,
    BatchFit,
    PeakLine,
    StageMemory,
    StageModel,
    divisors_of,
    fit_batch,
    line_through,
    stage_memory,
    stage_model,
)
from relora.method.schedule import Schedule
from relora.train.stages import Stage, stages


def restart_advice(config: Config) -> Iterator[str]:
    """Advice on restarts after which the learning rate does not recover, and on runs without restarts."""
    schedule, rewarm = schedule_of(config), config.schedule.restart_warmup_steps
    every = schedule.restart_every
    if not schedule.has_low_rank_stage or every is None:
        return
    num_restarts = schedule.restarts_done(schedule.max_steps)
    if num_restarts == 0:
        yield (
            f"relora.restart_every = {every}: no restart comes before the end at {schedule.max_steps}, so the update "
            f"stays of rank {config.lora.r}"
        )
        return
    last = schedule.warm_start_steps + num_restarts * every
    if last < schedule.max_steps < last + rewarm:
        yield (
            f"the restart at {last} is followed by {schedule.max_steps - last} updates and a re-warm-up of {rewarm}: "
            "its learning rate never recovers before the end"
        )
    if every <= rewarm:
        yield (
            f"relora.restart_every = {every}: schedule.restart_warmup_steps = {rewarm}, so the learning rate is never "
            "down from one re-warm-up before the next begins"
        )


def route_advice(config: Config, *, break_even: int, ratio: float) -> Iterator[str]:
    """Advice on low-rank updates that cost more than full-rank ones, and on settings that make them dearer."""
    r, lora = config.lora.r, lora_config(config)
    if r > break_even:
        yield (
            f"lora.r = {r}: above {break_even} low-rank updates need more FLOPs than full-rank ones (here {ratio:.2f} "
            "times as many)"
        )
    if lora.lora_dropout > 0:
        yield f"lora.lora_dropout = {lora.lora_dropout}: rules out the merged forward pass, one product with W + delta"
    if lora.base_dtype not in (None, "float32"):
        yield f"lora.base_dtype = {lora.base_dtype}: rules out the merged forward pass, W + delta would be rounded away"


def saving_advice(full: int, low: int) -> Iterator[str]:
    """Advice on low-rank training that saves no memory; `full` and `low` are the peaks of the two stages in bytes."""
    if low >= full:
        yield f"low rank takes no less memory than full rank: {low / 2**20:,.0f} MiB against {full / 2**20:,.0f}"


def room_advice(stage: str, peak: int, *, room: float | None) -> Iterator[str]:
    """Advice on a stage whose peak does not fit.

    Args:
        room: bytes of the device that a run can use; None if that is not known.
    """
    if room is not None and peak > room:
        yield (
            f"stage {stage} needs {peak / 2**30:.1f} GiB and the device leaves {room / 2**30:.1f}: try "
            "model.gradient_checkpointing, a smaller training.per_device_batch_size, or an engine that shards"
        )


# The least batch whose peak is on the line: with fewer samples the gradients may dominate.
LEAST_ON_LINE = 2


@dataclass(frozen=True)
class Compute:
    """FLOPs of an update over all processes; `low_rank` and the rest are None without a low-rank stage.

    Attributes:
        expected_ratio: time of a low-rank update over a full-rank one, if products took all of it.
        merged_layers: number of the wrapped layers that compute with W + delta.
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
    """The needs of a run.

    Attributes:
        numbers: numbers that follow from the settings, with restarts and reachable rank.
        models: the parameters of each stage.
        memory: of one process, by stage.
        sent: bytes that one process sends, by stage.
        lines: peak over the batch, by stage.
        fits: the batches that fit, by size of GPU.
    """

    launch: Launch
    numbers: dict[str, Any]
    models: dict[str, StageModel]
    memory: dict[str, StageMemory]
    compute: Compute
    sent: dict[str, SentBytes]
    lines: dict[str, PeakLine]
    fits: list[BatchFit]
    advice: list[str]

    def as_dict(self) -> dict[str, Any]:
        """All numbers, as `relora plan --json` writes them: the attributes, and the peaks of each stage in bytes.

        peaks: {stage: {"update": of an update, "peak": of updates, restarts and saves}}.
        """
        peaks = {name: {"update": memory.update, "peak": memory.peak} for name, memory in self.memory.items()}
        return asdict(self) | {"peaks": peaks}


def forecast(
    config: Config, hf_config: PretrainedConfig, launch: Launch, *, device_gib: float | None = None
) -> Forecast:
    """Forecast a run. Nothing is allocated, nothing is read but the model's configuration.

    Args:
        device_gib: memory of one device, to be judged beside the common sizes.

    Raises:
        UserError: the model cannot be computed without values.
        ValueError: the global batch cannot be divided over the processes.
    """
    if not can_cache_merged(config, launch):
        config = config.model_copy(update={"lora": config.lora.model_copy(update={"keep_merged": False})})
    schedule, numbers = schedule_of(config), derived_numbers(config, launch.num_processes)
    models, memory, lines = dict[str, StageModel](), dict[str, StageMemory](), dict[str, PeakLine]()
    for stage in stages_to_compare(schedule):
        models[stage.name] = stage_model(stage, config, hf_config)
        memory[stage.name], lines[stage.name] = forecast_memory(stage, config, hf_config, launch, models[stage.name])
    work = layer_work(config, hf_config, device_type="cuda" if launch.on_gpu else "cpu")
    compute = forecast_compute(config, work)
    lines_of_run: dict[str, PeakLine] = {stage.name: lines[stage.name] for stage in stages(schedule)}
    divisors = divisors_of(config.training.global_batch_size, launch.num_processes)
    sizes = sorted({*COMMON_GPUS_GIB, *([device_gib] if device_gib is not None else [])})
    return Forecast(
        launch=launch,
        numbers=numbers | reachable_rank(config, launch, models),
        models=models,
        memory=memory,
        compute=compute,
        sent={name: sent_bytes(launch, config, model.num_bytes) for name, model in models.items()},
        lines=lines,
        fits=[fit_batch(gib, lines_of_run, divisors) for gib in sizes],
        advice=[*restart_advice(config), *cost_advice(config, memory, compute, device_gib)],
    )


def stages_to_compare(schedule: Schedule) -> list[Stage]:
    """A full-rank stage, even if the run has none, as the reference for the low-rank one that follows."""
    low = [Stage("low_rank", schedule.max_steps)] if schedule.has_low_rank_stage else []
    return [Stage("full_rank", schedule.warm_start_steps or schedule.max_steps), *low]


def forecast_memory(
    stage: Stage, config: Config, hf_config: PretrainedConfig, launch: Launch, model: StageModel
) -> tuple[StageMemory, PeakLine]:
    """The memory at the configured batch, and how it grows with the batch on a GPU."""
    batch, on_gpu = config.training.per_device_batch_size, replace(launch, on_gpu=True)
    small = max(batch, LEAST_ON_LINE)
    # A set: on a GPU the configured batch is mostly one of the two on the line.
    memory = {
        (size, place): stage_memory(
            stage, config, place, model, dry_run_update(stage, config, hf_config, batch_size=size, on_gpu=place.on_gpu)
        )
        for size, place in {(batch, launch), (small, on_gpu), (2 * small, on_gpu)}
    }
    line = line_through(memory[small, on_gpu], memory[2 * small, on_gpu], small, 2 * small)
    return memory[batch, launch], line


def forecast_compute(config: Config, work: LayerWork) -> Compute:
    """The FLOPs of an update in both stages, and how they compare."""
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


def reachable_rank(config: Config, launch: Launch, models: Mapping[str, StageModel]) -> dict[str, Any]:
    """The rank that the sum of all updates can have, and the number of layers whose smaller side it reaches."""
    if "low_rank" not in models:
        return {}
    num_cycles = schedule_of(config).restarts_done(config.training.max_steps) + 1
    rank = num_cycles * rank_of_a_cycle(config) * num_independent_updates(config, launch)
    sides = [min(shape) for shape in models["low_rank"].parameter_report.wrapped_layers.values()]
    return {"reachable_rank": rank, "full_rank_layers": sum(rank >= side for side in sides)}


def cost_advice(
    config: Config, memory: Mapping[str, StageMemory], compute: Compute, device_gib: float | None
) -> Iterator[str]:
    """Advice on memory, for the stages that the run has, and on compute."""
    room = None if device_gib is None else device_gib * GIB * (1 - RESERVED_SHARE)
    for stage in stages(schedule_of(config)):
        yield from room_advice(stage.name, memory[stage.name].peak, room=room)
    if compute.break_even_rank is not None and compute.expected_ratio is not None:
        yield from route_advice(config, break_even=compute.break_even_rank, ratio=compute.expected_ratio)
        yield from saving_advice(memory["full_rank"].peak, memory["low_rank"].peak)
