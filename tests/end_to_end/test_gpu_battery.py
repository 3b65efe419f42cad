"""The battery for a GPU, dry: every stage on a CPU at tiny sizes, its pages, and how it goes on."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import stages, targets
from benchmarks.gpu.__main__ import page, run_stage, shown, slug
from benchmarks.gpu.profile import Span, gaps_of
from benchmarks.gpu.stages import STAGES, Stage, Step
from benchmarks.gpu.targets import H100, TARGETS, limits_of
from tests.helpers.programs import run

FORM_COST = "--shapes 32x48 --rank 4 --repeats 2 --rows 8"


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What `run.sh --dry` prints, and the folder of its pages."""
    out = tmp_path_factory.mktemp("battery")
    return run(["bash", "benchmarks/gpu/run.sh", "--dry", "--out", str(out)], timeout_s=900), out / "cpu"


def test_every_stage_is_made_and_has_its_page(dry: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result, folder = dry
    assert result.returncode == 0, result.stderr[-3000:]
    for stage in STAGES:
        outcomes = json.loads((folder / f"{stage.name}.json").read_text())
        made = [step.name for step in stage.steps if step.tiny is not None]
        assert list(outcomes) == made
        assert result.stdout.count(f"{stage.name}: ") == len(made)
        text = (folder / f"{stage.name}.md").read_text()
        assert text.startswith(f"# {stage.title}: cpu\n")
        assert text.count("\n## ") == len(stage.steps)
        assert text.count("Not made yet.") == len(stage.steps) - len(made)
        assert all(title in text for outcome in outcomes.values() for title in outcome["tables"])
        assert str(folder) not in text


def test_targets_are_held_against_the_tables(dry: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, folder = dry
    text = (folder / "speed.md").read_text()
    made = {step.name for stage in STAGES for step in stage.steps if step.tiny is not None}
    held = [target for target in TARGETS if target.device is None and target.step in made]
    assert all(f"- {target.method}, {target.column}: " in text for target in held)
    assert len(held) == 3
    assert {target.step for target in TARGETS} <= {step.name for step in stage_of(targets.STAGE).steps}


def stage_of(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def test_targets_of_a_device_and_of_all() -> None:
    rows = [{"method": "full", "MFU": 0.5, "tokens/s": 1.0}]
    rows.append({"method": "ours", "tokens/s": 6e4, "/ full": 0.7, "/ peft": 1.0})
    limits = {limit.what: limit.is_met for limit in limits_of("llama 1b", {"": rows}, H100)}
    assert limits == {"full, MFU": True, "ours, tokens/s": True, "ours, / full": True, "ours, / peft": False}
    assert [limit.what for limit in limits_of("llama 1b", {"": rows}, "another")] == ["ours, / full", "ours, / peft"]


def test_a_stage_goes_on_with_what_is_missing_or_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Step("good", "form_cost", FORM_COST), Step("bad", "form_cost", "--shapes 32")
    stage, path = Stage("some", "Some", (good, bad)), tmp_path / "some.json"
    [problem] = run_stage(stage, tmp_path, "cpu", dry=False, again=False)
    assert problem == "  some, bad: exit code 70"
    first = json.loads(path.read_text())
    assert "TypeError" in first["bad"]["log"]
    assert "**Failed**: exit code 70" in (tmp_path / "some.md").read_text()
    mended = Stage("some", "Some", (good, Step("bad", "form_cost", FORM_COST)))
    monkeypatch.setattr("benchmarks.gpu.__main__.STAGE_MINUTES", 0)
    [problem] = run_stage(mended, tmp_path, "cpu", dry=False, again=False)
    assert "no time was left" in problem
    monkeypatch.setattr("benchmarks.gpu.__main__.STAGE_MINUTES", stages.STAGE_MINUTES)
    assert run_stage(mended, tmp_path, "cpu", dry=False, again=False) == []
    second = json.loads(path.read_text())
    assert second["good"] == first["good"], "it was done"
    assert second["bad"]["tables"]
    assert "Failed" not in (tmp_path / "some.md").read_text()


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    step = Step("slow", "form_cost", "--shapes 2048x2048 --repeats 100000", minutes=0.02)
    [problem] = run_stage(Stage("some", "Some", (step,)), tmp_path, "cpu", dry=False, again=False)
    assert problem == "  some, slow: ended after 1 s, its limit"


def test_without_a_gpu_only_a_dry_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run(["bash", "benchmarks/gpu/run.sh", "checks"], timeout_s=60)
    assert result.returncode == 2
    assert "no GPU is visible to torch here; --dry runs everything on the CPU" in result.stderr


def test_gaps_are_times_in_which_no_kernel_runs() -> None:
    a, b, inside, c = Span("a", 0, 10), Span("b", 12, 40), Span("inside", 15, 20), Span("c", 45, 50)
    assert gaps_of([a, b, inside, c]) == [(b, c), (a, b)]


def test_names_of_devices_and_commands() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert (
        shown("python -m benchmarks.step --rank 4 --json /x/y.json --rounds 1")
        == "python -m benchmarks.step --rank 4 --rounds 1"
    )
    assert "Not made yet." in page(STAGES[0], {}, "cpu")
