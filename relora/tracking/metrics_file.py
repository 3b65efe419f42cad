"""metrics.jsonl: one object a line, each kind and step once, also after a resume."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora.config import UserError
from relora.files import write_text


class MetricsFile:
    """Appends lines, to be read at once by others. Those of a step are on the disk before its checkpoint is."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(dict(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off by a kill is left out.

    Raises:
        UserError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
        if isinstance(parsed, dict) and isinstance(parsed.get("step"), int):
            return parsed
    except ValueError:
        pass
    raise UserError([f"{path}: line {number} is damaged: {line.strip()[:60]}; remove the line or the file"])


def cut_metrics(path: Path, *, after_step: int | None, cycle: int) -> None:
    """Drop the lines past a checkpoint and its restarts, which the resumed run writes again; None drops all."""
    if path.is_file():
        kept = [
            line
            for line in read_metrics(path)
            if after_step is not None and line["step"] <= after_step and line.get("restart", 0) <= cycle
        ]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
