"""metrics.jsonl: one object a line, each kind and step once, also after a resume.

A checkpoint records the file as it is at its step (`MetricsFacts`), so a resumed run knows whether lines were lost or
changed since. It never ends for them: what is whole is kept, damaged lines go to metrics.damaged.jsonl.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from relora.checkpoint.format import MetricsFacts
from relora.errors import warn
from relora.files import json_of, set_aside, write_text

# A line is of the kind that the first of these keys in it names; TensorBoard shows its fields under KIND/.
KINDS = {"loss": "train", "eval_loss": "eval", "restart": "restart", "probe_loss": "probe", "spike_loss": "spike"}
Line = dict[str, Any]


def read_metrics(path: Path) -> list[Line]:
    """The whole lines of a metrics file, none if there is no file. Damaged ones are left out, with a warning.

    A last line that a kill cut off is no damage.
    """
    if not path.is_file():
        return []
    whole, damaged = _parse(path.read_bytes())
    if damaged:
        warn(f"{path}: {len(damaged)} damaged lines are left out, such as {damaged[0].strip()[:60]!r}")
    return [line for _, line in whole]


def has_number(line: Mapping[str, Any], key: str) -> bool:
    """Whether a line has a number under `key`.

    A line that was written by a run has what its kind has. One that was edited, or repaired from what could be known,
    may lack it.
    """
    value = line.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool)


def metrics_facts(path: Path) -> MetricsFacts | None:
    """The metrics file as it is now; None without one."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    return MetricsFacts(bytes=len(content), lines=content.count(b"\n"), sha256=hashlib.sha256(content).hexdigest())


def cut_metrics(
    path: Path, *, after_step: int | None, cycle: int, evaluated: bool = True, facts: MetricsFacts | None = None
) -> None:
    """Drop the lines that a run resumed from a checkpoint writes again.

    Where the file is not what was recorded at the checkpoint, what is left of its lines is kept, with a warning.

    Args:
        after_step: the step of the checkpoint; None drops all lines.
        cycle: the restarts behind the checkpoint; the lines of later ones at the same step are dropped too.
        evaluated: whether the evaluation at that step was made; else its line is dropped.
        facts: the file at that step; None where nobody recorded it.
    """
    if path.is_dir():
        warn(f"{path} is a folder; it is kept as {set_aside(path).name}")
    content = path.read_bytes() if path.is_file() else b""
    if after_step is None:
        kept = b""
    elif facts is not None and hashlib.sha256(content[: facts.bytes]).hexdigest() == facts.sha256:
        kept = content[: facts.bytes]
    else:
        whole, damaged = _parse(content)
        kept = b"".join(_before(whole, after_step, cycle, evaluated=evaluated))
        if damaged:
            with path.with_name(f"{path.stem}.damaged{path.suffix}").open("ab") as file:
                file.write(b"\n".join(damaged) + b"\n")
        if damaged or facts is not None:
            there = str(kept.count(b"\n")) + (f" of {facts.lines}" if facts is not None else "")
            aside = f"; {len(damaged)} damaged ones are kept in {path.stem}.damaged{path.suffix}" if damaged else ""
            warn(f"{path} is not what was written: it has {there} lines up to step {after_step}{aside}")
    if kept != content:
        write_text(path, kept.decode())


def written_again(path: Path, file: TextIO, size: int, *, before_step: int) -> bool:
    """Write the open `file` to `path` again where it is not there any more, or has not the size that it should have.

    Returns:
        Whether this was done, with a warning; `file` is closed then.
    """
    opened = os.fstat(file.fileno())
    try:
        is_same = os.path.samestat(opened, path.lstat())
    except OSError:
        is_same = False
    if is_same and opened.st_size == size:
        return False
    file.seek(0)
    left = file.read()
    file.close()
    whole = left[: left.rfind("\n") + 1]  # what was cut off may end within a line
    write_text(path, whole)
    what = "changed" if is_same else "removed or replaced"
    lost = "no line is lost" if len(whole) >= size else f"{size - len(whole)} of its {size} bytes are lost"
    warn(f"{path} was {what} before step {before_step}; it is written again, {lost}")
    return True


def _before(lines: Sequence[tuple[bytes, Line]], last: int, cycle: int, *, evaluated: bool) -> list[bytes]:
    """The lines that were written before the checkpoint, each kind and step once."""
    found: dict[tuple[int, str], bytes] = {}
    for raw, line in lines:
        kind = next((kind for key, kind in KINDS.items() if key in line), "")
        step, is_eval = line["step"], kind == "eval"
        is_later = step > last or (is_eval and step == last and not evaluated)
        # At the same step a longer run makes one restart more.
        if not is_later and line.get("restart", 0) <= cycle:
            found.setdefault((step, kind), raw)
    return list(found.values())


def _parse(content: bytes) -> tuple[list[tuple[bytes, Line]], list[bytes]]:
    """The lines that are whole, raw and parsed, and the others; not the last one if it has no end."""
    whole, damaged = [], []
    for raw in content.split(b"\n")[:-1]:
        try:
            line = json_of(raw)
        except ValueError:
            line = None
        if _is_line(line):
            whole.append((raw + b"\n", line))
        else:
            damaged.append(raw)
    return whole, damaged


def _is_line(line: Any) -> bool:
    """Whether this is an object with a step whose kind is told by a number."""
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return False
    return all(has_number(line, key) for key in KINDS if key in line)
