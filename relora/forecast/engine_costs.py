"""Engines: the shards that each leaves to a process, the buffers it holds and the bytes it sends.

All that depends on `relora.sync: restart` in a forecast is in this file too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from relora.config import Config, UserError
from relora.config.derived import accumulation_steps
from relora.engines.fsdp2 import FSDPOptions

EngineName = Literal["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)

# DeepSpeed's defaults, in numbers of 4 bytes: reduce_bucket_size, stage3_prefetch_bucket_size,
# stage3_max_live_parameters, stage3_param_persistence_threshold (deepspeed/runtime/zero/config.py).
ZERO_BUCKET, ZERO_PREFETCH, ZERO_LIVE, ZERO_SMALL = 500_000_000, 50_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class Launch:
    """The engine and the processes of a run.

    Attributes:
        on_gpu: whether each process has a GPU; otherwise all use the host's memory.

    Raises:
        UserError: no such engine, or not with so many processes.
    """

    engine: EngineName
    num_processes: int
    on_gpu: bool

    def __post_init__(self) -> None:
        if self.engine not in ENGINE_NAMES:
            raise UserError([f"--engine {self.engine}: must be one of {', '.join(ENGINE_NAMES)}"])
        if self.num_processes < 1:
            raise UserError([f"--processes {self.num_processes}: must be at least 1"])
        if self.engine == "one" and self.num_processes > 1:
            raise UserError([f"--processes {self.num_processes}: engine one is one process; ddp is several"])


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model that matter to engines.

    Attributes:
        weights: of all parameters, as stored.
        trained: of the trained parameters.
        factors: of the LoRA factors.
        units: (bytes, bytes trained) of the blocks that FSDP2 gathers one at a time.
        small: of the parameters that ZeRO-3 does not shard.
    """

    weights: int
    trained: int
    factors: int
    units: tuple[tuple[int, int], ...]
    small: int

    @property
    def root(self) -> int:
        """Outside of all units."""
        return self.weights - sum(unit for unit, _ in self.units)


def model_bytes(model: nn.Module, *, factors: int) -> ModelBytes:
    """Measure a model, in units as FSDP2 forms them by default."""

    def num_bytes(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.nbytes for p in parameters)

    weights = list(model.parameters())
    options = FSDPOptions(
        reshard_after_forward=True,
        cpu_offload=False,
        activation_checkpointing=False,
        block_names=(),
        min_num_params=None,
        one_unit=False,
    )
    units = options.units(model) if getattr(model, "_no_split_modules", None) else []
    return ModelBytes(
        weights=num_bytes(weights),
        trained=num_bytes(p for p in weights if p.requires_grad),
        factors=factors,
        units=tuple(
            (num_bytes(unit.parameters()), num_bytes(p for p in unit.parameters() if p.requires_grad)) for unit in units
        ),
        small=num_bytes(p for p in weights if p.numel() < ZERO_SMALL),
    )


@dataclass(frozen=True)
class Shares:
    """The fraction of the whole that one process holds, and bytes that the engine itself holds.

    Attributes:
        gradients_stay: whether gradients are there during forward passes too.
        masters: fp32 copies of the trained parameters.
        buffers: buckets, gathered weights.
    """

    weights: float
    optimizer: float
    gradients: float
    gradients_stay: bool
    masters: int
    buffers: int


def shares_of(launch: Launch, config: Config, model: ModelBytes) -> Shares:
    """How `launch` shards a model, the launcher's options at their defaults."""
    n, accumulates = launch.num_processes, accumulation_steps(config, launch.num_processes) > 1
    fraction, shard = 1 / n, math.ceil(model.trained / n)
    bucket = ZERO_BUCKET * 4 if launch.on_gpu else min(ZERO_BUCKET * 4, model.trained)
    match launch.engine:
        case "one":
            return Shares(1, 1, 1, accumulates, 0, 0)
        case "ddp" if is_local(config, model):
            return Shares(1, 1, 1, accumulates, 0, outer_optimizer_bytes(config, model))
        case "ddp":
            return Shares(1, 1, 1, True, 0, 0)  # gradients are views of its buckets, which stay
        case "fsdp2":
            gradients = fraction if config.training.sync_each_batch else 1
            return Shares(fraction, fraction, gradients, accumulates, 0, fsdp2_buffers(model, on_gpu=launch.on_gpu))
        case "zero1":
            return Shares(1, fraction, 1, accumulates, shard, bucket + shard)
        case "zero2":
            return Shares(1, fraction, fraction, accumulates, shard, bucket + shard)
        case "zero3":
            live = min(model.weights, (ZERO_LIVE + ZERO_PREFETCH) * 4)
            return Shares(fraction, fraction, fraction, True, shard, 2 * bucket + live)


