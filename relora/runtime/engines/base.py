"""What the rest of the program may ask of an engine, and which launches are refused."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.config import UserError
from relora.method.store import Store

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What one update measured.

    Attributes:
        loss: sum of the token losses over the global batch / its label tokens, in nats.
        grad_norm: norm of the whole gradient before clipping.
        applied: False when loss or gradient was not finite somewhere and no optimizer saw it.
    """

    loss: float
    grad_norm: float
    applied: bool


@dataclass
class Live:
    """A model in training. `model` is the plain module, `wrapped` what the engine made of it."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer


class Engine(Protocol):
    """One way to spread training over processes. All methods are collective: every rank calls them."""

    name: str
    rank: int
    world_size: int
    device: torch.device
    store: Store

    def prepare(self, model: nn.Module, *, compiled: bool) -> nn.Module:
        """Move `model` to its device and wrap it for training. Its parameters are then those to optimize."""

    def update(
        self, live: Live, batches: Sequence[Batch], *, seeds: Sequence[int], max_grad_norm: float | None
    ) -> Update:
        """Forward and backward over this rank's micro-batches, clip, and one step of the optimizer.

        `seeds` seed the random draws (dropout) of each micro-batch.
        """

    def token_losses(self, live: Live, batch: Batch) -> Tensor:
        """Sum of the token losses of this rank's batch, without gradients, in the precision of training."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of training, for forward passes beside it."""

    def read_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> tuple[dict[str, Tensor], float]:
        """Moments by slot, full shapes, and the step count; ({}, 0) where there is no state yet."""

    def write_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, moments: Mapping[str, Tensor], step: float
    ) -> None:
        """Put moments and step count into an optimizer that has made no update yet."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64."""

    def same_everywhere(self, text: str) -> bool:
        """Whether all ranks hold the same text."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the process group, together."""


def launched_world_size() -> int:
    """Number of processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is rank 0 of the launch: it alone writes the run folder, and talks."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_node() -> bool:
    """Whether this process does the work that is done once a node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def refused_launches() -> list[str]:
    """Launches for an engine that is not there: training would silently run under another."""
    asked = {
        "ACCELERATE_USE_FSDP": "FSDP",
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_TP": "tensor parallelism",
    }
    return [
        f"the launcher asks for {name} ({variable}=true): relora has the engines of one process and DDP; "
        "use launch/cpu.yaml, cpu_ddp.yaml, one_gpu.yaml or ddp.yaml"
        for variable, name in asked.items()
        if os.environ.get(variable, "false").lower() in ("true", "1")
    ]


def check_world(world_size: int, num_processes: int | None) -> None:
    """Raise UserError if processes would train independent copies, or are not as many as the run wants."""
    launched, problems = launched_world_size(), []
    if launched != world_size:
        problems.append(
            f"the launcher started {launched} processes but the engine sees {world_size}: "
            "they would train independent copies of the model"
        )
    if num_processes is not None and num_processes != launched:
        problems.append(f"training.num_processes = {num_processes}: the launcher started {launched}")
    if problems:
        raise UserError(problems)
