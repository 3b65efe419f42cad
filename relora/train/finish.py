"""The end of a run: the final model, and a summary that says where everything is."""

import math
from dataclasses import dataclass, field
from typing import Any

from relora.checkpoint.export import RESULTS, Card, export_model, file_hashes
from relora.checkpoint.format import MANIFEST, TEMPORARY_PREFIX, sealed
from relora.checkpoint.load import complete_checkpoints, read_manifest
from relora.checkpoint.run_model import load_run_model
from relora.config.yaml12 import dump
from relora.data import unigram_entropy
from relora.errors import warn
from relora.files import json_of, remove, sha256_of
from relora.tracking.metrics_file import has_number, read_metrics
from relora.train.run import Run

Lines = list[dict[str, Any]]


@dataclass
class Results:
    """The results of a run.

    Attributes:
        values: by name; only what was measured.
        unknown: a phrase for each result that is missing, and why.
    """

    values: dict[str, Any]
    unknown: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return self.values | ({"not_measured": self.unknown} if self.unknown else {})


def is_finished(run: Run) -> bool:
    """Whether `final/` is, file by file, the model of the newest checkpoint, and that one of the last step.

    The model card alone may be rewritten at will.
    """
    try:
        newest = complete_checkpoints(run.folder.checkpoints)[-1]
        written = json_of((run.folder.final / RESULTS).read_bytes())
        is_newest = written["checkpoint_sha256"] == sha256_of(newest / MANIFEST)
        if not is_newest or written["step"] != run.schedule.max_steps or sealed(written) != written:
            return False
        if written["files"] == file_hashes(run.folder.final, written["files"]):
            return True
        warn(f"{run.folder.final} is not what was written; it is written again from {newest.name}")
        return False
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False  # not there, damaged, or of another run: it is written again


def finish(run: Run) -> str:
    """Write `final/` from the newest checkpoint, unless it is there, and return the summary.

    It is written aside and renamed. Where this fails or is interrupted, the next start of the run does it again.
    """
    results = run_results(run)
    for leftover in run.folder.path.glob(f"{TEMPORARY_PREFIX}*"):
        remove(leftover)
    if not is_finished(run):
        newest = complete_checkpoints(run.folder.checkpoints)[-1]
        settings = dump(run.config.model_dump(mode="json"))
        card = Card(run.folder.path.name, task=run.task, results=results.as_json(), settings=settings)
        about = results.as_json() | {"checkpoint_sha256": sha256_of(newest / MANIFEST)}
        model = load_run_model(run.folder, newest, run.config, run.task)
        export_model(model, run.folder.final, card=card, about=about)
    run.folder.write_status("finished", step=run.schedule.max_steps)
    return summary(run, results)


def run_results(run: Run) -> Results:
    """The results of a finished run, from its newest checkpoint and its metrics, of which lines may have been lost."""
    step, training, schedule = run.schedule.max_steps, run.config.training, run.schedule
    manifest = read_manifest(complete_checkpoints(run.folder.checkpoints)[-1])
    results = Results(
        {
            "step": step,
            "tokens": step * training.global_batch_size * run.config.data.sequence_length,
            "skipped": manifest.skipped,
        }
    )
    lines = read_metrics(run.folder.metrics)
    eval_loss = {line["step"]: line["eval_loss"] for line in lines if has_number(line, "eval_loss")}
    wanted = {"eval_loss": step}
    if schedule.has_low_rank_stage and schedule.warm_start_steps:
        wanted["eval_loss_at_switch"] = schedule.warm_start_steps
    for name, at in wanted.items():
        if at in eval_loss:
            results.values[name] = eval_loss[at]
        else:
            results.unknown.append(f"the held-out loss at step {at}: its line is not in {run.folder.metrics.name}")
    if run.task.writes_text and not results.values.get("eval_loss", 0.0) <= math.log(run.vocab_size):
        results.values["worse_than_uniform_guess"] = True
    if manifest.spikes or manifest.left_out:
        results.values |= {"spikes": manifest.spikes, "left_out": len(manifest.left_out)}
    entropy = unigram_entropy(run.data, run.config.data, targets=run.task.targets, make_batch=run.task.make_batch)
    if math.isfinite(entropy):
        results.values["unigram_entropy"] = entropy
    if manifest.cycle:
        add_restarts(results, lines, manifest.cycle, run)
    return results


