"""Does a run go on under every engine from what every other has saved? What does each send?

    python -m benchmarks.engines        # 5 x 5, 2 -> 1 and 1 -> 2 processes, fp32 and bf16

A tiny run of 24 updates (warm start, restarts at 14 and 22, masked documents, two micro-batches a rank) is trained
under each engine on two processes, and by one process. Every target then goes on from the checkpoint of update 20 of
every source. The tables show the largest difference of a weight of final/ from the source's own, and bytes sent.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tables import head, line

ROOT = Path(__file__).parents[1]
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ALONE = "one process"
STOP, END = 20, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=("no", "bf16"), default=["no", "bf16"])
    parser.add_argument("--go-on", nargs="+", metavar="CONFIG", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.go_on:
        go_on(options.go_on)
        return
    for precision in options.precisions:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\nmixed_precision: {precision}\n")
            compare(Path(folder), precision)
            print_traffic(Path(folder))


def compare(folder: Path, precision: str) -> None:
    """Train under every engine, go on under every engine, print the differences."""
    corpus = write_corpus(folder)
    for source in (*ENGINES, ALONE):
        launch(source, ["-m", "relora", "train", str(written(settings(corpus, folder / source, precision)))])
    print(head(["from \\ to", *ENGINES, ALONE]))
    cells = {target: resumed(target, folder, corpus, precision) for target in (*ENGINES, ALONE)}
    for source in (*ENGINES, ALONE):
        print(line([source, *(cells[target][source] for target in (*ENGINES, ALONE))]), flush=True)


def resumed(target: str, folder: Path, corpus: Path, precision: str) -> dict[str, str]:
    """For each source how far off the target ends."""
    copies = {source: stopped(folder / source, folder / f"{source} to {target}") for source in (*ENGINES, ALONE)}
    configs = [str(written(settings(corpus, copy, precision))) for copy in copies.values()]
    launch(target, ["-m", "benchmarks.engines", "--go-on", *configs])
    return {source: difference(copy, folder / source) for source, copy in copies.items()}


def go_on(configs: list[str]) -> None:
    """In each process of a launch: finish several runs one after the other, in one process group."""
    from relora.config import load_config
    from relora.engines import connect
    from relora.train.preflight import preflight
    from relora.train.run import newest_state
    from relora.train.signals import stop_signals
    from relora.train.train import train_stages

    engine = connect(load_config(configs[0]))
    for config in configs:
        run = preflight(load_config(config))
        state = newest_state(run, engine.world)
        assert state.step == STOP, f"{config}: goes on from {state.step}"
        with stop_signals() as request:
            train_stages(run, engine, state, request)
    engine.world.close()


def difference(run: Path, reference: Path) -> str:
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, reference))
    largest = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    return "exact" if largest == 0 else f"{largest:.1e}"


def print_traffic(folder: Path) -> None:
    """Bytes that rank 0 sends: counted in the warm start and in the low-rank stage, and at a restart."""
    print("\n" + head(["engine", "full-rank update", "low-rank update", "of full rank", "restart"]))
    for engine in ENGINES:
        lines = [json.loads(text) for text in (folder / engine / "metrics.jsonl").read_text().splitlines()]
        updates = {each["step"]: each["bytes_sent"] for each in lines if "loss" in each and "bytes_sent" in each}
        restart = next(each["bytes_sent"] for each in lines if "restart" in each)
        full, low = updates[min(updates)], updates[max(updates)]
        print(line([engine, f"{full:,.0f}", f"{low:,.0f}", f"{low / full:.2f}", f"{restart:,.0f}"]))


def launch(engine: str, program: list[str]) -> None:
    kind = ["one_gpu", "1"] if engine == ALONE else [engine, "2"]
    options = ["--config_file", f"launch/{kind[0]}.yaml", "--num_processes", kind[1]]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if result.returncode:
        raise RuntimeError(f"{engine}: {result.stderr[-3000:]}")


def stopped(run: Path, copy: Path) -> Path:
    """A copy of the run as it was after update STOP."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / f"step-{END:08d}")
    return copy


def written(tree: dict[str, Any]) -> Path:
    path = Path(f"{tree['output_dir']}.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def write_corpus(folder: Path) -> Path:
    """Sentences in which each word follows from the last, in documents of unequal length."""
    rng, words = random.Random(0), ["red", "fox", "runs", "over", "the", "old", "stone", "wall", "and", "sleeps"]
    corpus = folder / "corpus"
    corpus.mkdir()
    with (corpus / "corpus.jsonl").open("w") as file:
        for number in range(26):
            text = " ".join(words[(number + i) % len(words)] for i in range(rng.randrange(2, 200)))
            file.write(json.dumps({"text": f"{number} {text}."}) + "\n")
    return corpus


def settings(corpus: Path, run: Path, precision: str) -> dict[str, Any]:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "output_dir": str(run),
        "model": {"config": {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64, **shape}},
        "data": {
            "sources": [{"path": str(corpus)}],
            "sequence_length": 32,
            "eval_fraction": 0.1,
            "eval_tokens": 256,
            "document_mask": True,
            "num_proc": 1,
            "num_workers": 0,
        },
        "lora": {"r": 4, "lora_alpha": 6},
        "relora": {"restart_every": 8, "warm_start_steps": 6},
        "optim": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2, "restart_warmup_steps": 1},
        "training": {
            "max_steps": END,
            "global_batch_size": 8,
            "per_device_batch_size": 2,
            "mixed_precision": precision,
            "eval_steps": END,
            "save_steps": STOP,
            "logging_steps": 1,
        },
    }


if __name__ == "__main__":
    main()
