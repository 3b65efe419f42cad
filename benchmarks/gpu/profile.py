"""Updates of a run under torch's profiler: is the device ever idle, does the host ever wait, what takes the time?

    python -m benchmarks.gpu.profile --size 1b --picture profile.png       # one GPU
    python -m benchmarks.gpu.profile --size tiny                           # a CPU: operators in place of kernels

A whole `relora train` at low rank, on text of a few words; neither logging nor anything else is due in the updates that
are watched. A gap is a time in which the device does nothing between two kernels; a wait, a call of CUDA's by which the
host waits for the device. One cudaDeviceSynchronize or two at the end of all updates are the profiler's own.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engines import write_corpus
from benchmarks.pictures import new_figure
from benchmarks.tables import Limit, Row, options_of, publish
from relora.config import check
from relora.train.loop import Loop
from relora.train.train import train

ROOT = Path(__file__).parents[2]
FIRST, NUM_UPDATES = 6, 4  # the first that is watched, and how many: by then everything is allocated and loaded
LONGEST_GAP_MS, NUM_ROWS = 1.0, 12
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
# What a kernel does, by its name: the first that matches.
KINDS = {
    "copies": r"memcpy|memset|copy_",
    "optimizer": r"adam|multi_tensor|foreach",
    "attention": r"flash|fmha|attention|softmax",
    "products": r"gemm|gemv|cutlass|cublas|xmma|nvjet|wgmma|::mm|::addmm|::bmm|::linear",
    "communication": r"nccl",
    "other": r"",
}
WAITS = r"Synchronize|cudaMemcpy$"


@dataclass(frozen=True)
class Span:
    """A kernel, or an operator of a CPU; in nanoseconds."""

    name: str
    start: int
    end: int

    @property
    def kind(self) -> str:
        return next(kind for kind, pattern in KINDS.items() if re.search(pattern, self.name, re.IGNORECASE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1b", help="of configs/models/llama_SIZE.json, or tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--picture", type=Path, help="draw the timeline there")
    options = options_of(parser)
    if options.size == "tiny":
        options.batch, options.sequence, options.rank = 2, 16, 4
    with tempfile.TemporaryDirectory() as folder, watched() as events:
        train(check(settings(Path(folder), options)))
    spans, waits = device_spans(events), Counter(e.name() for e in events if re.search(WAITS, e.name()))
    gaps = gaps_of(spans)
    tables = {
        "The device": [summary(spans, gaps)],
        "Time of the device": by_kind(spans),
        "The longest gaps": [gap_row(*gap) for gap in gaps[:NUM_ROWS]],
        "The longest kernels": by_name(spans),
        "Waits of the host": [{"call": name, "in an update": count / NUM_UPDATES} for name, count in waits.items()],
    }
    longest = (gaps[0][1].start - gaps[0][0].end) / 1e6 if gaps else 0.0
    limits = [Limit("longest gap, ms", longest, at_most=LONGEST_GAP_MS)]
    pictures = [] if options.picture is None else [draw(spans, options.picture)]
    publish({k: rows for k, rows in tables.items() if rows}, limits, json_path=options.json, pictures=pictures)


def settings(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    shape = str(ROOT / "configs" / "models" / f"llama_{options.size}.json")
    tiny = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64} | TINY
    data = {"sources": [{"path": str(write_corpus(folder))}], "sequence_length": options.sequence, "eval_fraction": 0.1}
    training = {"max_steps": FIRST + NUM_UPDATES + 2, "global_batch_size": options.batch, "mixed_precision": "bf16"}
    return {
        "output_dir": str(folder / "run"),
        "model": {"config": tiny if options.size == "tiny" else shape},
        "data": data | {"eval_tokens": 2 * options.sequence, "prepared_dir": str(folder / "prepared"), "num_proc": 1},
        "lora": {"r": options.rank},
        "relora": {"restart_every": 1000},
        "schedule": {"warmup_steps": 2, "restart_warmup_steps": 2},
        "training": training
        | {"per_device_batch_size": options.batch, "logging_steps": 1000, "save_steps": 1000, "report_to": []},
    }


@contextmanager
def watched() -> Iterator[list[Any]]:
    """The events of the updates FIRST, ... of a run that is made within; filled at the end of the last of them."""
    events, update = list[Any](), Loop.update
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    profiler = profile(activities=activities)

    def watched_update(loop: Loop, step: int, *batches: Any) -> Any:
        if step in (FIRST, FIRST + NUM_UPDATES) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == FIRST:
            profiler.start()
        if step == FIRST + NUM_UPDATES:
            profiler.stop()
            events.extend(profiler.profiler.kineto_results.events())  # type: ignore[union-attr]
        return update(loop, step, *batches)

    with patch.object(Loop, "update", watched_update):
        yield events


def device_spans(events: list[Any]) -> list[Span]:
    """What the device did, by its beginning: kernels and copies of a GPU, operators of a CPU."""
    on_gpu = torch.cuda.is_available()
    kept = [
        Span(e.name(), e.start_ns(), e.start_ns() + e.duration_ns())
        for e in events
        # Ranges that the host has named are repeated on the device's line, and would cover its gaps.
        if (on_gpu and str(e.device_type()).endswith("CUDA") and not e.is_user_annotation())
        or (not on_gpu and e.name().startswith("aten::"))
    ]
    return sorted(kept, key=lambda span: span.start)


def gaps_of(spans: list[Span]) -> list[tuple[Span, Span]]:
    """The kernels before and after each gap, the longest gap first."""
    gaps, latest = list[tuple[Span, Span]](), None
    for span in spans:
        if latest is not None and span.start > latest.end:
            gaps.append((latest, span))
        if latest is None or span.end > latest.end:
            latest = span
    return sorted(gaps, key=lambda gap: gap[0].end - gap[1].start)


def summary(spans: list[Span], gaps: list[tuple[Span, Span]]) -> Row:
    whole_ms = (max(span.end for span in spans) - spans[0].start) / 1e6
    idle_ms = sum(after.start - before.end for before, after in gaps) / 1e6
    return {
        "updates": NUM_UPDATES,
        "ms per update": whole_ms / NUM_UPDATES,
        "idle, ms per update": idle_ms / NUM_UPDATES,
        "busy, %": 100 * (1 - idle_ms / whole_ms),
        "kernels per update": len(spans) / NUM_UPDATES,
        "gaps over 0.1 ms per update": sum(b.start - a.end > 1e5 for a, b in gaps) / NUM_UPDATES,
    }


def by_kind(spans: list[Span]) -> list[Row]:
    whole = sum(span.end - span.start for span in spans)
    sums = {kind: sum(s.end - s.start for s in spans if s.kind == kind) for kind in KINDS}
    return [
        {"kernels": kind, "ms per update": time / 1e6 / NUM_UPDATES, "%": 100 * time / whole}
        for kind, time in sums.items()
        if time
    ]


def by_name(spans: list[Span]) -> list[Row]:
    times, counts = Counter[str](), Counter(span.name for span in spans)
    for span in spans:
        times[span.name] += span.end - span.start
    return [
        {
            "kernel": f"`{name[:80].replace('|', '/')}`",
            "in an update": counts[name] / NUM_UPDATES,
            "ms per update": time / 1e6 / NUM_UPDATES,
        }
        for name, time in times.most_common(NUM_ROWS)
    ]


def gap_row(before: Span, after: Span) -> Row:
    names = (f"`{span.name[:60].replace('|', '/')}`" for span in (before, after))
    return {"gap, ms": (after.start - before.end) / 1e6, **dict(zip(("after", "before"), names, strict=True))}


def draw(spans: list[Span], path: Path) -> Path:
    """The timeline, a line for each kind of kernel."""
    figure, axes = new_figure(12, 3)
    for line, kind in enumerate(KINDS):
        bars = [((s.start - spans[0].start) / 1e6, (s.end - s.start) / 1e6) for s in spans if s.kind == kind]
        axes.broken_barh(bars, (line - 0.4, 0.8), facecolors=f"C{line}")
    axes.set_yticks(range(len(KINDS)), list(KINDS))
    axes.set_xlabel(f"ms, {NUM_UPDATES} updates")
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
