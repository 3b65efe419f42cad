"""What can go wrong inside an engine: bad updates, restarts done wrong, what a stage leaves behind, bf16."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.engines.test_engines import ENGINES
from tests.helpers.launch import forked_launch, launch_file

TOLERANCE = 1e-4
WRONG = 100 * TOLERANCE  # a control that comes out closer than this would not be told from a right restart
# The same engines with all that their launchers offer: what rests in host memory, recomputed activations, gradients
# reduced once an update, DeepSpeed's own AdamW, whose first use on a machine compiles for minutes.
OFFLOADED = ("fsdp2_offloaded", "zero3_offloaded")
TRIALS = (*ENGINES, *OFFLOADED)
SHARDED = ("fsdp2", "zero3", *OFFLOADED)
# What the launch file leaves to DeepSpeed keeps parameters as small as ours whole on every rank.
ALL_PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}

OWN_ADAMW = {"optimizer": {"type": "AdamW", "params": {}}}
ON_HOST = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}

Told = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Told]:
    """What the two ranks of an engine tell of each scenario; each engine is launched when it is first asked for."""
    folder = tmp_path_factory.mktemp("trials")

    @cache
    def made(engine: str) -> CompletedProcess[str]:
        once = ["once"] if engine == "fsdp2_offloaded" else []
        return forked_launch(options(engine, folder), "tests/helpers/engine_scenarios.py", *once, timeout_s=600)

    def told(engine: str) -> Told:
        lines = [json.loads(line) for line in made(engine).stdout.splitlines() if line.startswith('{"scenario"')]
        assert made(engine).returncode == 0, made(engine).stderr[-6000:]
        return {name: [line for line in lines if line["scenario"] == name] for name in {x["scenario"] for x in lines}}

    return told


def options(engine: str, folder: Path) -> list[str]:
    if engine == "fsdp2_offloaded":
        chosen = "--fsdp_offload_params", "true", "--fsdp_activation_checkpointing", "true"
        return [*launch_file("fsdp2_cpu"), *chosen]
    if not engine.startswith("zero3"):
        return launch_file(f"{engine}_cpu")
    settings: dict[str, Any] = {"zero_optimization": dict(ALL_PARTITIONED)}
    if engine == "zero3_offloaded":
        settings["zero_optimization"] |= ON_HOST
        settings |= OWN_ADAMW
    file = folder / f"{engine}.json"
    file.write_text(json.dumps(settings))
    size = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    return ["--use_deepspeed", "--deepspeed_config_file", str(file), *size]


@pytest.fixture(params=TRIALS)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def told(engine: str, trials: Callable[[str], Told]) -> Told:
    return trials(engine)


def both(told: Told, scenario: str) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 tell of a scenario."""
    assert sorted(line["rank"] for line in told.get(scenario, [])) == [0, 1], f"{scenario}: not told by both ranks"
    return told[scenario]


def test_what_the_launcher_asks_for_is_what_trains(engine: str, told: Told) -> None:
    # An option that is read and not used would pass every comparison.
    for line in both(told, "built"):
        assert line["optimizer"] == {"zero3_offloaded": "DeepSpeedCPUAdam"}.get(engine, "AdamW")
        assert line["recomputes"] == (engine == "fsdp2_offloaded")


@pytest.mark.parametrize("kind", ["nan", "loss", "spike"])
def test_a_bad_update_of_one_rank_is_made_by_none(told: Told, kind: str) -> None:
    for line in both(told, f"bad {kind}"):
        assert line["skipped"]
        assert line["loss"] == {"nan": "nan", "loss": "inf"}[kind] if kind != "spike" else 1 < float(line["loss"]) < 1e3
        assert (line["weights_off"], line["slots_off"]) == (0, 0)
        assert line["steps_equal"]
    for line in both(told, "after bad"):
        assert line["off"] <= TOLERANCE, "the good updates after it"


def test_a_bad_update_that_the_host_has_not_looked_at_is_skipped_alone(trials: Callable[[str], Told]) -> None:
    scenarios = [(engine, "unread") for engine in ("ddp", "fsdp2", "fsdp2_offloaded")]
    for engine, scenario in [*scenarios, ("ddp", "product unread")]:
        for line in both(trials(engine), scenario):
            assert line["on_device"]
            assert line["skipped"] == [False, True, False]
            assert (line["weights_off"], line["slots_off"]) == (0, 0)
            assert line["steps_equal"]
            assert min(line["first_moved"], line["last_moved"]) > 10 * TOLERANCE


def test_a_stage_hands_over_its_weights_and_nothing_else(told: Told) -> None:
    for line in both(told, "switch"):
        assert line["full_rank_off"] <= TOLERANCE
        assert line["released_off"] == 0, "the weights of a released stage are still read"
        assert line["off"] <= TOLERANCE
        assert line["num_state"] > 0
        assert (line["num_state_left"], line["num_weights_left"], line["objects_left"]) == (0, 0, [])


