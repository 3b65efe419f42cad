"""The path of a GPU, rehearsed on a stand-in: no tensor on the wrong device, no wait of the host within an update."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from relora.config import check
from relora.engines.base import Engine
from relora.method.reinit import REINITS, DrawKey, LayerView, Residual
from relora.train import callbacks
from relora.train.train import train
from tests.helpers.fresh_process import in_a_fresh_process
from tests.helpers.rehearsal import SHORT, Rehearsal, rehearse, try_faults
from tests.helpers.standin import NAME, STANDIN, Wait, register
from tests.helpers.tiny import MODEL, metrics, only, settings

ENGINES = ("one process", "ddp", "local sgd", "fsdp2", "fsdp2 offload", "zero1", "zero3")
# A warm start of one update, a restart after the third, the end after the fourth. Resumed after the second.
RUN = {
    "model": {"config": MODEL | {"num_hidden_layers": 1}},
    "data__eval_tokens": 64,
    "relora__restart_every": 2,
    "relora__warm_start_steps": 1,
    "schedule__warmup_steps": 1,
    "training__max_steps": 4,
    "training__save_steps": 2,
    "training__eval_steps": 100,
    "training__mixed_precision": "bf16",
    "lora__lora_dropout": 0.1,
    "training__report_to": [],
}
RESUME_STEP, NUM_MICRO_BATCHES = 2, 2
TOLERANCE = 0.01  # of a loss in bf16
# transformers looks at the positions of a batch, to see whether documents are packed.
OF_TRANSFORMERS = [("item", "find_packed_sequence_indices")] * NUM_MICRO_BATCHES
# At its second update of a stage DDP sends the order of its buckets.
OF_DDP = [("copy to the device", "loss"), ("copy to the host", "loss")] * 2


@dataclass(frozen=True)
class Runs:
    """The run on a CPU, and on the stand-in under an engine, made when it is first asked for."""

    folder: Path
    on_cpu: list[dict[str, Any]]
    rehearsed: Callable[[str], Rehearsal]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("rehearsal")

    def rehearsed(engine: str) -> Rehearsal:
        return in_a_fresh_process(rehearse, engine, settings(corpus, folder / engine, **RUN), RESUME_STEP)

    with pytest.MonkeyPatch.context() as shorter:
        for name, value in SHORT.items():
            shorter.setattr(callbacks, name, value)
        train(check(settings(corpus, folder / "cpu", **RUN)))
        yield Runs(folder, metrics(folder / "cpu"), cache(rehearsed))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_on_the_device_is_the_run_on_a_cpu(runs: Runs, engine: str) -> None:
    found, expected = runs.rehearsed(engine).lines, runs.on_cpu
    assert [(line["step"], line.keys()) for line in found] == [(line["step"], line.keys()) for line in expected]
    for name in ("loss", "eval_loss", "probe_loss_before", "probe_loss_after", "grad_norm"):
        assert only(found, name) == pytest.approx(only(expected, name), abs=TOLERANCE), name
    assert max(only(found, "merge_error").values()) < 1e-6
    assert only(found, "eval_loss")[0] - only(found, "eval_loss")[4] > 50 * TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_on_the_device_is_the_same_run(runs: Runs, engine: str) -> None:
    rehearsal = runs.rehearsed(engine)
    assert rehearsal.resumed_lines == rehearsal.lines


@pytest.mark.parametrize("engine", ["one process", "ddp", "local sgd", "fsdp2"])
def test_the_host_waits_for_the_device_only_to_read_results(runs: Runs, engine: str) -> None:
    rehearsal = runs.rehearsed(engine)
    found = [sorted(map(shortly, waits)) for waits in rehearsal.in_updates]
    assert len(found) == 4
    expected = [sorted(OF_TRANSFORMERS + (OF_DDP if engine == "ddp" and number == 2 else [])) for number in range(4)]
    assert found == expected
    assert {wait.in_relora for wait in rehearsal.between} == {"train/loop.py:read"}


def test_an_optimizer_on_the_host_has_waited_for_the_flag_of_the_device(runs: Runs) -> None:
    for waits in runs.rehearsed("fsdp2 offload").in_updates:
        places = [wait.in_relora for wait in waits if wait.what == "copy to the host"]
        assert places.count("engines/fsdp2.py:step") == 1
        assert "engines/base.py:step" not in places, "a copy that torch has only started"


@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_under_deepspeed_relora_itself_waits_for_the_loss_and_the_norm_alone(runs: Runs, engine: str) -> None:
    rehearsal = runs.rehearsed(engine)
    for waits in rehearsal.in_updates:
        assert any("/deepspeed/" in wait.place for wait in waits), "it reads the norm to decide whether to step"
        own = [wait for wait in waits if "/deepspeed/" not in wait.place and "/transformers/" not in wait.place]
        assert [(wait.what, wait.in_relora) for wait in own] == [("item", "engines/deepspeed.py:update")] * 2
    assert rehearsal.between == [], "results are numbers of the host"


def test_collectives_that_a_backward_pass_starts_in_its_own_thread_are_counted(runs: Runs) -> None:
    sent = runs.rehearsed("ddp").bytes_sent
    weights = load_file(runs.folder / "ddp" / "final" / "model.safetensors")
    # All-reduced by two processes, a gradient is sent once by each.
    assert sent[0] == 4 * sum(values.numel() for values in weights.values())
    assert 0 < sent[1] == sent[3] < sent[0]


def test_what_the_outer_optimizer_has_learned_is_used_on_the_device_after_a_resume(
    corpus: Path, tmp_path: Path
) -> None:
    # A restart at 3, whose velocity is in the checkpoint of 4; the next at 5 and 7.
    outer = {"relora__sync": "restart", "relora__outer_momentum": 0.5, "lora__base_dtype": "bfloat16"}
    tree = settings(corpus, tmp_path / "run", **RUN | outer | {"training__max_steps": 7})
    rehearsal = in_a_fresh_process(rehearse, "local sgd", tree, 4)
    assert only(rehearsal.lines, "restart") == {3: 1, 5: 2, 7: 3}
    assert rehearsal.resumed_lines == rehearsal.lines


def factors_drawn_on(device_type: str) -> tuple[list[list[float]], list[list[float]], bool]:
    """A and B that carry a residual of this device, and whether the device's generator is as it was."""
    device = register().device if device_type == NAME else torch.device("cpu")
    residual = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(device)
    layer = LayerView("layer", 4, 16, 24, 1.5, residual.clone)
    before = STANDIN.generator.get_state()
    A, B = Residual(REINITS["kaiming"]).factors(layer, DrawKey(seed=0, index=1, name="layer"), residual)
    return A.tolist(), B.tolist(), torch.equal(STANDIN.generator.get_state(), before)


