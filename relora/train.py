"""A run from its configuration to its final model: the table of contents."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

import relora
from relora.arrival import Arrival
from relora.config import Config, UserError, raise_if_any
from relora.config.derived import derived_numbers
from relora.data import micro_batches
from relora.files import write_json
from relora.finish import finish, is_finished
from relora.job import Job, newest_state, open_job
from relora.loop import Loop
from relora.method.census import census
from relora.model import attention_problems
from relora.runtime.checkpoint import Checkpoints, write_stage_start
from relora.runtime.engines import Engine, Live, connect
from relora.runtime.folder import RunFolder
from relora.runtime.restore import open_stage_start
from relora.runtime.state import State
from relora.runtime.tracking import RunTracker, SilentTracker, Tracker
from relora.stages import Stage, build, stages, switch


def train(config: Config, *, dry_run: bool = False, extend: bool = False) -> None:
    """Train, from the newest complete checkpoint of the run if it has one.

    Args:
        dry_run: stop after building the model and one forward pass; the run folder is left alone.
        extend: a run may go on to a larger max_steps than it began with.

    Raises:
        UserError: something in the configuration, the files, the data or the launch is wrong.
    """
    _quiet_libraries()
    with _failure_in_status(RunFolder(Path(config.output_dir))) as mine:
        job = open_job(config, extend=extend)
        state = newest_state(job)
        engine = connect(config)
        _announce(job, engine, state)
        if dry_run:
            _rehearse(job, engine, state)
        else:
            with job.folder.held() if engine.rank == 0 else nullcontext():
                mine.append(job.folder)
                _run(job, engine, state)
        engine.close()


def _run(job: Job, engine: Engine, state: State) -> None:
    checkpoints = Checkpoints(
        job.folder.checkpoints, limit=job.config.training.save_total_limit, writes=engine.rank == 0
    )
    if engine.rank == 0:
        _open_folder(job, engine, state)
    with closing(_tracker(job, engine, state)) as tracker:
        for stage in stages(job.plan):
            if state.clock.step < stage.end:
                state = _run_stage(stage, state, job=job, engine=engine, tracker=tracker, checkpoints=checkpoints)
    if engine.rank == 0:
        print(finish(job), flush=True)
    engine.barrier()


def _run_stage(
    stage: Stage, state: State, *, job: Job, engine: Engine, tracker: Tracker, checkpoints: Checkpoints
) -> State:
    """Build the stage from `state`, train it to its end, and hand on what the next one needs."""
    clock, begins, is_last = state.clock, state.stage != stage.name, stage.end == job.plan.max_steps
    live = build(stage, state, config=job.config, hf_config=job.hf_config, engine=engine)
    raise_if_any(attention_problems(live.model, job.vocab_size, document_mask=job.config.data.document_mask))
    _tell_census(stage, live, job, tracker)
    if stage.is_low_rank and begins:
        write_stage_start(job.folder.stage_start, live, engine, writes=engine.rank == 0)
    arrival = Arrival(
        plan=job.plan,
        stage=stage,
        engine=engine,
        live=live,
        tracker=tracker,
        data=job.data,
        checkpoints=checkpoints,
        stage_start=open_stage_start(job.folder.stage_start) if stage.is_low_rank and engine.rank == 0 else {},
        about=job.about,
    )
    if begins:
        arrival(clock)
    training = job.config.training
    batches = micro_batches(
        job.data.samples(job.config.data, job.config.seed),
        start=clock.samples_seen,
        global_batch_size=training.global_batch_size,
        per_device_batch_size=training.per_device_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
        num_workers=job.config.data.num_workers,
    )
    loop = Loop(plan=job.plan, engine=engine, live=live, tracker=tracker, batches=batches, arrive=arrival)
    clock = loop.run(clock, until=stage.end, arrive_at_end=is_last)
    return State(clock=clock, stage=stage.name) if is_last else switch(live, engine, clock)


def _rehearse(job: Job, engine: Engine, state: State) -> None:
    """Build the stage that comes next and run one forward pass."""
    stage = next((s for s in stages(job.plan) if state.clock.step < s.end), stages(job.plan)[-1])
    live = build(stage, state, config=job.config, hf_config=job.hf_config, engine=engine)
    raise_if_any(attention_problems(live.model, job.vocab_size, document_mask=job.config.data.document_mask))
    samples = job.data.samples(job.config.data, job.config.seed)
    batch = samples.__getitems__(range(job.config.training.per_device_batch_size))
    loss = engine.token_losses(live, batch).item() / int((batch["labels"][:, 1:] >= 0).sum())
    if engine.rank == 0:
        print(f"{_stage_title(stage)}\n{census(live.model).table()}")
        print(f"dry run: built, one forward pass, loss {loss:.4f} nats. Nothing was written to {job.folder.path}")


def _announce(job: Job, engine: Engine, state: State) -> None:
    """The first line says what really runs; then what it will do."""
    if not engine.same_everywhere(job.data.manifest.content_hash):
        raise UserError(["data: the processes of this launch hold different prepared data; compare the sources"])
    if engine.rank != 0:
        return
    training = job.config.training
    print(
        f"relora {relora.__version__}: engine {engine.name}, world size {engine.world_size}, device {engine.device}, "
        f"mixed precision {training.mixed_precision}, torch {torch.__version__}"
    )
    print(job.data.summary())
    numbers = derived_numbers(job.config, engine.world_size)
    print(", ".join(f"{key} {value:,}" for key, value in numbers.items()))
    if training.method == "full":
        print("training.method = full: the settings of relora and lora are not used")
    if state.stage is not None:
        print(f"going on from step {state.clock.step}, sample {state.clock.samples_seen}")


def _open_folder(job: Job, engine: Engine, state: State) -> None:
    job.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    Checkpoints(job.folder.checkpoints, limit=None, writes=True).remove_drafts()
    numbers = derived_numbers(job.config, engine.world_size)
    settings = job.config.model_copy(update={"model": job.resolved_model})
    job.folder.write_config(settings, identity=job.identity, numbers=numbers)
    job.data.tokenizer().save_pretrained(job.folder.tokenizer)
    if not is_finished(job):
        job.folder.write_status("running", step=state.clock.step)


def _tracker(job: Job, engine: Engine, state: State) -> Tracker:
    if engine.rank != 0:
        return SilentTracker()
    start = None if state.stage is None else state.clock.step
    return RunTracker(job.folder, start=start, total=job.plan.max_steps, hparams=job.identity)


def _stage_title(stage: Stage) -> str:
    return (
        f"stage {stage.name}: low-rank to step {stage.end}"
        if stage.is_low_rank
        else (f"stage {stage.name}: full-rank to step {stage.end}")
    )


def _tell_census(stage: Stage, live: Live, job: Job, tracker: Tracker) -> None:
    counted = census(live.model)
    tracker.say(f"{_stage_title(stage)}\n{counted.table()}")
    if not isinstance(tracker, SilentTracker):
        write_json(job.folder.path / f"census_{stage.name}.json", counted.as_dict())


@contextmanager
def _failure_in_status(folder: RunFolder) -> Iterator[list[RunFolder]]:
    """Write why a run failed to its status.json, but never into the folder of another run.

    Yields a list; the folder is ours once it is in it, or if it was no run's before.
    """
    mine = [] if folder.is_run else [folder]
    try:
        yield mine
    except BaseException as error:
        if mine and os.environ.get("RANK", "0") == "0":
            # A disk that cannot be written to may be the very reason; the error itself says more.
            with suppress(OSError):
                folder.write_status("failed", step=folder.last_step(), reason=str(error) or type(error).__name__)
        raise


def _quiet_libraries() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
