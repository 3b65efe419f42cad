"""The processes of one launch: reading the launcher's environment, joining, communication outside of the model."""

import os
import platform
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Literal, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from relora.engines.heartbeat import Heartbeat, agree_on_name
from relora.errors import raise_if_any

T = TypeVar("T")
LaunchedEngine = Literal["ddp", "fsdp2", "deepspeed"]
# The first process writes checkpoints and the final model alone; the others wait longer than NCCL's ten minutes.
TIMEOUT = timedelta(hours=2)
# A group needs some time limit. Of gloo's sockets it is milliseconds in 32 bits: 24 days at most.
LONGEST = timedelta(days=20)


def launched_num_processes() -> int:
    """Number of processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_process_index() -> int:
    """The index of this process among them."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the first of the launch: it alone writes the run folder and prints."""
    return launched_process_index() == 0


def is_first_on_node() -> bool:
    """Whether this process does the work that is done once a node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def launched_engine() -> LaunchedEngine:
    """The engine that the launcher asks for, read before any process group exists."""
    asked = {"fsdp2": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    for engine, variable in asked.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            return "fsdp2" if engine == "fsdp2" else "deepspeed"
    return "ddp"


def world_problems(num_processes: int, wanted: int | None) -> list[str]:
    """Messages if processes would train independent copies, or are not as many as the run wants.

    Args:
        num_processes: as this process sees it.
        wanted: `training.num_processes`.
    """
    launched, problems = launched_num_processes(), []
    if launched != num_processes:
        problems.append(
            f"the launcher started {launched} processes, but this process joined a group of {num_processes}: "
            "they would train independent copies of the model"
        )
    if wanted is not None and wanted != launched:
        problems.append(f"training.num_processes = {wanted}: the launcher started {launched}")
    return problems


def collective_timeout(timeout_minutes: float | None) -> timedelta:
    """The time limit of collectives: an hour after the watchdog of the run, which says more, at least TIMEOUT.

    Args:
        timeout_minutes: `training.timeout_minutes`; None: no watchdog.
    """
    if timeout_minutes is None:
        return LONGEST
    return min(LONGEST, max(TIMEOUT, timedelta(hours=1, minutes=min(timeout_minutes, 1e6))))


def device_kind(device: torch.device) -> str:
    """What decides how a device rounds: the model of a GPU, the vector instructions of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


class World:
    """This process among the others. All methods are collective, unless they say otherwise.

    Args:
        wanted: number of processes that the run wants; None for any.
        group_of_one: create a process group for a single process too.
        timeout: time limit of a collective.

    Attributes:
        is_mixed: the processes compute on devices of different kinds.

    Raises:
        UserError: as `world_problems`.
    """

    def __init__(self, *, wanted: int | None, group_of_one: bool = False, timeout: timedelta = TIMEOUT) -> None:
        # cpu=True also makes a true world of an `accelerate launch` that would start independent copies.
        self._joined = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
        self.num_processes: int = self._joined.num_processes
        self.process_index: int = self._joined.process_index
        device: torch.device = self._joined.device
        self.device = torch.device("cpu") if device.type == "cpu" else device
        raise_if_any(world_problems(self.num_processes, wanted))
        self._heartbeat: Heartbeat | None = None
        self._host_group: distributed.ProcessGroup | None = None  # None: the group of all, whose messages are on hosts
        if self.num_processes > 1:
            self._heartbeat = Heartbeat(self.process_index, self.num_processes, agree_on_name())
            self._heartbeat.start()
            if distributed.get_backend() != "gloo":
                self._host_group = distributed.new_group(backend="gloo", timeout=timeout)
        # Devices of different kinds round the same computation differently.
        self.is_mixed = not self.all_equal(device_kind(self.device))
        if self.num_processes == 1 and group_of_one and not distributed.is_initialized():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    @property
    def backend(self) -> str:
        """nccl or gloo; "one process" where there is no process group."""
        return str(distributed.get_backend()) if distributed.is_initialized() else "one process"

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64, of numbers that the hosts know. Waits for no device."""
        if self.num_processes == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, group=self._host_group)
        return list(tensor.tolist())

    def all_reduce(self, tensor: Tensor) -> None:
        """Put the sum over all processes into `tensor`."""
        if self.num_processes > 1:
            distributed.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Process `source`'s tensor; on the others `tensor`, maybe a meta tensor, only supplies shape and dtype."""
        if self.num_processes == 1:
            return tensor
        is_source = self.process_index == source
        sent = tensor.to(self.device) if is_source else torch.empty_like(tensor, device=self.device)
        distributed.broadcast(sent, src=source)
        return sent

    def gather(self, value: T) -> list[T]:
        """The values of all processes, small objects that can be pickled, by process index."""
        if self.num_processes == 1:
            return [value]
        values: list[T] = [value] * self.num_processes
        distributed.all_gather_object(values, value)
        return values

    def all_equal(self, text: str) -> bool:
        """Whether all processes hold the same text."""
        return len(set(self.gather(text))) == 1

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.num_processes > 1:
            self._joined.wait_for_everyone()

    def report_failure(self, error: BaseException | str) -> str:
        """Tell the other processes why this one ends early. Not collective.

        Returns:
            The failure of another process that came first; empty if none is known.
        """
        if self._heartbeat is None:
            return ""
        return self._heartbeat.report_failure(error if isinstance(error, str) else f"{type(error).__name__}: {error}")

    def before_ending(self, last_words: Callable[[str], None]) -> None:
        """Have `last_words` called with the reason when another process's death ends this one. Not collective.

        Args:
            last_words: called by a thread, as the main one may hang in a collective.
        """
        if self._heartbeat is not None:
            self._heartbeat.last_words = last_words

    def close(self) -> None:
        """Leave the process group, together."""
        # Before the barrier: the first process may host the store of the heartbeat, and leaves once all have arrived.
        if self._heartbeat is not None:
            self._heartbeat.stop()
        # Without the barrier gloo processes now and then abort after correct results.
        self.barrier()
        if distributed.is_initialized():
            self._joined.destroy_process_group()
