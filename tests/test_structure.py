"""The shape of the code, measured: lengths of functions and files, import cycles, the path of one update."""

import ast
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.update_path import functions_of
from tests.helpers.programs import ROOT, run

PACKAGE = ROOT / "relora"
FILES = sorted(PACKAGE.rglob("*.py"))
LEAST_MEDIAN, MOST_OF_A_FUNCTION, MOST_OF_A_FILE = 8, 60, 320
HEAVY = {"torch", "transformers", "datasets", "accelerate"}


def function_lengths() -> dict[str, int]:
    """Lines from `def` to the end, nested functions included."""
    return {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_a_usual_function_tells_a_step_of_the_story() -> None:
    assert statistics.median(function_lengths().values()) >= LEAST_MEDIAN


def test_no_function_is_longer_than_a_screen() -> None:
    assert {name: length for name, length in function_lengths().items() if length > MOST_OF_A_FUNCTION} == {}


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_OF_A_FILE} == {}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Modules of ours that are imported when the module itself is: not those imported in functions."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & MODULES or {node.module}
        elif isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node)):
            yield from imported_at_once([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def test_no_import_cycle() -> None:
    graph = {module_name(path): set(imported_at_once(ast.parse(path.read_text()).body)) for path in FILES}
    assert sum(map(len, graph.values())) > 100, "imports were not found"
    TopologicalSorter(graph).prepare()  # CycleError names the modules


def imported_by(*arguments: str, code: int) -> set[str]:
    """Top-level packages that `python -m relora ARGUMENTS` imports until it ends with `code`."""
    command = [sys.executable, "-X", "importtime", "-m", "relora", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr[-2000:]
    names = set(re.findall(r"^import time:.*\| +([a-zA-Z_]\w*)", result.stderr, re.MULTILINE))
    assert {"argparse", "relora"} <= names
    return names


def test_help_loads_no_heavy_library() -> None:
    assert imported_by("--help", code=0) & HEAVY == set()


@pytest.mark.parametrize("command", ["train", "prepare", "plan"])
def test_a_mistake_in_a_config_loads_no_heavy_library(command: str) -> None:
    mistake = "training.max_step=5"
    assert imported_by(command, "configs/quickstart.yaml", mistake, code=2) & HEAVY == set()


@pytest.fixture(scope="module")
def update_path(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Figures of `python -m benchmarks.update_path`, by name."""
    path = tmp_path_factory.mktemp("update_path") / "figures.json"
    result = run([sys.executable, "-m", "benchmarks.update_path", "--json", str(path)])
    assert result.returncode == 0, result.stderr[-3000:]
    return {limit["what"]: limit for limit in json.loads(path.read_text())["limits"]}


def test_the_trace_of_an_update_saw_what_every_update_runs(update_path: dict[str, dict[str, float]]) -> None:
    # Half of the limits: a trace that saw less has missed a thread or the backward pass.
    assert {name: figure["value"] > figure["at_most"] / 2 for name, figure in update_path.items()} == dict.fromkeys(
        ("source lines", "functions", "files"), True
    )


@pytest.mark.parametrize("figure", ["source lines", "functions", "files"])
def test_one_update_can_be_read_at_one_sitting(figure: str, update_path: dict[str, dict[str, float]]) -> None:
    assert update_path[figure]["value"] <= update_path[figure]["at_most"]


EXAMPLE = '''
class Layer:
    """Not counted."""

    def forward(self, x):
        """Neither counted
        nor its second line."""

        # A comment is.
        def inner(y):
            return y

        return [inner(y) for y in x]

top = lambda x: x
'''


def test_functions_of_a_module_are_its_outermost_without_docstrings_and_blank_lines() -> None:
    [function] = functions_of(EXAMPLE)
    assert (function.name, function.lines) == ("Layer.forward", range(5, 14))
    assert function.source == {5, 9, 10, 11, 13}
