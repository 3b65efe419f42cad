"""The launch files: what accelerate, torchrun and Slurm make of them, without GPUs or a cluster.

tests/engines/test_engines.py trains with two CPU processes by the file of each engine; images and Kubernetes are in
test_containers.py.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora.checkpoint.run_folder import RunFolder
from tests.helpers.programs import ROOT, run

LAUNCH = ROOT / "launch"
ALONE = {"compute_environment", "distributed_type", "use_cpu", "num_machines", "num_processes", "mixed_precision"}
SEVERAL = ALONE | {"machine_rank", "main_process_port", "rdzv_backend", "same_network"}
ZERO = {"distributed_type": "DEEPSPEED", "keys": SEVERAL | {"deepspeed_config"}}
KINDS: dict[str, dict[str, Any]] = {
    "one_gpu": {"distributed_type": "NO", "keys": ALONE},
    "ddp": {"distributed_type": "MULTI_GPU", "keys": SEVERAL},
    "fsdp2": {"distributed_type": "FSDP", "keys": SEVERAL | {"fsdp_config"}},
    "zero1": ZERO,
    "zero2": ZERO,
    "zero3": ZERO,
}
OF_EIGHT_GPUS = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((LAUNCH / f"{name}.yaml").read_text()))


def test_every_file_is_of_a_known_kind() -> None:
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == KINDS.keys() | {"kubernetes", "kubernetes_one_node"}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_file_has_the_keys_of_its_kind(name: str) -> None:
    tree = read(name)
    assert tree["distributed_type"] == KINDS[name]["distributed_type"]
    assert tree.keys() == KINDS[name]["keys"]
    assert tree["mixed_precision"] == "no"  # training.mixed_precision decides
    assert tree["num_processes"] == (8 if name in OF_EIGHT_GPUS else 1)
    assert tree["use_cpu"] is False  # relora itself takes the CPU where no GPU is visible


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_files_leave_to_relora_what_it_sets_itself(stage: int) -> None:
    options = read(f"zero{stage}")["deepspeed_config"]
    assert options["zero_stage"] == stage
    assert not options.keys() & {"gradient_clipping", "gradient_accumulation_steps", "deepspeed_config_file"}


def test_fsdp2_file_has_every_rank_load_the_weights() -> None:
    options = read("fsdp2")["fsdp_config"]
    assert (options["fsdp_version"], options["fsdp_auto_wrap_policy"]) == (2, "TRANSFORMER_BASED_WRAP")
    assert options["fsdp_cpu_ram_efficient_loading"] is False


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_script_is_bash(script: str) -> None:
    assert run(["bash", "-n", f"launch/{script}"], timeout_s=10).returncode == 0


STAND_IN = """
import os, pathlib, signal, sys, time

def leave(number, frame):
    time.sleep(1)
    pathlib.Path("left." + os.environ["RANK"]).write_text(signal.Signals(number).name)
    sys.exit(143)

signal.signal(signal.SIGUSR1, leave)
pathlib.Path("up." + os.environ["RANK"]).touch()
time.sleep(30)
"""
SIGNALLED = """
cd "$0"
bash launch/torchrun_multinode.sh some.yaml &
until [[ -e up.0 && -e up.1 ]]; do sleep 0.1; done
kill -USR1 $!
wait $!
"""


def test_a_signal_to_the_launcher_alone_reaches_the_processes_and_leaves_them_time(tmp_path: Path) -> None:
    """Slurm signals what it has started itself. A stand-in for relora tells what arrives."""
    (tmp_path / "relora").mkdir()
    (tmp_path / "relora" / "__init__.py").touch()
    (tmp_path / "relora" / "__main__.py").write_text(STAND_IN)
    (tmp_path / "launch").mkdir()
    for name in ("torchrun_multinode.sh", "torchrun.py"):
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    place = {"NNODES": "1", "NODE_RANK": "0", "NPROC_PER_NODE": "2", "PYTHON": sys.executable}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = run([*with_environment(place), "bash", "-c", SIGNALLED, str(tmp_path)], timeout_s=60)
    assert result.returncode == 143, result.stderr
    assert "torchrun: received SIGUSR1; its processes have ended" in result.stderr
    assert "Traceback" not in result.stderr
    assert [(tmp_path / f"left.{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1", "SIGUSR1"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def with_environment(variables: dict[str, str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in variables.items())]


# Stand-ins for Slurm's commands, and for the Python that is asked for the run folder.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$JOB/srun"
env >"$JOB/environment"
if [[ -f $JOB/run/next.json ]]; then mv "$JOB/run/next.json" "$JOB/run/status.json"; fi
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$JOB/scontrol"
if [[ $1 == show ]]; then printf '%s\\n' node1 node2; fi
"""
PYTHON = """#!/usr/bin/env bash
cat >/dev/null
echo "$JOB/run"
"""


