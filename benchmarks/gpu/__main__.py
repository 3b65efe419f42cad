"""Run the stages of the battery and write their pages; `benchmarks/gpu/run.sh` is the command, and says more."""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import relora.train.train  # noqa: F401  # loaded once, before the forks
from benchmarks.engines import write_corpus
from benchmarks.forks import Forked, forked
from benchmarks.gpu.stages import STAGE_MINUTES, STAGES, Stage, Step
from benchmarks.gpu.targets import STAGE as TARGETED
from benchmarks.gpu.targets import limits_of
from benchmarks.tables import Limit, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "gpu"
POLL_S, LOG_LINES = 0.05, 15
Outcome = dict[str, Any]


def main() -> None:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(names)}; default: all")
    parser.add_argument("--out", type=Path, help="folder of the pages (default: docs/results/gpu)")
    parser.add_argument("--again", action="store_true", help="make steps anew that are done")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at tiny sizes; without --out nothing stays")
    options = parser.parse_args()
    unknown = [name for name in options.stages if name not in names]
    if unknown:
        parser.error(f"no stage {unknown[0]!r}: {', '.join(names)}")
    device = device_name()
    if device is None and not options.dry:
        parser.error("no GPU is visible to torch here; --dry runs everything on the CPU, at tiny sizes")
    with tempfile.TemporaryDirectory() as temporary:
        if options.dry:
            os.environ["RELORA_TEXT"] = str(write_corpus(Path(temporary)))
        out = options.out or (Path(temporary) if options.dry else RESULTS)
        folder = out.resolve() / slug(device or "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [stage for stage in STAGES if stage.name in (options.stages or names)]
        problems = [
            problem
            for stage in wanted
            for problem in run_stage(stage, folder, device or "cpu", dry=options.dry, again=options.again)
        ]
    if problems:
        sys.exit("\n".join(["run.sh: error: not every step was made:", *problems]))


def device_name() -> str | None:
    """The name of the first GPU, asked by a fork: CUDA does not survive one."""

    def ask() -> None:
        import torch

        print(torch.cuda.get_device_name() if torch.cuda.is_available() else "", flush=True)

    with forked(ask) as process:
        _, said = process.end()
    return said.strip().splitlines()[-1] if said.strip() else None


def slug(name: str) -> str:
    """A name as a folder's: "NVIDIA H100 80GB HBM3" -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_stage(stage: Stage, folder: Path, device: str, *, dry: bool, again: bool) -> list[str]:
    """Make the steps of a stage that are not done, and write its page after each; return a line for each problem."""
    path, end_s = folder / f"{stage.name}.json", time.monotonic() + 60 * STAGE_MINUTES
    outcomes: dict[str, Outcome] = json.loads(path.read_text()) if path.exists() and not again else {}
    steps = [step for step in stage.steps if not (dry and step.tiny is None)]
    for step in steps:
        if "tables" in outcomes.get(step.name, {}):
            continue
        limit_s = min(60 * step.minutes, end_s - time.monotonic())
        if limit_s <= 0:
            outcomes[step.name] = {"problem": f"no time was left in the {STAGE_MINUTES:g} minutes of the stage"}
        else:
            print(f"{stage.name}: {step.name}", flush=True)
            outcomes[step.name] = run_step(step, folder, limit_s, dry=dry)
        path.write_text(json.dumps(outcomes, indent=1) + "\n")
        (folder / f"{stage.name}.md").write_text(page(stage, outcomes, device))
    return [
        f"  {stage.name}, {step.name}: {outcomes[step.name]['problem']}"
        for step in steps
        if "problem" in outcomes[step.name]
    ]


def run_step(step: Step, folder: Path, limit_s: float, *, dry: bool) -> Outcome:
    """Run the program of a step in a fork: what it wrote, or why there is nothing."""
    arguments = shlex.split((step.tiny or "" if dry else step.arguments).format(out=folder))
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "step.json"
        with forked(partial(run_program, step.program, [*arguments, "--json", str(written)])) as process:
            has_ended = wait(process, limit_s)
            said = process.log.read_text()
        took = {"commit": commit(), "seconds": round(time.monotonic() - start_s, 1)}
        if not has_ended:
            return took | {"problem": f"ended after {limit_s:.0f} s, its limit", "log": last_lines(said)}
        if process.code != 0:
            return took | {"problem": f"exit code {process.code}", "log": last_lines(said)}
        return took | json.loads(written.read_text())


def run_program(name: str, arguments: list[str]) -> int:
    """`python -m benchmarks.NAME ARGUMENTS`, in this process."""
    sys.argv = [f"{name.rpartition('.')[2]}.py", *arguments]
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def wait(process: Forked, limit_s: float) -> bool:
    """Whether the process ended by itself within so many seconds."""
    end_s = time.monotonic() + limit_s
    while not process.has_ended():
        if time.monotonic() > end_s:
            return False
        time.sleep(POLL_S)
    return True


def last_lines(said: str) -> str:
    return "\n".join(said.strip().splitlines()[-LOG_LINES:])


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it; "unknown" outside of a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def page(stage: Stage, outcomes: Mapping[str, Outcome], device: str) -> str:
    """The page of a stage: each step with its command, tables, and what they are held against."""
    command = f"Made by `bash benchmarks/gpu/run.sh {stage.name}` on {device}."
    parts = [f"# {stage.title}: {device}", command]
    for step in stage.steps:
        parts += [f"## {step.name}", *section(stage, step, outcomes.get(step.name), device)]
    return "\n\n".join(parts) + "\n"


def section(stage: Stage, step: Step, outcome: Outcome | None, device: str) -> list[str]:
    if outcome is None:
        return ["Not made yet."]
    if "problem" in outcome:
        log = [f"```\n{outcome['log']}\n```"] if outcome.get("log") else []
        return [f"**Failed**: {outcome['problem']}.", *log]
    own = [Limit(each["what"], each["value"], each["at_most"], each["at_least"]) for each in outcome["limits"]]
    limits = own + (limits_of(step.name, outcome["tables"], device) if stage.name == TARGETED else [])
    pictures = [f"![{step.name}]({name})" for name in outcome.get("pictures", [])]
    return [
        f"`{shown(outcome['command'])}`",
        f"{outcome['machine']}; commit {outcome['commit']}, {outcome['seconds']:.0f} s",
        *(f"{title}\n\n{table(rows)}" for title, rows in outcome["tables"].items() if rows),
        *(["\n".join(f"- {limit}" for limit in limits)] if limits else []),
        *pictures,
    ]


def shown(command: str) -> str:
    """A command without the places of this machine: where its numbers and pictures went."""
    return re.sub(r" --(json|picture) \S+", "", command)


if __name__ == "__main__":
    main()
