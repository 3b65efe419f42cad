"""The processes of one launch: joining them, and what travels between them beside tensors of the model."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from relora.runtime.engines.launches import check_world
from relora.runtime.engines.watch import Watch, agreed_name

# Rank 0 writes checkpoints and the final model alone; the others wait longer than NCCL's ten minutes.
TIMEOUT = timedelta(hours=2)


class Processes:
    """This process among the others. All methods are collective: every rank calls them.

    Args:
        num_processes: how many the run wants; None for any number.
        alone_too: make a process group of a single process too.
    """

    def __init__(self, *, num_processes: int | None, alone_too: bool = False) -> None:
        # cpu=True also makes a true world of an `accelerate launch` that would start independent copies.
        cpu = not torch.cuda.is_available()
        self._joined = PartialState(cpu=cpu, timeout=TIMEOUT)
        self.world_size: int = self._joined.num_processes
        self.rank: int = self._joined.process_index
        device: torch.device = self._joined.device
        self.device = torch.device("cpu") if device.type == "cpu" else device
        check_world(self.world_size, num_processes)
        self._watch = Watch(self.rank, self.world_size, agreed_name()) if self.world_size > 1 else None
        if self._watch is not None:
            self._watch.start()
        if alone_too and not distributed.is_initialized():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._of_hosts = _host_group() if self.world_size > 1 else None

    @property
    def backend(self) -> str:
        """nccl or gloo."""
        return str(distributed.get_backend())

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64, of numbers that the hosts know. Waits for no device."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, group=self._of_hosts)
        return list(tensor.tolist())

    def same_everywhere(self, text: str) -> bool:
        """Whether all ranks hold the same text."""
        if self.world_size == 1:
            return True
        texts: list[str | None] = [None] * self.world_size
        distributed.all_gather_object(texts, text)
        return len(set(texts)) == 1

    def from_rank(self, tensor: Tensor, rank: int) -> Tensor:
        """What that rank holds; elsewhere `tensor` (on any device, meta too) only says shape and dtype."""
        if self.world_size == 1:
            return tensor
        sent = tensor.to(self.device) if self.rank == rank else torch.empty_like(tensor, device=self.device)
        distributed.broadcast(sent, src=rank)
        return sent

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all ranks into `tensor`."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
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