def add_restarts(results: Results, lines: Lines, num_restarts: int, run: Run) -> None:
    """Add what the lines of the restarts tell, each figure only if no restart is left out of it."""
    results.values["restarts"] = num_restarts
    keys = ("merge_error", "probe_loss_before", "probe_loss_after")
    found = {line["restart"]: line for line in lines if all(has_number(line, key) for key in ("restart", *keys))}
    if len(found) == num_restarts:
        jumps = [abs(line["probe_loss_after"] - line["probe_loss_before"]) for line in found.values()]
        results.values["merge_error"] = max(line["merge_error"] for line in found.values())
        results.values["restart_jump"] = max(jumps)
    else:
        lost = num_restarts - len(found)
        results.unknown.append(f"how exact the restarts were: the lines of {lost} of {num_restarts} are lost")
    probed = num_probes(run)
    lost = probed - len({line["step"] for line in lines if has_number(line, "probe_loss")})
    if lost > 0 or len(found) < num_restarts:
        results.unknown.append(f"the rise of the loss after a restart: {max(lost, 0)} of {probed} probes are missing")
    elif probed:
        results.values["rise_after_restart"] = largest_rise(lines)


def largest_rise(lines: Lines) -> float:
    """The largest probe loss after a restart, less that just before it; 0 if none was higher."""
    before, rise = 0.0, 0.0
    for line in lines:
        if "restart" in line:
            before = line["probe_loss_before"]
        elif has_number(line, "probe_loss"):
            rise = max(rise, line["probe_loss"] - before)
    return rise


def num_probes(run: Run) -> int:
    """How many updates after restarts were probed: the first `training.probe_steps` of each cycle after the first."""
    schedule, every = run.schedule, run.schedule.restart_every
    if every is None:
        return 0
    count = 0
    for index in range(1, schedule.restarts_done(schedule.max_steps) + 1):
        restart = schedule.warm_start_steps + index * every
        last = min(restart + every - 1, schedule.max_steps)
        count += min(run.config.training.probe_steps, last - restart)
    return count


def summary(run: Run, results: Results) -> str:
    """The end-of-run summary."""
    values = results.values
    lines = [f"finished: {values['step']:,} updates, {values['tokens']:,} tokens"]
    loss, entropy = values.get("eval_loss"), values.get("unigram_entropy")
    if loss is not None:
        line = f"held-out loss {loss:.4f} nats"
        if entropy is not None and math.isfinite(loss):
            line += (
                f"; the unigram entropy of the same tokens is {entropy:.4f}, so context is worth "
                f"{entropy - loss:+.4f} nats"
            )
        lines.append(line)
        if "eval_loss_at_switch" in values:
            at_switch = values["eval_loss_at_switch"]
            lines.append(f"at the switch to low rank it was {at_switch:.4f}: {at_switch - loss:.4f} nats gained since")
    if "worse_than_uniform_guess" in values:
        guess = f"a uniform guess among {run.vocab_size:,} tokens has the loss {math.log(run.vocab_size):.4f}"
        lines.append(f"{guess}: the model has learned nothing, or the run has diverged")
    if "restart_jump" in values:
        rise = values.get("rise_after_restart")
        rose = "" if rise is None else f", and rose by at most {rise:.4f} in the probed updates after it"
        lines.append(
            f"{values['restarts']} restarts: the loss on one held-out batch changed by at most "
            f"{values['restart_jump']:.1e} at a restart{rose}"
        )
    elif "restarts" in values:
        lines.append(f"{values['restarts']} restarts")
    if values["skipped"]:
        lines.append(f"{values['skipped']} updates were skipped: a loss or gradient that is not finite, or a spike")
    if values.get("spikes"):
        lines.append(f"{values['spikes']} updates had a loss that was a spike")
    if values.get("left_out"):
        lines.append(f"went back {values['left_out']} times for a spike of the loss: {run.folder.skipped_data}")
    lines += [f"not known: {phrase}" for phrase in results.unknown]
    places = {"model": run.folder.final, "metrics": run.folder.metrics, "TensorBoard": run.folder.tensorboard}
    return "\n".join([*lines, *(f"{name + ':':<13}{place}" for name, place in places.items())])
