"""The end of a run: the final model, and a summary that says where everything is."""

import json
from typing import Any

from relora.checkpoint.export import export_model, model_card
from relora.checkpoint.format import MANIFEST
from relora.checkpoint.load import complete_checkpoints, open_states, read_manifest
from relora.checkpoint.weights import merged_model
from relora.config import UserError
from relora.config.yaml12 import dump
from relora.data import unigram_entropy
from relora.files import sha256_of
from relora.tracking.metrics_file import read_metrics
from relora.train.run import Run

RESULTS = "relora.json"


def is_finished(run: Run) -> bool:
    """Whether `final/` is the model of the newest checkpoint, and that one of the last step."""
    try:
        newest = complete_checkpoints(run.folder.checkpoints)[-1]
        written = json.loads((run.folder.final / RESULTS).read_text(encoding="utf-8"))
        is_newest = written["checkpoint_sha256"] == sha256_of(newest / MANIFEST)
        return bool(is_newest and written["step"] == run.schedule.max_steps)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False  # not there, damaged, or of another run: it is written again


def finish(run: Run) -> str:
    """Write `final/` from the newest checkpoint, unless it is there, and return the summary."""
    results = run_results(run)
    if not is_finished(run):
        newest = complete_checkpoints(run.folder.checkpoints)[-1]
        model = merged_model(open_states(newest), run.config, run.hf_config, run.task)
        settings = dump(run.config.model_dump(mode="json"))
        files = {
            "README.md": model_card(run.folder.path.name, results=results, settings=settings),
            RESULTS: json.dumps(results | {"checkpoint_sha256": sha256_of(newest / MANIFEST)}, indent=1),
        }
        export_model(model, run.data.tokenizer(), run.folder.final, files=files)
    run.folder.write_status("finished", step=run.schedule.max_steps)
    return summary(run, results)


def run_results(run: Run) -> dict[str, Any]:
    """The results of a finished run, from its metrics and its newest checkpoint.

    Raises:
        UserError: the metrics file lacks the evaluation at the last step.
    """
    step, training = run.schedule.max_steps, run.config.training
    lines = read_metrics(run.folder.metrics)
    eval_loss = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    restarts = [line for line in lines if "restart" in line]
    if step not in eval_loss:
        raise UserError(
            [f"{run.folder.metrics}: the evaluation at step {step} is missing; the run has lost its metrics"]
        )
    results: dict[str, Any] = {
        "step": step,
        "tokens": step * training.global_batch_size * run.config.data.sequence_length,
        "skipped": read_manifest(complete_checkpoints(run.folder.checkpoints)[-1]).skipped,
        "eval_loss": eval_loss[step],
        "unigram_entropy": unigram_entropy(
            run.data, run.config.data, targets=run.task.targets, make_batch=run.task.make_batch
        ),
    }
    if run.schedule.has_low_rank_stage and run.schedule.warm_start_steps:
        results["eval_loss_at_switch"] = eval_loss[run.schedule.warm_start_steps]
    if restarts:
        jumps = [abs(line["probe_loss_after"] - line["probe_loss_before"]) for line in restarts]
        results["restarts"] = len(restarts)
        results["merge_error"] = max(line["merge_error"] for line in restarts)
        results["restart_jump"] = max(jumps)
        results["rise_after_restart"] = largest_rise(lines)
    return results


def largest_rise(lines: list[dict[str, Any]]) -> float:
    """The largest probe loss after a restart, less that just before it; 0 if none was higher."""
    before, rise = 0.0, 0.0
    for line in lines:
        if "restart" in line:
            before = line["probe_loss_before"]
        elif "probe_loss" in line:
            rise = max(rise, line["probe_loss"] - before)
    return rise


def summary(run: Run, results: dict[str, Any]) -> str:
    """The end-of-run summary."""
    loss, entropy = results["eval_loss"], results["unigram_entropy"]
    lines = [
        f"finished: {results['step']:,} updates, {results['tokens']:,} tokens",
        f"held-out loss {loss:.4f} nats; the unigram entropy of the same tokens is {entropy:.4f}, so context is worth "
        f"{entropy - loss:+.4f} nats",
    ]
    if "eval_loss_at_switch" in results:
        at_switch = results["eval_loss_at_switch"]
        lines.append(f"at the switch to low rank it was {at_switch:.4f}: {at_switch - loss:.4f} nats gained since")
    if "restarts" in results:
        lines.append(
            f"{results['restarts']} restarts: the loss on one held-out batch changed by at most "
            f"{results['restart_jump']:.1e} at a restart, and rose by at most {results['rise_after_restart']:.4f} in "
            "the probed updates after it"
        )
    if results["skipped"]:
        lines.append(f"{results['skipped']} updates were skipped: their loss or gradient was not finite")
    places = {"model": run.folder.final, "metrics": run.folder.metrics, "TensorBoard": run.folder.tensorboard}
    return "\n".join([*lines, *(f"{name + ':':<13}{place}" for name, place in places.items())])
