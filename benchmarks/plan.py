"""Does a run need the memory that `relora plan` says?

    python -m benchmarks.plan                      # both stages of four sizes, fp32 and bf16; about ten minutes
    python -m benchmarks.plan --models quickstart --precisions no --repeats 1
    python -m benchmarks.plan --models 350m 1b --precisions bf16 --override training.per_device_batch_size=8   # a GPU

Each measurement is a process of its own that trains three updates, on random tokens, through the engine of a run, and
makes a restart. On a GPU it is `max_memory_allocated`. On a CPU it is the largest resident size over the level after
imports; a tiny model has made an update by then, so that what libraries load at their first use (code, thread stacks,
scratch space) is part of that level. The plan counts tensors. An allocator adds what it keeps for later: the target is
held with one that gives freed memory back; what glibc's makes of the same run by default stands beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.peaks import ALLOCATOR, MIB, level, phase
from benchmarks.tables import Limit, Row, options_of, publish

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
STAGES = ("full_rank", "low_rank")
TARGET = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["quickstart", "9m", "20m", "35m"])
    parser.add_argument("--precisions", nargs="+", choices=("no", "bf16"), default=["no", "bf16"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--override", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--repeats", type=int, default=3, help="on a GPU the first is like all others")
    parser.add_argument("--measure", nargs="+", metavar="STAGE OVERRIDE", help=argparse.SUPPRESS)
    options = options_of(parser)
    if options.measure:
        print(measure(options.measure[0], options.measure[1:]))
        return
    rows = [
        row(model, precision, stage, options)
        for model in options.models
        for precision in options.precisions
        for stage in options.stages
    ]
    worst = max(abs(float(row["plan / measured"]) - 1) for row in rows)
    publish({"Memory": rows}, [Limit("furthest off", worst, at_most=TARGET)], json_path=options.json)


def row(model: str, precision: str, stage: str, options: argparse.Namespace) -> Row:
    """One stage of one model: what the plan says, and what is measured."""
    overrides = settings(model, precision) + options.override
    planned = predicted(stage, overrides)
    # A GPU's memory is not in the hands of the host's allocator.
    allocators = [ALLOCATOR] if torch.cuda.is_available() else [ALLOCATOR, {}]
    measured, *default = (
        statistics.median(run(stage, overrides, allocator) for _ in range(options.repeats)) for allocator in allocators
    )
    return {
        "model": model,
        "precision": precision,
        "stage": stage,
        "plan, MiB": planned / MIB,
        "measured, MiB": measured / MIB,
        "plan / measured": planned / measured,
        "with glibc's defaults, MiB": default[0] / MIB if default else None,
    }


def settings(model: str, precision: str) -> list[str]:
    """Overrides of the quickstart's configuration."""
    if model == "quickstart":
        return [f'training.mixed_precision="{precision}"']
    return [
        f'training.mixed_precision="{precision}"',
        f"model.config={ROOT / 'configs' / 'models' / f'llama_{model}.json'}",
        "data.sequence_length=256",
        "lora.r=32",
        "training.per_device_batch_size=4",
        "training.global_batch_size=4",
    ]


def predicted(stage: str, overrides: Sequence[str]) -> int:
    """The peak that the plan says."""
    from relora.config import load_config
    from relora.forecast.dry_run import dry_run_update
    from relora.forecast.engine_costs import Launch
    from relora.forecast.memory import stage_memory, stage_model
    from relora.model.model import load_hf_config
    from relora.model.tasks import task_of
    from relora.train.stages import Stage

    config, on_gpu = load_config(QUICKSTART, overrides), torch.cuda.is_available()
    hf_config, launch = load_hf_config(config.model, task_of(config)), Launch("one", 1, on_gpu=on_gpu)
    what, batch_size = Stage(stage, config.training.max_steps), config.training.per_device_batch_size
    dry_run = dry_run_update(what, config, hf_config, batch_size=batch_size, on_gpu=on_gpu)
    return stage_memory(what, config, launch, stage_model(what, config, hf_config), dry_run).peak


def run(stage: str, overrides: Sequence[str], environment: dict[str, str]) -> int:
    """What a fresh process measures, in bytes."""
    command = [sys.executable, "-m", "benchmarks.plan", "--measure", stage, *overrides]
    result = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=900
    )
    return int(result.stdout.splitlines()[-1])


def measure(stage: str, overrides: Sequence[str]) -> int:
    """In a process of its own: bytes at most, on a CPU over the level after imports and a tiny model."""
    on_gpu = torch.cuda.is_available()
    tiny = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    shape = f"model.config={json.dumps(tiny | {'num_hidden_layers': 2, 'num_attention_heads': 2})}"
    train(stage, [*overrides, shape, "lora.r=4", "training.per_device_batch_size=1", "training.global_batch_size=1"])
    before = level(on_gpu=on_gpu)
    with phase(on_gpu=on_gpu) as training:
        train(stage, overrides)
    return training.peak - before


def train(stage: str, overrides: Sequence[str]) -> None:
    """Three updates of a stage on random tokens and, at low rank, a restart."""
    from relora.checkpoint.state import State
    from relora.config import load_config
    from relora.engines import connect
    from relora.model.model import load_hf_config
    from relora.model.tasks import task_of
    from relora.train.stages import Stage, build

    config = load_config(QUICKSTART, overrides)
    hf_config, engine = load_hf_config(config.model, task_of(config)), connect(config)
    what = Stage(stage, config.training.max_steps)
    live = build(what, State(), config=config, hf_config=hf_config, engine=engine)
    shape = (config.training.per_device_batch_size, config.data.sequence_length)
    ids = torch.randint(hf_config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        assert not engine.update(live, [{"input_ids": ids, "labels": ids}], seeds=[0], stop=False).skipped
    if what.is_low_rank:
        engine.restart(live, seed=0, index=1)


if __name__ == "__main__":
    main()
