"""What README and launch files tell people to type."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from relora.config import load_config
from relora.config.derived import accumulation_steps
from tests.helpers.programs import ROOT

TEXTS = (ROOT / "README.md", *sorted((ROOT / "launch").glob("*.yaml")), *sorted((ROOT / "configs").glob("*.yaml")))
COMMAND = re.compile(r"--config_file (launch/\S+)(?: --num_processes (\d+))? -m relora train ((?:[^\n#\\]|\\\n#?)*)")


def commands() -> list[tuple[str, str, str]]:
    """Launch file, number of processes (empty: the file's), and arguments of each command."""
    return [found for text in TEXTS for found in COMMAND.findall(text.read_text())]


@pytest.mark.parametrize(("launch", "size", "rest"), commands())
def test_launch_commands_fit_their_configs(launch: str, size: str, rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config, *overrides = shlex.split(rest.replace("\\\n#", " ").replace("\\\n", " "))
    num_processes = int(size or yaml.safe_load(Path(launch).read_text())["num_processes"])
    assert accumulation_steps(load_config(config, overrides), num_processes) >= 1


def test_there_are_such_commands() -> None:
    kinds = "one_gpu", "ddp", "fsdp2", "zero1", "zero2", "zero3"
    assert {launch for launch, _, _ in commands()} == {f"launch/{kind}.yaml" for kind in kinds}
    assert ("launch/ddp.yaml", "2") in {found[:2] for found in commands()}, "two processes on the CPU"


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"(?:docs|launch|tests)/[\w./]+\.(?:md|sh|yaml|png|py)", text)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).is_file()] == []
