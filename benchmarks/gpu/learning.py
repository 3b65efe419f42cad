"""What the methods have learned after the same tokens: held-out loss, tokens/s and memory of whole runs.

    python -m benchmarks.gpu.learning --size 20m --updates 1500 --picture learning.png       # a GPU, minutes
    python -m benchmarks.gpu.learning --size tiny --updates 12 --arms full                   # a CPU, seconds

Each arm is a `relora train` of its own: the text of RELORA_TEXT (`python -m benchmarks.gpu.text`), else of Python's
standard library; 64 x 256 tokens an update, bf16, a cosine. Low rank begins after a tenth of the updates and restarts
four times. One seed and one learning rate an arm, so differences of a few hundredths of a nat say nothing.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.forks import run_to_end
from benchmarks.pictures import new_figure
from benchmarks.tables import Row, options_of, publish
from relora.config import check
from relora.tracking.metrics_file import read_metrics
from relora.train.train import train

ROOT = Path(__file__).parents[2]
VOCAB_SIZE, SEQUENCE, BATCH, NUM_EVALUATIONS, NUM_CYCLES = 8192, 256, 64, 10, 5
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
# Method and peak rate by arm, the most valuable first.
ARMS = {"full": ("full", 1e-3), "relora": ("relora", 2e-3), "lora": ("lora", 2e-3)}
Lines = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="20m", help="of configs/models/llama_SIZE.json, or tiny")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--picture", type=Path, help="draw the curves there")
    options = options_of(parser)
    with tempfile.TemporaryDirectory() as folder:
        lines = {arm: trained(arm, Path(folder), options) for arm in options.arms}
    rows = [row(arm, lines[arm], lines.get("full")) for arm in options.arms]
    title = f"llama {options.size}, {options.updates} updates of {tokens_of(options):,} tokens"
    pictures = [] if options.picture is None else [draw(lines, options.picture)]
    publish({title: rows}, [], json_path=options.json, pictures=pictures)


def trained(arm: str, folder: Path, options: argparse.Namespace) -> Lines:
    """The metrics of an arm, trained by a fork: memory and kernels of one are not the other's."""
    tree = settings(arm, folder, options)
    run_to_end(lambda: train(check(tree)), arm)
    return read_metrics(Path(tree["output_dir"]) / "metrics.jsonl")


def tokens_of(options: argparse.Namespace) -> int:
    return 2 * 16 if options.size == "tiny" else BATCH * SEQUENCE


def settings(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    is_tiny, updates, (method, rate) = options.size == "tiny", options.updates, ARMS[arm]
    batch, sequence, vocab_size = (2, 16, 300) if is_tiny else (BATCH, SEQUENCE, VOCAB_SIZE)
    shape = {"model_type": "llama", "vocab_size": vocab_size, "max_position_embeddings": sequence}
    text, warm = os.environ.get("RELORA_TEXT", "python-stdlib"), updates // 10
    return {
        "output_dir": str(folder / arm),
        "model": {"config": shape | (TINY if is_tiny else sides_of(options.size))},
        "data": {
            "sources": [{"path": text}],
            "sequence_length": sequence,
            "eval_fraction": 0.2 if is_tiny else 0.02,
            "eval_tokens": 16 * sequence if is_tiny else 500_000,
            "prepared_dir": str(folder / "prepared"),
        },
        "lora": {"r": 4 if is_tiny else options.rank},
        "relora": {"restart_every": max(1, (updates - warm) // NUM_CYCLES), "warm_start_steps": warm},
        "optim": {"learning_rate": rate, "warm_start_learning_rate": ARMS["full"][1]},
        "schedule": {"warmup_steps": updates // 20, "restart_warmup_steps": max(1, updates // 100)},
        "training": {
            "method": method,
            "max_steps": updates,
            "global_batch_size": batch,
            "per_device_batch_size": batch,
            "mixed_precision": "no" if is_tiny else "bf16",
            "eval_steps": max(1, updates // NUM_EVALUATIONS),
            "save_steps": updates,
            "report_to": [],
        },
    }


def sides_of(size: str) -> dict[str, Any]:
    """The sides of a shipped model, without its vocabulary."""
    shape = json.loads((ROOT / "configs" / "models" / f"llama_{size}.json").read_text())
    return {name: shape[name] for name in TINY}


def row(arm: str, lines: Lines, full: Lines | None) -> Row:
    loss, updates = end_loss(lines), [line for line in lines if "tokens_per_second" in line]
    speed = sorted(line["tokens_per_second"] for line in updates)[len(updates) // 2]
    return {
        "arm": arm,
        "held-out loss, nats": loss,
        "perplexity": math.exp(loss),
        "- full": loss - end_loss(full) if full else None,
        "tokens/s": speed,
        "peak memory, MiB": max(line["peak_memory_bytes"] for line in updates[len(updates) // 2 :]) / 2**20,
    }


def end_loss(lines: Lines) -> float:
    return float([line["eval_loss"] for line in lines if "eval_loss" in line][-1])


def draw(lines: dict[str, Lines], path: Path) -> Path:
    """Held-out loss against tokens."""
    figure, axes = new_figure(8, 5)
    for arm, of_arm in lines.items():
        tokens = {line["step"]: line["tokens"] for line in of_arm if "tokens" in line}
        points = [(tokens.get(line["step"], 0), line["eval_loss"]) for line in of_arm if "eval_loss" in line]
        axes.plot(*zip(*points, strict=True), marker=".", label=arm)
    axes.set(xlabel="tokens", ylabel="held-out loss, nats")
    axes.legend()
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
