"""The run folder: which run it holds, and how far it has come."""

import json
import os
import socket
import subprocess  # nosec B404  # for git alone, below
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

import relora
from relora.checkpoint.format import FORMAT, format_problem
from relora.checkpoint.load import complete_checkpoints, format_problems, last_step, read_manifest
from relora.config import Config, UserError, load_config
from relora.config.derived import expanded, fingerprint
from relora.config.derived import identity as identity_of
from relora.config.yaml12 import dump, format_value, parse
from relora.engines import is_first
from relora.errors import DISK_IS_FULL, warn
from relora.files import json_of, sha256_of, write_json, write_text
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
        self.skipped_data = path / "skipped_data.json"

    @property
    def is_run(self) -> bool:
        return self.config.is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one run at a time trains in the folder; UserError for the second."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError([f"output_dir = {self.path}: another process is training in it"]) from None
        except OSError as error:
            if error.errno in DISK_IS_FULL:
                raise
            raise UserError([f"output_dir = {self.path}: its lock cannot be taken ({error})"]) from None
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
        """The step in status.json; where that cannot be read, the step of the newest checkpoint."""
        try:
            step = json_of(self.status.read_bytes())["step"]
        except (OSError, ValueError, KeyError, TypeError):
            step = None
        return step if type(step) is int and step >= 0 else last_step(self.checkpoints)

    def write_config(self, config: Config, *, identity: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        """Write the resolved configuration, which itself can be trained again, and what follows from it.

        The tokenizer is in its folder already: its hashes are part of it.
        """
        derived = {
            "format": FORMAT,
            "fingerprint": fingerprint(dict(identity)),
            "code_version": code_version(),
            "numbers": dict(numbers),
            "identity": json.loads(json.dumps(dict(identity))),
            "tokenizer": {path.name: sha256_of(path) for path in sorted(self.tokenizer.glob("*")) if path.is_file()},
        }
        write_text(self.config, dump(config.model_dump(mode="json") | {"derived": derived}))


def run_folder_problems(folder: RunFolder, identity: Mapping[str, Any] | None, *, extend: bool) -> list[str]:
    """Why the run `identity` cannot resume in `folder`: one line for each key that differs; empty if it can.

    Args:
        identity: None while it is not known, as the model's config cannot be read: other problems only.
        extend: a larger training.max_steps is no difference.
    """
    in_the_way = place_problems(folder)
    if in_the_way or not folder.is_run or not (complete_checkpoints(folder.checkpoints) or folder.final.exists()):
        return in_the_way  # nothing to resume from, and nothing to lose
    old_format = format_problems(folder.checkpoints)
    try:
        derived = _derived(folder)
    except UserError as error:
        if old_format or identity is None:
            return [*old_format, *error.problems]
        return _lost_config(folder, identity, error)
    if not old_format and "format" not in derived and not complete_checkpoints(folder.checkpoints):
        old_format = [format_problem(folder.path, 1)]  # relora 0.1 wrote no number here
    if old_format or identity is None:
        return old_format
    if derived.get("fingerprint") != fingerprint(derived["identity"]):
        problem = UserError([f"{folder.config}: is damaged (derived.identity has another fingerprint)"])
        return _lost_config(folder, identity, problem)
    there, here = _flat(derived["expanded"]), _flat(json.loads(json.dumps(dict(identity))))
    problems = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        is_longer = key == "training.max_steps" and isinstance(old, int) and isinstance(new, int) and new > old
        if old != new and not (is_longer and extend):
            line = f"output_dir = {folder.path}: holds another run: {key} is {old} there and {new} here"
            problems.append(f"{line}; --extend resumes with the longer one" if is_longer else line)
    return problems


def place_problems(folder: RunFolder) -> list[str]:
    """One line for each file where a folder of the run belongs, and the other way round."""
    folders = (folder.checkpoints, folder.tensorboard)
    problems = [f"{place}: is a folder, not a file; move it away" for place in (folder.config,) if place.is_dir()]
    for place in folders:
        if place.is_symlink() and not place.exists():
            problems.append(f"{place}: is a link to {place.readlink()}, which is not there")
        elif place.exists() and not place.is_dir():
            problems.append(f"{place}: is a file, not a folder; move it away")
    return problems


def read_run_config(folder: RunFolder) -> Config:
    """The configuration of a run, after a look at its tokenizer.

    Raises:
        UserError: it cannot be read, its settings are not those that the run was trained with, or the tokenizer is not
            what was written.
    """
    config, derived = load_config(folder.config), _derived(folder)
    there = derived["expanded"]
    here = json.loads(json.dumps(identity_of(config, there.get("model.config", {}))))
    if isinstance(config.model.config, dict):
        here["model.config"] = config.model.config
    there, here = _flat(there), _flat(here)
    differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if differing:
        told = [f"{key} is {format_value(here.get(key))}, was {format_value(there.get(key))}" for key in differing]
        more = f", and {len(told) - 3} more" if len(told) > 3 else ""
        raise UserError(
            [f"{folder.config}: not the settings of the run (derived.identity): {'; '.join(told[:3])}{more}"]
        )
    for name, sha256 in derived["tokenizer"].items():
        path = folder.tokenizer / Path(name).name
        if not path.is_file() or sha256_of(path) != sha256:
            raise UserError([f"{path}: is not what was written; `relora train {folder.config}` writes it again"])
    return config


def _derived(folder: RunFolder) -> dict[str, Any]:
    """The section `derived` of config.yaml, `identity` also `expanded`, `tokenizer` a mapping; UserError if damaged."""
    try:
        derived = parse(folder.config.read_text(encoding="utf-8"))["derived"]
        identity = dict(derived["identity"])
        hashes = {str(name): sha256 for name, sha256 in dict(derived.get("tokenizer") or {}).items()}
        return dict(derived) | {"identity": identity, "expanded": expanded(identity), "tokenizer": hashes}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        told = str(error) or type(error).__name__
        raise UserError([f"{folder.config}: is not a run's configuration ({told})"]) from None


def _lost_config(folder: RunFolder, identity: Mapping[str, Any], error: UserError) -> list[str]:
    """`error` about config.yaml, unless a checkpoint says that this run is the one in the folder."""
    for checkpoint in reversed(complete_checkpoints(folder.checkpoints)):
        with suppress(UserError):
            if read_manifest(checkpoint).fingerprint == fingerprint(dict(identity)):
                if is_first():
                    warn(f"{error}; {checkpoint.name} is of this very run, so the file is written again")
                return []
    return error.problems


def saved_identity(folder: RunFolder) -> dict[str, Any] | None:
    """The identity of the run in the folder, as its config.yaml has it; None without one that can be read."""
    try:
        return dict(_derived(folder)["identity"])
    except UserError:
        return None


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
