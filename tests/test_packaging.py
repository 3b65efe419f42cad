"""The package as pip installs it: versions, contents of the wheel, and what works from it alone."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import relora
from tests.helpers.programs import ROOT, run

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
NEEDED = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
OPTIONAL = [Requirement(line) for lines in EXTRAS.values() for line in lines]


def pins() -> dict[str, Version]:
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert len({name for name, _ in pairs}) == len(pairs)
    return {name: Version(version) for name, version in pairs}


def test_every_package_is_pinned_within_its_range() -> None:
    assert pins().keys() == {requirement.name for requirement in NEEDED + OPTIONAL}
    for requirement in NEEDED + OPTIONAL:
        assert requirement.specifier.contains(pins()[requirement.name]), requirement


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda requirement: requirement.name)
def test_a_needed_package_has_a_range_not_a_pin(requirement: Requirement) -> None:
    assert sorted(each.operator for each in requirement.specifier) == ["<", ">="]


def test_docs_give_a_reason_for_every_package_and_its_tested_version() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for name, version in pins().items():
        assert re.search(rf"\| [^|]*\b{re.escape(name)}\b[^|]* \| [^\n]*\b{re.escape(str(version))}\b", text), name


def test_every_folder_of_the_package_is_shipped() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "relora").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {".".join(folder.parts) for folder in folders} | {
        "relora.configs"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy, since a build leaves folders beside its sources."""
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheels")
    for name in ("relora", "configs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = ["wheel", str(sources), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    result = run([sys.executable, "-m", "pip", *build])
    assert result.returncode == 0, result.stderr
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_holds_package_configs_and_typing_marker(wheel: Path) -> None:
    assert wheel.name == f"relora-{relora.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "relora").rglob("*.py")}
    configs = {f"relora/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*") if path.suffix}
    assert {name for name in names if ".dist-info/" not in name} == ours | configs | {"relora/py.typed"}


def test_the_wheel_alone_finds_its_configs_by_name(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import relora; from relora.config import load_config; print(relora.__version__, relora.__file__);"
        "print(load_config('quickstart').output_dir, load_config('llama_130m').model.config)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    package = tmp_path / "site" / "relora"
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{relora.__version__} {package / '__init__.py'}",
        f"runs/quickstart {package / 'configs/models/llama_130m.json'}",
    ]


def test_citation_and_changelog_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == relora.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == relora.__version__
