"""How often a run makes the host wait for the device: only where somebody needs the newest numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from relora.config import check
from relora.engines.base import Engine
from relora.files import sha256_of
from relora.model.tasks import CausalLM
from relora.train.loop import Loop, NotFiniteError
from relora.train.preflight import preflight
from relora.train.train import train
from tests.helpers.tiny import metrics, only

NUM_MICRO_BATCHES = 2
BATCH, BAD = 8, (3, 8, 13)  # samples of an update; the updates whose loss is not finite
# The operators behind item(), bool(), float(), int() and everything whose shape depends on values.
READERS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")


@dataclass
class Reads:
    """Reads of device values within the updates of a run, one entry an update, those of forward passes apart.

    Attributes:
        events: ("update", step) and ("read", step) in the order in which they happened.
    """

    update: list[int] = field(default_factory=list)
    forward: list[int] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)
    is_update: bool = False
    is_forward: bool = False

    def add(self) -> None:
        (self.forward if self.is_forward else self.update)[-1] += 1


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
    """Filled by the run that comes next."""
    reads, update, read = Reads(), Engine.update, Loop.read
    loss, num_labels, tolist = CausalLM.loss, CausalLM.num_labels, Tensor.tolist

    def counted_update(*args: Any, **kwargs: Any) -> Any:
        reads.update.append(0)
        reads.forward.append(0)
        reads.events.append(("update", len(reads.update)))
        reads.is_update = True
        with Counting(reads):
            done = update(*args, **kwargs)
        reads.is_update = False
        return done

    def counted_read(loop: Loop, step: int, result: Any) -> Any:
        reads.events.append(("read", step))
        return read(loop, step, result)

    def on_the_host(*args: Any) -> int:
        with _disable_current_modes():  # the batch has not been sent to the device yet
            return num_labels(*args)

    def forward(*args: Any) -> Tensor:
        reads.is_forward = True
        losses = loss(*args)
        reads.is_forward = False
        return losses

    def counted_tolist(tensor: Tensor) -> Any:  # reads memory without an operator
        if reads.is_update:
            reads.add()
        return tolist(tensor)

    monkeypatch.setattr(Engine, "update", counted_update)
    monkeypatch.setattr(Loop, "read", counted_read)
    monkeypatch.setattr(CausalLM, "num_labels", on_the_host)
    monkeypatch.setattr(CausalLM, "loss", forward)
    monkeypatch.setattr(Tensor, "tolist", counted_tolist)
    return reads


def settings_of(tiny_run: Callable[..., dict[str, Any]], name: str, **training: Any) -> dict[str, Any]:
    """A warm start of 4 updates, restarts at 9 and 14, 16 updates."""
    lengths = {"max_steps": 16, "global_batch_size": BATCH, "per_device_batch_size": BATCH // NUM_MICRO_BATCHES}
    intervals = {"eval_steps": 100, "save_steps": 100, "logging_steps": 3}
    relora = {"restart_every": 5, "warm_start_steps": 4}
    return tiny_run(name, relora=relora, training={"mixed_precision": "bf16", **lengths, **intervals, **training})


@pytest.mark.parametrize(("document_mask", "factors"), [(False, None), (True, None), (False, "product")])
def test_results_are_read_one_update_late_but_where_somebody_needs_them(
    tiny_run: Callable[..., dict[str, Any]], reads: Reads, document_mask: bool, factors: str | None
) -> None:
    optim = {"optim": {"learning_rate": 1e-2, "factors": factors}}
    data = {"data": tiny_run()["data"] | {"document_mask": document_mask}}
    train(check(settings_of(tiny_run, "run") | data | optim))
    assert reads.update == [0] * 16, "the optimizer decides on the device whether it writes"
    # 3, 6, .. are logged, 4 is the switch, 9 and 14 are restarts, 16 is the end.
    at_once = {3, 4, 6, 9, 12, 14, 15, 16}
    for step in range(1, 17):
        place = reads.events.index(("read", step))
        newest = max(number for kind, number in reads.events[:place] if kind == "update")
        assert newest == (step if step in at_once else step + 1)
    # transformers looks at the positions of a batch, to see whether documents are packed.
    assert max(reads.forward) <= NUM_MICRO_BATCHES


def test_an_optimizer_that_cannot_be_told_on_the_device_is_asked_before_it_steps(
    tiny_run: Callable[..., dict[str, Any]], reads: Reads
) -> None:
    tree = settings_of(tiny_run, "run", max_steps=6)
    train(check(tree | {"optim": tree["optim"] | {"name": "adamw"}}))
    assert len(reads.update) == 6
    assert min(reads.update) >= 1  # on CPUs torch's default kernel itself reads the step of each parameter


def poison(monkeypatch: pytest.MonkeyPatch, bad: tuple[int, ...]) -> None:
    """Make the loss of the updates `bad`, counted from 1, NaN."""
    update, loss, number = Loop.update, CausalLM.loss, 0

    def counted(loop: Loop, step: int, batches: Any) -> Any:
        nonlocal number
        number = step + 1
        return update(loop, step, batches)

    def poisoned(task: CausalLM, model: Any, batch: Any) -> Tensor:
        losses = loss(task, model, batch)
        return losses * math.nan if model.training and number in bad else losses

    monkeypatch.setattr(Loop, "update", counted)
    monkeypatch.setattr(CausalLM, "loss", poisoned)


@pytest.mark.parametrize("optimizer", ["adamw_fused", "adamw", "muon"])
def test_a_bad_batch_counts_as_a_step_and_changes_nothing(
    tiny_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    trees = [settings_of(tiny_run, name, logging_steps=every) for name, every in (("each", 1), ("few", 3), ("end", 99))]
    poison(monkeypatch, BAD)
    for tree in trees:
        tree["optim"]["name"] = optimizer
        train(check(tree))
    each, few, end = (metrics(tree["output_dir"]) for tree in trees)
    assert sorted(only(each, "loss")) == [step for step in range(1, 17) if step not in BAD]
    assert only(each, "skipped")[16] == only(few, "skipped")[15] == only(end, "skipped")[16] == len(BAD)
    assert only(each, "samples_seen")[16] == 16 * BATCH
    assert only(few, "loss") == {step: loss for step, loss in only(each, "loss").items() if step in (6, 9, 12, 15, 16)}
    rate = preflight(check(trees[0])).schedule.rate
    assert only(each, "learning_rate") == {step: rate(step - 1) for step in only(each, "loss")}
    files = [Path(tree["output_dir"], "final", "model.safetensors") for tree in trees]
    assert len({sha256_of(file) for file in files}) == 1


def test_ten_bad_batches_in_a_row_stop_the_run(
    tiny_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = settings_of(tiny_run, "run", logging_steps=100)
    poison(monkeypatch, tuple(range(5, 15)))
    with pytest.raises(
        NotFiniteError, match=r"step 14: .* 10 in a row, so the run stops\. No skipped batch has changed"
    ):
        train(check(tree))


def test_a_read_would_be_seen(reads: Reads) -> None:
    reads.update.append(0)
    reads.is_update = True
    with Counting(reads):
        numbers = torch.arange(3.0)
        assert numbers.sum().item() + float(numbers[1]) > 0
        assert numbers.isfinite().all()
        assert numbers.tolist() and len(numbers.nonzero()) == 2
    assert reads.update == [5]
