"""The processes of one launch: joining them, and what travels between them beside tensors of the model."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from relora.config import raise_if_any
from relora.engines.heartbeat import Heartbeat, agreed_name

EngineKind = Literal["local", "fsdp2", "deepspeed"]


def launched_num_processes() -> int:
    """Number of processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_process_index() -> int:
    """The place of this process among them."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is rank 0 of the launch: it alone writes the run folder, and talks."""
    return launched_process_index() == 0


def is_first_on_node() -> bool:
    """Whether this process does the work that is done once a node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def launched_engine() -> EngineKind:
    """The engine that the launcher asks for."""
    if _is_set("ACCELERATE_USE_FSDP"):
        return "fsdp2"
    return "deepspeed" if _is_set("ACCELERATE_USE_DEEPSPEED") else "local"


def world_problems(joined: int, wanted: int | None) -> list[str]:
    """Whether processes would train independent copies, or are not as many as the run wants."""
    launched, problems = launched_num_processes(), []
    if launched != joined:
        problems.append(
            f"the launcher started {launched} processes but the engine sees {joined}: "
            "they would train independent copies of the model"
        )
    if wanted is not None and wanted != launched:
        problems.append(f"training.num_processes = {wanted}: the launcher started {launched}")
    return problems


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


# Rank 0 writes checkpoints and the final model alone; the others wait longer than NCCL's ten minutes.
TIMEOUT = timedelta(hours=2)


class World:
    """This process among the others. All methods are collective: every rank calls them.

    Args:
        wanted: how many processes the run wants; None for any number.
        alone_too: make a process group of a single process too.
    """

    def __init__(self, *, wanted: int | None, alone_too: bool = False) -> None:
        # cpu=True also makes a true world of an `accelerate launch` that would start independent copies.
        cpu = not torch.cuda.is_available()
        self._joined = PartialState(cpu=cpu, timeout=TIMEOUT)
        self.num_processes: int = self._joined.num_processes
        self.process_index: int = self._joined.process_index
        device: torch.device = self._joined.device
        self.device = torch.device("cpu") if device.type == "cpu" else device
        raise_if_any(world_problems(self.num_processes, wanted))
        is_alone = self.num_processes == 1
        self._watch = None if is_alone else Heartbeat(self.process_index, self.num_processes, agreed_name())
        if self._watch is not None:
            self._watch.start()
        if alone_too and not distributed.is_initialized():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._of_hosts = _host_group() if self.num_processes > 1 else None

    @property
    def backend(self) -> str:
        """nccl or gloo."""
        return str(distributed.get_backend())

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64, of numbers that the hosts know. Waits for no device."""
        if self.num_processes == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, group=self._of_hosts)
        return list(tensor.tolist())

    def all_equal(self, text: str) -> bool:
        """Whether all ranks hold the same text."""
        if self.num_processes == 1:
            return True
        texts: list[str | None] = [None] * self.num_processes
        distributed.all_gather_object(texts, text)
        return len(set(texts)) == 1

    def broadcast(self, tensor: Tensor, process_index: int) -> Tensor:
        """What that rank holds; elsewhere `tensor` (on any device, meta too) only says shape and dtype."""
        if self.num_processes == 1:
            return tensor
        sent = (
            tensor.to(self.device)
            if self.process_index == process_index
            else torch.empty_like(tensor, device=self.device)
        )
        distributed.broadcast(sent, src=process_index)
        return sent

    def all_reduce(self, tensor: Tensor) -> None:
        """Put the sum over all ranks into `tensor`."""
        if self.num_processes > 1:
            distributed.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.num_processes > 1:
            self._joined.wait_for_everyone()

    def tell(self, error: BaseException) -> None:
        """Let the other ranks know why this one ends before its time. Not collective."""
        if self._watch is not None:
            self._watch.tell(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Leave the process group, together."""
        # Before the barrier: rank 0 may hold the store of the watch, and leaves as soon as all have come.
        if self._watch is not None:
            self._watch.stop()
        # Without the barrier gloo processes now and then abort after correct results.
        self.barrier()
        if distributed.is_initialized():
            self._joined.destroy_process_group()


def _host_group() -> distributed.ProcessGroup | None:
    """A group whose messages leave from host memory; None, the group of all, if that one's do."""
    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo", timeout=TIMEOUT)
