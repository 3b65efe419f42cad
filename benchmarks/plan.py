"""Does a run need the memory that `relora plan` says?

    python benchmarks/plan.py                      # both stages of four sizes, fp32 and bf16; about ten minutes
    python benchmarks/plan.py --models quickstart --precisions no --repeats 1

Each measurement is a process of its own that trains three updates, on random tokens, through the engine of a run. What
is measured is its largest resident size over the level after imports; a tiny model has made an update by then, so that
what libraries load at their first use (code, thread stacks, scratch space) is part of that level. The plan counts
tensors. An allocator adds what it keeps for later: the target is held with one that gives freed memory back; what
glibc's makes of the same run by default stands beside it.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peaks import ALLOCATOR, MIB

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
STAGES = ("warm_start", "relora")
TARGET = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["quickstart", "9m", "20m", "35m"])
    parser.add_argument("--precisions", nargs="+", choices=("no", "bf16"), default=["no", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs="+", metavar="STAGE OVERRIDE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], options.measure[1:])
        return
    print(
        "| model | precision | stage | plan | measured | plan / measured | with glibc's defaults |\n" + "|---" * 7 + "|"
    )
    rows = [
        row(model, precision, stage, options.repeats)
        for model in options.models
        for precision in options.precisions
        for stage in STAGES
    ]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    worst = max(abs(float(row["ratio"]) - 1) for row in rows)
    print(f"\nfurthest off: {worst:.1%}; target: {TARGET:.0%}")


def row(model: str, precision: str, stage: str, repeats: int) -> dict[str, str | float]:
    """Measure one stage of one model, and print its line."""
    overrides = settings(model, precision)
    planned = predicted(stage, overrides)
    measured = statistics.median(run(stage, overrides, ALLOCATOR) for _ in range(repeats))
    default = statistics.median(run(stage, overrides, {}) for _ in range(repeats))
    cells = [f"{value / MIB:,.1f} MiB" for value in (planned, measured)]
    ratio = planned / measured
    print(
        f"| {model} | {precision} | {stage} | {' | '.join(cells)} | {ratio:.3f} | {default / MIB:,.1f} MiB |",
        flush=True,
    )
    return {
        "model": model,
        "precision": precision,
        "stage": stage,
        "plan_bytes": planned,
        "measured_bytes": measured,
        "ratio": ratio,
        "default_allocator_bytes": default,
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

    config = load_config(QUICKSTART, overrides)
    hf_config, launch = load_hf_config(config.model, task_of(config)), Launch("one", 1, on_gpu=False)
    what = Stage(stage, config.training.max_steps)
    dry_run = dry_run_update(what, config, hf_config, batch_size=config.training.per_device_batch_size)
    return stage_memory(what, config, launch, stage_model(what, config, hf_config), dry_run).peak


def run(stage: str, overrides: Sequence[str], environment: dict[str, str]) -> int:
    """What a fresh process measures, in bytes."""
    command = [sys.executable, __file__, "--measure", stage, *overrides]
    result = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True, timeout=900
    )
    return int(result.stdout.splitlines()[-1])


def measure(stage: str, overrides: Sequence[str]) -> None:
    """In a process of its own: print the largest resident size over the level after imports and a tiny model."""
    tiny = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    shape = f"model.config={json.dumps(tiny | {'num_hidden_layers': 2, 'num_attention_heads': 2})}"
    train(stage, [*overrides, shape, "lora.r=4", "training.per_device_batch_size=1"])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    level = memory_of("VmRSS")
    train(stage, overrides)
    print(memory_of("VmHWM") - level)


def train(stage: str, overrides: Sequence[str]) -> None:
    """Three updates of a stage on random tokens and, at low rank, a restart."""
    import torch

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


def memory_of(field: str) -> int:
    """A figure of this process, in bytes: VmRSS, or VmHWM, the largest since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


if __name__ == "__main__":
    main()
