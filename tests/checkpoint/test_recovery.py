"""What a run does with checkpoints that are not what was written: it goes back, keeps them, and says what is lost."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora.checkpoint.format import HASH, MANIFEST, sealed
from relora.checkpoint.load import DamagedError, complete_checkpoints, read_manifest
from relora.checkpoint.verify import checkpoint_problems, newest_whole
from relora.cli import main
from relora.config import UserError, check
from relora.config.yaml12 import dump, parse
from relora.train.train import train
from tests.checkpoint.test_resume import assert_same
from tests.helpers.launch import accelerate, written
from tests.helpers.tiny import settings, stopped

NUM_FLIPS = 1000
NEWEST = "step-00000009"
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run without damage: the switch at 4, restarts at 7 and 10, a checkpoint at every step."""
    tree = settings(corpus, tmp_path_factory.mktemp("whole") / "run", training__report_to=[])
    train(check(tree))
    return tree


@pytest.fixture
def halfway(whole: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same run, killed after the checkpoint of step 9; those of a cycle share files."""
    tree = stopped(whole, 9, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    for cycle in ((5, 6), (8, 9)):
        for step in cycle:
            for file in (folder / f"step-{step:08d}").glob("base-*"):
                file.unlink()
                file.hardlink_to(folder / f"step-{cycle[0] - 1:08d}" / file.name)
    return tree


def flip(path: Path) -> None:
    """Flip a bit in the file itself: all its names share the damage."""
    with path.open("r+b") as file:
        file.seek(-3, 2)
        byte = file.read(1)[0]
        file.seek(-3, 2)
        file.write(bytes([byte ^ 1]))


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    mark = "relora: warning: "
    return [line.partition(mark)[2] for line in capsys.readouterr().err.splitlines() if mark in line]


# --- manifests


def drop(mapping: dict[str, Any], part: str) -> None:
    for name in [name for name in mapping if part in name]:
        del mapping[name]


def drop_file(manifest: dict[str, Any]) -> None:
    name = next(name for name in manifest["files"] if name.startswith("moments"))
    del manifest["files"][name]
    manifest["tensors"] = {tensor: file for tensor, file in manifest["tensors"].items() if file != name}
    manifest["steps"] = {}


EDITS: dict[str, Edit] = {
    "step + 4": lambda manifest: manifest.update(step=manifest["step"] + 4),
    "one Adam step": lambda manifest: manifest["steps"].update({"model.norm.weight": 1.0}),
    "a parameter's moments left out": lambda manifest: drop(manifest["tensors"], "model.norm.weight:"),
    "one moment left out": lambda manifest: drop(manifest["tensors"], "model.norm.weight:exp_avg_sq"),
    "a parameter's step left out": lambda manifest: drop(manifest["steps"], "model.norm.weight"),
    "a file left out": drop_file,
    "an unknown field": lambda manifest: manifest.update(samples_seen=8),
    "a file elsewhere": lambda manifest: manifest["files"].update({"../x.safetensors": manifest["files"].popitem()[1]}),
    "a parameter that is none": lambda manifest: manifest["steps"].update({"model.other": 1.0}),
    "other processes": lambda manifest: manifest.update(num_states=10**9),
    "not a number": lambda manifest: manifest["steps"].update({"model.norm.weight": float("nan")}),
    "text for a number": lambda manifest: manifest.update(skipped="0"),
}


def edited(folder: Path, edit: Edit, *, number: int) -> None:
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    if number == 2:
        del manifest[HASH], manifest["metrics"]
        manifest["format"] = 2
    edit(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("number", [3, 2], ids="format {}".format)
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_damage(name: str, number: int, halfway: dict[str, Any]) -> None:
    folder = Path(halfway["output_dir"]) / "checkpoints" / NEWEST
    edited(folder, EDITS[name], number=number)
    if (name, number) == ("one Adam step", 2):
        assert checkpoint_problems(folder) == [], "without a hash a possible value cannot be told from the right one"
    else:
        [problem] = checkpoint_problems(folder)
        assert problem.startswith(f"checkpoint {folder}: MANIFEST.json ")


def test_no_flipped_bit_of_a_manifest_is_accepted(halfway: dict[str, Any]) -> None:
    folder, rng = Path(halfway["output_dir"]) / "checkpoints" / NEWEST, random.Random(0)
    path = folder / "MANIFEST.json"
    content = path.read_bytes()
    for _ in range(NUM_FLIPS):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError) as error:
            read_manifest(folder)
        assert len(error.value.problems) == 1
    path.write_bytes(content)
    assert read_manifest(folder).step == 9


def test_checkpoints_of_the_former_format_are_resumed(whole: dict[str, Any], halfway: dict[str, Any]) -> None:
    run = Path(halfway["output_dir"])
    for folder in complete_checkpoints(run / "checkpoints"):
        edited(folder, lambda _: None, number=2)
    train(check(halfway))
    assert_same(run, whole["output_dir"])
    formats = {read_manifest(folder).format for folder in complete_checkpoints(run / "checkpoints")}
    assert formats == {2, 3}


def test_a_manifest_that_was_sealed_again_must_still_fit(halfway: dict[str, Any]) -> None:
    folder = Path(halfway["output_dir"]) / "checkpoints" / NEWEST
    path = folder / "MANIFEST.json"
    for text in (json.dumps(sealed(json.loads(path.read_text()) | {"step": 13})), "[" * 100_000, '{"format": [3]}'):
        path.write_text(text)
        with pytest.raises(DamagedError):
            read_manifest(folder)


# --- resumes


def test_the_one_before_is_used_and_the_damaged_one_is_kept(
    whole: dict[str, Any], halfway: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(halfway["output_dir"])
    flip(run / "checkpoints" / NEWEST / "trained-00001.safetensors")
    limited = halfway | {"training": halfway["training"] | {"save_total_limit": 2}}
    train(check(limited), dry_run=True)
    assert (run / "checkpoints" / NEWEST).is_dir(), "a rehearsal changes nothing"
    assert len(warnings(capsys)) == 1
    with pytest.raises(UserError, match=r"trained-00001\.safetensors is not what was written.*without --strict"):
        train(check(limited), strict=True)
    train(check(limited))
    [warning] = warnings(capsys)
    assert f"{NEWEST} is damaged (trained-00001.safetensors is not what was written" in warning
    assert warning.endswith(
        f"it is kept as {NEWEST}.damaged, and the run resumes from step-00000008: 1 updates are trained again"
    )
    assert_same(run, whole["output_dir"])
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [f"{NEWEST}.damaged", "step-00000011", "step-00000012"], "it does not count towards the limit"


def test_damage_in_a_shared_file_leads_to_an_earlier_cycle(
    whole: dict[str, Any], halfway: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(halfway["output_dir"])
    flip(next((run / "checkpoints" / NEWEST).glob("base-*")))
    train(check(halfway))
    assert [line.partition(" is damaged")[0][-2:] for line in warnings(capsys)] == ["09", "08", "07"]
    assert_same(run, whole["output_dir"])
    assert all(checkpoint_problems(folder) == [] for folder in complete_checkpoints(run / "checkpoints"))


@pytest.mark.parametrize("damage", ["files", "manifests"])
def test_without_a_whole_checkpoint_nothing_begins_at_zero(damage: str, halfway: dict[str, Any]) -> None:
    checkpoints = Path(halfway["output_dir"]) / "checkpoints"
    for folder in checkpoints.iterdir():
        (folder / ("MANIFEST.json" if damage == "manifests" else "trained-00001.safetensors")).unlink()
    names = sorted(path.name for path in checkpoints.iterdir())
    with pytest.raises(UserError, match=r"no checkpoint is whole \(step-00000009: .*; and 6 more\); put one back"):
        train(check(halfway))
    assert sorted(path.name for path in checkpoints.iterdir()) == names, "the next start must find the same"
    for folder in checkpoints.iterdir():
        folder.rename(folder.with_name(f"{folder.name}.damaged"))
    with pytest.raises(UserError, match="all were set aside"):
        newest_whole(checkpoints)


def test_a_file_that_cannot_be_read_is_no_damage(halfway: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("relora.checkpoint.verify.sha256_of", fails)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)") as error:
        newest_whole(Path(halfway["output_dir"]) / "checkpoints")
    assert not isinstance(error.value, DamagedError)


def test_links_are_not_followed_on_removal(halfway: dict[str, Any], tmp_path: Path) -> None:
    checkpoints, elsewhere = Path(halfway["output_dir"]) / "checkpoints", tmp_path / "elsewhere"
    shutil.move(checkpoints / "step-00000003", elsewhere)
    (checkpoints / "step-00000003").symlink_to(elsewhere)
    (checkpoints / ".tmp-step-00000010").symlink_to(elsewhere)
    (checkpoints / "step-00000011").write_text("a file")
    (checkpoints.parent / "final").symlink_to(elsewhere)
    before = sorted(path.name for path in elsewhere.iterdir())
    train(check(halfway | {"training": halfway["training"] | {"save_total_limit": 1}}))
    assert sorted(path.name for path in elsewhere.iterdir()) == before
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000011.damaged", "step-00000012"]
    assert (checkpoints.parent / "final" / "config.json").is_file()


def test_two_processes_go_back_together(halfway: dict[str, Any], tmp_path: Path) -> None:
    flip(tmp_path / "run/checkpoints" / NEWEST / "moments-00001.safetensors")
    result = accelerate("ddp_cpu", written(halfway, tmp_path))
    assert result.stderr.count("relora: warning: checkpoint") == 1
    assert (tmp_path / "run/checkpoints" / f"{NEWEST}.damaged").is_dir()
    assert "resuming from step 8" in result.stdout


# --- the run's own configuration


def test_a_damaged_configuration_is_written_again(
    whole: dict[str, Any], halfway: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(halfway["output_dir"]) / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("seed: 0", "seed: 1") if "seed: 0" in text else text[: len(text) // 2])
    train(check(halfway))
    assert [line for line in warnings(capsys) if "so the file is written again" in line]
    assert_same(halfway["output_dir"], whole["output_dir"])
    other = check(halfway | {"seed": 5})
    config.write_text("a: [")
    with pytest.raises(UserError, match="is not a run's configuration"):
        train(other)


def test_a_checkpoint_that_has_lost_its_manifest_is_not_passed_over(
    whole: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(whole["output_dir"], run)
    before, newest = complete_checkpoints(run / "checkpoints")[-2:]
    (newest / MANIFEST).unlink()
    for words in (["export", str(run), "--output", str(exported)], ["generate", str(run), "--prompt", "red"]):
        assert main(words) == 2
        assert f"{newest}: is damaged (MANIFEST.json is missing); `relora train` resumes from {before.name}" in (
            capsys.readouterr().err
        )
    assert main(["export", str(run), "--output", str(exported), "--step", before.name.removeprefix("step-")]) == 0


def test_hashes_that_are_no_mapping_are_no_configuration(whole: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["output_dir"], run)
    tree = parse((run / "config.yaml").read_text())
    tree["derived"]["tokenizer"] = ["tokenizer.json"]
    (run / "config.yaml").write_text(dump(tree))
    assert main(["export", str(run), "--output", str(tmp_path / "exported")]) == 2
    assert f"{run / 'config.yaml'}: is not a run's configuration" in capsys.readouterr().err


def test_settings_that_were_edited_are_not_evaluated(whole: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["output_dir"], run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lora_alpha: 6", "lora_alpha: 60", 1))
    assert main(["export", str(run), "--output", str(tmp_path / "exported")]) == 2
    assert "not the settings of the run (derived.identity): lora.lora_alpha is 60.0, was 6.0" in capsys.readouterr().err
    train(check(whole | {"output_dir": str(run)}))
    tokenizer = run / "tokenizer" / "tokenizer.json"
    flip(tokenizer)
    assert main(["export", str(run), "--output", str(tmp_path / "exported")]) == 2
    assert f"{tokenizer}: is not what was written" in capsys.readouterr().err