def slurm_job(
    job: Path,
    *arguments: str,
    code: int,
    before: str | None = None,
    after: str | None = None,
    python: str | None = None,
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """launch/slurm.sh around a run that ends with `code`, with `more` environment variables.

    Its status.json says `before` (None: there is none), then `after` (None: as it was).
    """
    folder = RunFolder(job / "run")
    if after is not None:
        folder.write_status(after, step=7)  # type: ignore[arg-type]
        (folder.path / "status.json").rename(folder.path / "next.json")
    if before is not None:
        folder.write_status(before, step=3)  # type: ignore[arg-type]
    (job / "bin").mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "asked": PYTHON}.items():
        (job / "bin" / name).write_text(text)
        (job / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{job / 'bin'}:{os.environ['PATH']}"}
    ours = {"JOB": str(job), "CODE": str(code), "PYTHON": python or "asked"} | more
    return run([*with_environment(slurm | ours), "bash", "launch/slurm.sh", *arguments], timeout_s=60)


def requeued(job: Path) -> bool:
    return "requeue 77" in (job / "scontrol").read_text().splitlines()


@pytest.mark.parametrize(
    ("before", "after", "code", "again"),
    [
        (None, "preempted", 1, True),
        ("preempted", "preempted", 1, True),
        ("running", "preempted", 143, True),
        ("running", "failed", 1, False),
        ("running", "running", 137, False),
        ("preempted", None, 1, False),  # it failed before it wrote anything
        (None, None, 2, False),
        ("running", "finished", 0, False),
    ],
)
def test_slurm_job_is_queued_again_when_the_run_was_preempted(
    tmp_path: Path, before: str | None, after: str | None, code: int, again: bool
) -> None:
    result = slurm_job(tmp_path, "some.yaml", code=code, before=before, after=after)
    assert result.returncode == code, result.stderr
    assert requeued(tmp_path) == again
    assert result.stderr == ""


def test_slurm_job_that_was_ended_by_the_file_stop_is_not_queued_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_status("preempted", step=7, reason=f"found {folder.stop}: ended after update 7; resumes from step 7")
    folder.status.rename(folder.path / "next.json")
    assert slurm_job(tmp_path, "some.yaml", code=143).returncode == 143
    assert not requeued(tmp_path)


def test_slurm_job_finds_the_run_folder_as_relora_does(tmp_path: Path) -> None:
    arguments = ["configs/quickstart.yaml", "--extend", f"output_dir={tmp_path / 'run'}"]
    result = slurm_job(tmp_path, *arguments, code=1, before="running", after="preempted", python=sys.executable)
    assert (result.returncode, result.stderr) == (1, "")
    assert requeued(tmp_path)
    assert (tmp_path / "srun").read_text().splitlines()[-3:] == arguments


def test_slurm_job_runs_where_the_run_folder_cannot_be_told(tmp_path: Path) -> None:
    result = slurm_job(tmp_path, "some.yaml", code=2, after="preempted", python="false")
    assert result.returncode == 2
    assert "will not queue itself again" in result.stderr
    assert not requeued(tmp_path)


@pytest.mark.parametrize(("restarts", "again"), [("99", True), ("100", False)])
def test_slurm_job_is_not_queued_again_without_end(tmp_path: Path, restarts: str, again: bool) -> None:
    result = slurm_job(
        tmp_path, "some.yaml", code=143, before="preempted", after="preempted", SLURM_RESTART_COUNT=restarts
    )
    assert requeued(tmp_path) == again
    assert ("has been requeued 100 times (MAX_REQUEUES)" in result.stderr) == (not again)


def test_slurm_passes_on_what_srun_does_not_take_over_by_itself(tmp_path: Path) -> None:
    variables = {"SLURM_CPUS_PER_TASK": "32", "SLURM_ARRAY_TASK_ID": "3", "CONTAINER": "apptainer exec --nv relora.sif"}
    arguments = ["some.yaml", "seed=%a", "output_dir=runs/seed_%a"]
    asked = tmp_path / "bin" / "apptainer"  # where relora is asked for the run folder, too
    asked.parent.mkdir()
    asked.write_text(PYTHON)
    asked.chmod(0o755)
    assert slurm_job(tmp_path, *arguments, code=143, after="preempted", **variables).returncode == 143
    assert requeued(tmp_path)
    options = (tmp_path / "srun").read_text().splitlines()
    assert {"--label", "--export=ALL"} <= set(options)
    script = ["relora", *variables["CONTAINER"].split(), "bash", "launch/torchrun_multinode.sh"]
    assert options[-len(script) - 3 :] == [*script, "some.yaml", "seed=3", "output_dir=runs/seed_3"]
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"SRUN_CPUS_PER_TASK=32", "LOG_DIR=slurm-77", "MASTER_ADDR=node1", "NNODES=2"} <= set(environment)
