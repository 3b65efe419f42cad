"""Golden traces: tiny runs as numbers, to hold still what the program does while its code moves.

    python -m tests.end_to_end.golden --check [NAME ...]     compare with golden.json (no name: every run)
    python -m tests.end_to_end.golden --record [NAME ...]    write golden.json anew

The runs are seen from outside alone: a YAML file goes in, metrics.jsonl and the weights in final/ come out. What is
recorded of the weights is, of each tensor, its norm and its product with a vector of random numbers.
"""

import argparse
import functools
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from relora.cli import main as relora
from tests.helpers.programs import run as run_program
from tests.helpers.tiny import MODEL, settings, write_corpus

GOLDEN = Path(__file__).with_name("golden.json")
COMMAND = "python -m tests.end_to_end.golden"

Trace = dict[str, dict[str, Any]]  # "metrics": field -> step -> number; "final": tensor -> [norm, product]
Weights = dict[str, Tensor]

# The fields of metrics.jsonl that are recorded: losses and other measurements, each with a tolerance of its run, what
# must be equal, and errors of rounding, which may be twice as large.
LOSSES = {"loss", "eval_loss", "probe_loss", "probe_loss_before", "probe_loss_after", "probe_loss_master"}
OTHERS = {"grad_norm", "update_effective_rank", "optimizer_zeroed_fraction"}
EXACT = {"bytes_sent"}
ROUNDING = {"merge_error", "master_error"}
RATE = "learning_rate"  # computed, not measured
RATE_TOLERANCE = 1e-6  # golden.json has seven digits

TOLERANCE = 2e-4
LOSS_FALLS = 100  # by so many tolerances at least, or the run would say little
WEIGHTS_MOVE = 10 * TOLERANCE  # each tensor, relatively; at least


