"""What each engine leaves with one process, and what it holds and sends for itself."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from relora.config import Config, UserError
from relora.config.derived import accumulation_steps
from relora.engines.fsdp2 import FSDPOptions
from relora.engines.outer import OuterOptimizer

EngineName = Literal["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

# DeepSpeed's defaults, in numbers of 4 bytes: reduce_bucket_size, stage3_prefetch_bucket_size,
# stage3_max_live_parameters, stage3_param_persistence_threshold (deepspeed/runtime/zero/config.py).
ZERO_BUCKET, ZERO_PREFETCH, ZERO_LIVE, ZERO_SMALL = 500_000_000, 50_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class Launch:
    """What a run is launched as.

    Attributes:
        on_gpu: whether each process has a GPU; otherwise all share the host's memory.
    """

    engine: EngineName
    num_processes: int
    on_gpu: bool

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError([f"--engine {self.engine}: must be one of {', '.join(ENGINES)}"])
        if self.num_processes < 1:
            raise UserError([f"--processes {self.num_processes}: must be at least 1"])
        if self.engine == "one" and self.num_processes > 1:
            raise UserError([f"--processes {self.num_processes}: engine one is one process; ddp is several"])


@dataclass(frozen=True)
class Sharing:
    """Shares of the whole that one process keeps, and bytes that the engine itself holds.

    Attributes:
        gradients_stay: whether gradients are there during forward passes too.
        masters: fp32 copies of what is trained.
        buffers: buckets, gathered weights.
    """

    weights: float
    optimizer: float
    gradients: float
    gradients_stay: bool
    masters: int
    buffers: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends in rings, at most: ZeRO-3 may still hold what it would gather again."""

    update: float
    restart: float


@dataclass(frozen=True)
class Parts:
    """Bytes of a model that matter to engines.

    Attributes:
        weights: as stored.
        trained: of what is trained.
        factors: of the LoRA factors.
        units: (bytes, bytes trained) of the blocks that FSDP2 gathers one at a time.
        small: of the parameters that ZeRO-3 does not shard out.
    """

    weights: int
    trained: int
    factors: int
    units: tuple[tuple[int, int], ...]
    small: int

    @property
    def root(self) -> int:
        """What is outside of all units."""
        return self.weights - sum(whole for whole, _ in self.units)


def parts(model: nn.Module, *, factors: int) -> Parts:
    """Measure a model."""
    weights = list(model.parameters())
    units = _BLOCKS.units(model) if getattr(model, "_no_split_modules", None) else []
    return Parts(
        weights=_bytes(weights),
        trained=_bytes(p for p in weights if p.requires_grad),
        factors=factors,
        units=tuple((_bytes(u.parameters()), _bytes(p for p in u.parameters() if p.requires_grad)) for u in units),
        small=_bytes(p for p in weights if p.numel() < ZERO_SMALL),
    )


def sharing(launch: Launch, config: Config, model: Parts) -> Sharing:
    """How `launch` spreads a model; the launcher's options at their defaults."""
    n, accumulates = launch.num_processes, accumulation_steps(config, launch.num_processes) > 1
    share, part = 1 / n, math.ceil(model.trained / n)
    bucket = ZERO_BUCKET * 4 if launch.on_gpu else min(ZERO_BUCKET * 4, model.trained)
    match launch.engine:
        case "one":
            return Sharing(1, 1, 1, accumulates, 0, 0)
        case "ddp" if _is_apart(config, model):
            return Sharing(1, 1, 1, accumulates, 0, _of_outer_optimizer(config, model))
        case "ddp":
            return Sharing(1, 1, 1, True, 0, 0)  # gradients are views of its buckets, which stay
        case "fsdp2":
            whole = not config.training.sync_each_batch
            return Sharing(share, share, 1 if whole else share, accumulates, 0, _gathered(model, launch.on_gpu))
        case "zero1":
            return Sharing(1, share, 1, accumulates, part, bucket + part)
        case "zero2":
            return Sharing(1, share, share, accumulates, part, bucket + part)
        case "zero3":
            live = min(model.weights, (ZERO_LIVE + ZERO_PREFETCH) * 4)
            return Sharing(share, share, share, True, part, 2 * bucket + live)


def traffic(launch: Launch, config: Config, model: Parts) -> Traffic:
    """What a process sends in an update and at a restart (optimizer_reset zero)."""
    n, k = launch.num_processes, accumulation_steps(config, launch.num_processes)
    ring, gradients = (n - 1) / n, model.trained
    reduced = k if config.training.sync_each_batch else 1
    match launch.engine:
        case "one":
            return Traffic(0, 0)
        case "ddp" if _is_apart(config, model):
            return Traffic(0, (n - 1) * model.factors + 2 * ring * (model.trained - model.factors))
        case "ddp":
            return Traffic(2 * ring * gradients, 0)
        case "fsdp2":
            gathered = k * (2 * model.weights - model.root)  # the units again for the backward pass
            return Traffic(ring * (reduced * gradients + gathered), ring * 12 * model.factors)
        case "zero1":
            return Traffic(ring * 3 * gradients, ring * 10 * model.factors)
        case "zero2":
            return Traffic(ring * (2 * k + 1) * gradients, ring * 10 * model.factors)
        case "zero3":
            gathered = model.small + k * 2 * (model.weights - model.small)
            return Traffic(ring * (k * gradients + gathered), ring * 12 * model.factors)


_BLOCKS = FSDPOptions(
    reshard_after_forward=True,
    cpu_offload=False,
    activation_checkpointing=False,
    block_names=(),
    min_num_params=None,
    one_unit=False,
)


def _is_apart(config: Config, model: Parts) -> bool:
    """Whether each process trains factors of its own, and they meet at restarts."""
    return config.relora.sync == "restart" and model.factors > 0


def _of_outer_optimizer(config: Config, model: Parts) -> int:
    """Anchors of what trains in full, and velocities of that and of the base weights (OuterOptimizer)."""
    outer = OuterOptimizer(config.relora.outer_learning_rate, config.relora.outer_momentum)
    anchors = 0 if outer.takes_the_mean else model.trained - model.factors
    return anchors + (model.weights - model.factors if outer.momentum else 0)


def _gathered(model: Parts, on_gpu: bool) -> int:
    """FSDP2: what is outside of the units, whole from the first pass to the end of the last; the unit in use, on a
    GPU the next one too; the unit's gradients, and what is reduced of them."""
    whole = max((unit for unit, _ in model.units), default=0)
    trained = max((trained for _, trained in model.units), default=0)
    return model.root + (2 if on_gpu else 1) * whole + 2 * trained


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters)
