"""`relora status RUN`: how far a run is, whether it lives and where, and when it will end. It loads no torch."""

import json
import os
import shutil
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from relora.checkpoint.format import BEAT_S, MANIFEST
from relora.config.yaml12 import parse
from relora.errors import UserError
from relora.tracking.metrics_file import read_metrics

SILENT_S = 6 * BEAT_S  # clocks of hosts differ, and a shared disk shows a change late
NUM_PACED = 20
GIB = 2**30


@dataclass(frozen=True)
class Standing:
    """How a run stands; None is what is not known, or does not exist yet.

    Attributes:
        status: as in status.json, but "lost" where that says running and no process does.
        alive: None where its process exists but is silent: it may be suspended, or another one with that pid.
        eta_seconds: at the pace of the last updates, without evaluations and checkpoints.
    """

    run: str
    status: str
    reason: str | None
    step: int
    max_steps: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    alive: bool | None
    pid: int
    host: str
    heartbeat_age_seconds: float
    disk_free_bytes: int


def status(run: str, *, as_json: bool) -> None:
    """Print how the run in the folder `run` stands, as lines or as one JSON object. UserError: it is no run."""
    standing = standing_of(Path(run))
    print(json.dumps(asdict(standing), indent=1) if as_json else "\n".join(lines_of(standing)))


def standing_of(folder: Path) -> Standing:
    """Read how the run in `folder` stands.

    Raises:
        UserError: there is no run in it.
    """
    try:
        told = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        age_s = max(0.0, time.time() - (folder / "status.json").stat().st_mtime)
        said, reason, pid, host = str(told["status"]), told["reason"], int(told["pid"]), str(told["host"])
        step, max_steps = int(told["step"]), int(parse((folder / "config.yaml").read_text())["training"]["max_steps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError([f"{folder}: is not a run folder that can be read ({error})"]) from None
    lines = read_metrics(folder / "metrics.jsonl")
    updates = [line for line in lines if "loss" in line]
    newest = updates[-1] if updates else {"step": step}
    alive = is_alive(pid, host, age_s) if said == "running" else False
    step = max(step, newest["step"])
    checkpoints = sorted(path.parent for path in (folder / "checkpoints").glob(f"step-*/{MANIFEST}"))
    saved = checkpoints[-1] if checkpoints else None
    return Standing(
        run=str(folder),
        status="lost" if said == "running" and alive is False else said,
        reason=reason,
        step=step,
        max_steps=max_steps,
        loss=newest.get("loss"),
        eval_loss=next((line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), None),
        tokens_per_second=newest.get("tokens_per_second"),
        eta_seconds=(max_steps - step) * pace if alive and (pace := seconds_per_update(updates)) else None,
        checkpoint_step=int(saved.name.removeprefix("step-")) if saved else None,
        checkpoint_age_seconds=time.time() - (saved / MANIFEST).stat().st_mtime if saved else None,
        alive=alive,
        pid=pid,
        host=host,
        heartbeat_age_seconds=age_s,
        disk_free_bytes=shutil.disk_usage(folder).free,
    )


def is_alive(pid: int, host: str, age_s: float) -> bool | None:
    """Whether the first process of a run lives: by its pid on this host, else by the age of its last heartbeat."""
    if host != socket.gethostname():
        return age_s < SILENT_S
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True if age_s < SILENT_S else None


def seconds_per_update(updates: Sequence[dict[str, Any]]) -> float | None:
    """The median time of an update by the last lines of metrics, so that a pause between two runs does not count."""
    timed = [(line["step"], datetime.fromisoformat(line["time"])) for line in updates if "time" in line][-NUM_PACED:]
    paces = [
        (after - before).total_seconds() / (step - earlier)
        for (earlier, before), (step, after) in pairwise(timed)
        if step > earlier
    ]
    return statistics.median(paces) if paces else None


def lines_of(standing: Standing) -> list[str]:
    """What is known, one line a fact."""
    percent, place = 100 * standing.step / standing.max_steps, f"pid {standing.pid} on {standing.host}"
    sign = f"last sign of life {duration(standing.heartbeat_age_seconds)} ago"
    lines = [f"{standing.run}: {standing.status}" + (f" ({standing.reason})" if standing.reason else "")]
    lines.append(f"step         {standing.step:,} of {standing.max_steps:,} ({percent:.1f} %)")
    if standing.loss is not None:
        held_out = "" if standing.eval_loss is None else f", held-out {standing.eval_loss:.4f}"
        lines.append(f"loss         {standing.loss:.4f}{held_out}")
    if standing.tokens_per_second is not None:
        left = "" if standing.eta_seconds is None else f"; {duration(standing.eta_seconds)} left at this pace"
        lines.append(f"speed        {standing.tokens_per_second:,.0f} tokens/s{left}")
    if standing.checkpoint_step is not None and standing.checkpoint_age_seconds is not None:
        age = duration(standing.checkpoint_age_seconds)
        lines.append(f"checkpoint   step {standing.checkpoint_step:,}, written {age} ago")
    if standing.alive:
        lines.append(f"process      alive: {place}, {sign}")
    elif standing.alive is None:
        lines.append(
            f"process      silent: {place} is there, but its {sign}: it is suspended, hangs, or is another one"
        )
    elif standing.status == "lost":
        lines.append(f"process      not running: {place} is gone, {sign}")
    if standing.status in ("lost", "preempted", "failed"):
        lines.append(f"resume with  relora train {standing.run}/config.yaml")
    lines.append(f"disk         {standing.disk_free_bytes / GIB:,.1f} GiB left")
    return lines


def duration(seconds: float) -> str:
    """A time in words, of two units at most."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"
