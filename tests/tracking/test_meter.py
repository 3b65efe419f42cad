"""The clock of the updates: what counts and what does not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relora.config import Config, check
from relora.tracking import throughput
from relora.tracking.communication import Traffic, bytes_sent
from relora.tracking.throughput import Meter
from tests.tracking.test_throughput import llama


class Clock:
    """A clock that goes only when it is told."""

    now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(throughput, "time", found)
    return found


@pytest.fixture
def config(tiny_run: Any) -> Config:
    return check(tiny_run(training__peak_tflops=0.01))  # 8 samples of 32 tokens an update


def meter_of(config: Config, *, num_processes: int = 1) -> Meter:
    engine: Any = SimpleNamespace(
        world=SimpleNamespace(device=torch.device("cpu"), num_processes=num_processes),
        store=SimpleNamespace(shape=lambda p: p.shape),
        reduces_gradients=True,
        counted_update=2,
        sent_per_gradient_byte=lambda _: 1.0,
    )
    state: Any = SimpleNamespace(model=llama())
    return Meter(engine, state, config)


def test_speed_is_the_mean_over_updates_and_their_data_without_pauses(clock: Clock, config: Config) -> None:
    meter = meter_of(config)
    for _ in range(4):
        clock.now_s += 0.25  # the next batch is read
        with meter.measure(1):
            clock.now_s += 0.75
        with meter.pause():
            clock.now_s += 50
    fields = meter.fields()
    assert (fields["step_seconds"], fields["tokens_per_second"]) == (1, 256)
    assert list(fields) == ["tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes"]
    flops = throughput.flops_per_token(llama(), sequence_length=32)
    assert fields["mfu"] == pytest.approx(256 * flops / 1e10)
    with meter.measure(1):
        clock.now_s += 2
    assert meter.fields()["step_seconds"] == 2  # since the last call


def test_the_clock_goes_on_after_a_pause_that_failed(clock: Clock, config: Config) -> None:
    meter = meter_of(config)
    with meter.measure(1):
        clock.now_s += 1
    with pytest.raises(RuntimeError), meter.pause():
        clock.now_s += 50
        raise RuntimeError
    assert meter.fields()["step_seconds"] == 1


def test_the_traffic_of_the_engines_update_is_counted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = meter_of(config, num_processes=2)
    monkeypatch.setattr(Traffic, "__exit__", lambda self, *_: setattr(self, "bytes_sent", 1000.0))
    monkeypatch.setattr(Traffic, "__enter__", lambda self: self)
    for number in range(1, 5):
        with meter.measure(1):
            pass
        assert ("bytes_sent" in meter.fields()) == (number >= 2)
    with meter.measure(1):
        pass
    fields = meter.fields()
    # A model without factors trains in full rank, and sends the same.
    assert fields["bytes_sent"] == fields["bytes_sent_full_rank"] == 1000


def test_bytes_of_collectives() -> None:
    tensor = torch.zeros(10)
    assert bytes_sent("allreduce_", [[tensor, tensor]], 4) == 2 * 3 / 4 * 80
    assert bytes_sent("_allgather_base_", [torch.zeros(40), tensor], 4) == 3 * 40
    assert bytes_sent("barrier", [tensor], 4) == 0
    assert bytes_sent("a new one", [tensor], 4) != bytes_sent("a new one", [tensor], 4)  # NaN
