"""Memory of one process by component, between updates and at the peaks of a stage; the batch that fits a GPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from relora.config import Config
from relora.config.derived import lora_config
from relora.forecast.dry_run import DryRun, fake, fake_model
from relora.forecast.engine_costs import Launch, ModelBytes, Shares, model_bytes, num_master_shards, shares_of
from relora.method.choices import BaseDtype
from relora.method.parameter_report import ParameterReport, parameter_report
from relora.train.stages import Stage

GIB = 2**30
COMMON_GPUS_GIB = (24, 40, 80, 141)
# Memory of a GPU that a run cannot use: the CUDA context, workspaces of libraries, gaps that the allocator cannot fill.
RESERVED_SHARE = 0.08


@dataclass(frozen=True)
class StageModel:
    """The parameters of a stage.

    Attributes:
        num_bytes: what engines need to know of their sizes.
        largest_tensor: bytes of the largest parameter.
        num_buffer_bytes: bytes of all buffers.
    """

    parameter_report: ParameterReport
    num_bytes: ModelBytes
    largest_tensor: int
    num_buffer_bytes: int


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process.

    Attributes:
        stage: full_rank or low_rank.
        device: at the peak of an update, by component; their sum is that peak.
        host: in host memory all the time, by component. Without a GPU it is the same memory.
        restart: peak of a restart on the device, or None where there are none.
        save: peak of a checkpoint on the device.
        save_host: the additional host memory of a checkpoint, in the process that writes it.
    """

    stage: str
    device: dict[str, int]
    host: dict[str, int]
    restart: int | None
    save: int
    save_host: int

    @property
    def update(self) -> int:
        """The peak of an update on the device."""
        return sum(self.device.values())

    @property
    def peak(self) -> int:
        """The peak of the stage on the device."""
        return max(self.update, self.restart or 0, self.save)


def stage_model(stage: Stage, config: Config, hf_config: PretrainedConfig) -> StageModel:
    """Measure the parameters of a stage, without values."""
    with fake():
        model = fake_model(stage, config, hf_config)
        report = parameter_report(model)
        return StageModel(
            parameter_report=report,
            num_bytes=model_bytes(model, factors=report.factors.num_bytes),
            largest_tensor=max(p.nbytes for p in model.parameters()),
            num_buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        )


def stage_memory(stage: Stage, config: Config, launch: Launch, model: StageModel, dry_run: DryRun) -> StageMemory:
    """The memory of one process, from a dry run of the whole model and the shares that the engine leaves it."""
    shares = shares_of(launch, config, model.num_bytes)
    between = between_updates(model, dry_run, shares)
    level = sum(between.values())
    merges = stage.is_low_rank and config.training.method == "relora" and config.relora.restart_every is not None
    is_sharded = shares.weights < 1
    masters = exact_master(stage, config, model.parameter_report, launch)
    save_host = model.largest_tensor if launch.on_gpu else 0
    if config.training.async_save:
        num_shards = num_master_shards(config, launch)
        all_masters = num_shards * sum(masters.values()) if num_shards > 1 else 0
        save_host += copies_of_a_save(
            model, dry_run, masters=all_masters, base_dtype=config.lora.base_dtype, is_sharded=is_sharded
        )
    return StageMemory(
        stage=stage.name,
        device=between | at_peak(dry_run, shares, trained=model.num_bytes.trained),
        host=masters,
        restart=level + math.ceil(dry_run.merge * shares.weights) if merges else None,
        save=level + (model.largest_tensor if is_sharded else 0),  # gathered one at a time
        save_host=save_host,
    )


def between_updates(model: StageModel, dry_run: DryRun, shares: Shares) -> dict[str, int]:
    """Bytes by component that are allocated between updates."""
    report = model.parameter_report
    weights = {
        "base weights": report.wrapped,
        "LoRA factors": report.factors,
        "trained in full": report.full,
        "frozen for good": report.frozen,
    }
    return {kind: math.ceil(group.num_bytes * shares.weights) for kind, group in weights.items()} | {
        "buffers of the model": model.num_buffer_bytes,
        "fp32 copies of what is trained (ZeRO)": shares.masters,
        "optimizer state": math.ceil(dry_run.optimizer_state * shares.optimizer),
        "buffers of the engine": shares.buffers,
    }


