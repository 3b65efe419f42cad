"""`relora plan`: the estimate matches a real run."""

import json
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import PretrainedConfig

from relora.cli import main
from relora.config import Config, ModelSection, UserError, check, load_config
from relora.config.derived import lora_config
from relora.engines.ddp import DDPEngine
from relora.engines.deepspeed import DeepSpeedEngine
from relora.engines.fsdp2 import FSDP2Engine
from relora.forecast import dry_run as dry_run_module
from relora.forecast.dry_run import DryRun, LiveBytes, dry_run_update, example_batch, fake_batch
from relora.forecast.engine_costs import (
    Launch,
    ModelBytes,
    num_independent_updates,
    num_master_shards,
    sent_bytes,
    shares_of,
)
from relora.forecast.flops import LayerWork, break_even_rank, full_rank_update, layer_work, low_rank_update, num_merged
from relora.forecast.forecast import restart_advice, room_advice, route_advice, saving_advice
from relora.forecast.memory import (
    GIB,
    PeakLine,
    StageMemory,
    divisors_of,
    fit_batch,
    line_through,
    stage_memory,
    stage_model,
)
from relora.method.base_weights import WeightFormat
from relora.model.model import build_model, read_hf_config
from relora.model.tasks import CausalLM
from relora.train.stages import Stage, make_trainable
from tests.helpers.programs import ROOT, run
from tests.helpers.tiny import MODEL as MODEL_OF_TESTS

FULL, LOW = Stage("full_rank", 4), Stage("low_rank", 12)
ALONE = Launch("one", 1, on_gpu=False)


def hf_config_of(section: ModelSection) -> PretrainedConfig:
    found, problems = read_hf_config(section, CausalLM())
    assert found is not None, problems
    return found


@pytest.fixture
def config(tiny_run: Callable[..., dict[str, Any]]) -> Config:
    return check(tiny_run())