def test_a_residual_on_the_device_is_carried_by_the_factors_that_a_cpu_draws() -> None:
    (A, B, _), (A_device, B_device, is_untouched) = (in_a_fresh_process(factors_drawn_on, d) for d in ("cpu", NAME))
    torch.testing.assert_close(torch.tensor(A_device), torch.tensor(A))
    torch.testing.assert_close(torch.tensor(B_device), torch.tensor(B))
    assert is_untouched, "all draws come from generators of the CPU"


def shortly(wait: Wait) -> tuple[str, str]:
    return wait.what, wait.place.rpartition(":")[2]


# Faults, each put into one update.


def after_norm(change: Callable[[Tensor], Any]) -> Callable[[Engine], AbstractContextManager[Any]]:
    """A fault in `Engine.update`, where the norm of the gradient is known."""
    total_norm = Engine.total_norm

    def faulty(engine: Engine, trained: Any) -> Tensor:
        norm = total_norm(engine, trained)
        changed = change(norm)
        return changed if isinstance(changed, Tensor) and not changed.dim() else norm

    return lambda _: patch.object(Engine, "total_norm", faulty)


def draw_with_a_generator_of_the_cpu(norm: Tensor) -> Tensor:
    return norm + torch.rand((), device=norm.device, generator=torch.Generator())


def autocast_for_cpus(engine: Engine) -> AbstractContextManager[Any]:
    return patch.object(engine, "autocast", partial(torch.autocast, "cpu", dtype=torch.bfloat16))


def batches_in_plain_memory(_: Engine) -> AbstractContextManager[Any]:
    return patch("tests.helpers.standin.is_pinned", return_value=False)


# name -> (the fault, a part of the error, the waits)
FAULTS: dict[str, tuple[Callable[[Engine], AbstractContextManager[Any]], str, set[str]]] = {
    "none": (lambda _: nullcontext(), "", set()),
    "tensor of the CPU": (after_norm(lambda norm: (norm + torch.zeros(1)).sum()), "same device", set()),
    "product with a tensor of the CPU": (after_norm(lambda norm: norm[None] @ torch.ones(1)), "on cpu", set()),
    "tensor made on the CPU and sent": (
        after_norm(lambda norm: norm * torch.tensor(1.0, device=norm.device)),
        "",
        {"copy to the device"},
    ),
    "item": (after_norm(lambda norm: norm.item()), "", {"item"}),
    "branch": (after_norm(lambda norm: norm if norm > 1 else norm * 1), "", {"item"}),
    "list": (after_norm(lambda norm: norm.tolist()), "", {"copy to the host"}),
    "shape that depends on values": (after_norm(lambda norm: norm[None].nonzero()), "", {"nonzero"}),
    "generator of the CPU": (after_norm(draw_with_a_generator_of_the_cpu), "device type for generator", set()),
    "autocast for CPUs": (autocast_for_cpus, "within the autocast of another device", set()),
    "batches in plain memory": (batches_in_plain_memory, "", {"copy to the device"}),
}


def try_all() -> dict[str, tuple[str, set[str]]]:
    return try_faults({name: fault for name, (fault, _, _) in FAULTS.items()})


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, set[str]]]:
    """Error and waits of an update with each fault."""
    return in_a_fresh_process(try_all)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_an_update_is_found(outcomes: dict[str, tuple[str, set[str]]], name: str) -> None:
    error, waits = outcomes[name]
    _, expected_error, expected_waits = FAULTS[name]
    assert expected_error in error and bool(expected_error) == bool(error), error
    assert waits == expected_waits
