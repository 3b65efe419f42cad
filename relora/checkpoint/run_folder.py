"""The run folder: which run it holds, and how far it has come."""

import json
import os
import socket
import subprocess  # nosec B404  # for git alone, below
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

import relora
from relora.checkpoint.format import FORMAT, format_problem
from relora.checkpoint.load import complete_checkpoints, format_problems
from relora.config import Config, UserError
from relora.config.derived import fingerprint
from relora.config.yaml12 import dump, parse
from relora.files import write_json, write_text
from relora.text import without_secrets

Status = Literal["running", "finished", "preempted", "failed"]


class RunFolder:
    """The places in a run folder, its lock, its status and its configuration."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.status = path / "status.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.stage_start = path / "stage_start"
        self.tokenizer = path / "tokenizer"
        self.model = path / "model"
        self.final = path / "final"
        self.stop = path / "STOP"

    @property
    def is_run(self) -> bool:
        return self.config.is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one run at a time trains in the folder; UserError for the second."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError([f"output_dir = {self.path}: another process is training in it"]) from None
        try:
            yield
        finally:
            lock.release()

    def write_status(self, status: Status, *, step: int, reason: str | None = None) -> None:
        """Replace status.json; the time is that of now, in UTC."""
        shown = None if reason is None else without_secrets(reason)
        facts: dict[str, Any] = {"status": status, "step": step, "reason": shown}
        time = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.status, facts | {"time": time, "pid": os.getpid(), "host": socket.gethostname()})

    def last_step(self) -> int:
        """The step in status.json, 0 without one."""
        return int(json.loads(self.status.read_text(encoding="utf-8"))["step"]) if self.status.is_file() else 0

    def write_config(self, config: Config, *, identity: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        """Write the resolved configuration, which itself can be trained again, and what follows from it."""
        derived = {
            "format": FORMAT,
            "fingerprint": fingerprint(dict(identity)),
            "code_version": code_version(),
            "numbers": dict(numbers),
            "identity": json.loads(json.dumps(dict(identity))),
        }
        write_text(self.config, dump(config.model_dump(mode="json") | {"derived": derived}))


def run_folder_problems(folder: RunFolder, identity: Mapping[str, Any] | None, *, extend: bool) -> list[str]:
    """Why the run `identity` cannot resume in `folder`: one line for each key that differs; empty if it can.

    Args:
        identity: None while it is not known, as the model's config cannot be read: other problems only.
        extend: a larger training.max_steps is no difference.
    """
    if not folder.is_run or not (complete_checkpoints(folder.checkpoints) or folder.final.exists()):
        return []  # nothing to resume from, and nothing to lose
    try:
        derived = parse(folder.config.read_text(encoding="utf-8"))["derived"]
        identity_there = dict(derived["identity"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return [f"{folder.config}: is not a run's configuration ({error})"]
    old_format = format_problems(folder.checkpoints)
    if not old_format and "format" not in derived:
        old_format = [format_problem(folder.path, 1)]  # relora 0.1 wrote no number here
    if old_format or identity is None:
        return old_format
    there, here = _flat(identity_there), _flat(json.loads(json.dumps(dict(identity))))
    problems = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        is_longer = key == "training.max_steps" and isinstance(old, int) and isinstance(new, int) and new > old
        if old != new and not (is_longer and extend):
            line = f"output_dir = {folder.path}: holds another run: {key} is {old} there and {new} here"
            problems.append(f"{line}; --extend resumes with the longer one" if is_longer else line)
    return problems


def _flat(identity: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings under dotted keys, so that a difference names the very key."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def code_version() -> str:
    """The version of this package, with the commit where it is a checkout."""
    try:
        commit = subprocess.run(  # nosec B603, B607  # fixed words, no shell, the user's git
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return relora.__version__
    return f"{relora.__version__}+{commit}"
