"""Runs of several processes, as users start them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.programs import ROOT, run

LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]


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


def accelerate(kind: str, config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train under `command`, with no environment variable of a launcher set, to a successful end."""
    assert not [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE"))]
    result = run(command(kind, config, *overrides))
    assert result.returncode == 0, result.stderr[-3000:]
    return result
