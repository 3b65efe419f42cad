"""A whole model's update, ours against full rank, PEFT, GaLore and APOLLO, in turn in one process.

    python -m benchmarks.step                 # 4 layers of width 2048, 4096 tokens, r = 128; 13 GB, 10 minutes, half
                                              # of them for the first subspace of galore
    python -m benchmarks.step --bf16          # bf16 autocast
    python -m benchmarks.step --memory        # peak memory instead, each method in a fresh process
    python -m benchmarks.step --compile --methods ours        # compiled beside eager, recompiles counted

Every model is built from the same seed and stays in memory for the whole run, its gradients only for its own update.
A round is one update of each, begun by another one every time; times are medians over rounds, ratios medians of the
ratios within a round. Loss and clipping are the same code for all; AdamW is that of `build_optimizer` for full, peft
and ours, the packages' own for galore and apollo. Their medians leave out the update that chooses a new subspace, one
in 200: "amortised" has its share. Optimizer bytes are the memory behind its state: a view holds all of its storage.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks import llama
from benchmarks.contenders import (
    CONTENDERS,
    PROJECTION_GAP,
    Contender,
    gradient_bytes,
    optimizer_bytes,
    require_gradients,
)
from benchmarks.llama import Batch, Seconds
from benchmarks.peaks import MIB, in_fresh_process, level, phase
from benchmarks.tables import Limit, Row, options_of, publish
from relora.model.model import COMPILE_OPTIONS

OF_FULL, OF_PEFT = 0.85, 0.90


@dataclass(frozen=True)
class Footprint:
    """Bytes that an update handles, of the wrapped layers and of the rest, and what its first optimizer step took."""

    wrapped: int
    gradients: int
    optimizer: int
    saved: int
    first_step_s: float


@dataclass(frozen=True)
class Entrant:
    """One row: a contender, run through `forward`, which is its model or that compiled."""

    name: str
    contender: Contender
    forward: nn.Module
    footprint: Footprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    llama.add_options(parser)
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="a second row for each method, compiled")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--measure-peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = options_of(parser)
    if options.measure_peak:
        print(json.dumps(peak_of(options.measure_peak, options)))
        return
    precision = "bf16 autocast" if options.bf16 else "fp32"
    title = f"{options.batch} x {options.sequence} tokens, r = {options.rank}, {precision}"
    if options.memory:
        rows, limits = peaks(options.methods), list[Limit]()
    else:
        rows, limits = race(options)
    publish({title: rows}, limits, json_path=options.json)


def race(options: argparse.Namespace) -> tuple[list[Row], list[Limit]]:
    entrants, batch = [], None
    for name in options.methods:
        contender = CONTENDERS[name](options)
        batch = batch or llama.draw_batch(contender.model, options)
        entrants += enter(name, contender, batch, options)
    assert batch is not None
    graphs = compiled_graphs()
    seconds: dict[str, list[Seconds]] = {entrant.name: [] for entrant in entrants}
    for number in range(options.rounds):
        first = number % len(entrants)
        for entrant in entrants[first:] + entrants[:first]:
            optimizer = entrant.contender.optimizer
            seconds[entrant.name].append(llama.update(entrant.forward, optimizer, batch, bf16=options.bf16))
    shapes = {low_rank: llama.shapes_of(options, low_rank=low_rank) for low_rank in (False, True)}
    rows = [row(entrant, seconds, shapes, options) for entrant in entrants]
    recompiled = [Limit("graphs compiled after the warm-up", compiled_graphs() - graphs, at_most=0)]
    return rows, limits_of(entrants, seconds, options.rank) + (recompiled if options.compile else [])


def enter(name: str, contender: Contender, batch: Batch, options: argparse.Namespace) -> list[Entrant]:
    """The warm-up of a contender, in which its bytes are counted."""
    footprint = footprint_of(contender, batch, bf16=options.bf16)
    eager = Entrant(name, contender, contender.model, footprint)
    if not options.compile:
        return [eager]
    forward = torch.compile(contender.model, options=COMPILE_OPTIONS)
    llama.update(forward, contender.optimizer, batch, bf16=options.bf16)
    with llama.counted_saves(contender.model) as saved:
        llama.mean_loss(forward, batch, bf16=options.bf16)
    return [eager, Entrant(f"{name}, compiled", contender, forward, replace(footprint, saved=sum(saved.values())))]


def footprint_of(contender: Contender, batch: Batch, *, bf16: bool) -> Footprint:
    """One update, weighed."""
    model, optimizer = contender.model, contender.optimizer
    with llama.counted_saves(model) as saved:
        loss = llama.mean_loss(model, batch, bf16=bf16)
    loss.backward()
    require_gradients(contender)
    trained, began = llama.trained(optimizer), llama.clock_s()
    gradients, wrapped = gradient_bytes(trained), gradient_bytes(contender.wrapped)
    optimizer.step()
    seconds = llama.clock_s() - began
    optimizer.zero_grad(set_to_none=True)
    return Footprint(
        wrapped=wrapped + optimizer_bytes(optimizer, contender.wrapped),
        gradients=gradients,
        optimizer=optimizer_bytes(optimizer, trained),
        saved=sum(saved.values()),
        first_step_s=seconds,
    )


def row(
    entrant: Entrant, seconds: dict[str, list[Seconds]], shapes: dict[bool, nn.Module], options: argparse.Namespace
) -> dict[str, Any]:
    """The row of the table; `shapes` is the model of full rank, and of low rank."""
    mine, footprint, low_rank = seconds[entrant.name], entrant.footprint, entrant.contender.trains_factors
    update_s = statistics.median(each.update for each in mine)
    optimizer_s = statistics.median(each.optimizer for each in mine)
    tokens_per_second = options.batch * options.sequence / update_s
    extra_s = max(0.0, footprint.first_step_s - optimizer_s) / PROJECTION_GAP if projects(entrant) else 0.0
    return {
        "method": entrant.name,
        "trained parameters": sum(p.numel() for p in llama.trained(entrant.contender.optimizer)),
        "ms per update": 1e3 * update_s,
        "amortised, ms": 1e3 * (update_s + extra_s),
        "of it optimizer, ms": 1e3 * optimizer_s,
        "/ full": ratio(mine, seconds.get("full")),
        "/ peft": ratio(mine, seconds.get("peft")),
        "tokens/s": tokens_per_second,
        "MFU": llama.mfu(tokens_per_second, shapes[low_rank], options),
        "gradients, MiB": footprint.gradients / MIB,
        "optimizer, MiB": footprint.optimizer / MIB,
        "saved for backward, MiB": footprint.saved / MIB,
    }


def projects(entrant: Entrant) -> bool:
    """Whether some updates cost more, since they choose a new subspace."""
    return any("update_proj_gap" in group for group in entrant.contender.optimizer.param_groups)


def ratio(mine: list[Seconds], theirs: list[Seconds] | None) -> float | None:
    if theirs is None:
        return None
    return statistics.median(a.update / b.update for a, b in zip(mine, theirs, strict=True))


def limits_of(entrants: list[Entrant], seconds: dict[str, list[Seconds]], rank: int) -> list[Limit]:
    """The promises that the chosen methods allow to check."""
    named = {entrant.name: entrant for entrant in entrants}
    limits = []
    for other, most in {"full": OF_FULL, "peft": OF_PEFT}.items():
        if (found := ratio(seconds.get("ours", []), seconds.get(other))) is not None and "ours" in named:
            limits.append(Limit(f"time, ours / {other}", found, at_most=most))
    if {"ours", "full"} <= named.keys():
        ours, full = named["ours"], named["full"]
        limits.append(Limit("gradients + optimizer of ours, MiB", held(ours) / MIB, at_most=low_rank(full, rank) / MIB))
    if "ours, compiled" in named:
        found = ratio(seconds["ours, compiled"], seconds["ours"])
        limits.append(Limit("time, ours compiled / eager", found, at_most=1.0))
    return limits


def held(entrant: Entrant) -> int:
    return entrant.footprint.gradients + entrant.footprint.optimizer


def low_rank(full: Entrant, rank: int) -> float:
    """What full rank holds, with r (d_in + d_out) numbers in place of d_in d_out in the wrapped layers."""
    shapes = [parameter.shape for parameter in full.contender.wrapped]
    share = sum(rank * (d_out + d_in) for d_out, d_in in shapes) / sum(d_out * d_in for d_out, d_in in shapes)
    return held(full) - full.footprint.wrapped * (1 - share)


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def peaks(methods: list[str]) -> list[Row]:
    measured = {name: in_fresh_process("benchmarks.step", [*sys.argv[1:], "--measure-peak", name]) for name in methods}
    over = {name: found["peak"] - found["imports"] for name, found in measured.items()}
    return [
        {
            "method": name,
            "after imports, MiB": found["imports"] / MIB,
            "at rest, over that, MiB": (found["rest"] - found["imports"]) / MIB,
            "peak of an update, over that, MiB": over[name] / MIB,
            "/ full": over[name] / over["full"] if "full" in over else None,
            "/ peft": over[name] / over["peft"] if "peft" in over else None,
        }
        for name, found in measured.items()
    ]


def peak_of(name: str, options: argparse.Namespace) -> dict[str, int]:
    """Bytes after the imports, and at rest and at most in the first two updates (the first makes the state)."""
    on_gpu = llama.device().type == "cuda"
    imports = level(on_gpu=on_gpu)
    contender = CONTENDERS[name](options)
    batch = llama.draw_batch(contender.model, options)
    with phase(on_gpu=on_gpu) as updates:
        for _ in range(2):
            llama.update(contender.model, contender.optimizer, batch, bf16=options.bf16)
    return {"imports": imports, "rest": updates.after, "peak": updates.peak}


if __name__ == "__main__":
    main()
