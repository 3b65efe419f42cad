"""How often an update makes the host wait for the device: as often as it reads a number that was computed there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from relora.config import check
from relora.loop import Loop
from relora.runtime.engines import torch_engine
from relora.train import train

NUM_UPDATES, NUM_MICRO_BATCHES = 8, 2
# What hides behind item(), bool(), float(), int() and what has a shape that depends on values.
READERS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")


@dataclass
class Reads:
    """Reads of the updates of a run, one entry an update; those within forward passes apart."""

    ours: list[int] = field(default_factory=list)
    forward: list[int] = field(default_factory=list)
    is_update: bool = False
    is_forward: bool = False

    def add(self) -> None:
        (self.forward if self.is_forward else self.ours)[-1] += 1


class Counting(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READERS:
            self.reads.add()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Filled by whatever run comes next."""
    reads, update = Reads(), Loop._update
    num_label_tokens, token_losses, tolist = torch_engine.num_label_tokens, torch_engine.token_losses, Tensor.tolist

    def counted_update(*args: Any) -> Any:
        reads.ours.append(0)
        reads.forward.append(0)
        reads.is_update = True
        with Counting(reads):
            done = update(*args)
        reads.is_update = False
        return done

    def on_the_host(batch: Any) -> int:
        with _disable_current_modes():  # the batch has not been sent to the device yet
            return num_label_tokens(batch)

    def forward(*args: Any) -> Tensor:
        reads.is_forward = True
        losses = token_losses(*args)
        reads.is_forward = False
        return losses

    def counted_tolist(tensor: Tensor) -> Any:  # reads memory without an operator
        if reads.is_update:
            reads.add()
        return tolist(tensor)

    monkeypatch.setattr(Loop, "_update", counted_update)
    monkeypatch.setattr(torch_engine, "num_label_tokens", on_the_host)
    monkeypatch.setattr(torch_engine, "token_losses", forward)
    monkeypatch.setattr(Tensor, "tolist", counted_tolist)
    return reads


@pytest.mark.parametrize("document_mask", [False, True])
def test_an_update_waits_once(tiny_run: Callable[..., dict[str, Any]], reads: Reads, document_mask: bool) -> None:
    # The other implementations of AdamW read their step counts, which are on the host wherever the parameters are.
    tree = tiny_run(
        optim__name="adamw_fused",
        data__document_mask=document_mask,
        training={
            "max_steps": NUM_UPDATES,
            "global_batch_size": 8,
            "per_device_batch_size": 8 // NUM_MICRO_BATCHES,
            "mixed_precision": "bf16",
            "eval_steps": 100,
            "save_steps": 100,
            "logging_steps": 1,
        },
    )
    train(check(tree))
    assert reads.ours == [1] * NUM_UPDATES
    # transformers looks at the positions of a batch, to see whether documents are packed.
    assert max(reads.forward) <= NUM_MICRO_BATCHES


def test_a_read_would_be_seen(reads: Reads) -> None:
    reads.ours.append(0)
    reads.is_update = True
    with Counting(reads):
        numbers = torch.arange(3.0)
        assert numbers.sum().item() + float(numbers[1]) > 0
        assert numbers.isfinite().all()
        assert numbers.tolist() and len(numbers.nonzero()) == 2
    assert reads.ours == [5]