@pytest.mark.parametrize("stage", [FULL, LOW], ids=lambda stage: stage.name)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"training__mixed_precision": "bf16"},
        {"data__document_mask": True},
        {"optim": {"name": "muon", "factors": "product"}},
    ],
    ids=["fp32", "bf16", "masked", "muon and product"],
)
def test_a_dry_run_takes_what_real_tensors_take(
    stage: Stage,
    overrides: dict[str, Any],
    tiny_run: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = check(tiny_run(**overrides))
    hf_config = hf_config_of(config.model)
    faked = dry_run_update(stage, config, hf_config, batch_size=4)
    monkeypatch.setattr(dry_run_module, "FakeTensorMode", nullcontext)
    monkeypatch.setattr(dry_run_module, "empty_model", lambda *how: build_model(*how, seed=0))
    real = dry_run_update(stage, config, hf_config, batch_size=4)
    assert summary(faked) == summary(real)
    assert (faked.merge > 0) == stage.is_low_rank


def test_a_forecast_needs_no_triton_and_no_gpu(config: Config) -> None:
    of_a_gpu = config.model_copy(update={"lora": config.lora.model_copy(update={"kernels": "triton"})})
    forecasts = [dry_run_update(LOW, c, hf_config_of(c.model), batch_size=4) for c in (config, of_a_gpu)]
    assert summary(forecasts[0]) == summary(forecasts[1])


def test_the_state_of_the_product_optimizer_is_one_momentum_a_factor(tiny_run: Callable[..., dict[str, Any]]) -> None:
    by_optimizer = {}
    for factors in (None, "product"):
        config = check(tiny_run(optim={"factors": factors}))
        hf_config = hf_config_of(config.model)
        by_optimizer[factors] = dry_run_update(LOW, config, hf_config, batch_size=4).optimizer_state
    of_factors = stage_model(LOW, config, hf_config).parameter_report.factors
    num_factors = 2 * 14  # of 2 layers with 7 wrapped weights each; AdamW has a step count of 4 bytes for each
    assert by_optimizer[None] - by_optimizer["product"] == of_factors.num_bytes + 4 * num_factors


def test_the_state_of_muon_is_one_momentum_a_hidden_matrix(tiny_run: Callable[..., dict[str, Any]]) -> None:
    by_optimizer = {}
    for name in ("adamw_fused", "muon"):
        config = check(tiny_run(optim={"name": name}))
        hf_config = hf_config_of(config.model)
        by_optimizer[name] = dry_run_update(FULL, config, hf_config, batch_size=4).optimizer_state
    d, ffn = MODEL_OF_TESTS["hidden_size"], MODEL_OF_TESTS["intermediate_size"]
    # One moment less for each entry, and a step count less for each matrix, of 2 layers with 7.
    assert by_optimizer["adamw_fused"] - by_optimizer["muon"] == 4 * 2 * (4 * d * d + 3 * d * ffn) + 4 * 14


def summary(dry_run: DryRun) -> list[int]:
    peak = max(other + gradients for other, gradients in dry_run.passes)
    gradients = dry_run.step[-1][1]
    return [dry_run.activations, peak, gradients, dry_run.optimizer_state, dry_run.step_temporaries]


def test_what_is_alive_after_a_forward_pass_is_what_autograd_saved(config: Config) -> None:
    hf_config, saved = hf_config_of(config.model), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    example = example_batch(config, 4)
    with LiveBytes() as live:
        model = build_model(config.model, hf_config, CausalLM(), seed=0)
        make_trainable(model, LOW, config)
        batch = fake_batch(example)
        level, own = live.now, {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = CausalLM().loss(model, batch)
        alive = live.now - level
    assert loss.requires_grad
    assert alive == pytest.approx(sum(size for key, size in saved.items() if key not in own), rel=0.02)


def test_components_are_those_of_a_real_model_and_optimizer(config: Config) -> None:
    hf_config = hf_config_of(config.model)
    model = build_model(config.model, hf_config, CausalLM(), seed=0)
    make_trainable(model, LOW, config)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    num_trained = sum(1 for p in model.parameters() if p.requires_grad)
    measured = stage_model(LOW, config, hf_config)
    held = stage_memory(LOW, config, ALONE, measured, dry_run_update(LOW, config, hf_config, batch_size=4))
    kinds = ("base weights", "LoRA factors", "trained in full", "frozen for good")
    assert sum(held.device[kind] for kind in kinds) == sum(p.nbytes for p in model.parameters())
    assert held.device["optimizer state"] == 2 * trained + 4 * num_trained  # two moments and a step count each
    assert held.restart is not None and held.restart > held.save > trained
    assert held.update == sum(held.device.values()) == held.peak


@pytest.mark.parametrize("name", ["bfloat16", "int8", "nf4"])
def test_a_quantized_base_takes_what_its_format_takes(
    name: Any, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("relora.train.stages", "relora.forecast.memory"):
        monkeypatch.setattr(f"{module}.lora_config", lambda c: replace(lora_config(c), base_dtype=name))
    hf_config = hf_config_of(config.model)
    measured = stage_model(LOW, config, hf_config)
    shapes = measured.parameter_report.wrapped_layers.values()
    assert measured.parameter_report.wrapped.num_bytes == sum(
        WeightFormat(name, s).quantize(torch.zeros(s)).nbytes for s in shapes
    )
    two = Launch("ddp", 2, on_gpu=False)
    nothing = DryRun(activations=0, passes=[(0, 0)], step=[(0, 0)], optimizer_state=0, merge=0)
    held = stage_memory(LOW, config, two, measured, nothing)
    assert held.host == {"exact fp32 master": sum(4 * d_out * d_in // 2 for d_out, d_in in shapes)}
    assert stage_memory(FULL, config, two, measured, nothing).host == {}
    assert stage_memory(LOW, config, ALONE, measured, nothing).host == {
        "exact fp32 master": 2 * held.host["exact fp32 master"]
    }


MODEL = ModelBytes(weights=4000, trained=800, factors=600, units=((1000, 100), (1000, 100)), small=40)


@pytest.mark.parametrize(
    ("engine", "weights", "optimizer", "gradients", "stay", "masters"),
    [
        ("ddp", 1, 1, 1, True, 0),
        ("fsdp2", 1 / 4, 1 / 4, 1 / 4, False, 0),
        ("zero1", 1, 1 / 4, 1, False, 200),
        ("zero2", 1, 1 / 4, 1 / 4, False, 200),
        ("zero3", 1 / 4, 1 / 4, 1 / 4, True, 200),
    ],
)
def test_shares_of_four_processes(
    engine: Any, weights: float, optimizer: float, gradients: float, stay: bool, masters: int, config: Config
) -> None:
    once = config.model_copy(update={"training": config.training.model_copy(update={"per_device_batch_size": 2})})
    shares = shares_of(Launch(engine, 4, on_gpu=False), once, MODEL)
    assert (shares.weights, shares.optimizer, shares.gradients) == (weights, optimizer, gradients)
    assert (shares.gradients_stay, shares.masters) == (stay, masters)
    # Two micro-batches: the gradients of the first are there during the second.
    twice = config.model_copy(update={"training": config.training.model_copy(update={"per_device_batch_size": 1})})
    assert shares_of(Launch(engine, 4, on_gpu=False), twice, MODEL).gradients_stay


def test_fsdp2_holds_a_unit_and_what_is_outside_of_all(config: Config) -> None:
    on_cpu, on_gpu = (shares_of(Launch("fsdp2", 2, on_gpu=on_gpu), config, MODEL).buffers for on_gpu in (False, True))
    assert (on_cpu, on_gpu) == (2000 + 1000 + 2 * 100, 2000 + 2 * 1000 + 2 * 100)
    whole = config.model_copy(update={"training": config.training.model_copy(update={"sync_each_batch": False})})
    assert shares_of(Launch("fsdp2", 2, on_gpu=False), whole, MODEL).gradients == 1


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_gradients_travel_as_the_engines_say(engine: Any, config: Config) -> None:
    training = config.training.model_copy(update={"per_device_batch_size": 1})
    config, launch = config.model_copy(update={"training": training}), Launch(engine, 4, on_gpu=False)
    more = replace(MODEL, trained=MODEL.trained + 1000)
    sent = sent_bytes(launch, config, more).update - sent_bytes(launch, config, MODEL).update
    stage = int(engine[-1]) if "zero" in engine else 0
    it: Any = SimpleNamespace(world=SimpleNamespace(num_processes=4), zero_stage=stage, _sync_each_batch=True)
    kind: Any = {"ddp": DDPEngine, "fsdp2": FSDP2Engine}.get(engine, DeepSpeedEngine)
    assert sent == pytest.approx(1000 * kind.sent_per_gradient_byte(it, 2))


def test_processes_that_synchronize_at_restarts_send_nothing_between(config: Config) -> None:
    apart = config.model_copy(update={"relora": config.relora.model_copy(update={"sync": "restart"})})
    sent = sent_bytes(Launch("ddp", 2, on_gpu=False), apart, MODEL)
    assert (sent.update, sent.restart) == (0, 600 + 200)
    two = Launch("ddp", 2, on_gpu=False)
    assert (num_master_shards(apart, two), num_independent_updates(apart, two)) == (1, 2)
    assert (num_master_shards(config, two), num_independent_updates(config, two)) == (2, 1)


def square(d: int, *, can_merge: bool = True, forward: str = "auto") -> LayerWork:
    return LayerWork([(d, d)], rest_full=0, rest_low=0, attention=0, can_merge=can_merge, forward=forward)


def test_break_even() -> None:
    # Factored: 14 T r d = 2 T d^2. Merged: 4 r d^2 + 8 T r d = 2 T d^2.
    d, T = 1024, 4096
    assert break_even_rank(square(d, can_merge=False), num_tokens=T) == d // 7
    assert break_even_rank(square(d), num_tokens=T) == 2 * T * d // (4 * d + 8 * T)
    assert num_merged(square(d), num_tokens=T, r=64) == 1
    assert num_merged(square(d), num_tokens=d // 2, r=64) == 0  # few tokens: W + delta is not worth forming
    assert num_merged(square(d, forward="factored"), num_tokens=T, r=64) == 0
    full = full_rank_update(square(d), num_calls=3, num_tokens=T)
    low = low_rank_update(square(d), num_calls=3, num_tokens=T, r=128)
    assert full.total == 18 * T * d * d
    assert low.total == 3 * (4 * T * d * d + 4 * 128 * d * d + 8 * T * 128 * d)


def test_the_products_of_a_model_are_counted(config: Config) -> None:
    hf_config: Any = hf_config_of(config.model)
    work = layer_work(config, hf_config)
    d, length = hf_config.hidden_size, config.data.sequence_length
    assert len(work.wrapped) == 7 * hf_config.num_hidden_layers
    assert work.rest_full == work.rest_low == 6 * d * hf_config.vocab_size
    assert work.attention == 12 * hf_config.num_hidden_layers * length * d


def test_peaks_grow_on_a_line(config: Config) -> None:
    hf_config = hf_config_of(config.model)
    measured = stage_model(LOW, config, hf_config)

    def at(batch_size: int) -> StageMemory:
        return stage_memory(LOW, config, ALONE, measured, dry_run_update(LOW, config, hf_config, batch_size=batch_size))

    line = line_through(at(4), at(8), 4, 8)
    assert line.at(64) == pytest.approx(at(64).update, rel=0.01)
    assert line.at(1) >= measured.num_bytes.weights


def test_what_fits() -> None:
    lines = {"low_rank": PeakLine(floor=GIB, base=2 * GIB, slope=GIB), "full_rank": PeakLine(0, 4 * GIB, GIB)}
    found = fit_batch(24, lines, divisors_of(96, 2))
    assert found.largest == {"low_rank": 20, "full_rank": 18}  # of 24 GiB 22.08 are ours
    assert found.usable == 16
    assert fit_batch(2, lines, [1, 2]).largest == {"low_rank": None, "full_rank": None}
    assert divisors_of(12, 2) == [1, 2, 3, 6]


def test_advice_on_restarts_that_do_not_recover(tiny_run: Callable[..., dict[str, Any]]) -> None:
    def told(**overrides: Any) -> str:
        return "\n".join(restart_advice(check(tiny_run(**overrides))))

    assert told() == ""
    assert "the restart at 10 is followed by 2 updates and a re-warm-up of 3" in told(schedule__restart_warmup_steps=3)
    assert "never down" in told(schedule__restart_warmup_steps=3)
    assert "no restart comes before the end at 12" in told(relora__restart_every=8)
    assert told(training__method="full") == ""


def test_advice_on_updates_that_cost_more_than_full_rank(tiny_run: Callable[..., dict[str, Any]]) -> None:
    config = check(tiny_run(lora__lora_dropout=0.1))
    assert ["rules out" in line for line in route_advice(config, break_even=4, ratio=0.9)] == [True]
    [slow, _] = route_advice(config, break_even=3, ratio=1.25)
    assert slow.startswith("lora.r = 4: above 3") and "1.25 times" in slow
    assert list(saving_advice(100, 90)) == [] and len(list(saving_advice(90, 90))) == 1
    assert list(room_advice("low_rank", 5, room=None)) == list(room_advice("low_rank", 5, room=6)) == []
    assert "stage low_rank needs" in next(room_advice("low_rank", 7, room=6))


def test_a_model_of_7b_takes_no_memory() -> None:
    config = load_config(f"{ROOT}/configs/llama_1b.yaml", [f"model.config={ROOT}/configs/models/llama_7b.json"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = stage_model(FULL, config, hf_config_of(config.model))
    dry_run = dry_run_update(FULL, config, hf_config_of(config.model), batch_size=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    assert measured.num_bytes.weights > 25 * GIB and dry_run.optimizer_state > 50 * GIB


def written(tree: dict[str, Any], folder: Path) -> str:
    (folder / "plan.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "plan.yaml")


def test_the_command(
    tiny_run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tiny_run(data__sources=[{"path": "no such folder"}]), tmp_path)  # no data are needed
    numbers = tmp_path / "numbers.json"
    options = ["--engine", "fsdp2", "--processes", "2", "--device-memory", "0.001", "--json", str(numbers)]
    assert main(["plan", file, *options, "lora.r=8"]) == 0
    printed = capsys.readouterr().out
    for said in (
        "engine fsdp2, processes 2",
        "LoRA factors",
        "peak of a restart",
        "low rank costs less up to r",
        "GiB",
    ):
        assert said in printed
    assert "the device leaves" in printed
    found = json.loads(numbers.read_text())
    assert found["numbers"]["reachable_rank"] == 24
    assert found["peaks"]["low_rank"]["peak"] == max(
        found["peaks"]["low_rank"]["update"], found["memory"]["low_rank"]["restart"]
    )
    assert not (tmp_path / "run").exists()


def test_nothing_but_the_plan_is_printed(tiny_run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    # In a process of its own: torch warns once.
    told = run([sys.executable, "-m", "relora", "plan", written(tiny_run(), tmp_path)])
    assert (told.returncode, told.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "zero9"], "--engine zero9: must be one of one, ddp, fsdp2, zero1, zero2, zero3"),
        (["--processes", "0"], "--processes 0: must be at least 1"),
        (["--engine", "one", "--processes", "2"], "--processes 2: engine one is one process"),
        (["--processes", "3"], "training.global_batch_size = 8: must be a multiple"),
        (["--device-memory", "-1"], "--device-memory -1: must be > 0"),
        (["--json", "plan.yaml/numbers.json"], "--json plan.yaml/numbers.json"),
        (["lora.r=64"], "has a smaller side of 32, less than r = 64"),
    ],
)
def test_mistakes(
    options: list[str],
    said: str,
    tiny_run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", written(tiny_run(), tmp_path), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_needs_values_is_refused(tiny_run: Callable[..., dict[str, Any]]) -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = check(tiny_run(model__config=MODEL_OF_TESTS | experts))
    with pytest.raises(UserError, match="MixtralForCausalLM cannot be computed without values"):
        dry_run_update(LOW, config, hf_config_of(config.model), batch_size=2)


def test_engines_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from relora.commands.plan import launch_of

    assert (launch_of(None, None).engine, launch_of(None, 2).engine) == ("one", "ddp")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    launch = launch_of(None, None)
    assert (launch.engine, launch.num_processes) == ("zero2", 4)
    with pytest.raises(UserError):
        launch_of("one", None)
