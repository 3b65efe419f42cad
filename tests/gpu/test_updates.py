"""Updates on the device: those of the host, none from a bad batch, and no wait of the host in between."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import relora
from relora import LoRAConfig, build_optimizer, inject_lora
from relora.engines.ddp import OneProcessEngine
from relora.engines.world import World
from relora.model.tasks import CausalLM
from tests.helpers.tiny import MODEL

pytestmark = pytest.mark.gpu
WIDE = MODEL | {"hidden_size": 128, "intermediate_size": 160}  # bitsandbytes quantizes no state of under 4096 entries
RATE, NUM_UPDATES = 1e-2, 5
# Adam divides by the root of a moment, so an entry whose gradient is rounding alone may move by the rate in any
# direction: held against is the mean.
TOLERANCE = {"adamw": 1e-5, "adamw_fused": 1e-5, "adamw_8bit": 1e-3}


def update_all(
    optimizer: str, device: torch.device, *, number: int = NUM_UPDATES, bad: int | None = None
) -> dict[str, Tensor]:
    """The trained parameters after so many updates, of which that with the index `bad` has a norm that is NaN."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in WIDE.items() if key != "model_type"}))
    inject_lora(model, LoRAConfig(r=32, lora_alpha=32, modules_to_save="rest"), seed=0)
    engine = OneProcessEngine(World(wanted=None), CausalLM(), mixed_precision="no", max_grad_norm=1.0)
    engine.world.device = device
    live = engine.prepare(
        model.to(device), lambda prepared: build_optimizer(prepared, name=optimizer, learning_rate=RATE)
    )
    for index, batch in enumerate([batch_of(index, device) for index in range(number)]):
        # The first updates load kernels; other optimizers than the fused one wait for the verdict on a batch.
        free = no_waits() if optimizer == "adamw_fused" and index >= 2 else contextlib.nullcontext()
        with bad_norm() if index == bad else contextlib.nullcontext(), free:
            update = engine.update(live, [batch], seeds=[index], stop=False)
        assert bool(update.skipped) == (index == bad)
    return {name: p.detach().cpu() for name, p in live.model.named_parameters() if p.requires_grad}


def batch_of(number: int, device: torch.device) -> dict[str, Tensor]:
    """Rows of equal steps, which can be learned."""
    ids = (17 * number + 3 * torch.arange(32) + 40 * torch.arange(2)[:, None]) % MODEL["vocab_size"]
    pinned = ids.pin_memory() if device.type == "cuda" else ids
    return {"input_ids": pinned, "labels": pinned}


@contextlib.contextmanager
def bad_norm() -> Iterator[None]:
    """The norm of the gradient comes out as NaN."""
    total_norm = OneProcessEngine.total_norm
    with patch.object(OneProcessEngine, "total_norm", lambda *arguments: total_norm(*arguments) * torch.nan):
        yield


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Fail if relora's own code waits for a GPU within."""
    if not torch.cuda.is_available():
        yield
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    home = str(Path(relora.__file__).parent)
    waits = [f"{each.filename}:{each.lineno}" for each in told if "synchroniz" in str(each.message)]
    assert not [place for place in waits if place.startswith(home)], waits


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_updates_are_those_of_the_host(device: torch.device, optimizer: str) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    before, expected = (update_all("adamw", torch.device("cpu"), number=number) for number in (0, NUM_UPDATES))
    ours = update_all(optimizer, device)
    for name, value in expected.items():
        assert (ours[name] - value).abs().mean() <= TOLERANCE[optimizer], name
        assert (value - before[name]).abs().mean() > 100 * TOLERANCE["adamw"], f"{name} has hardly moved"


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_a_bad_batch_that_only_the_device_knows_of_is_skipped(device: torch.device, optimizer: str) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    last = NUM_UPDATES - 1
    skipped, never_seen = update_all(optimizer, device, bad=last), update_all(optimizer, device, number=last)
    assert all(torch.equal(skipped[name], value) for name, value in never_seen.items())
    assert all(value.isfinite().all() for value in update_all(optimizer, device, bad=1).values())