@dataclass(frozen=True)
class SentBytes:
    """Bytes that a process sends in rings, at most: ZeRO-3 may still hold what it would gather again."""

    update: float
    restart: float


def sent_bytes(launch: Launch, config: Config, model: ModelBytes) -> SentBytes:
    """The traffic of an update and of a restart (optimizer_reset zero)."""
    n, k = launch.num_processes, accumulation_steps(config, launch.num_processes)
    ring, gradients = (n - 1) / n, model.trained
    num_reductions = k if config.training.sync_each_batch else 1
    match launch.engine:
        case "one":
            return SentBytes(0, 0)
        case "ddp" if is_local(config, model):
            return SentBytes(0, (n - 1) * model.factors + 2 * ring * (model.trained - model.factors))
        case "ddp":
            return SentBytes(2 * ring * gradients, 0)
        case "fsdp2":
            gathered = k * (2 * model.weights - model.root)  # the units again for the backward pass
            return SentBytes(ring * (num_reductions * gradients + gathered), ring * 12 * model.factors)
        case "zero1":
            return SentBytes(ring * 3 * gradients, ring * 10 * model.factors)
        case "zero2":
            return SentBytes(ring * (2 * k + 1) * gradients, ring * 10 * model.factors)
        case "zero3":
            gathered = model.small + k * 2 * (model.weights - model.small)
            return SentBytes(ring * (k * gradients + gathered), ring * 12 * model.factors)


def fsdp2_buffers(model: ModelBytes, *, on_gpu: bool) -> int:
    """Gathered weights and gradients under FSDP2.

    The root, whole from the first pass to the end of the last; the unit in use, on a GPU the next one too; the unit's
    gradients, and the result of reducing them.
    """
    unit = max((weights for weights, _ in model.units), default=0)
    trained = max((trained for _, trained in model.units), default=0)
    return model.root + (2 if on_gpu else 1) * unit + 2 * trained


def can_cache_merged(config: Config, launch: Launch) -> bool:
    """Whether wrapped layers can cache W + delta.

    W must be whole between two passes, which it is not under FSDP2 and DeepSpeed; and torch.compile decides for itself
    which tensors stay alive.
    """
    return launch.engine in ("one", "ddp") and not config.model.torch_compile


def is_local(config: Config, model: ModelBytes) -> bool:
    """Whether each process trains factors of its own, which synchronize at restarts only.

    A full-rank stage has no factors, and its gradients travel at every update.
    """
    return config.relora.sync == "restart" and model.factors > 0


def outer_optimizer_bytes(config: Config, model: ModelBytes) -> int:
    """Anchors of the parameters trained in full, and velocities of these and of the base weights."""
    takes_mean = config.relora.outer_learning_rate == 1 and config.relora.outer_momentum == 0
    anchors = 0 if takes_mean else model.trained - model.factors
    velocities = model.weights - model.factors if config.relora.outer_momentum else 0
    return anchors + velocities


def num_master_shards(config: Config, launch: Launch) -> int:
    """The number of shards of the exact masters of quantized weights, one a process.

    A process that trains factors of its own forms their update alone, and so holds whole masters.
    """
    return 1 if config.relora.sync == "restart" else launch.num_processes


def num_independent_updates(config: Config, launch: Launch) -> int:
    """The number of different low-rank updates that a restart merges.

    Where each process trains factors of its own, the ranks of their updates add up.
    """
    return launch.num_processes if config.relora.sync == "restart" else 1
