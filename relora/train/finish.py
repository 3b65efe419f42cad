"""The end of a run: the final model, and a summary that says where everything is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from relora.checkpoint.export import export_model, model_card
from relora.checkpoint.format import MANIFEST, sealed
from relora.checkpoint.load import complete_checkpoints, open_states, read_manifest
from relora.checkpoint.weights import merged_model
from relora.config.yaml12 import dump
from relora.data import unigram_entropy
from relora.errors import warn
from relora.files import json_of, sha256_of, write_json
from relora.tracking.metrics_file import has_number, read_metrics
from relora.train.run import Run

RESULTS = "relora.json"
OF_THE_USER = {"README.md"}  # may be rewritten at will
RESTART_FIELDS = {"probe_loss_before", "probe_loss_after", "merge_error"}


def is_finished(run: Run) -> bool:
    """Whether `final/` is, file by file, the model of the newest checkpoint, and that one of the last step."""
    try:
        newest = complete_checkpoints(run.folder.checkpoints)[-1]
        written = json_of((run.folder.final / RESULTS).read_bytes())
        is_newest = written["checkpoint_sha256"] == sha256_of(newest / MANIFEST)
        if not is_newest or written["step"] != run.schedule.max_steps or sealed(written) != written:
            return False
        if written["files"] == _hashes(run.folder.final, written["files"]):
            return True
        warn(f"{run.folder.final} is not what was written; it is written again from {newest.name}")
        return False
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False  # not there, damaged, or of another run: it is written again


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The hash of each of these files in `folder` that is there."""
    paths = {name: folder / name for name in names if Path(name).name == name}
    return {name: sha256_of(path) for name, path in paths.items() if path.is_file()}


def finish(run: Run) -> str:
    """Write `final/` from the newest checkpoint, unless it is there, and return the summary."""
    results = run_results(run)
    if not is_finished(run):
        newest, final = complete_checkpoints(run.folder.checkpoints)[-1], run.folder.final
        model = merged_model(open_states(newest), run.config, run.hf_config, run.task)
        settings = dump(run.config.model_dump(mode="json"))
        card = model_card(run.folder.path.name, results=results, settings=settings)
        export_model(model, run.data.tokenizer(), final, files={"README.md": card})
        names = sorted({path.name for path in final.iterdir()} - OF_THE_USER)
        # Last, so that a folder with this file in it is whole.
        made_from = {"checkpoint_sha256": sha256_of(newest / MANIFEST), "files": _hashes(final, names)}
        write_json(final / RESULTS, sealed(results | made_from))
    run.folder.write_status("finished", step=run.schedule.max_steps)
    return summary(run, results)


def run_results(run: Run) -> dict[str, Any]:
    """The results of a finished run, from its metrics and its newest checkpoint; without those whose lines are lost."""
    step, training = run.schedule.max_steps, run.config.training
    lines = read_metrics(run.folder.metrics)
    eval_loss = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    restarts = [line for line in lines if all(has_number(line, key) for key in RESTART_FIELDS)]
    results: dict[str, Any] = {
        "step": step,
        "tokens": step * training.global_batch_size * run.config.data.sequence_length,
        "skipped": read_manifest(complete_checkpoints(run.folder.checkpoints)[-1]).skipped,
    }
    if step in eval_loss:
        results["eval_loss"] = eval_loss[step]
    results["unigram_entropy"] = unigram_entropy(
        run.data, run.config.data, targets=run.task.targets, make_batch=run.task.make_batch
    )
    switch = run.schedule.warm_start_steps
    if run.schedule.has_low_rank_stage and switch and switch in eval_loss:
        results["eval_loss_at_switch"] = eval_loss[switch]
    # Of some restarts alone the largest values would be guesses.
    if restarts and len(restarts) == run.schedule.restarts_done(step):
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
    lines = [f"finished: {results['step']:,} updates, {results['tokens']:,} tokens"]
    loss, entropy = results.get("eval_loss"), results["unigram_entropy"]
    if loss is None:
        lost = f"the last evaluation is not in {run.folder.metrics}"
        lines.append(f"{lost}; `relora eval {run.folder.path}` measures the held-out loss")
    else:
        worth = f"so context is worth {entropy - loss:+.4f} nats"
        lines.append(f"held-out loss {loss:.4f} nats; the unigram entropy of the same tokens is {entropy:.4f}, {worth}")
    if loss is not None and "eval_loss_at_switch" in results:
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
