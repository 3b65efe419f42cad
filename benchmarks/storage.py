"""What the storage of the frozen weights costs in held-out loss: the same run with each of them, one after the other.

    python -m benchmarks.storage              # the quickstart with each storage: six runs of 3 minutes
    python -m benchmarks.storage --storages float32 nf4+residual

`+residual` is relora.carry_residual = true. A run that is already finished in its folder is not made again. "live" is
the model that computes with the stored weights; "master" the exact one, which the checkpoints and final/ hold.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import Limit, Row, options_of, publish
from relora.commands.eval import held_out
from relora.tracking.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
REFERENCE = "float32"
STORAGES = (REFERENCE, "bfloat16", "int8", "int8+residual", "nf4", "nf4+residual")
BF16_NATS = 0.01


@dataclass(frozen=True)
class Run:
    """A finished run: its metrics, and the held-out loss of final/ in nats."""

    storage: str
    lines: list[dict[str, Any]]
    master_loss: float

    @property
    def live_loss(self) -> float:
        return float([line["eval_loss"] for line in self.lines if "eval_loss" in line][-1])

    @property
    def restarts(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "restart" in line]

    def largest(self, error: str) -> float | None:
        """The largest of an error over the restarts; None where the storage has no such error."""
        return max((line[error] for line in self.restarts if error in line), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--folder", type=Path, default=Path("runs/storage"), help="of the runs")
    options = options_of(parser)
    runs = {storage: trained(storage, options.config, options.folder) for storage in options.storages}
    tables = {"End of the run": [end_row(run, runs.get(REFERENCE)) for run in runs.values()]}
    tables |= {f"Restarts, {run.storage}": [restart_row(line) for line in run.restarts] for run in runs.values()}
    publish({title: rows for title, rows in tables.items() if rows}, limits_of(runs), json_path=options.json)


def trained(storage: str, config: Path, folder: Path) -> Run:
    run = folder / storage
    command = [sys.executable, "-m", "relora", "train", str(config), f"output_dir={run}", *overrides(storage)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return Run(storage, read_metrics(run / "metrics.jsonl"), held_out(str(run / "final")).loss)


def overrides(storage: str) -> list[str]:
    base_dtype, _, residual = storage.partition("+")
    return [f"lora.base_dtype={base_dtype}", *(["relora.carry_residual=true"] if residual else [])]


def end_row(run: Run, reference: Run | None) -> Row:
    return {
        "storage": run.storage,
        "live, nats": run.live_loss,
        f"- {REFERENCE}": run.live_loss - reference.live_loss if reference else None,
        "master, nats": run.master_loss,
        f"master - {REFERENCE}": run.master_loss - reference.master_loss if reference else None,
        "largest merge_error": run.largest("merge_error"),
        "largest master_error": run.largest("master_error"),
    }


def restart_row(line: dict[str, Any]) -> Row:
    """A restart on the probe rows. The master's function does not change; the live model's by what storage forgets."""
    before, after, master = line["probe_loss_before"], line["probe_loss_after"], line.get("probe_loss_master")
    return {
        "step": line["step"],
        "live before, nats": before,
        "live after, nats": after,
        "after - before": after - before,
        "master, nats": master,
        "live after - master": after - master if master is not None else None,
        "merge_error": line["merge_error"],
        "master_error": line.get("master_error"),
    }


def limits_of(runs: dict[str, Run]) -> Sequence[Limit]:
    if not {REFERENCE, "bfloat16"} <= runs.keys():
        return []
    apart = abs(runs["bfloat16"].live_loss - runs[REFERENCE].live_loss)
    return [Limit(f"bfloat16 against {REFERENCE}, live, nats", apart, at_most=BF16_NATS)]


if __name__ == "__main__":
    main()
