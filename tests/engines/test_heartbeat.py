"""Ranks that are killed, stopped or fail: the others say so and end; those that end in order are not missed."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import TCPStore

from relora.engines.heartbeat import Heartbeat, Limits
from tests.helpers.launch import launch_file
from tests.helpers.programs import run

FORK = multiprocessing.get_context("fork")  # torch is loaded once only
LIMITS = Limits(every_s=0.1, silent_s=2.0, start_s=4.0, grace_s=0.5)
SECONDS_LEFT = 10.0  # to end in; less than the programs here sleep
Program = Callable[[Heartbeat, int], None]


class Ranks:
    """Forked processes, a rank and a watch each. No launcher, which would end the others of a dead one."""

    def __init__(self, folder: Path, port: int, programs: tuple[Program, ...], launcher: bool) -> None:
        environment = {"WORLD_SIZE": str(len(programs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": str(launcher)}
        self.logs = [folder / str(rank) for rank in range(len(programs))]
        ranks = enumerate(zip(programs, self.logs, strict=True))
        self.world = [FORK.Process(target=_rank, args=(*what, rank, environment)) for rank, what in ranks]
        for process in self.world:
            process.start()
        time.sleep(0.7)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.world[rank].pid or 0, number)

    def name(self, rank: int) -> str:
        return f"process {rank} (host {socket.gethostname()}, pid {self.world[rank].pid})"

    def end(self, rank: int) -> tuple[int | None, str]:
        """Exit code, None if it is still there, and what is in stderr."""
        self.world[rank].join(SECONDS_LEFT)
        return self.world[rank].exitcode, self.logs[rank].read_text()


def _rank(program: Program, log: Path, rank: int, environment: dict[str, str]) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= environment | {"RANK": str(rank)}
    program(Heartbeat(rank, int(environment["WORLD_SIZE"]), log.parent.name, LIMITS), rank)


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ranks]]:
    """Start programs as ranks, beside a process that holds the store as a launcher does; all gone afterwards."""
    ours, theirs = FORK.Pipe()
    launcher, started = FORK.Process(target=_hold, args=(theirs,)), []
    launcher.start()
    own_port = ours.recv()

    def ranks(*programs: Program, port: int | None = None) -> Ranks:
        started.append(Ranks(tmp_path_factory.mktemp("ranks"), port or own_port, programs, launcher=port is None))
        return started[-1]

    yield ranks
    for process in [launcher, *(process for ranks in started for process in ranks.world)]:
        process.kill()
        process.join()


def _hold(told: Connection) -> None:
    # Not in the process of the tests: the store has a thread, and what that has locked stays so in forked processes.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told.send(store.port)
    told.recv()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def sleeps(watch: Heartbeat, _: int, *, for_s: float = 60.0, before_s: float = 0.0) -> None:
    time.sleep(before_s)
    watch.start()
    time.sleep(for_s)
    watch.stop()


def tells(watch: Heartbeat, _: int, *, then_stops: bool) -> None:
    watch.start()
    time.sleep(1.0)
    watch.report_failure("ValueError: two\nlines \udcff")
    if then_stops:
        watch.stop()
        time.sleep(3 * LIMITS.grace_s)
        sys.exit(3)
    time.sleep(60.0)


def follows(watch: Heartbeat, _: int) -> None:
    """Fails after another rank has, and has time to end by itself."""
    watch.start()
    time.sleep(1.2)
    begin_s = time.monotonic()
    first = watch.report_failure("RuntimeError: connection closed")
    os.write(2, f"first: {first}; {time.monotonic() - begin_s < 2 * LIMITS.every_s}\n".encode())
    watch.stop()


def sums(watch: Heartbeat, rank: int) -> None:
    """Waits in a collective for rank 1, which does not come."""
    watch.start()
    distributed.init_process_group("gloo")
    if rank == 1:
        time.sleep(60.0)
    distributed.all_reduce(torch.ones(1))


def holds_the_store(watch: Heartbeat, rank: int, *, port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    sleeps(watch, rank)
    del store


def test_a_rank_that_is_gone_takes_the_others_down(start: Callable[..., Ranks]) -> None:
    killed, stopped = start(*[sleeps] * 3), start(*[sums] * 3)
    killed.send(signal.SIGKILL, 1)
    stopped.send(signal.SIGSTOP, 1)
    for ranks in (killed, stopped):
        for rank in (0, 2):
            said = f"relora: process {rank} ended: {ranks.name(1)} has been silent for 2 s\n"
            assert ranks.end(rank) == (1, said)


def test_what_a_rank_tells_is_said_by_the_others(start: Callable[..., Ranks]) -> None:
    for stops in (True, False):
        ranks = start(sleeps, partial(tells, then_stops=stops), sleeps)
        for rank in (0, 2):
            said = f"relora: process {rank} ended: {ranks.name(1)} failed: ValueError: two lines \\udcff\n"
            assert ranks.end(rank) == (1, said)
        assert ranks.end(1) == (3 if stops else 1, ""), "it ends by itself, or is ended; its traceback says why"


def test_a_rank_that_fails_after_another_is_told_of_that_one(start: Callable[..., Ranks]) -> None:
    ranks = start(follows, partial(tells, then_stops=True))
    code, said = ranks.end(0)
    assert code == 0
    assert f"first: {ranks.name(1)} failed: ValueError: two lines \\udcff; True\n" in said
    assert ranks.end(1) == (3, ""), "the first is told of nobody"


def test_a_rank_that_is_ended_leaves_the_reason_to_its_launcher(
    start: Callable[..., Ranks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    ranks = start(sleeps, partial(tells, then_stops=True))
    said = f"relora: process 0 ended: {ranks.name(1)} failed: ValueError: two lines \\udcff"
    assert ranks.end(0) == (1, f"{said}\n")
    assert json.loads((tmp_path / "error.json").read_text())["message"] == said


def test_the_store_that_is_gone_with_rank_0(start: Callable[..., Ranks]) -> None:
    ports = [_free_port() for _ in range(2)]
    groups = [start(partial(holds_the_store, port=port), sleeps, sleeps, port=port) for port in ports]
    groups[0].send(signal.SIGKILL, 0)
    groups[1].send(signal.SIGSTOP, 0)
    for ranks, port in zip(groups, ports, strict=True):
        for rank in (1, 2):
            code, said = ranks.end(rank)
            why = f"process 0 is gone or unreachable: its store at 127.0.0.1:{port} has not answered for 2 s"
            assert (code, said.count("relora:")) == (1, 1)
            assert f"relora: process {rank} ended: {why}\n" in said


def test_only_who_never_comes_is_missed_and_not_who_comes_late_or_leaves_early(start: Callable[..., Ranks]) -> None:
    early, late = partial(sleeps, for_s=0.0), partial(sleeps, before_s=3.0, for_s=2.5)
    ranks, waiting = start(early, late, partial(sleeps, for_s=5.0)), start(sleeps, partial(sleeps, before_s=60.0))
    assert [ranks.end(rank) for rank in range(3)] == [(0, "")] * 3
    assert waiting.end(0) == (1, "relora: process 0 ended: process 1 has been silent for 4 s\n")


def test_a_job_that_is_suspended_as_a_whole_goes_on(start: Callable[..., Ranks]) -> None:
    ranks = start(*[partial(sleeps, for_s=4.5)] * 2)
    ranks.send(signal.SIGSTOP, 0, 1)
    time.sleep(LIMITS.silent_s + 0.5)
    ranks.send(signal.SIGCONT, 0)
    time.sleep(0.5)
    ranks.send(signal.SIGCONT, 1)
    assert [ranks.end(rank) for rank in range(2)] == [(0, "")] * 2


LAUNCHED = """
import os, sys, time
sys.path.insert(0, "relora/engines")  # the module alone, without its package, which loads transformers
from torch import distributed
from heartbeat import Heartbeat, Limits, agree_on_name

distributed.init_process_group("gloo")
who = distributed.get_rank(), distributed.get_world_size()
watch = Heartbeat(*who, agree_on_name(), Limits(every_s=0.1, grace_s=1.5))
watch.start()
if distributed.get_rank() == 1:
    watch.report_failure("ValueError: from " + os.environ["TORCHELASTIC_USE_AGENT_STORE"])
time.sleep(60)
"""
STANDALONE = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
STATIC = ["accelerate.commands.launch", *launch_file("ddp_cpu"), "--main_process_port", "0"]


def test_the_store_of_real_launchers_is_found(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LAUNCHED)
    commands = [[sys.executable, "-m", *launcher, str(program)] for launcher in (STANDALONE, STATIC)]
    with ThreadPoolExecutor() as at_once:
        results = list(at_once.map(partial(run, timeout_s=60), commands))
    for result in results:
        assert result.returncode == 1
        assert "relora: process 0 ended: process 1 (" in result.stderr, result.stderr
        assert ") failed: ValueError: from True\n" in result.stderr
