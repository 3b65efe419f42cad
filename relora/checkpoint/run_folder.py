"""The run folder: what run it holds, and how far it is."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

import relora
from relora.checkpoint.load import complete_checkpoints
from relora.config import Config, UserError
from relora.config.derived import fingerprint
from relora.config.yaml12 import dump, parse
from relora.files import write_json, write_text

Status = Literal["running", "finished", "preempted", "failed"]


@dataclass(frozen=True)
class RunFolder:
    """Names of what is in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stage_start(self) -> Path:
        return self.path / "stage_start"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def is_run(self) -> bool:
        return self.config.is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
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
        write_json(self.path / "status.json", {"status": status, "step": step, "reason": reason})

    def last_step(self) -> int:
        """The step that status.json tells, 0 without one."""
        path = self.path / "status.json"
        return int(json.loads(path.read_text(encoding="utf-8"))["step"]) if path.is_file() else 0

    def write_config(self, config: Config, *, identity: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        """The resolved configuration, which itself can be trained again, and what follows from it."""
        facts = {
            "fingerprint": fingerprint(dict(identity)),
            "code_version": code_version(),
            "numbers": dict(numbers),
            "identity": json.loads(json.dumps(dict(identity))),
        }
        tree = config.model_dump(mode="json") | {"derived": facts}
        write_text(self.config, dump(tree))

    def written_identity(self) -> dict[str, Any]:
        """What run the folder holds. UserError if config.yaml cannot be read."""
        try:
            identity = parse(self.config.read_text(encoding="utf-8"))["derived"]["identity"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise UserError([f"{self.config}: is not a run's configuration ({error})"]) from None
        return dict(identity)


def same_run_problems(folder: RunFolder, identity: Mapping[str, Any], *, extend: bool) -> list[str]:
    """Why `folder` cannot go on as the run `identity`: one line a key that differs; empty if it can."""
    if folder.path.exists() and not folder.path.is_dir():
        return [f"output_dir = {folder.path}: is a file"]
    if not folder.is_run or not (complete_checkpoints(folder.checkpoints) or folder.final.exists()):
        return []  # nothing that could be gone on from, or be lost
    there, here = _flat(folder.written_identity()), _flat(json.loads(json.dumps(dict(identity))))
    return [
        line
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
        for line in _difference(folder, key, there.get(key), here.get(key), extend=extend)
    ]


def _flat(identity: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings under dotted keys, so that a difference names the very key."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _difference(folder: RunFolder, key: str, there: Any, here: Any, *, extend: bool) -> list[str]:
    line = f"output_dir = {folder.path}: holds another run: {key} is {there} there and {here} here"
    if key == "training.max_steps" and isinstance(there, int) and isinstance(here, int) and here > there:
        return [] if extend else [f"{line}; --extend goes on with the longer one"]
    return [line]


def code_version() -> str:
    """The version of this package, with the commit where it is a checkout."""
    try:
        commit = subprocess.run(
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
