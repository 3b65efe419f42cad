"""Runs of several processes, as users start them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.programs import run

LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]


def written(tree: dict[str, Any], folder: Path) -> Path:
    """A configuration file in `folder`, named as the run folder."""
    path = folder / f"{Path(tree['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(kind: str, config: Path, *overrides: str) -> list[str]:
    """`accelerate launch --config_file launch/KIND.yaml -m relora train CONFIG`."""
    return [*LAUNCHER, "--config_file", f"launch/{kind}.yaml", "-m", "relora", "train", str(config), *overrides]


def accelerate(kind: str, config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train under launch/KIND.yaml, with no environment variable of a launcher set, to a good end."""
    assert not [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE"))]
    result = run(command(kind, config, *overrides))
    assert result.returncode == 0, result.stderr[-3000:]
    return result
