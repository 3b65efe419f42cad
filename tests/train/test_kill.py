"""SIGKILL at random steps, some inside a save, a fresh process each time: nothing is lost and nothing differs."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from relora.config import check
from relora.train.train import train
from tests.checkpoint.test_resume import assert_same
from tests.helpers.tiny import metrics

NUM_KILLS = 4
PATIENCE_S = 120.0


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "relora", "train", str(config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> bool:
    """Wait until `reached`, as closely as polling allows; False if the process ended before."""
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        if reached():
            return True
        time.sleep(0.0005)
    return False


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_killed_runs_end_as_if_they_never_were(tiny_run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    tree = tiny_run("undisturbed", lora__lora_dropout=0.1, data__document_mask=True)
    train(check(tree))
    killed = tree | {"output_dir": str(tmp_path / "killed")}
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(killed))
    checkpoints, rng = tmp_path / "killed" / "checkpoints", random.Random(1)

    inside_a_save = 0
    for number in range(NUM_KILLS):
        process, done = start(config), len(list(checkpoints.glob("step-*")))
        if number % 2:
            wanted = done + rng.randrange(1, 3)
            hit = wait_for(process, lambda wanted=wanted: len(list(checkpoints.glob("step-*"))) >= wanted)
            time.sleep(rng.random() * 0.05)
        else:
            hit = wait_for(process, lambda: any(checkpoints.glob(".tmp-*/*.safetensors")))
        assert hit, "the process ended before it was killed"
        kill(process)
        inside_a_save += any(checkpoints.glob(".tmp-*"))
    assert inside_a_save > 0

    assert start(config).wait(timeout=PATIENCE_S) == 0
    assert_same(killed["output_dir"], tree["output_dir"])
    assert not list(checkpoints.glob(".tmp-*"))
    assert json.loads((tmp_path / "killed" / "status.json").read_text())["status"] == "finished"
    steps = [line["step"] for line in metrics(killed["output_dir"]) if "loss" in line]
    assert steps == list(range(1, 13)), "each step stands once"
