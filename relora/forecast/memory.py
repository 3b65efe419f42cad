"""Memory of one process by component, for one stage: what is always there, and what is added at the peaks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from relora.config import Config
from relora.config.derived import lora_config
from relora.forecast.dry_run import History, Rehearsal, fake, fake_model
from relora.forecast.engine_costs import Launch, Parts, Sharing, parts, sharing
from relora.method.parameter_report import ParameterReport, parameter_report
from relora.train.stages import Stage


@dataclass(frozen=True)
class StageModel:
    """The parameters of a stage: their census, their bytes, and those of the largest tensor and of all buffers."""

    parameter_report: ParameterReport
    parts: Parts
    largest_tensor: int
    num_buffer_bytes: int


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process.

    Attributes:
        stage: warm_start or relora.
        device: at the peak of an update, by component; their sum is that peak.
        host: in host memory all the time, by component. Without a GPU it is the same memory.
        restart: peak of a restart on the device, or None where there are none.
        save: peak of a checkpoint on the device.
        save_host: what a checkpoint takes on the host.
    """

    stage: str
    device: dict[str, int]
    host: dict[str, int]
    restart: int | None
    save: int
    save_host: int

    @property
    def update(self) -> int:
        return sum(self.device.values())

    @property
    def peak(self) -> int:
        return max(self.update, self.restart or 0, self.save)


def stage_model(stage: Stage, config: Config, hf_config: PretrainedConfig) -> StageModel:
    """The parameters that a stage has."""
    with fake():
        model = fake_model(stage, config, hf_config)
        counted = parameter_report(model)
        return StageModel(
            parameter_report=counted,
            parts=parts(model, factors=counted.factors.num_bytes),
            largest_tensor=max(p.nbytes for p in model.parameters()),
            num_buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        )


def assemble(stage: Stage, config: Config, launch: Launch, model: StageModel, rehearsed: Rehearsal) -> StageMemory:
    """The memory of one process, from the whole that was rehearsed and the share that the engine leaves it."""
    shares = sharing(launch, config, model.parts)
    kept = _kept(model, rehearsed, shares)
    level = sum(kept.values())
    merges = stage.is_low_rank and config.training.method == "relora" and config.relora.restart_every is not None
    is_sharded = shares.weights < 1
    return StageMemory(
        stage=stage.name,
        device=kept | _at_peak(rehearsed, shares, trained=model.parts.trained),
        host=_host(stage, config, model.parameter_report, launch),
        restart=level + math.ceil(rehearsed.merge * shares.weights) if merges else None,
        save=level + (model.largest_tensor if is_sharded else 0),
        save_host=model.largest_tensor if launch.on_gpu else 0,
    )


def _kept(model: StageModel, rehearsed: Rehearsal, shares: Sharing) -> dict[str, int]:
    """What is there between updates."""
    counted = model.parameter_report
    weights = {
        "base weights": counted.wrapped,
        "LoRA factors": counted.factors,
        "trained in full": counted.full,
        "frozen for good": counted.frozen,
    }
    return {kind: math.ceil(group.num_bytes * shares.weights) for kind, group in weights.items()} | {
        "buffers of the model": model.num_buffer_bytes,
        "fp32 copies of what is trained (ZeRO)": shares.masters,
        "optimizer state": math.ceil(rehearsed.optimizer_state * shares.optimizer),
        "buffers of the engine": shares.buffers,
    }


def _at_peak(rehearsed: Rehearsal, shares: Sharing, *, trained: int) -> dict[str, int]:
    """What the costliest moment of an update adds: in the passes, or in the optimizer's step."""
    other, gradients = _costliest(rehearsed.passes, shares, trained=trained)
    step, whole = math.ceil(rehearsed.step_temporaries * shares.optimizer), math.ceil(trained * shares.gradients)
    if step + whole > other + gradients:
        return {"gradients": whole, "activations": 0, "logits, loss, temporaries": step}
    activations = min(rehearsed.activations, other)
    return {"gradients": gradients, "activations": activations, "logits, loss, temporaries": other - activations}


def _costliest(passes: History, shares: Sharing, *, trained: int) -> tuple[int, int]:
    """(everything else, gradients) of one process when they are most."""
    held = [(other, math.ceil(shares.gradients * (trained if shares.gradients_stay else g))) for other, g in passes]
    return max(held, key=sum)


def _host(stage: Stage, config: Config, counted: ParameterReport, launch: Launch) -> dict[str, int]:
    """The exact fp32 master beside a coarser base, each process with its part."""
    needs_master = stage.is_low_rank and lora_config(config).base_dtype not in (None, "float32")
    numbers = sum(d_out * d_in for d_out, d_in in counted.wrapped_layers.values())
    num_shares = 1 if config.relora.sync == "restart" else launch.num_processes
    where = ", mapped from disk" if config.lora.master == "disk" else ""
    return {f"exact fp32 master{where}": math.ceil(4 * numbers / num_shares)} if needs_master else {}


GIB = 2**30
COMMON_GPUS_GIB = (24, 40, 80, 141)
# What is not ours to use: the CUDA context, the libraries' workspaces, and what the allocator cannot fill.
RESERVED_SHARE = 0.08


@dataclass(frozen=True)
class Line:
    """The peak of a stage over the batch: at least `floor`, and base + slope * samples."""

    floor: int
    base: float
    slope: float

    def at(self, batch_size: int) -> float:
        return max(self.floor, self.base + self.slope * batch_size)


@dataclass(frozen=True)
class Fit:
    """One size of GPU.

    Attributes:
        largest: the largest batch per device that fits each stage, None where not even one sample does.
        usable: the largest that fits all stages and divides the global batch.
    """

    gib: float
    largest: dict[str, int | None]
    usable: int | None


def line_through(small: StageMemory, large: StageMemory, small_batch: int, large_batch: int) -> Line:
    """Through the peaks of an update at two batches; what does not depend on the batch is the floor."""
    slope = (large.update - small.update) / (large_batch - small_batch)
    floor = max(small.restart or 0, small.save)
    return Line(floor, small.update - slope * small_batch, slope)


def fit(gib: float, lines: dict[str, Line], divisors: Sequence[int]) -> Fit:
    """What fits a GPU of `gib`.

    Args:
        divisors: batches per device that divide the global batch, ascending.
    """
    room = gib * GIB * (1 - RESERVED_SHARE)
    largest = {stage: _largest(line, room) for stage, line in lines.items()}
    usable = [size for size in divisors if all(line.at(size) <= room for line in lines.values())]
    return Fit(gib, largest, max(usable, default=None))


def divisors_of(global_batch_size: int, num_processes: int) -> list[int]:
    """The batches per device that `training.global_batch_size` allows on so many processes."""
    share = global_batch_size // num_processes
    return [size for size in range(1, share + 1) if global_batch_size % (size * num_processes) == 0]


def _largest(line: Line, room: float) -> int | None:
    if line.at(1) > room:
        return None
    assert line.slope > 0, "a larger batch takes more memory"
    return int((room - line.base) / line.slope)
