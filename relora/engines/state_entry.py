"""One tensor to be written to a checkpoint, by name; its values are put together when they are asked for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Names of what a process trained alone begin so, those of process 0 excepted: "process-1/model.norm.weight".
STATE_PREFIX = "process-"


@dataclass(frozen=True)
class Entry:
    """A tensor of known shape and dtype. Every process calls `fetch`, in the same order: it may be collective.

    Attributes:
        is_constant: `fetch` is not collective and gives the same values until the next restart, in any thread.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    fetch: Callable[[], Tensor]
    is_constant: bool = False

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def state_prefix(state_index: int) -> str:
    """The prefix of the names of what only the process `state_index` trained; process 0 has plain names."""
    return f"{STATE_PREFIX}{state_index}/" if state_index else ""
