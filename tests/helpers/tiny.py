"""A run that takes seconds: a corpus with rules that can be learned, a two-layer Llama, a dozen updates."""

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from relora.config import Config, check

TIMINGS = {"time", "tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes", "restart_seconds"}
TRAFFIC = {"bytes_sent", "bytes_sent_full_rank"}

MODEL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def write_corpus(folder: Path, *, num_documents: int = 26) -> Path:
    """Sentences in which each word follows from the last, in documents of very unequal length."""
    rng = random.Random(0)
    words = ["red", "fox", "runs", "over", "the", "old", "stone", "wall", "and", "sleeps"]
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(num_documents):
            at = rng.randrange(len(words))
            length = 2 if number % 3 else rng.randrange(60, 300)
            text = " ".join(words[(at + i * (1 + number % 2)) % len(words)] for i in range(length))
            file.write(json.dumps({"text": f"{number} {text}."}) + "\n")
    return folder


def settings(corpus: Path, output_dir: Path, **overrides: Any) -> dict[str, Any]:
    """The mapping of a tiny run: warm start of 4, restarts at 7 and 10, 12 updates, several epochs."""
    tree: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {"config": dict(MODEL)},
        "data": {
            "sources": [{"path": str(corpus)}],
            "sequence_length": 32,
            "eval_fraction": 0.1,
            "eval_tokens": 256,
            "num_proc": 1,
            "num_workers": 0,
        },
        "lora": {"r": 4, "lora_alpha": 6},
        "relora": {"restart_every": 3, "warm_start_steps": 4},
        "optim": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2, "restart_warmup_steps": 1},
        "training": {
            "max_steps": 12,
            "global_batch_size": 8,
            "per_device_batch_size": 4,
            "mixed_precision": "no",
            "eval_steps": 4,
            "save_steps": 1,
            "save_total_limit": None,
            "logging_steps": 1,
            "probe_steps": 1,
        },
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return tree


def config(corpus: Path, output_dir: Path, **overrides: Any) -> Config:
    return check(settings(corpus, output_dir, **overrides))


def settings_of(run: Path) -> dict[str, Any]:
    """The mapping that a run was made from."""
    tree: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    tree.pop("derived")
    return tree


def metrics(run: Path | str) -> list[dict[str, Any]]:
    """The lines of a run, without timings, memory and traffic."""
    return untimed(all_metrics(run))


def untimed(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what is measured: timings, memory and traffic."""
    left_out = TIMINGS | TRAFFIC
    return [{key: value for key, value in line.items() if key not in left_out} for line in lines]


def all_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The lines of a run."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def only(lines: Iterable[dict[str, Any]], key: str) -> dict[int, Any]:
    """One field by step, from the lines that have it."""
    return {line["step"]: line[key] for line in lines if key in line}


def stopped(tree: dict[str, Any], step: int, folder: Path) -> dict[str, Any]:
    """A copy of the run as if killed after the checkpoint of `step`, metrics of later steps already written."""
    shutil.copytree(tree["output_dir"], folder)
    shutil.rmtree(folder / "final")
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return tree | {"output_dir": str(folder)}