@dataclass(frozen=True)
class Golden:
    """A run that is recorded: what it lays over tests.tiny.settings, how it is made and how it is compared.

    On one machine the numbers come out equal to the last digit. The tolerances, which are relative, are for processors
    that sum in another order, and were chosen by letting torch, MKL and oneDNN use AVX2 or SSE4 alone.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    engine: str | None = None  # two processes, as the launch file of this name says; none: this process alone
    loss: float = TOLERANCE
    others: float = TOLERANCE  # of other measurements, and of the weights
    recorded_as: str | None = None  # compared with the numbers of this other run
    resumed_from: int | None = None  # killed after the checkpoint of this step, and run again


GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
# With r = 32 factors of 4096 entries and more, which bitsandbytes keeps in codes, and norms, which it does not.
WIDE = MODEL | {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1}
TWO_BATCHES = {"training__per_device_batch_size": 2}  # an update, on each of two processes


def adam(epsilon: float = 1e-6, **how: Any) -> dict[str, Any]:
    """AdamW makes whole steps of gradients that are nothing but rounding, unless epsilon is larger than they are."""
    return {"learning_rate": 1e-2, "adam_epsilon": epsilon} | how


RUNS = {
    "relora": Golden(),
    "resume": Golden(recorded_as="relora", resumed_from=5),
    "full": Golden({"training__method": "full"}),
    "lora": Golden({"training__method": "lora", "lora__use_rslora": True}),
    # Products of bf16 are rounded by 4e-3, and fall to either side.
    "bf16": Golden({"training__mixed_precision": "bf16", "optim": adam(1e-3)}, loss=2e-3, others=3e-2),
    "base_bfloat16": Golden({"lora__base_dtype": "bfloat16", "optim": adam(1e-3)}),
    # A weight that falls to the next code turns the singular vectors of what the codes lack: they are close to equal.
    "base_int8_carry_residual": Golden(
        {"lora__base_dtype": "int8", "relora__carry_residual": True, "optim": adam(1e-3)}, loss=1e-3, others=1e-1
    ),
    "base_nf4": Golden({"lora__base_dtype": "nf4", "lora__master": "disk"}),
    "document_mask": Golden({"data__document_mask": True, "optim": adam(1e-5)}),
    "accumulate_dropout": Golden(
        {"training__per_device_batch_size": 2, "lora__lora_dropout": 0.1, "model__gradient_checkpointing": True}
    ),
    "orthogonal_magnitude": Golden({"relora__reinit": "orthogonal", "relora__optimizer_reset": "magnitude"}),
    "random_keep_merged_off": Golden({"relora__optimizer_reset": "random", "lora__keep_merged": False}),
    "adamw_fused": Golden({"optim": adam(name="adamw_fused", warm_start_learning_rate=5e-3)}),
    # A moment that falls to the next of 256 codes is another one by up to some percent.
    "adamw_8bit": Golden(
        {
            "model": {"config": WIDE},
            "lora": {"r": 32, "lora_alpha": 32},
            "optim": adam(1e-4, name="adamw_8bit", learning_rate=3e-3),
        },
        others=2e-3,
    ),
    "gpt2": Golden({"model": {"config": GPT2}, "relora__optimizer_reset": "keep", "optim": adam(weight_decay=0.1)}),
    "ddp": Golden(TWO_BATCHES, "ddp"),
    "fsdp2": Golden(TWO_BATCHES, "fsdp2"),
    "zero1": Golden(TWO_BATCHES, "zero1"),
    "zero2": Golden(TWO_BATCHES, "zero2"),
    "zero3": Golden(TWO_BATCHES, "zero3"),
    "ddp_sync_restart": Golden(
        {
            "relora": {
                "restart_every": 3,
                "warm_start_steps": 4,
                "sync": "restart",
                "outer_learning_rate": 0.7,
                "outer_momentum": 0.5,
            },
            "training__max_steps": 13,  # the processes meet at the end
        },
        "ddp",
    ),
    "fsdp2_nf4": Golden(TWO_BATCHES | {"lora__base_dtype": "nf4", "training__sync_each_batch": False}, "fsdp2"),
}
ALONE = tuple(name for name, golden in RUNS.items() if golden.engine is None)


def workplace(folder: Path) -> Path:
    """`folder`, with the corpus in it that the runs there learn."""
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    return folder


def finished(name: str, folder: Path) -> Path:
    """Make a run in `folder`, and return its own folder there."""
    golden, run = RUNS[name], folder / name
    tree = settings(folder / "corpus", run, **{"training__save_steps": 5, "optim": adam()} | golden.overrides)
    train(tree, golden.engine)
    if golden.resumed_from is not None:
        kill(run, golden.resumed_from)
        train(tree, golden.engine)
    return run


def train(tree: dict[str, Any], engine: str | None) -> None:
    """`relora train` by this process, or by two under a launcher, to a good end."""
    config = Path(f"{tree['output_dir']}.yaml")
    config.write_text(yaml.safe_dump(tree))
    if engine is None:
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            code = relora(["train", str(config)])
        said = printed.getvalue()
    else:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *launch_options(engine)]
        # DeepSpeed's first run on a machine compiles for a minute.
        result = run_program([*launcher, "-m", "relora", "train", str(config)], timeout_s=300)
        code, said = result.returncode, result.stderr
    if code != 0:
        raise RuntimeError(f"relora train {config} ended with {code}:\n{said[-6000:]}")


def launch_options(engine: str) -> list[str]:
    return ["--config_file", f"launch/{engine}.yaml", "--num_processes", "2"]


def kill(run: Path, step: int) -> None:
    """Leave of a run what there is when it is killed after the checkpoint of `step`."""
    shutil.rmtree(run / "final")
    later = [path for path in (run / "checkpoints").glob("step-*") if int(path.name.removeprefix("step-")) > step]
    if not later:
        raise RuntimeError(f"{run} has no checkpoint after step {step}: nothing would be done again")
    for checkpoint in later:
        shutil.rmtree(checkpoint)


def trace(run: Path) -> Trace:
    """The numbers of a run that has ended, rounded as golden.json has them."""
    metrics: dict[str, dict[str, float]] = {}
    for line in (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()):
        for key in line.keys() & (LOSSES | OTHERS | EXACT | ROUNDING | {RATE}):
            # A restart has a line of its own beside that of the update, and both tell of traffic.
            by_step = metrics.setdefault(f"restart {key}" if "restart" in line else key, {})
            if str(line["step"]) in by_step:
                raise RuntimeError(f"{run}: two lines tell the {key} of step {line['step']}")
            by_step[str(line["step"])] = rounded(line[key])
    final = {
        name: [rounded(float(tensor.double().norm())), rounded(product(name, tensor))]
        for name, tensor in weights(run).items()
    }
    return {"metrics": dict(sorted(metrics.items())), "final": dict(sorted(final.items()))}


def weights(run: Path) -> Weights:
    return load_file(run / "final" / "model.safetensors")


def product(name: str, tensor: Tensor) -> float:
    """The product with a vector of normal random numbers that belongs to the name of the tensor."""
    vector = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tensor.numel())
    return float(tensor.double().flatten() @ torch.from_numpy(vector))


def rounded(value: float) -> float:
    """To seven digits; whole numbers, like bytes, as they are."""
    return int(value) if value == int(value) else float(f"{value:.7g}")


def differences(found: Trace, recorded: Trace, golden: Golden) -> Iterator[str]:
    """What is not as recorded, by step, then the weights; each with both values and the tolerance."""
    for step, name in sorted(places(found["metrics"]) | places(recorded["metrics"])):
        ours, theirs = (trace["metrics"].get(name, {}).get(str(step)) for trace in (found, recorded))
        allowed = 0.0 if theirs is None else allowance(name.removeprefix("restart "), theirs, golden)
        if ours is None or theirs is None or not abs(ours - theirs) <= allowed:
            yield f"step {step}, {name}: {ours}, recorded {theirs} (tolerance {allowed:.1g})"
    for name in sorted(found["final"].keys() | recorded["final"].keys()):
        (norm, dot), (old_norm, old_dot) = (trace["final"].get(name, (None, None)) for trace in (found, recorded))
        if norm is None or old_norm is None:
            yield f"final weights, {name}: " + ("gone" if norm is None else "not there when recorded")
            continue
        # A change of the weights by some length changes the product by about that.
        allowed = golden.others * old_norm
        for what, ours, theirs in (("norm", norm, old_norm), ("product", dot, old_dot)):
            if not abs(ours - theirs) <= allowed:
                yield f"final weights, {what} of {name}: {ours}, recorded {theirs} (tolerance {allowed:.1g})"


def places(metrics: dict[str, Any]) -> set[tuple[int, str]]:
    return {(int(step), name) for name, by_step in metrics.items() for step in by_step}


def allowance(key: str, recorded: float, golden: Golden) -> float:
    """How far from `recorded` a field may be."""
    if key in EXACT:
        return 0.0
    if key in ROUNDING:
        return recorded + 1e-6
    if key == RATE:
        return RATE_TOLERANCE * recorded
    return (golden.loss if key in LOSSES else golden.others) * abs(recorded)


class ChangedError(RuntimeError):
    """A run is not as recorded."""


def check(name: str, folder: Path) -> str:
    """Make a run again, and say how well it agrees.

    Raises:
        ChangedError: with the first difference, and what to do about it.
    """
    golden = RUNS[name]
    recorded_as = golden.recorded_as or name
    found, recorded = trace(finished(name, folder)), read()[recorded_as]
    if found == recorded:
        return "the same to the last digit"
    differing = list(differences(found, recorded, golden))
    if not differing:
        return "the same within the tolerances"
    raise ChangedError(
        f"the run {name!r} does not do what it did; of {len(differing)} differences the first is\n"
        f"  {differing[0]}\n"
        f"If that was meant, record it with `{COMMAND} --record {recorded_as}`, and say in the message of the commit "
        "why these numbers had to change."
    )


def record(name: str, folder: Path) -> str:
    """Make a run and put its numbers into golden.json, if they move enough to tell of something."""
    run = finished(name, folder)
    found = trace(run)
    loss = list(found["metrics"]["loss"].values())
    fall = (loss[0] - loss[-1]) / loss[0]
    if not fall > LOSS_FALLS * RUNS[name].loss:
        raise RuntimeError(f"{name}: the loss falls by {fall:.1%}, which is less than {LOSS_FALLS} tolerances")
    start = first_weights(json.dumps(RUNS[name].overrides.get("model", {"config": MODEL})), folder)
    moves = {name: float((tensor - start[name]).norm() / tensor.norm()) for name, tensor in weights(run).items()}
    least = min(moves, key=moves.__getitem__)
    if not moves[least] > WEIGHTS_MOVE:
        raise RuntimeError(f"{name}: {least} moves by {moves[least]:.1e}, which is less than {WEIGHTS_MOVE}")
    write(read() | {name: found})
    return f"recorded; the loss falls by {fall:.0%}, each tensor moves by {moves[least]:.1%} or more"


@functools.cache
def first_weights(model: str, folder: Path) -> Weights:
    """What a model begins with: the end of a run at rate zero. `model` is its section, as JSON."""
    run = folder / f"first_{zlib.crc32(model.encode())}"
    still: dict[str, Any] = {"training__method": "full", "optim__learning_rate": 0}
    train(settings(folder / "corpus", run, model=json.loads(model), **still), None)
    return weights(run)


def read() -> dict[str, Trace]:
    return dict(json.loads(GOLDEN.read_text())) if GOLDEN.exists() else {}


def write(traces: dict[str, Trace]) -> None:
    """In the order of RUNS; one line a field or tensor."""
    runs = {name: traces[name] for name in RUNS if name in traces}
    text = json.dumps(runs, indent=1)
    # The innermost lists and mappings, closed again: what stands in them is short.
    text = re.sub(r"[\[{][^][{}]*[]}]", lambda match: " ".join(match[0].split()), text)
    GOLDEN.write_text(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Compare tiny runs with golden.json, or record them.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", dest="do", action="store_const", const=check)
    what.add_argument("--record", dest="do", action="store_const", const=record)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    options = parser.parse_args()
    unknown = set(options.names) - RUNS.keys()
    if unknown:
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    names = options.names or list(RUNS)
    if options.do is record:
        names = [name for name in names if RUNS[name].recorded_as is None]

    # One thread each and no GPU, here and in the programs that are started.
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended_well = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = workplace(Path(temporary))
        os.environ["RELORA_CACHE"] = str(folder / "cache")
        for name in names:
            began = time.monotonic()
            try:
                said = options.do(name, folder)
            except RuntimeError as complaint:
                ended_well, said = False, str(complaint)
            print(f"{name} ({time.monotonic() - began:.0f} s): {said}", flush=True)
    return 0 if ended_well else 1


if __name__ == "__main__":
    sys.exit(main())
