"""Signals at random moments of prepare, train (evaluations, saves and the final model among it) and export.

    python -m benchmarks.signals                 # 200 moments, about a quarter of an hour on two cores
    python -m benchmarks.signals --moments 20 --seed 7

A command starts as a fork of this process and gets one of the stop signals at a random moment of the time that it takes
undisturbed. It must end with 143 (or 0, if it was done already) within 5 s, with a line and no traceback, and leave no
process behind. A stopped run must resume from its last logged update; in the end its weights and metrics must be those
of a run that nobody disturbed.
"""

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines
from benchmarks.forks import Forked, command
from benchmarks.tables import Limit, options_of, publish, write_section
from relora.errors import EXIT_STOPPED
from relora.train.signals import STOP_SIGNALS

TITLE = "Signals at random moments"
END_S, ORPHAN_S = 5.0, 3.0
TIMINGS = {"time", "tokens_per_second", "step_seconds", "peak_memory_bytes", "restart_seconds"}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass
class Seen:
    """What the signals to one command did."""

    stopped: int = 0
    done: int = 0
    longest_s: float = 0.0
    orphans: int = 0
    updates_lost: int = 0
    wrong: list[str] = field(default_factory=list)

    def row(self, name: str) -> dict[str, Any]:
        facts = {"command": name, "moments": self.stopped + self.done, "stopped (143)": self.stopped}
        facts |= {"done before (0)": self.done, "longest end, s": self.longest_s, "orphans": self.orphans}
        return facts | {"updates lost": self.updates_lost, "wrong ends": len(self.wrong)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=200, help="number of signals")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    parser.add_argument("--write", type=Path, help="write the section there, such as docs/results/reliability.md")
    options = options_of(parser)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, limits = storm(Path(folder), options.moments, random.Random(options.seed))
    text = publish({TITLE: rows}, limits, json_path=options.json)
    if options.write is not None:
        write_section(options.write, TITLE, text)


def storm(folder: Path, num_moments: int, rng: random.Random) -> tuple[list[dict[str, Any]], list[Limit]]:
    """Half of the moments in training, a quarter each in preparation and export."""
    corpus, seen = engines.write_corpus(folder), {name: Seen() for name in ("prepare", "train", "export")}
    config = {name: write_config(folder, corpus, name) for name in ("calm", "disturbed")}
    prepared = folder / "prepared"
    took_s = {"prepare": timed("prepare", config["calm"]), "train": timed("train", config["calm"])}
    export = ("export", str(folder / "calm"), "--output", str(folder / "exported"))
    took_s["export"] = timed(*export)
    of_export = max(1, num_moments // 4)
    for _ in range(of_export):
        shutil.rmtree(folder / "exported", ignore_errors=True)
        moment(export, took_s["export"], seen["export"], rng)
        shutil.rmtree(prepared)
        moment(("prepare", config["calm"]), took_s["prepare"], seen["prepare"], rng)
        timed("prepare", config["calm"])  # a preparation that was stopped goes on
    differing, of_training = 0, num_moments - 2 * of_export
    while seen["train"].stopped + seen["train"].done < of_training:
        differing += disturbed_run(folder, config["disturbed"], took_s["train"], seen["train"], rng, of_training)
    limits = [
        Limit(f"{name}: {what}", value, at_most=most)
        for name, found in seen.items()
        for what, value, most in (
            ("ends that are not as documented", len(found.wrong), 0),
            ("longest end, s", found.longest_s, END_S),
            ("processes left after 3 s", found.orphans, 0),
        )
    ]
    limits.append(Limit("updates lost", seen["train"].updates_lost, at_most=0))
    limits.append(Limit("runs that end otherwise than an undisturbed one", differing, at_most=0))
    for name, found in seen.items():
        print("".join(f"{name}: {wrong}\n" for wrong in found.wrong), end="")
    return [found.row(name) for name, found in seen.items()], limits


def disturbed_run(folder: Path, config: str, took_s: float, seen: Seen, rng: random.Random, num_moments: int) -> bool:
    """One run to its end, whatever comes between. Whether it ends otherwise than the calm one."""
    run = folder / "disturbed"
    shutil.rmtree(run, ignore_errors=True)
    while not (run / "final" / "relora.json").exists():
        if seen.stopped + seen.done < num_moments:
            before = seen.stopped
            moment(("train", config), took_s, seen, rng)
            if seen.stopped > before:
                seen.updates_lost += lost_updates(run)
        else:
            timed("train", config)
    return result(run) != result(folder / "calm")


def moment(arguments: tuple[str, ...], took_s: float, seen: Seen, rng: random.Random) -> None:
    """Start a command, send a signal at a random moment of its time, and see how it ends."""
    number, wait_s = rng.choice(STOP_SIGNALS), rng.uniform(0, took_s)
    with command(*arguments) as process:
        end_s = time.monotonic() + wait_s
        while time.monotonic() < end_s and not process.has_ended():
            time.sleep(0.002)
        sent_s = time.monotonic()
        if not process.has_ended():
            process.send(number)
        code, said = process.end()
        seen.longest_s = max(seen.longest_s, time.monotonic() - sent_s)
        seen.orphans += left_after(process, ORPHAN_S)
    seen.stopped, seen.done = seen.stopped + (code == EXIT_STOPPED), seen.done + (code == 0)
    is_answered = code == 0 or f"relora: received {number.name}" in said
    if code not in (0, EXIT_STOPPED) or "Traceback" in said or not is_answered:
        seen.wrong.append(f"{number.name} after {wait_s:.2f} s of {arguments}: exit code {code}\n{said[-3000:]}")


def left_after(process: Forked, patience_s: float) -> int:
    """Number of processes of its session that live longer than it by `patience_s`."""
    end_s = time.monotonic() + patience_s
    while (orphans := process.orphans()) and time.monotonic() < end_s:
        time.sleep(0.02)
    return len(orphans)


def lost_updates(run: Path) -> int:
    """Updates that were logged, but that a run which was stopped in order will do again."""
    if not (run / "metrics.jsonl").exists():
        return 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "preempted", status
    return max(steps, default=0) - int(status["step"])


def result(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The hash of the final weights, and the metrics without timings."""
    weights = hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plain = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
    return weights, sorted(plain, key=str)


def timed(*arguments: str) -> float:
    """Seconds that an undisturbed command takes."""
    start_s = time.monotonic()
    with command(*arguments) as process:
        code, said = process.end()
    assert code == 0, said
    return time.monotonic() - start_s


def write_config(folder: Path, corpus: Path, name: str, **of_training: Any) -> str:
    """A run of a few seconds, half of them evaluations, that saves at every third update unless told otherwise."""
    data = {"sources": [{"path": str(corpus)}], "sequence_length": 32, "eval_fraction": 0.1, "num_proc": 2}
    training = {"max_steps": 12, "global_batch_size": 8, "per_device_batch_size": 4, "per_device_eval_batch_size": 1}
    training |= {"eval_steps": 4, "save_steps": 3, "logging_steps": 1, "probe_steps": 1, "mixed_precision": "no"}
    tree = {
        "output_dir": str(folder / name),
        "model": {"config": SHAPE | {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64}},
        "data": data | {"num_workers": 1, "prepared_dir": str(folder / "prepared")},
        "lora": {"r": 4},
        "relora": {"restart_every": 3, "warm_start_steps": 4},
        "schedule": {"warmup_steps": 2, "restart_warmup_steps": 1},
        "training": training | {"report_to": []} | of_training,
    }
    path = folder / f"{name}.json"  # JSON is YAML
    path.write_text(json.dumps(tree))
    return str(path)


if __name__ == "__main__":
    main()
