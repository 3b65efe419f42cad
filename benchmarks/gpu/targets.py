"""What the tables of the battery are held against.

Tokens/s are of one H100 SXM: llm-foundry's full rank of 1B (45,455 tokens/s, 42 % MFU), and NeMo AutoModel's LoRA of
Llama 3 8B (12,473). Ratios hold on every GPU.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import Limit, Row

STAGE = "speed"  # whose tables they are of
H100 = "NVIDIA H100 80GB HBM3"
STEP_OF_FULL, STEP_OF_PEFT, MEMORY_OF_FULL = 0.80, 0.90, 0.75


@dataclass(frozen=True)
class Target:
    """A cell of a table.

    Attributes:
        step: of the stage `speed`, by its name.
        method: the row.
        column: the cell.
        device: the only one that the target is for; None for any.
    """

    step: str
    method: str
    column: str
    at_least: float | None = None
    at_most: float | None = None
    device: str | None = None


PEAK = "peak of an update, over that, MiB"
TARGETS = (
    Target("llama 1b", "full", "MFU", at_least=0.42, device=H100),
    Target("llama 1b", "ours", "tokens/s", at_least=59_000, device=H100),
    Target("llama 1b", "ours", "/ full", at_most=STEP_OF_FULL),
    Target("llama 1b", "ours", "/ peft", at_most=STEP_OF_PEFT),
    Target("llama 1b, memory", "ours", "/ full", at_most=MEMORY_OF_FULL),
    Target("llama 3 8b", "ours", "tokens/s", at_least=12_500, device=H100),
    Target("llama 3 8b, memory", "ours", "/ peft", at_most=1.0),
    Target("llama 7b nf4, memory", "ours", PEAK, at_most=24 * 1024),
)


def limits_of(step: str, tables: Mapping[str, Iterable[Row]], device: str) -> list[Limit]:
    """The targets of a step of the stage `speed`, held against its tables; for other stages none."""
    rows: list[Mapping[str, Any]] = [row for table in tables.values() for row in table]
    limits = []
    for target in TARGETS:
        if target.step == step and target.device in (None, device):
            [value] = [row[target.column] for row in rows if row["method"] == target.method]
            what = f"{target.method}, {target.column}"
            limits.append(Limit(what, float(value), at_most=target.at_most, at_least=target.at_least))
    return limits
