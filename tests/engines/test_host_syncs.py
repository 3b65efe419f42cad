"""How often a run makes the host wait for the device: as often as it reads a number that was computed there."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from relora.config import check
from relora.engines import base as torch_engine
from relora.files import sha256_of
from relora.train import loop
from relora.train.loop import Loop
from relora.train.preflight import preflight
from relora.train.train import train
from tests.helpers.tiny import metrics

NUM_MICRO_BATCHES = 2
BATCH, BAD = 8, (3, 13, 14)  # samples of an update; the updates, counted by their batches, whose loss is not finite
# What hides behind item(), bool(), float(), int() and what has a shape that depends on values.
READERS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")


@dataclass
class Reads:
    """Reads of the updates of a run, one entry an update; those within forward passes, and those of results, apart."""

    ours: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
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


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU can queue as well, though it gains nothing."""
    monkeypatch.setattr(torch_engine, "IMMEDIATE", ())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Filled by whatever run comes next."""
    reads, update = Reads(), Loop._update
    read = loop.read
    num_label_tokens, token_losses, tolist = torch_engine.num_label_tokens, torch_engine.token_losses, Tensor.tolist

    def counted_update(*args: Any, **kwargs: Any) -> Any:
        reads.ours.append(0)
        reads.forward.append(0)
        reads.is_update = True
        with Counting(reads):
            done = update(*args, **kwargs)
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

    def counted_results(queued: Any) -> Any:
        reads.results.append(len(queued))
        return read(queued)

    monkeypatch.setattr(Loop, "_update", counted_update)
    monkeypatch.setattr(loop, "read", counted_results)
    monkeypatch.setattr(torch_engine, "num_label_tokens", on_the_host)
    monkeypatch.setattr(torch_engine, "token_losses", forward)
    monkeypatch.setattr(Tensor, "tolist", counted_tolist)
    return reads


def settings_of(tiny_run: Callable[..., dict[str, Any]], name: str, **overrides: Any) -> dict[str, Any]:
    """A warm start of 4 updates, restarts at 9 and 14, 16 updates."""
    training = {
        "max_steps": 16,
        "global_batch_size": BATCH,
        "per_device_batch_size": BATCH // NUM_MICRO_BATCHES,
        "mixed_precision": "bf16",
        "eval_steps": 100,
        "save_steps": 100,
        "logging_steps": 3,
    }
    relora = {"restart_every": 5, "warm_start_steps": 4}
    return tiny_run(name, optim__name="adamw_fused", relora=relora, training=training | overrides)


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_run_waits_only_where_something_is_told_or_due(
    tiny_run: Callable[..., dict[str, Any]], reads: Reads, document_mask: bool
) -> None:
    train(check(settings_of(tiny_run, "run") | {"data": tiny_run()["data"] | {"document_mask": document_mask}}))
    assert reads.ours == [0] * 16
    looks = [3, 4, 6, 9, 12, 14, 15, 16]  # 3, 6, .. are logged, 4 is the switch, 9 and 14 are restarts, 16 is the end
    assert list(accumulate(reads.results)) == looks
    # transformers looks at the positions of a batch, to see whether documents are packed.
    assert max(reads.forward) <= NUM_MICRO_BATCHES


@pytest.mark.parametrize(("name", "immediate"), [("adamw", ()), ("adamw_fused", ("cpu",))])
def test_else_every_update_is_looked_at(
    tiny_run: Callable[..., dict[str, Any]], reads: Reads, monkeypatch: pytest.MonkeyPatch, name: str, immediate: Any
) -> None:
    monkeypatch.setattr(torch_engine, "IMMEDIATE", immediate)
    tree = settings_of(tiny_run, "run", max_steps=6)
    train(check(tree | {"optim": tree["optim"] | {"name": name}}))
    assert reads.results == [1] * 6


def test_no_more_wait_in_memory_than_allowed(
    tiny_run: Callable[..., dict[str, Any]], reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_QUEUED", 2)
    train(check(settings_of(tiny_run, "run", logging_steps=100)))
    assert list(accumulate(reads.results)) == [2, 4, 6, 8, 9, 11, 13, 14, 16]


@pytest.mark.parametrize("logging_steps", [3, 100])
def test_a_bad_batch_changes_nothing_for_updates_that_are_queued(
    tiny_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    token_losses = torch_engine.token_losses
    samples = preflight(check(settings_of(tiny_run, "one"))).data.samples(check(settings_of(tiny_run, "one")).data, 0)
    bad_ids = torch.stack([samples[BATCH * number + 1]["input_ids"] for number in BAD])

    def poisoned(model: Any, batch: Any) -> Tensor:
        is_bad = (batch["input_ids"][:, None] == bad_ids).all(-1).any()
        losses: Tensor = token_losses(model, batch)
        return losses * math.nan if model.training and is_bad else losses

    monkeypatch.setattr(torch_engine, "token_losses", poisoned)
    one, many = (
        settings_of(tiny_run, "one", logging_steps=1),
        settings_of(tiny_run, "many", logging_steps=logging_steps),
    )
    for tree in (one, many):
        train(check(tree))
    [looked_at, queued] = [metrics(tree["output_dir"]) for tree in (one, many)]
    assert max(line.get("samples_seen", 0) for line in looked_at) > BATCH * (16 + len(BAD)), "they come again"
    logged = {line["step"] for line in queued if "loss" in line}
    assert queued == [line for line in looked_at if "loss" not in line or line["step"] in logged]
    final = [Path(tree["output_dir"], "final", "model.safetensors") for tree in (one, many)]
    assert sha256_of(final[0]) == sha256_of(final[1])


def test_a_read_would_be_seen(reads: Reads) -> None:
    reads.ours.append(0)
    reads.is_update = True
    with Counting(reads):
        numbers = torch.arange(3.0)
        assert numbers.sum().item() + float(numbers[1]) > 0
        assert numbers.isfinite().all()
        assert numbers.tolist() and len(numbers.nonzero()) == 2
    assert reads.ours == [5]
