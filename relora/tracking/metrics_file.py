"""metrics.jsonl: one object a line, each kind and step once, also after a resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora.config import UserError
from relora.files import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none if there is no file; a last line that a kill cut off is left out.

    Raises:
        UserError: another line is damaged.
    """
    if not path.is_file():
        return []
    metrics = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue
        try:
            parsed = json.loads(line)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict) or not isinstance(parsed.get("step"), int):
            raise UserError([f"{path}: line {number} is damaged: {line.strip()[:60]}; remove the line or the file"])
        metrics.append(parsed)
    return metrics


def has_number(line: Mapping[str, Any], key: str) -> bool:
    """Whether a line has a number under `key`.

    A line that was written by a run has what its kind has. One that was edited, or repaired from what could be known,
    may lack it.
    """
    value = line.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool)


def cut_metrics(path: Path, *, after_step: int | None, cycle: int) -> None:
    """Drop the lines that a run resumed from a checkpoint writes again.

    Args:
        after_step: the step of the checkpoint; None drops all lines.
        cycle: the restarts behind the checkpoint; the lines of later ones at the same step are dropped too.
    """
    if path.is_file():
        lines = [
            line
            for line in read_metrics(path)
            if after_step is not None and line["step"] <= after_step and line.get("restart", 0) <= cycle
        ]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
