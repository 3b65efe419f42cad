"""Runs of two processes that are ended from outside: in order, or not."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from benchmarks.forks import forked
from relora.checkpoint.load import complete_checkpoints
from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.save import Checkpoints
from relora.checkpoint.verify import checkpoint_problems
from relora.cli import main
from relora.config import check
from relora.errors import Stopped
from relora.train.callbacks import Callbacks
from relora.train.loop import Loop
from relora.train.signals import LAUNCHERS, stop_signals
from relora.train.train import train
from tests.helpers.launch import command, written
from tests.helpers.programs import ROOT, end_group
from tests.helpers.tiny import metrics, settings

LONG = {
    "training__save_steps": 10_000,
    "training__eval_steps": 10_000,
    "training__max_steps": 40_000,
    "training__probe_steps": 0,
}


@contextmanager
def launched(kind: str, config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A launch that is gone with all its processes afterwards."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command(kind, config), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        ranks = []
        try:
            wait_until(lambda: process.poll() is not None or steps_done(config) > 12, log)
            assert process.poll() is None, log.read_text()[-3000:]
            ranks = children(process.pid)
            yield process
        finally:
            for group in (process.pid, *ranks):  # torchrun's ranks have sessions of their own
                end_group(group)


def wait_until(reached: Callable[[], bool], log: Path, *, patience_s: float = 120) -> float:
    """Seconds until `reached`."""
    start_s = time.monotonic()
    while not reached():
        assert time.monotonic() - start_s < patience_s, log.read_text()[-3000:]
        time.sleep(0.05)
    return time.monotonic() - start_s


def steps_done(config: Path) -> int:
    lines = config.with_suffix("") / "metrics.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status(config: Path) -> dict[str, Any]:
    return dict(json.loads((config.with_suffix("") / "status.json").read_text()))


def long_run(corpus: Path, folder: Path, **overrides: Any) -> Path:
    return written(settings(corpus, folder / "run", **LONG | overrides), folder)


def assert_ended_in_order(config: Path, why: str) -> None:
    told = status(config)
    assert told["status"] == "preempted"
    assert told["reason"] == f"{why}: ended after update {told['step']}; resumes from step {told['step']}"
    [checkpoint] = complete_checkpoints(config.with_suffix("") / "checkpoints")
    assert checkpoint.name == f"step-{told['step']:08d}"
    assert checkpoint_problems(checkpoint) == []


def test_a_signal_to_the_launcher_ends_the_run_in_order(corpus: Path, tmp_path: Path) -> None:
    # torchrun sends it to the whole group of each rank, the readers of its data among them.
    config, log = long_run(corpus, tmp_path, data__num_workers=1), tmp_path / "log"
    with launched("ddp_cpu", config, log) as launcher:
        launcher.send_signal(signal.SIGTERM)
        assert wait_until(lambda: launcher.poll() is not None, log) < 25
    assert_ended_in_order(config, "received SIGTERM")


def test_a_signal_to_one_rank_ends_all_in_order(corpus: Path, tmp_path: Path) -> None:
    config, log = long_run(corpus, tmp_path), tmp_path / "log"
    with launched("fsdp2_cpu", config, log) as launcher:
        os.kill(children(launcher.pid)[1], signal.SIGUSR1)
        assert wait_until(lambda: launcher.poll() is not None, log) < 25
        assert launcher.returncode != 0
    assert_ended_in_order(config, "asked to stop")
    # torchrun repeats, in its own report, what the process that ended first has said.
    assert len(re.findall("^relora: received SIGUSR1: ended after", log.read_text(), re.MULTILINE)) == 1
    assert "exitcode  : 143" in log.read_text()


def test_a_rank_that_dies_takes_the_others_down(corpus: Path, tmp_path: Path) -> None:
    config, log = long_run(corpus, tmp_path, training__save_steps=1), tmp_path / "log"
    with launched("zero2_cpu", config, log) as launcher:
        ranks = children(launcher.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert wait_until(lambda: launcher.poll() is not None, log) < 60
        assert not [rank for rank in ranks if Path(f"/proc/{rank}/exe").exists()]
    assert re.search(r"rank\s+: 1.*\n.*exitcode\s+: -9", log.read_text()), log.read_text()[-2000:]
    assert status(config)["status"] in ("failed", "running")
    for checkpoint in complete_checkpoints(config.with_suffix("") / "checkpoints"):
        assert checkpoint_problems(checkpoint) == []


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tree = settings(corpus, tmp_path_factory.mktemp("whole") / "run", training__save_steps=5)
    train(check(tree))
    return tree


def ask_after(step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Send this process a signal at the beginning of the update that leads to `step`."""

    update = Loop.update

    def signalled(loop: Loop, at: int, batches: Any) -> Any:
        if at == step - 1:
            os.kill(os.getpid(), number)
        return update(loop, at, batches)

    monkeypatch.setattr(Loop, "update", signalled)


