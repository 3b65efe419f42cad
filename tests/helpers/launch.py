"""Runs of several processes: as users start them, or as forks, which need not import torch and transformers again."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.forks import accelerate_launch, begin_session
from tests.helpers.fresh_process import fresh_process
from tests.helpers.programs import ROOT, end_group

LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
RELORA = "relora/__main__.py"


def written(tree: dict[str, Any], folder: Path) -> Path:
    """A configuration file in `folder`, named as the run folder."""
    path = folder / f"{Path(tree['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def launch_file(kind: str) -> list[str]:
    """Options of `accelerate launch`: launch/KIND.yaml; of ENGINE_cpu, launch/ENGINE.yaml with two processes."""
    engine = kind.removesuffix("_cpu")
    size = ["--num_processes", "2"] if engine != kind else []
    return ["--config_file", f"{ROOT}/launch/{engine}.yaml", *size]


def command(kind: str, config: Path, *overrides: str) -> list[str]:
    """`accelerate launch --config_file launch/ENGINE.yaml ... -m relora train CONFIG`; `kind` as in `launch_file`."""
    return [*LAUNCHER, *launch_file(kind), "-m", "relora", "train", str(config), *overrides]


def forked_launch(
    options: Sequence[str], program: str, *arguments: str, timeout_s: float = 180, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch OPTIONS PROGRAM ARGUMENTS` at the root of the repository, launcher and ranks as forks.

    Args:
        program: a file of Python there.
        environment: variables beside those of this process.

    Raises:
        subprocess.TimeoutExpired: it took longer; it and every process it started have been killed.
    """
    assert not [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE"))]
    words = [*options, f"{ROOT}/{program}", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        printed, complained = Path(folder, "stdout"), Path(folder, "stderr")
        process = fresh_process(_launch, words, os.environ | environment, printed, complained, is_daemon=False)
        assert process.pid is not None
        try:
            process.join(timeout_s)
            code = process.exitcode
        finally:
            end_group(process.pid)
            process.kill()  # it may not lead a session yet
            process.join()
        said = [path.read_text() if path.exists() else "" for path in (printed, complained)]
    if code is None:
        raise subprocess.TimeoutExpired(words, timeout_s, *said)
    return subprocess.CompletedProcess(words, code, *said)


def _launch(words: Sequence[str], environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    begin_session(*(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (stdout, stderr)))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    accelerate_launch(*words)


def accelerate(kind: str, config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`forked_launch` of `relora train CONFIG` to a successful end; `kind` as in `launch_file`."""
    result = forked_launch(launch_file(kind), RELORA, "train", str(config), *overrides)
    assert result.returncode == 0, result.stderr[-3000:]
    return result