def test_updates_around_a_restart_are_those_of_one_process(told: Told) -> None:
    for line in both(told, "restart"):
        assert line["off"] <= TOLERANCE
        assert line["least_moved"] > WRONG, "nothing was compared"


def test_an_optimizer_of_the_factors_makes_the_updates_of_one_process(trials: Callable[[str], Told]) -> None:
    for line in both(trials("ddp"), "product"):
        assert line["off"] <= TOLERANCE
        assert line["least_moved"] > WRONG, "nothing was compared"
        assert line["agreed"]


def test_logits_right_after_a_restart_are_those_right_before(told: Told) -> None:
    for line in both(told, "logits"):
        assert line["off"] < 1e-5


@pytest.mark.parametrize("mode", ["keep", "magnitude", "random"])
def test_every_way_to_reset_is_that_of_one_process(told: Told, mode: str) -> None:
    for line in both(told, f"reset {mode}"):
        assert line["off"] <= TOLERANCE


def test_factors_that_begin_with_b_come_out_of_w_as_in_one_process(told: Told) -> None:
    for line in both(told, "offset logits"):
        assert line["off"] <= TOLERANCE
    for line in both(told, "offset"):
        assert line["off"] <= TOLERANCE


def test_ranks_that_differ_in_a_copy_are_told(engine: str, told: Told) -> None:
    seen = engine not in SHARDED  # of a sharded parameter there is one copy only
    for line in both(told, "checksum"):
        assert line["unchanged"]
        assert {line[kind] for kind in ("W", "A", "B", "norm")} == {not seen}


def test_devices_that_round_differently_agree_after_a_restart(engine: str, told: Told) -> None:
    for line in both(told, "mixed False"):
        assert line["agreed"] == (engine in SHARDED), "nothing was rounded differently"
    for line in both(told, "mixed True"):
        assert line["agreed"]


def test_a_rank_that_has_sampled_its_text_goes_on_with_the_others(told: Told) -> None:
    first, second = sorted(both(told, "sample"), key=lambda line: line["rank"])
    assert (first["num_tokens"], second["num_tokens"]) == (5, 0)


def test_a_resume_in_place_restarts_the_same(told: Told) -> None:
    # The controls below go on from the same snapshot: what they show is their own mistake.
    for line in both(told, "control right"):
        assert line["raised"] is None
        assert line["off"] <= TOLERANCE


def test_kept_moments_would_be_seen(told: Told) -> None:
    for line in both(told, "control moments kept"):
        assert line["raised"] is None
        assert line["off"] > WRONG


@pytest.mark.parametrize("what", ["moments", "step", "pruning"])
def test_a_reset_that_is_not_written_is_refused(told: Told, what: str) -> None:
    for line in both(told, f"control {what} not written"):
        assert re.search("reads? back", line["raised"])


def test_a_stale_copy_is_refused_by_name(engine: str, told: Told) -> None:
    copies = {"ddp": ["parameter"], "fsdp2": ["shard"]}.get(
        engine.removesuffix("_offloaded"), ["parameter", "fp32 master"]
    )
    assert {name for name in told if "stale" in name} == {f"control stale {copy}" for copy in copies}
    for copy in copies:
        for line in both(told, f"control stale {copy}"):
            assert f"the {copy} does not hold what the restart has written" in line["raised"]


def test_a_master_left_out_would_be_seen(trials: Callable[[str], Told]) -> None:
    for engine in ("zero1", "zero2", "zero3", "zero3_offloaded"):
        for line in both(trials(engine), "control only what the model shows"):
            assert line["raised"] is None
            assert line["off"] > WRONG


def test_a_wrong_part_would_be_seen(trials: Callable[[str], Told]) -> None:
    for engine in TRIALS:
        name = "control a part one row off"
        assert (name in trials(engine)) == (engine in SHARDED)
        for line in both(trials(engine), name) if engine in SHARDED else []:
            assert line["raised"] is None
            assert line["off"] > WRONG


def test_only_where_parameters_are_whole_is_more_than_one_layer_in_memory(engine: str, told: Told) -> None:
    for line in both(told, "bf16"):
        assert line["together"] == (not engine.startswith("zero3"))  # it gathers one layer at a time
        assert (line["num_kept"] > 0) == (engine == "ddp")  # W + delta


def test_bf16_keeps_float32_where_it_counts(told: Told) -> None:
    for line in both(told, "bf16"):
        assert line["dtypes"] == ["torch.float32"]
        assert line["off"] <= TOLERANCE
        assert line["off_if_rounded"] > 10 * TOLERANCE, "the tolerance would not tell gradients rounded to bf16"
