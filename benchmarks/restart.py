"""What a restart costs: seconds against a cycle of updates, memory against an update's.

    python -m benchmarks.restart                          # 4 layers of width 2048, r = 128; 3 GB, 6 minutes
    python -m benchmarks.restart --base-dtype nf4         # a coarser base beside its exact master

Time: an update before each restart, so that there is something to merge; medians. The parts are those functions of
relora that took over 5 % of one further restart, what they call included. Memory: a fresh process whose
allocator gives back what is freed, 10 restarts, each after an update.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

import relora
from benchmarks import llama
from benchmarks.peaks import MIB, in_fresh_process, level, phase
from benchmarks.tables import Limit, Row, options_of, publish
from relora import inject_lora, restart
from relora.method.lora import lora_layers

CYCLE, SHARE_PERCENT = 2000, 0.2
PART_OF_RESTART = 0.05
# What Python and the allocator themselves may have taken meanwhile.
NOISE_MIB = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    llama.add_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="timed restarts")
    parser.add_argument("--restarts", type=int, default=10, help="restarts whose memory is followed")
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    options = options_of(parser)
    if options.measure_memory:
        print(json.dumps(memory(options)))
        return
    times, parts, share = timed(options)
    found = in_fresh_process("benchmarks.restart", [*sys.argv[1:], "--measure-memory"])
    limits = [
        Limit(f"restart, % of a cycle of {CYCLE} updates", share, at_most=SHARE_PERCENT),
        Limit("peak of a restart over an update's, MiB", found["over"] / MIB, at_most=found["layer"] / MIB),
        Limit(f"growth over {options.restarts} restarts, MiB", found["growth"] / MIB, at_most=NOISE_MIB),
    ]
    tables = {"Time": times, "Parts of a restart": parts, "Memory": [{k: v / MIB for k, v in titled(found).items()}]}
    publish(tables, limits, json_path=options.json)


def timed(options: argparse.Namespace) -> tuple[list[Row], list[Row], float]:
    """Rows of times, rows of parts, and a restart in percent of a cycle."""
    model, optimizer = trainee(options)
    batch, updates_s, restarts_s = llama.draw_batch(model, options), list[float](), list[float]()
    llama.update(model, optimizer, batch, bf16=options.bf16)
    for index in range(1, options.rounds + 1):
        updates_s.append(llama.update(model, optimizer, batch, bf16=options.bf16).update)
        began = llama.clock_s()
        restart(model, optimizer, seed=0, index=index)
        restarts_s.append(llama.clock_s() - began)
    llama.update(model, optimizer, batch, bf16=options.bf16)
    with cProfile.Profile() as profile:
        restart(model, optimizer, seed=0, index=options.rounds + 1)
    update_s, restart_s = statistics.median(updates_s), statistics.median(restarts_s)
    share = 100 * restart_s / (CYCLE * update_s)
    row = {
        "update, s": update_s,
        "restart, s": restart_s,
        "restart / update": restart_s / update_s,
        f"% of {CYCLE} updates": share,
    }
    return [row], parts_of(profile), share


def trainee(options: argparse.Namespace) -> tuple[nn.Module, Optimizer]:
    model = llama.build(options)
    inject_lora(model, llama.lora_config(options))
    return model, llama.optimizer_for(model, options)


def parts_of(profile: cProfile.Profile) -> list[Row]:
    """Functions of relora by the time that they and what they call took, the longest first."""
    home = str(Path(relora.__file__).parent)
    found = [
        (seconds, f"{Path(file).stem}.{function}", calls)
        for (file, _, function), (_, calls, _, seconds, _) in pstats.Stats(profile).stats.items()
        if file.startswith(home) and not function.startswith("<")
    ]
    whole = max(found)[0]
    return [
        {"function": name, "calls": calls, "s": seconds, "%": 100 * (seconds / whole)}
        for seconds, name, calls in sorted(found, reverse=True)
        if seconds >= PART_OF_RESTART * whole
    ]


def memory(options: argparse.Namespace) -> dict[str, int]:
    """Bytes: the level between updates, the peaks, and what the restarts leave behind."""
    on_gpu = llama.device().type == "cuda"
    model, optimizer = trainee(options)
    batch = llama.draw_batch(model, options)
    llama.update(model, optimizer, batch, bf16=options.bf16)
    # The first restart of a process loads what later ones share.
    restart(model, optimizer, seed=0, index=1)
    before, peak, update_peak = level(on_gpu=on_gpu), 0, 0
    for index in range(2, options.restarts + 2):
        with phase(on_gpu=on_gpu) as update:
            llama.update(model, optimizer, batch, bf16=options.bf16)
        with phase(on_gpu=on_gpu) as merge:
            restart(model, optimizer, seed=0, index=index)
        peak, update_peak = max(peak, merge.peak), max(update_peak, update.peak)
    after = level(on_gpu=on_gpu)
    return {
        "level": before,
        "update": update_peak,
        "restart": peak,
        "over": max(0, peak - update_peak),
        "over_level": peak - before,
        "layer": max(layer.in_features * layer.out_features * 4 for layer in lora_layers(model).values()),
        "growth": after - before,
    }


def titled(found: dict[str, int]) -> dict[str, int]:
    return {
        "level, MiB": found["level"],
        "peak of an update, MiB": found["update"],
        "peak of a restart, MiB": found["restart"],
        "restart over the level, MiB": found["over_level"],
        "restart over an update, MiB": found["over"],
        "largest layer in fp32, MiB": found["layer"],
        "growth over the restarts, MiB": found["growth"],
    }


if __name__ == "__main__":
    main()
