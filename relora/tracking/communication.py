"""Bytes that a process sends: every collective of a piece of the program, counted in torch's dispatcher.

Whoever starts it (DDP's C++ reducer, fully_shard, DeepSpeed, our own sums), a collective is an operation of
torch.distributed with tensors for arguments. Their sizes are measured; the bytes that travel for them are those of a
ring, which NCCL and gloo use for all but the smallest tensors.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operation -> (the argument to measure, bytes that each of n processes sends per byte of it). Argument 0 is the output,
# or is changed in place; argument 1 is the input.
_RING: dict[str, tuple[int, Callable[[int], float]]] = {
    "allreduce_": (0, lambda n: 2 * (n - 1) / n),
    "broadcast_": (0, lambda n: (n - 1) / n),
    "reduce_": (0, lambda n: (n - 1) / n),
    "_allgather_base_": (1, lambda n: n - 1),
    "allgather_": (1, lambda n: n - 1),
    "allgather_into_tensor_coalesced_": (1, lambda n: n - 1),
    "_reduce_scatter_base_": (1, lambda n: (n - 1) / n),
    "reduce_scatter_": (1, lambda n: (n - 1) / n),
    "reduce_scatter_tensor_coalesced_": (1, lambda n: (n - 1) / n),
    "alltoall_base_": (1, lambda n: (n - 1) / n),
    "alltoall_": (1, lambda n: (n - 1) / n),
    "all_reduce": (0, lambda n: 2 * (n - 1) / n),
    "all_reduce_": (0, lambda n: 2 * (n - 1) / n),
    "all_gather_into_tensor": (0, lambda n: n - 1),
    "reduce_scatter_tensor": (0, lambda n: (n - 1) / n),
    "barrier": (0, lambda n: 0 * n),
    "wait_tensor": (0, lambda n: 0 * n),
    "_wrap_tensor_autograd": (0, lambda n: 0 * n),
}


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within `with Traffic(num_processes) as traffic:` counts `traffic.bytes_sent`.

    It costs time at every operation of torch: meant for one update, not for all. After a collective that is not in the
    table the count is NaN rather than too small.
    """

    def __init__(self, num_processes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_sent = 0.0
        self._num_processes = num_processes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().partition("::")
        if "c10d" in namespace:
            self.bytes_sent += bytes_sent(name.partition(".")[0], args, self._num_processes)
        return function(*args, **(kwargs or {}))


def bytes_sent(name: str, args: Sequence[Any], num_processes: int) -> float:
    """Bytes that one process sends for one collective; NaN if it is unknown.

    Args:
        name: of the operation, without namespace and overload, such as allreduce_.
        args: its arguments: tensors, or lists of them.
    """
    if name not in _RING:
        return math.nan
    place, per_byte = _RING[name]
    tensors = (leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor))
    return per_byte(num_processes) * sum(tensor.nbytes for tensor in tensors)
