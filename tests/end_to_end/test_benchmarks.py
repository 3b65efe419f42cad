"""Each benchmark at a size of no interest: it ends, and its tables hold what docs/results/performance.md says."""

import importlib.util
import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import storage
from tests.helpers.interpreter import fresh_kernels
from tests.helpers.launch import written
from tests.helpers.programs import ROOT

SIZE = {"layers": 1, "hidden-size": 32, "intermediate-size": 80, "heads": 2, "vocab-size": 64, "rank": 4}
TOKENS = {"batch": 2, "sequence": 16}
SMALL = [f"--{name}={value}" for name, value in (SIZE | TOKENS).items()]
HAS_OTHERS = all(importlib.util.find_spec(name) for name in ("galore_torch", "apollo_torch"))
METHODS = ["full", "peft", "ours", *(["galore", "apollo"] if HAS_OTHERS else [])]

Tables = dict[str, list[dict[str, Any]]]
Limits = dict[str, dict[str, Any]]
Benchmark = Callable[..., tuple[Tables, Limits]]


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Benchmark:
    """`benchmark(name, *arguments)` runs `python -m benchmarks.NAME` in this process -> tables, limits.

    It has printed each table and each limit, and the command to repeat it.
    """

    def run(name: str, *arguments: str) -> tuple[Tables, Limits]:
        written_to = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--json", str(written_to)])
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        content, printed = json.loads(written_to.read_text()), capsys.readouterr().out
        assert printed.startswith(f"`python -m benchmarks.{name} {arguments[0]}")
        for title, rows in content["tables"].items():
            assert f"\n{title}\n\n| {' | '.join(rows[0])} |\n|---" in printed
            numbers = [value for row in rows for value in row.values() if isinstance(value, float | int)]
            assert numbers
            assert all(map(math.isfinite, numbers))
        for limit in content["limits"]:
            assert f"- {limit['what']}: " in printed
            most, least = limit["at_most"], limit["at_least"]
            assert limit["is_met"] == (limit["value"] <= most if most is not None else limit["value"] >= least)
        return content["tables"], {limit["what"]: limit for limit in content["limits"]}

    return run


def by(column: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row[column]: row for row in rows}


def test_a_step_of_every_method_and_what_it_holds(benchmark: Benchmark) -> None:
    tables, limits = benchmark("step", *SMALL, "--rounds=2", "--methods", *METHODS)
    [(title, table)] = tables.items()
    rows = by("method", table)
    assert "2 x 16 tokens, r = 4, fp32" in title
    assert list(rows) == METHODS
    assert all(row["ms per update"] > row["of it optimizer, ms"] > 0 for row in rows.values())
    assert rows["full"]["/ full"] == rows["peft"]["/ peft"] == 1
    assert rows["ours"]["trained parameters"] == rows["peft"]["trained parameters"]
    assert rows["full"]["optimizer, MiB"] == 2 * rows["full"]["gradients, MiB"] == 2 * bytes_of_model() / 2**20
    assert all(rows[name]["optimizer, MiB"] < rows["full"]["optimizer, MiB"] for name in METHODS[1:])
    assert set(limits) == {"time, ours / full", "time, ours / peft", "gradients + optimizer of ours, MiB"}
    assert limits["gradients + optimizer of ours, MiB"]["is_met"]


def bytes_of_model() -> int:
    d, ffn, vocab = SIZE["hidden-size"], SIZE["intermediate-size"], SIZE["vocab-size"]
    return 4 * (SIZE["layers"] * (4 * d * d + 3 * d * ffn + 2 * d) + d + 2 * vocab * d)


def test_only_the_limits_of_the_chosen_methods_are_told(benchmark: Benchmark) -> None:
    tables, limits = benchmark("step", *SMALL, "--rounds=1", "--bf16", "--methods", "ours")
    [(title, [row])] = tables.items()
    assert "bf16" in title
    assert row["/ full"] is row["/ peft"] is None
    assert not limits


def test_the_peak_of_a_step_is_that_of_a_process_of_its_own(benchmark: Benchmark) -> None:
    tables, _ = benchmark("step", *SMALL, "--memory", "--methods", "full")
    [[row]] = tables.values()
    assert row["peak of an update, over that, MiB"] > 0
    assert row["at rest, over that, MiB"] > 0
    assert row["/ full"] == 1


