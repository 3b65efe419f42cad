"""Paths in a configuration: ~ and variables are expanded, what no file can be called is refused."""

import os
from pathlib import Path
from typing import Any

import pytest

from relora.cli import main
from relora.config import check
from relora.config.derived import expanded
from relora.files import expand_path, missing_folder
from tests.config.tree import FIELDS, problems_of, settings, value_of
from tests.helpers import tiny

PATHS = [
    *("output_dir", "model.config", "model.name_or_path"),
    *("data.sources[].path", "data.tokenizer", "data.prepared_dir"),
]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("UNSET", raising=False)


def tree_of(key: str, value: str) -> dict[str, Any]:
    tree = settings(key, value)
    if key == "model.name_or_path":
        tree["model"]["config"] = None
    return tree


@pytest.mark.parametrize("key", PATHS)
def test_paths_are_expanded(key: str) -> None:
    expected = {"~/x": "/home/me/x", "$SCRATCH/x": "/scratch/me/x", "${SCRATCH}x": "/scratch/mex", "a/~": "a/~"}
    assert {value: value_of(check(tree_of(key, value)), key) for value in expected} == expected


@pytest.mark.parametrize("key", PATHS)
def test_what_no_file_can_be_called_is_refused(key: str) -> None:
    shown = key.replace("[]", "[1]")
    assert problems_of(tree_of(key, "$UNSET/x")) == [f"{shown} = $UNSET/x: the environment variable UNSET is not set"]
    assert problems_of(tree_of(key, "~nobody-at-all/x")) == [
        f"{shown} = ~nobody-at-all/x: ~nobody-at-all is nobody's home folder"
    ]
    for long in ("x" * 256, "x/" * 2050):
        [problem] = problems_of(tree_of(key, long))
        assert problem.endswith(": too long for a path: at most 255 bytes a name and 4095 in all")
    [problem] = problems_of(tree_of(key, "a\0b"))
    assert problem.endswith("is not Unicode text")


def test_no_other_key_is_a_path() -> None:
    texts = [key for key, field in FIELDS.items() if "str" in str(field.annotation) and key not in PATHS]
    assert len(texts) > 5
    for key in texts:
        tree = tree_of(key, "$UNSET/x")
        assert not any("environment variable" in problem for problem in problems_of(tree))


def test_what_exists_under_the_very_name_is_left_alone(tmp_path: Path) -> None:
    for name in ("$UNSET", "~", "$SCRATCH"):
        (tmp_path / name).mkdir()
        assert expand_path(name) == name


def test_a_run_folder_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = check(tiny.settings(corpus, Path("~/runs/x")))
    assert config.output_dir == str(tmp_path / "home" / "runs" / "x")


def test_paths_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "~/none", "--output=~/x"]) == 2
    assert capsys.readouterr().err == "relora: /home/me/none: is not a run folder (it has no config.yaml)\n"
    with pytest.raises(SystemExit) as ending:
        main(["report", "run", "--output=$UNSET/x"])
    assert ending.value.code == 2
    assert "argument --output: $UNSET/x: the environment variable UNSET is not set" in capsys.readouterr().err


def test_the_identity_of_a_run_begun_before_is_expanded() -> None:
    sources = [{"path": "~/texts", "weight": 1.0}]
    before = {"data.sources": sources, "data.tokenizer": None, "model.name_or_path": "$SCRATCH/model", "seed": 0}
    after = {"data.sources": [{"path": "/home/me/texts", "weight": 1.0}], "model.name_or_path": "/scratch/me/model"}
    assert expanded(before) == before | after


def test_a_name_that_hides_a_model_of_the_hub_says_so() -> None:
    os.mkdir("google")  # noqa: PTH102
    assert missing_folder("google/gemma") == (
        "there is no such folder (the hub is not asked for it, because there is a folder google here)"
    )
    assert missing_folder("openai/gpt") is None
    assert missing_folder("google") is None
    assert missing_folder("./openai") == "there is no such folder"


def test_an_unset_variable_in_extends(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("extends: $UNSET/base.yaml\n")
    assert main(["train", "c.yaml"]) == 2
