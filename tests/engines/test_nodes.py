"""launch/torchrun_multinode.sh on two "nodes" of one process each, that share a run folder and nothing else."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.test_launch_files import free_port
from tests.helpers.launch import written
from tests.helpers.programs import ROOT, end_group
from tests.helpers.tiny import metrics, only, settings
from tests.train.test_ends import children

END, KILLED_AT = 24, 6
PATIENCE_S = 240


class Nodes:
    """The launchers of two nodes, each with a cache, and so prepared data, of its own."""

    def __init__(self, config: Path, rendezvous: str) -> None:
        self._config, self._folder = config, config.parent / rendezvous
        self._place = {"NNODES": "2", "NPROC_PER_NODE": "1", "RDZV": rendezvous, "PYTHON": sys.executable}
        self._place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.world: list[subprocess.Popen[bytes]] = []
        self._folder.mkdir()

    def start(self, node: int) -> None:
        place = self._place | {"NODE_RANK": str(node), "RELORA_CACHE": str(self.cache(node))}
        with (self._folder / f"log.{node}").open("ab") as log:
            command = ["bash", "launch/torchrun_multinode.sh", str(self._config)]
            self.world.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | place, stdout=log, stderr=log, start_new_session=True
                )
            )

    def cache(self, node: int) -> Path:
        return self._folder / f"cache.{node}"

    def log(self, node: int) -> str:
        path = self._folder / f"log.{node}"
        return path.read_text() if path.exists() else ""

    def store_is_there(self) -> bool:
        with socket.socket() as visitor:
            return visitor.connect_ex(("127.0.0.1", int(self._place["MASTER_PORT"]))) == 0

    def wait(self) -> None:
        for process in self.world:
            if process.poll() != -signal.SIGKILL:
                assert process.wait(PATIENCE_S) == 0, self.log(0)[-3000:] + self.log(1)[-3000:]


@contextmanager
def two_nodes(config: Path, rendezvous: str) -> Iterator[Nodes]:
    nodes = Nodes(config, rendezvous)
    try:
        nodes.start(0)
        # On one machine both find MASTER_ADDR to be theirs: the store shall be the first node's, which stays.
        wait_until(nodes.store_is_there, nodes)
        nodes.start(1)
        yield nodes
    finally:
        for process in nodes.world:
            kill(process)


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """As if its machine were gone: the launcher, which passes nothing on, and its processes."""
    if launcher.poll() is None:
        groups = [launcher.pid, *children(launcher.pid)]  # torchrun's processes have sessions of their own
        for group in groups:
            end_group(group)
        launcher.wait()


def config_of(corpus: Path, folder: Path) -> Path:
    tree: dict[str, Any] = settings(corpus, folder / "run", training__max_steps=END)
    return written(tree, folder)


def wait_until(reached: Callable[[], bool], nodes: Nodes) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end_s, nodes.log(0)[-3000:] + nodes.log(1)[-3000:]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run by a fixed set of nodes."""
    folder = tmp_path_factory.mktemp("nodes")
    with two_nodes(config_of(corpus, folder), "static") as nodes:
        nodes.wait()
    assert "engine DDP (gloo), processes 2" in nodes.log(0)
    assert "engine" not in nodes.log(1), "only rank 0 talks"
    for node in (0, 1):
        assert list(nodes.cache(node).glob("prepared/*/*")), "each node prepares its own data"
    return folder / "run"


def test_two_nodes_train_one_model(undisturbed: Path) -> None:
    loss = only(metrics(undisturbed), "loss")
    assert loss.keys() == set(range(1, END + 1))
    assert loss[END] < loss[1] - 1


def test_a_node_that_is_lost_comes_back(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    with two_nodes(config_of(corpus, tmp_path), "c10d") as nodes:
        reached = tmp_path / "run" / "checkpoints" / f"step-{KILLED_AT:08d}"
        wait_until(reached.exists, nodes)
        kill(nodes.world[1])
        nodes.start(1)
        nodes.wait()
    assert nodes.log(0).count("resuming from step") + nodes.log(1).count("resuming from step") == 1
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (tmp_path / "run", undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert only(metrics(tmp_path / "run"), "loss") == only(metrics(undisturbed), "loss")
