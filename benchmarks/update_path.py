"""How much of relora one update runs through: functions, their source lines, files.

    python -m benchmarks.update_path                # every function, by file
    python -m benchmarks.update_path --update 6     # another update of the low-rank stage

A tiny run of one process on the CPU (a warm start of 4 updates, two micro-batches per update, each step logged) is
traced between the metrics lines of two successive steps: the log line, whatever is due, the next batch, the update.
Counted are the functions and methods of relora/ in which at least one line ran. A comprehension, a lambda or a nested
function belongs to the function that contains it. Source lines are code and comments, without docstrings and blanks.
"""

import argparse
import ast
import contextlib
import io
import json
import sys
import tempfile
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import relora
from benchmarks import engines
from benchmarks.tables import Limit, options_of, publish

PACKAGE = Path(relora.__file__).parent
# Their threads look at signals and at the clock several times a second, whatever an update does.
BESIDE_THE_RUN = tuple(f"{PACKAGE}/train/{name}.py" for name in ("signals", "watch"))
WARM_START = 4
MAX_LINES, MAX_FUNCTIONS, MAX_FILES = 600, 60, 14


@dataclass(frozen=True)
class Function:
    """An outermost function or method of a file; the docstrings inside it and blank lines are not in `source`."""

    name: str
    lines: range
    source: frozenset[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=int, default=4, help="which update of the low-rank stage (from 1)")
    options = options_of(parser)
    functions = executed_functions(traced_lines(WARM_START + options.update))
    every = [(path, function) for path, found in functions.items() for function in found]
    source, whole = (
        sum(len(lines) for lines in counts)
        for counts in ([function.source for _, function in every], [function.lines for _, function in every])
    )
    rows = [
        {
            "file": str(path.relative_to(PACKAGE)),
            "functions": len(found),
            "source lines": sum(len(function.source) for function in found),
            "with docstrings and blanks": sum(len(function.lines) for function in found),
            "names": ", ".join(f"{function.name} {len(function.source)}" for function in found),
        }
        for path, found in functions.items()
    ]
    total = {"file": f"{len(rows)} files", "functions": len(every), "source lines": source}
    rows.append(total | {"with docstrings and blanks": whole, "names": ""})
    limits = [
        Limit("source lines", source, at_most=MAX_LINES),
        Limit("functions", len(every), at_most=MAX_FUNCTIONS),
        Limit("files", len(functions), at_most=MAX_FILES),
    ]
    publish({f"Update {options.update} of the low-rank stage": rows}, limits, json_path=options.json)


def traced_lines(step: int) -> dict[Path, set[int]]:
    """By file, the lines of relora/ that run between the writing of the metrics lines of `step - 1` and `step`."""
    from relora.config.load import load_config
    from relora.train.train import train

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"  # JSON is YAML
        path.write_text(json.dumps(settings(engines.write_corpus(Path(folder)), Path(folder) / "run", step)))
        trace = Trace(Path(folder) / "run" / "metrics.jsonl", step)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), trace.active():
            train(load_config(path))
    assert trace.lines, f"no metrics line of step {step - 1} was followed by one of step {step}"
    return dict(sorted(trace.lines.items()))


class Trace:
    """Line events of relora/ between two lines of a metrics file.

    The end of every traced call checks whether the file has grown: its format is documented, while the functions that
    write it may change.
    """

    def __init__(self, metrics: Path, step: int) -> None:
        self.lines: defaultdict[Path, set[int]] = defaultdict(set)
        self._metrics, self._step = metrics, step
        self._size, self._logged = 0, -1

    @contextlib.contextmanager
    def active(self) -> Any:
        before = sys.gettrace()
        threading.settrace(self._on_call)
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(before)
            threading.settrace(None)  # type: ignore[arg-type]

    def _on_call(self, frame: FrameType, *_: Any) -> Any:
        path = frame.f_code.co_filename
        return self._in_call if path.startswith(f"{PACKAGE}/") and path not in BESIDE_THE_RUN else None

    def _in_call(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and self._logged == self._step - 1:
            self.lines[Path(frame.f_code.co_filename)].add(frame.f_lineno)
        if event == "return" and self._metrics.exists() and self._metrics.stat().st_size != self._size:
            self._size = self._metrics.stat().st_size
            lines = map(json.loads, self._metrics.read_text().splitlines())
            self._logged = max((line["step"] for line in lines if "loss" in line), default=-1)
        return self._in_call


def executed_functions(lines: dict[Path, set[int]]) -> dict[Path, list[Function]]:
    """The functions of each file that contain one of its lines."""
    found = {
        path: [function for function in functions_of(path.read_text()) if not numbers.isdisjoint(function.lines)]
        for path, numbers in lines.items()
    }
    return {path: functions for path, functions in found.items() if functions}


def functions_of(text: str) -> list[Function]:
    """The functions and methods of a module that lie in no other function."""
    tree, rows = ast.parse(text), text.splitlines()
    functions, pending = list[Function](), [("", node) for node in tree.body]
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            left_out = docstring_lines(node) | {number for number in lines if not rows[number - 1].strip()}
            functions.append(Function(prefix + node.name, lines, frozenset(lines) - left_out))
        else:
            inner = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix
            pending += [(inner, child) for child in ast.iter_child_nodes(node)]
    return sorted(functions, key=lambda function: function.lines.start)


def docstring_lines(function: ast.AST) -> set[int]:
    """The lines of the docstrings of a function and of what is defined in it."""
    lines = set[int]()
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            text = node.body[0]
            lines.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return lines


def settings(corpus: Path, run: Path, step: int) -> dict[str, Any]:
    """A run in which nothing but the log line is due at the steps around `step`."""
    rarely = 10 * step
    tree = engines.settings(corpus, run, "no")
    tree["relora"] = {"restart_every": rarely, "warm_start_steps": WARM_START}
    tree["training"] |= {"max_steps": step + 2, "per_device_batch_size": 4, "eval_steps": rarely, "save_steps": rarely}
    tree["training"]["probe_steps"], tree["data"]["document_mask"] = 0, False
    return tree


if __name__ == "__main__":
    main()
