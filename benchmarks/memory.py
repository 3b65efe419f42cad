"""Peak memory of each rank while a sharded run is built, saved, switched, restarted and resumed.

    python -m benchmarks.memory            # two processes each under FSDP2 and ZeRO-3; about three minutes
    python -m benchmarks.memory --engines fsdp2 --hidden-size 1024

What a phase takes is its peak over the larger of the levels before and after it: memory that is needed only for
a while. It is held against one block of the model. Resident memory of the process, with an allocator that gives
back what is freed.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import peaks
from benchmarks.peaks import ALLOCATOR, MIB, Phase
from benchmarks.tables import head, line

LAUNCHES = {
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    },
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
COLUMNS = ("engine", "rank", "phase", "level before", "level after", "peak over both", "one block")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank-program", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_program:
        measure(options.engines[0], options.hidden_size, options.layers)
        return
    print(head(COLUMNS))
    for engine in options.engines:
        for row in launched(engine, options):
            print(row, flush=True)


def launched(engine: str, options: argparse.Namespace) -> list[str]:
    """The rows that two ranks print, in the order of the ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    size = ["--hidden-size", str(options.hidden_size), "--layers", str(options.layers)]
    environment = os.environ | ALLOCATOR | LAUNCHES[engine] | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-m", "benchmarks.memory", "--rank-program", "--engines", engine, *size],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1200,
    )
    return sorted(row for row in result.stdout.splitlines() if row.startswith("| "))


def measure(engine_name: str, hidden_size: int, num_layers: int) -> None:
    """The phases of a run, by the functions that a run goes through."""
    import torch

    from relora.checkpoint.format import History
    from relora.checkpoint.load import complete_checkpoints, open_checkpoint
    from relora.checkpoint.save import Checkpoints
    from relora.checkpoint.state import State
    from relora.config import check
    from relora.engines import connect
    from relora.model.model import load_hf_config
    from relora.model.tasks import task_of
    from relora.train.stages import Stage, build, switch

    config = check(settings(hidden_size, num_layers))
    hf_config, engine, table = load_hf_config(config.model, task_of(config)), connect(config), dict[str, Phase]()
    full, low = Stage("full_rank", 2), Stage("low_rank", 10)
    how: dict[str, Any] = {"config": config, "hf_config": hf_config, "engine": engine}
    ids = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(engine.world.process_index))
    batch = {"input_ids": ids, "labels": ids}
    folder = Path(from_first(tempfile.mkdtemp() if engine.world.process_index == 0 else ""))
    checkpoints = Checkpoints(folder, limit=None, writes=engine.world.process_index == 0)
    about = {"fingerprint": "", "data": ""}

    with peaks.phase() as table["build the warm start"]:
        live = build(full, State(), **how)
    block = sum(engine.store.shape(p).numel() * 4 for p in live.model.model.layers[0].parameters())
    update(engine, live, batch)
    with peaks.phase() as table["update, full rank"]:
        update(engine, live, batch)
    with peaks.phase() as table["save, full rank"]:
        checkpoints.save(live, engine, 1, history=History(), stage="full_rank", cycle=0, about=about)
    with peaks.phase() as table["switch to low rank"]:
        state = switch(live, engine, step=2, history=History())
        del live
        live = build(low, state, **how)
        del state
    update(engine, live, batch)
    with peaks.phase() as table["update, low rank"]:
        update(engine, live, batch)
    with peaks.phase() as table["restart"]:
        engine.restart(live, seed=0, index=1)
    with peaks.phase() as table["save, low rank"]:
        checkpoints.save(live, engine, 3, history=History(), stage="low_rank", cycle=1, about=about)
    engine.world.barrier()
    engine.release(live)
    del live
    gc.collect()
    with peaks.phase() as table["resume, low rank"]:
        resumed = build(low, open_checkpoint(complete_checkpoints(folder)[-1]), **how)
    del resumed
    report(engine_name, engine.world.process_index, table, block)
    engine.world.close()


def update(engine: Any, live: Any, batch: Any) -> None:
    assert not engine.update(live, [batch], seeds=[0], stop=False).skipped


def from_first(text: str) -> str:
    from torch import distributed

    texts = [text]
    distributed.broadcast_object_list(texts)
    return texts[0]


def report(engine: str, rank: int, table: dict[str, Phase], block: int) -> None:
    for number, (name, phase) in enumerate(table.items(), start=1):
        sizes = [f"{value / MIB:.0f} MiB" for value in (phase.before, phase.after, phase.over, block)]
        print(line([engine, str(rank), f"{number}. {name}", *sizes]), flush=True)


def settings(hidden_size: int, num_layers: int) -> dict[str, Any]:
    return {
        "output_dir": "unused",
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 4096,
                "hidden_size": hidden_size,
                "intermediate_size": hidden_size * 11 // 4,
                "num_hidden_layers": num_layers,
                "num_attention_heads": 8,
                "max_position_embeddings": 64,
            }
        },
        "data": {"sequence_length": 64, "eval_tokens": 64},
        "lora": {"r": 16},
        "relora": {"restart_every": 4, "warm_start_steps": 2},
        "schedule": {"warmup_steps": 0, "restart_warmup_steps": 0},
        "training": {"max_steps": 10, "global_batch_size": 2, "per_device_batch_size": 1, "mixed_precision": "no"},
    }


if __name__ == "__main__":
    main()
