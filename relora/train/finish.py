"""The end of a run: the final model, and one summary that says where everything is."""

import json
from pathlib import Path
from typing import Any

from relora.checkpoint.export import export_model, model_card
from relora.checkpoint.load import MANIFEST, complete_checkpoints, open_shares
from relora.checkpoint.weights import merged_model
from relora.config import UserError
from relora.config.derived import lora_config
from relora.config.yaml12 import dump
from relora.data import unigram_entropy
from relora.files import sha256_of
from relora.tracking.metrics_file import read_metrics
from relora.train.run import Run

RESULTS = "relora.json"


def is_finished(job: Run) -> bool:
    """Whether `final/` is the model of the newest checkpoint, and that one of the last step."""
    checkpoints = complete_checkpoints(job.folder.checkpoints)
    try:
        written = json.loads((job.folder.final / RESULTS).read_text(encoding="utf-8"))
        return bool(
            written["step"] == job.schedule.max_steps and written["checkpoint_sha256"] == _hash_of(checkpoints[-1])
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False  # not there, damaged, or of another run: it is written again


def finish(job: Run) -> str:
    """Write `final/` from the last checkpoint, unless it is there, and return the summary."""
    results = measured(job)
    if not is_finished(job):
        checkpoint = complete_checkpoints(job.folder.checkpoints)[-1]
        model = merged_model(open_shares(checkpoint), job.config.model, job.hf_config, lora_config(job.config))
        settings = dump(job.config.model_dump(mode="json"))
        card = model_card(job.folder.path.name, results=results, settings=settings)
        files = {
            "README.md": card,
            RESULTS: json.dumps(results | {"checkpoint_sha256": _hash_of(checkpoint)}, indent=1),
        }
        export_model(model, job.data.tokenizer(), job.folder.final, files=files)
    job.folder.write_status("finished", step=job.schedule.max_steps)
    return summary(job, results)


def measured(job: Run) -> dict[str, Any]:
    """What the run came to, from its metrics."""
    lines = read_metrics(job.folder.metrics)
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    restarts = [line for line in lines if "restart" in line]
    updates = [line for line in lines if "loss" in line]
    if not updates or job.schedule.max_steps not in evaluations:
        raise UserError([f"{job.folder.metrics}: the lines of the last step are missing; the run has lost its metrics"])
    last = max(updates, key=lambda line: int(line["step"]))
    results: dict[str, Any] = {
        "step": last["step"],
        "tokens": last["tokens"],
        "skipped_updates": last["samples_seen"] // job.config.training.global_batch_size - last["step"],
        "eval_loss": evaluations[last["step"]],
        "unigram_entropy": unigram_entropy(job.data, job.config.data, targets=lambda batch: batch["labels"][:, 1:]),
    }
    if job.schedule.has_low_rank_stage and job.schedule.warm_start_steps:
        results["eval_loss_at_switch"] = evaluations[job.schedule.warm_start_steps]
    if restarts:
        results["restarts"] = len(restarts)
        results["merge_error"] = max(line["merge_error"] for line in restarts)
        results["restart_jump"] = max(abs(r["probe_loss_after"] - r["probe_loss_before"]) for r in restarts)
        results["rise_after_restart"] = _largest_rise(lines)
    return results


def summary(job: Run, results: dict[str, Any]) -> str:
    """The last words of a run."""
    folder, loss = job.folder, results["eval_loss"]
    said = [
        f"finished: {results['step']:,} updates, {results['tokens']:,} tokens",
        f"held-out loss {loss:.4f} nats; the unigram entropy of the same tokens is {results['unigram_entropy']:.4f}, "
        f"so context is worth {results['unigram_entropy'] - loss:+.4f} nats",
    ]
    if "eval_loss_at_switch" in results:
        at_switch = results["eval_loss_at_switch"]
        said.append(f"at the switch to low rank it was {at_switch:.4f}: {at_switch - loss:.4f} nats gained since")
    if "restarts" in results:
        said.append(
            f"{results['restarts']} restarts; on one held-out batch they changed the loss by at most "
            f"{results['restart_jump']:.1e}, and in the probed updates after them it rose by at most "
            f"{results['rise_after_restart']:.4f}"
        )
    if results["skipped_updates"]:
        said.append(f"{results['skipped_updates']} updates were skipped: their loss or gradient was not finite")
    places = {"model": folder.final, "metrics": folder.metrics, "TensorBoard": folder.tensorboard}
    return "\n".join([*said, *(f"{name + ':':<13}{place}" for name, place in places.items())])


def _hash_of(checkpoint: Path) -> str:
    return sha256_of(checkpoint / MANIFEST)


def _largest_rise(lines: list[dict[str, Any]]) -> float:
    """The largest probe loss after a restart over that just before it; 0 if none was higher."""
    before, rise = 0.0, 0.0
    for line in lines:
        if "restart" in line:
            before = line["probe_loss_before"]
        elif "probe_loss" in line:
            rise = max(rise, line["probe_loss"] - before)
    return rise