def at_peak(dry_run: DryRun, shares: Shares, *, trained: int) -> dict[str, int]:
    """Bytes by component that the costliest moment of an update adds: in the passes, or in the optimizer's step.

    Args:
        trained: bytes of the trained parameters, and so of all gradients.
    """
    # (everything else, gradients) of one process, at the moment of the passes when their sum is largest
    moments = [
        (other, math.ceil(shares.gradients * (trained if shares.gradients_stay else gradients)))
        for other, gradients in dry_run.passes
    ]
    other, gradients = max(moments, key=sum)
    step, all_gradients = math.ceil(dry_run.step_temporaries * shares.optimizer), math.ceil(trained * shares.gradients)
    if step + all_gradients > other + gradients:
        return {"gradients": all_gradients, "activations": 0, "logits, loss, temporaries": step}
    activations = min(dry_run.activations, other)
    return {"gradients": gradients, "activations": activations, "logits, loss, temporaries": other - activations}


def exact_master(stage: Stage, config: Config, report: ParameterReport, launch: Launch) -> dict[str, int]:
    """Bytes in host memory of this process's shard of the exact fp32 master, beside weights of a coarser dtype."""
    if not stage.is_low_rank or lora_config(config).base_dtype in (None, "float32"):
        return {}
    num_entries = sum(d_out * d_in for d_out, d_in in report.wrapped_layers.values())
    where = ", mapped from disk" if config.lora.master == "disk" else ""
    return {f"exact fp32 master{where}": math.ceil(4 * num_entries / num_master_shards(config, launch))}


def copies_of_a_save(
    model: StageModel, dry_run: DryRun, *, masters: int, base_dtype: BaseDtype, is_sharded: bool
) -> int:
    """Bytes of the copies in the host memory of the first process from which a thread writes a checkpoint.

    Of all that is trained, with its optimizer state, and of frozen weights that no process holds whole.

    Args:
        masters: bytes of all exact masters, if they are sharded; else 0.
        is_sharded: whether the weights that the model computes with are.
    """
    report = model.parameter_report
    copies = model.num_bytes.trained + dry_run.optimizer_state + model.num_buffer_bytes + masters
    if is_sharded:
        copies += report.frozen.num_bytes
        # Quantized weights are saved beside their masters; bf16 weights follow from them.
        copies += 0 if masters and base_dtype == "bfloat16" else report.wrapped.num_bytes
    return copies


@dataclass(frozen=True)
class PeakLine:
    """The peak of a stage in bytes over the batch per device: base + slope * samples, and at least `floor`."""

    floor: int
    base: float
    slope: float

    def at(self, batch_size: int) -> float:
        """The peak at a batch."""
        return max(self.floor, self.base + self.slope * batch_size)

    def largest_batch(self, room: float) -> int | None:
        """The largest batch whose peak is at most `room` bytes; None if not even one sample fits."""
        if self.at(1) > room:
            return None
        assert self.slope > 0, "a larger batch takes more memory"
        return int((room - self.base) / self.slope)


@dataclass(frozen=True)
class BatchFit:
    """One size of GPU.

    Attributes:
        largest: the largest batch per device that fits each stage, None where not even one sample does.
        usable: the largest that fits all stages and divides the global batch.
    """

    gib: float
    largest: dict[str, int | None]
    usable: int | None


def line_through(small: StageMemory, large: StageMemory, small_batch: int, large_batch: int) -> PeakLine:
    """The line through the peaks of an update at two batches; the peaks of restarts and saves are its floor.

    Args:
        small, large: the memory of a stage at `small_batch` and at `large_batch` samples per device.
    """
    slope = (large.update - small.update) / (large_batch - small_batch)
    floor = max(small.restart or 0, small.save)
    return PeakLine(floor, small.update - slope * small_batch, slope)


def fit_batch(gib: float, lines: dict[str, PeakLine], divisors: Sequence[int]) -> BatchFit:
    """The batches that fit a GPU of `gib`.

    Args:
        lines: peak over the batch, by stage.
        divisors: batches per device that divide the global batch, ascending.
    """
    room = gib * GIB * (1 - RESERVED_SHARE)
    largest = {stage: line.largest_batch(room) for stage, line in lines.items()}
    usable = [size for size in divisors if all(line.at(size) <= room for line in lines.values())]
    return BatchFit(gib, largest, max(usable, default=None))


def divisors_of(global_batch_size: int, num_processes: int) -> list[int]:
    """The batches per device that `training.global_batch_size` allows on so many processes, ascending.

    12 on 2 processes: 1, 2, 3, 6.
    """
    most = global_batch_size // num_processes
    return [size for size in range(1, most + 1) if global_batch_size % (size * num_processes) == 0]
