"""What the benchmarks have in common: tables in Markdown, what a number is held against, and the same as JSON."""

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Limit:
    """What a measured value is held against; exactly one of the bounds is given."""

    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        assert (self.at_most is None) != (self.at_least is None), self.what

    @property
    def is_met(self) -> bool:
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.at_least is not None and self.value >= self.at_least

    def __str__(self) -> str:
        bound = f"at most {shown(self.at_most)}" if self.at_most is not None else f"at least {shown(self.at_least)}"
        return f"{self.what}: {shown(self.value)}, {bound}: {'met' if self.is_met else 'NOT MET'}"


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed arguments, among them `json`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    return parser.parse_args()


def publish(
    tables: Mapping[str, Sequence[Row]],
    limits: Sequence[Limit],
    *,
    json_path: Path | None,
    pictures: Sequence[Path] = (),
) -> str:
    """Print the tables, each under its title, and the limits, and return what was printed.

    Both are written to `json_path` too, unrounded, with the names of pictures that were drawn.
    """
    program = Path(sys.argv[0])
    module = f"gpu.{program.stem}" if program.parent.name == "gpu" else program.stem
    command = " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]])
    parts = [f"`{command}`", machine(), *(f"{title}\n\n{table(rows)}" for title, rows in tables.items())]
    if limits:
        parts.append("\n".join(f"- {limit}" for limit in limits))
    text = "\n\n".join(parts)
    print(text)
    if json_path is not None:
        told = [asdict(limit) | {"is_met": limit.is_met} for limit in limits]
        content = {"command": command, "machine": machine(), "tables": tables, "limits": told}
        content |= {"pictures": [path.name for path in pictures]}
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    return text


def write_section(page: Path, title: str, text: str) -> None:
    """Put `text` under the heading `# title` of a page, in place of what stands there, or at its end."""
    content = page.read_text() if page.exists() else ""
    sections = [part for part in re.split(r"^(?=# )", content, flags=re.MULTILINE) if part.strip()]
    new = f"# {title}\n\n{text.strip()}\n"
    if any(part.startswith(f"# {title}\n") for part in sections):
        sections = [new if part.startswith(f"# {title}\n") else part for part in sections]
    else:
        sections.append(new)
    page.write_text("\n".join(part.rstrip() + "\n" for part in sections))


def table(rows: Sequence[Row]) -> str:
    """Rows under the keys of the first, in Markdown."""
    columns = list(rows[0])
    return "\n".join([head(columns), *(line(shown(row[column]) for column in columns) for row in rows)])


def head(columns: Sequence[str]) -> str:
    return f"{line(columns)}\n{'|---' * len(columns)}|"


def line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def shown(value: Any) -> str:
    """A number with three digits or all before the point; a dash where there is none."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.{1 if abs(value) >= 10 else 3}f}"


def machine() -> str:
    """Where the numbers come from: processor, threads, versions, and how busy it was."""
    import torch

    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    busy = f"load {os.getloadavg()[0]:.1f}"
    cores = f"{os.cpu_count()} cores ({_processor()}), {torch.get_num_threads()} threads, {busy}"
    return f"{gpu}{cores}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    names = [text for text in facts.read_text().splitlines() if text.startswith("model name")] if facts.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()