def test_a_restart_its_parts_and_its_memory(benchmark: Benchmark) -> None:
    tables, limits = benchmark("restart", *SMALL, "--rounds=1", "--restarts=2")
    assert list(tables) == ["Time", "Parts of a restart", "Memory"]
    [time] = tables["Time"]
    assert time["% of 2000 updates"] == pytest.approx(100 * time["restart, s"] / (2000 * time["update, s"]))
    whole, *parts = tables["Parts of a restart"]
    assert (whole["function"], whole["calls"], whole["%"]) == ("restart.restart", 1, 100)
    assert parts
    assert all(5 <= part["%"] <= 100 for part in parts)
    [memory] = tables["Memory"]
    assert memory["largest layer in fp32, MiB"] == 4 * 32 * 80 / 2**20
    assert len(limits) == 3


def test_checkpoints_of_a_cycle_share_their_base(benchmark: Benchmark) -> None:
    tables, limits = benchmark("checkpoint", *SMALL, "--rounds=1")
    rows = by("what", tables["Checkpoints"])
    first, later = rows["save, first of a cycle"], rows["save, later in it"]
    wrapped_bytes = 4 * (4 * 32 * 32 + 3 * 32 * 80)
    assert first["MB"] - later["MB"] == pytest.approx(wrapped_bytes / 1e6, rel=0.1)
    assert rows["resume: model"]["MB"] == rows["plain file, read"]["MB"] == first["MB"]
    assert len(limits) == 5


def test_a_save_in_the_background_lets_updates_go_on(benchmark: Benchmark) -> None:
    tables, limits = benchmark("background_save", *SMALL, "--rounds=1", "--disk-mb-per-s=2")
    rows = by("save", tables["Saves in the background"])
    for row in rows.values():
        assert row["waits, s"] < row["within, s"], "the disk, and not the copy, is what takes the time"
    assert len(limits) == len(rows) == 2


def test_the_same_run_with_each_storage(
    benchmark: Benchmark, tiny_run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = written(tiny_run(), tmp_path)
    arguments = [f"--config={config}", f"--folder={tmp_path / 'runs'}"]
    tables, limits = benchmark("storage", *arguments, "--storages", "float32")
    [end] = tables["End of the run"]
    assert end["live, nats"] == pytest.approx(end["master, nats"], abs=1e-5), "float32 is its own master"
    assert end["- float32"] == 0
    assert 0 < end["largest merge_error"] < 1e-5
    assert [row["step"] for row in tables["Restarts, float32"]] == [7, 10]
    assert all(abs(row["after - before"]) < 1e-5 for row in tables["Restarts, float32"])
    assert not limits


def test_a_coarse_storage_and_its_master_are_compared() -> None:
    assert storage.overrides("bfloat16") == ["lora.base_dtype=bfloat16"]
    assert storage.overrides("nf4+residual") == ["lora.base_dtype=nf4", "relora.carry_residual=true"]
    probes = {"probe_loss_before": 2.0, "probe_loss_after": 2.25, "probe_loss_master": 2.125}
    row = storage.restart_row({"step": 7, "merge_error": 0.5, "master_error": 1e-7} | probes)
    assert (row["after - before"], row["live after - master"]) == (0.25, 0.125)
    assert (row["merge_error"], row["master_error"]) == (0.5, 1e-7)


def test_signals_at_random_moments_lose_nothing_and_leave_nothing(benchmark: Benchmark) -> None:
    tables, limits = benchmark("signals", "--moments", "4", "--seed", "1")
    [rows] = tables.values()
    assert {row["command"]: row["moments"] for row in rows} == {"prepare": 1, "train": 2, "export": 1}
    assert [what for what, limit in limits.items() if not limit["is_met"]] == []


def test_triton_kernels_take_turns_with_torch(benchmark: Benchmark) -> None:
    sizes = ("--shapes", "20x35", "35x20", "--tokens", "5", "7", "--r=3", "--repeats=1")
    with fresh_kernels(interpreted=True):
        tables, limits = benchmark("kernels", *sizes)
    [rows] = tables.values()
    passes = [("forward", 5), ("backward", 5), ("forward", 7), ("backward", 7), ("W + s B A", None)]
    assert [(row["what"], row["tokens"]) for row in rows] == 2 * passes
    assert all(row["triton / torch"] == pytest.approx(row["triton, ms"] / row["torch, ms"]) for row in rows)
    largest = max(row["triton / torch"] for row in rows if row["what"] == "backward")
    assert limits["backward, largest triton / torch"]["value"] == largest
    assert len(limits) == 3


SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "benchmarks").glob("*.py"))}
PROGRAMS = [name for name, source in SOURCES.items() if "ArgumentParser" in source and "__main__" in source]


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_starts(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out