@pytest.mark.parametrize("step", [2, 5, 7, 8], ids=["nothing due", "checkpoint due", "restart due", "evaluation due"])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(
    whole: dict[str, Any], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = whole | {"output_dir": str(tmp_path / "run")}
    ask_after(step, monkeypatch, signal.SIGUSR1)
    with pytest.raises(Stopped, match=f"received SIGUSR1: ended after update {step}; resumes from step {step}"):
        train(check(tree))
    monkeypatch.undo()
    assert status(tmp_path / "run.yaml")["status"] == "preempted"
    train(check(tree))
    assert sorted(metrics(tree["output_dir"]), key=str) == sorted(metrics(whole["output_dir"]), key=str)
    ours, theirs = (load_file(Path(run["output_dir"]) / "final/model.safetensors") for run in (tree, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def ask_in(method: str, step: int, monkeypatch: pytest.MonkeyPatch, *, call: int = 0) -> None:
    """Send this process SIGTERM in the `call`-th call of a method of `Callbacks` after the update to `step`."""
    reached, calls, original = [0], count(), getattr(Callbacks, method)
    begin = Callbacks.restart_or_probe

    def begun(callbacks: Callbacks, at: int) -> None:
        reached[0] = at
        begin(callbacks, at)

    def signalled(*arguments: Any, **options: Any) -> Any:
        if reached[0] == step and next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(Callbacks, "restart_or_probe", begun)
    monkeypatch.setattr(Callbacks, method, signalled)


@pytest.mark.parametrize(
    ("method", "call", "step", "evaluated"),
    [
        ("give_up_if_asked", 1, 8, False),  # a batch of the evaluation
        ("give_up_if_asked", 20, 8, False),  # a token of the samples
        ("give_up_if_asked", 0, 12, False),  # the evaluation at the end
        ("save", 0, 10, True),
        ("probe_loss", 0, 7, True),  # in a restart
    ],
)
def test_no_update_is_made_after_a_signal_and_none_is_lost(
    whole: dict[str, Any],
    method: str,
    call: int,
    step: int,
    evaluated: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = whole | {"output_dir": str(tmp_path / "run")}
    ask_in(method, step, monkeypatch, call=call)
    with pytest.raises(Stopped, match=f"received SIGTERM: ended after update {step}; resumes from step {step}"):
        train(check(tree))
    monkeypatch.undo()
    newest = complete_checkpoints(tmp_path / "run/checkpoints")[-1]
    assert json.loads((newest / "MANIFEST.json").read_text())["evaluated"] is evaluated
    train(check(tree))
    assert sorted(metrics(tree["output_dir"]), key=str) == sorted(metrics(whole["output_dir"]), key=str)


def test_an_evaluation_before_the_first_update_is_given_up(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = whole | {"output_dir": str(tmp_path / "run")}
    ask_in("give_up_if_asked", 0, monkeypatch)
    with pytest.raises(Stopped, match="received SIGTERM: ended after update 0; resumes from step 0"):
        train(check(tree))
    assert metrics(tree["output_dir"]) == []
    assert complete_checkpoints(tmp_path / "run/checkpoints") == []


def rank_of_two(tree: dict[str, Any], index: int, port: int) -> None:
    """One of two processes, as a launcher would start them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= place | {"RANK": str(index), "LOCAL_RANK": str(index)}
    PartialState._reset_state()  # this process's parent has one of its own
    train(check(tree))


def test_an_evaluation_is_given_up_by_all_processes_at_the_same_batch(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Callbacks.give_up_if_asked

    def slowly(callbacks: Callbacks) -> None:
        (tmp_path / f"evaluates-{os.environ['RANK']}").touch()
        time.sleep(0.5)
        slow(callbacks)

    monkeypatch.setattr(Callbacks, "give_up_if_asked", slowly)
    short = {"training__max_steps": 6, "training__per_device_eval_batch_size": 1, "training__eval_steps": 100}
    tree = settings(corpus, tmp_path / "run", **short, training__save_steps=100)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    processes = [forked(partial(rank_of_two, tree, index, port)) for index in (0, 1)]
    with processes[0] as first, processes[1] as second:
        for index, process in enumerate(processes):  # a process that is still building would end alone
            process.wait_until((tmp_path / f"evaluates-{index}").exists)
        asked_s = time.monotonic()
        second.send(signal.SIGUSR1)
        assert [process.end()[0] for process in processes] == [143, 143], first.end()[1] + second.end()[1]
        assert time.monotonic() - asked_s < 10
        assert "relora: asked to stop: ended after update 0; resumes from step 0" in first.end()[1]
        assert "relora: received SIGUSR1: ended after update 0; resumes from step 0" in second.end()[1]
    assert status(tmp_path / "run.yaml")["status"] == "preempted"


def test_processes_end_soon_after_their_launcher(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Loop.update

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return update(*arguments)

    monkeypatch.setattr(Loop, "update", slowly)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    options = {"training__max_steps": 100, "training__save_steps": 1000, "data__num_workers": 1}
    tree = settings(corpus, tmp_path / "run", **options)

    def launcher() -> None:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        else:
            with suppress(Stopped):
                train(check(tree))
            os._exit(0)

    with forked(launcher) as process:
        process.wait_until(lambda: steps_done(tmp_path / "run.yaml") > 2)
        process.send(signal.SIGKILL)
        process.end()
        gone_s = time.monotonic()
        while process.orphans():
            assert time.monotonic() - gone_s < 3
            time.sleep(0.02)
    told = status(tmp_path / "run.yaml")
    assert told["status"] == "preempted"
    step = told["step"]
    assert told["reason"] == f"the launcher is gone: ended after update {step}; resumes from step {step}"
    assert step > 0
    with RunFolder(tmp_path / "run").locked():
        pass


def test_processes_end_whose_launcher_is_gone_before_they_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(name in Path("/proc/1/cmdline").read_bytes() for name in LAUNCHERS):
        pytest.skip("process 1, to which orphans belong, may be a launcher here")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def launcher() -> None:
        own = os.getpid()
        if os.fork():
            return
        while os.getppid() == own:
            time.sleep(0.01)
        with suppress(Stopped), stop_signals(restores=False):
            (tmp_path / "looks").touch()
            time.sleep(60)
        os._exit(0)

    with forked(launcher) as process:
        process.end()
        gone_s = time.monotonic()
        while process.orphans():
            assert time.monotonic() - gone_s < 5
            time.sleep(0.02)
    assert (tmp_path / "looks").exists()


def test_a_launcher_is_told_the_error_that_it_shows(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchrun gives each process the name of such a file, and prints its message below all that has ended.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    path = written(settings(corpus, tmp_path / "run"), tmp_path)
    assert main(["train", str(path), "training.max_step=3"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message.startswith("relora: training.max_step = 3: unknown key")
    assert "\n" not in failure.message, "no traceback"
    assert time.time() - failure.timestamp < 60


def test_no_checkpoint_is_begun_that_would_take_too_long(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = whole | {"output_dir": str(tmp_path / "run")}
    ask_after(7, monkeypatch, signal.SIGTERM)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as under a launcher, which kills
    monkeypatch.setattr(Checkpoints, "expected_seconds", lambda _: 31.0)
    with pytest.raises(Stopped, match="received SIGTERM: ended after update 7; resumes from step 5"):
        train(check(tree))
    assert not list((tmp_path / "run/checkpoints").glob(".tmp-*"))


def test_a_signal_in_the_last_update_leaves_what_is_due_to_the_resumed_run(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = whole | {"output_dir": str(tmp_path / "run")}
    ask_after(12, monkeypatch, signal.SIGTERM)
    with pytest.raises(Stopped, match="received SIGTERM: ended after update 12; resumes from step 12"):
        train(check(tree))
    monkeypatch.undo()
    assert not (tmp_path / "run/final").exists()
    train(check(tree))
    assert metrics(tree["output_dir"]) == metrics(whole["output_dir"])
    assert status(tmp_path / "run.yaml")["status"] == "finished"


def test_the_command_ends_with_143(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask_after(3, monkeypatch, signal.SIGINT)
    path = written(whole | {"output_dir": str(tmp_path / "run")}, tmp_path)
    assert main(["train", str(path)]) == 143
    assert "relora: received SIGINT: ended after update 3" in capsys.readouterr().err
