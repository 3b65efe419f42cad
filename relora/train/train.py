"""A run from its configuration to its final model: the table of contents."""

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

import relora
from relora.checkpoint.load import last_step, open_stage_start
from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.save import Checkpoints, write_stage_start
from relora.checkpoint.state import State
from relora.config import Config, UserError, raise_if_any
from relora.config.derived import derived_numbers
from relora.data import micro_batches
from relora.engines import Engine, TrainState, World, connect, is_first
from relora.errors import Stopped
from relora.files import write_json
from relora.method.parameter_report import describe_routes, parameter_report
from relora.model.model import attention_problems, num_label_tokens
from relora.tracking.tracker import RunTracker, SilentTracker, Tracker
from relora.train.callbacks import Callbacks
from relora.train.finish import finish, is_finished
from relora.train.loop import Loop
from relora.train.preflight import preflight
from relora.train.run import Run, newest_state
from relora.train.signals import StopRequest, stop_signals
from relora.train.stages import Stage, build, stages, switch


def train(config: Config, *, dry_run: bool = False, extend: bool = False) -> None:
    """Train, from the newest complete checkpoint of the run if it has one.

    Args:
        dry_run: stop after building the model and one forward pass; the run folder is left alone.
        extend: a run may go on to a larger max_steps than it began with.

    Raises:
        UserError: something in the configuration, the files, the data or the launch is wrong.
        Stopped: SIGTERM, SIGINT or SIGUSR1 came, to whichever rank; the same call goes on later.
    """
    _quiet_libraries()
    folder = RunFolder(Path(config.output_dir))
    with _reason_in_status(folder, ours=not folder.is_run and not dry_run):
        job = preflight(config, extend=extend)
    if dry_run:
        return _train(job, _rehearse)
    with folder.locked() if is_first() else nullcontext(), _reason_in_status(folder, ours=True):
        return _train(job, run)


def _train(job: Run, what: Callable[[Run, Engine, State], None]) -> None:
    state = newest_state(job)
    engine = connect(job.config)
    try:
        _agree(job, engine, state)
        if engine.world.process_index == 0:
            _announce(job, engine, state)
        what(job, engine, state)
    except Stopped:
        engine.world.close()
        raise
    except BaseException as error:
        engine.world.tell(error)
        raise
    engine.world.close()


def run(job: Run, engine: Engine, state: State) -> None:
    """The stages of a run from `state` to its end, on an engine that is connected; every rank calls it.

    Raises:
        Stopped: as `train`.
    """
    training, writes = job.config.training, engine.world.process_index == 0
    checkpoints = Checkpoints(job.folder.checkpoints, limit=training.save_total_limit, writes=writes)
    if writes:
        checkpoints.remove_leftovers()
        _open_folder(job, engine, state)
    tracker: Tracker = (
        RunTracker(job.folder, state, total=job.schedule.max_steps, hparams=job.identity) if writes else SilentTracker()
    )
    with closing(tracker), stop_signals() as asked:
        kept = Kept(engine, tracker, checkpoints, asked)
        for stage in stages(job.schedule):
            if state.step < stage.end:
                state = _run_stage(stage, state, job=job, kept=kept)
    if writes:
        print(finish(job), flush=True)
    engine.world.barrier()


@dataclass(frozen=True)
class Kept:
    """What the stages of a run have in common."""

    engine: Engine
    tracker: Tracker
    checkpoints: Checkpoints
    asked: StopRequest


def _run_stage(stage: Stage, state: State, *, job: Run, kept: Kept) -> State:
    """Build the stage from `state`, train it to its end, and hand on what the next one needs.

    Raises:
        Stopped: some rank was asked to stop. A checkpoint has been written, if there was time for one.
    """
    engine, begins = kept.engine, state.stage != stage.name
    live = build(stage, state, config=job.config, hf_config=job.hf_config, engine=engine)
    with engine.inference(live):
        raise_if_any(attention_problems(live.model, job.vocab_size, document_mask=job.config.data.document_mask))
    if job.config.model.torch_compile:
        engine.compile(live)
    if engine.world.device.type == "cuda":
        # The peak that is logged is that of the stage: the warm start's would hide the low-rank one's.
        torch.cuda.reset_peak_memory_stats(engine.world.device)
    arrival = _begin(stage, live, is_new=begins, job=job, kept=kept)
    if begins:
        arrival(state.step, state.skipped)
    else:
        arrival.catch_up(state)
    is_last = stage.end == job.schedule.max_steps
    batches = _batches(job, state.step, engine.world)
    loop = Loop(
        config=job.config,
        schedule=job.schedule,
        engine=engine,
        live=live,
        tracker=kept.tracker,
        batches=batches,
        arrive=arrival,
        due=arrival.is_due,
        asked=kept.asked,
    )
    with closing(batches):  # ends the processes that read ahead
        step, skipped, stops = loop.run(state.step, state.skipped, until=stage.end, arrive_at_end=is_last)
        if stops:
            _stop(arrival, step, skipped, kept, job)
    return State(step, skipped, stage=stage.name) if is_last else switch(live, engine, step, skipped)


def _batches(job: Run, step: int, processes: World) -> Generator[list[dict[str, Tensor]], None, None]:
    training = job.config.training
    return micro_batches(
        job.data.samples(job.config.data, job.config.seed),
        start=step * training.global_batch_size,
        global_batch_size=training.global_batch_size,
        per_device_batch_size=training.per_device_batch_size,
        process_index=processes.process_index,
        num_processes=processes.num_processes,
        num_workers=job.config.data.num_workers,
        pin_memory=processes.device.type == "cuda",
    )


def _stop(arrival: Callbacks, at: int, skipped: int, kept: Kept, job: Run) -> NoReturn:
    """End the run in order. The status is on the disk before any rank leaves: launchers then end the others."""
    saved = arrival.stop(at, skipped, kept.asked.seconds_left())
    why = "asked to stop" if kept.asked.signal is None else f"{kept.asked.signal.name} came"
    step = at if saved else last_step(job.folder.checkpoints)
    reason = f"{why}: ended after update {at}; goes on from step {step}"
    if kept.engine.world.process_index == 0:
        job.folder.write_status("preempted", step=step, reason=reason)
    raise Stopped(reason)


def _begin(stage: Stage, live: TrainState, *, is_new: bool, job: Run, kept: Kept) -> Callbacks:
    """Say and keep what the stage starts from, and set up its housekeeping."""
    engine, folder = kept.engine, job.folder
    counted = parameter_report(live.model, engine.store.shape)
    is_first_rank = engine.world.process_index == 0
    kept.tracker.say(f"{_title(stage)}\n{counted.table()}{_routes(live, job.config) if stage.is_low_rank else ''}")
    if is_first_rank:
        write_json(folder.path / f"parameters_{stage.name}.json", counted.as_dict())
    if stage.is_low_rank and is_new:
        write_stage_start(folder.stage_start, live, engine, writes=is_first_rank)
    return Callbacks(
        config=job.config,
        schedule=job.schedule,
        stage=stage,
        engine=engine,
        live=live,
        tracker=kept.tracker,
        data=job.data,
        checkpoints=kept.checkpoints,
        stage_start=open_stage_start(folder.stage_start) if stage.is_low_rank and is_first_rank else {},
        about=job.about,
    )


def _rehearse(job: Run, engine: Engine, state: State) -> None:
    """Build the stage that comes next and run one forward pass."""
    stage = next((s for s in stages(job.schedule) if state.step < s.end), stages(job.schedule)[-1])
    live = build(stage, state, config=job.config, hf_config=job.hf_config, engine=engine)
    samples = job.data.samples(job.config.data, job.config.seed)
    batch = samples.__getitems__(range(job.config.training.per_device_batch_size))
    with engine.inference(live):
        loss = engine.token_losses(live, batch).item() / max(1, num_label_tokens(batch))
    if engine.world.process_index == 0:
        print(f"{_title(stage)}\n{parameter_report(live.model, engine.store.shape).table()}")
        print(f"dry run: built, one forward pass, loss {loss:.4f} nats. Nothing was written to {job.folder.path}")


def _agree(job: Run, engine: Engine, state: State) -> None:
    """UserError if the processes hold other data or settings, or would go on from another state."""
    if not engine.world.all_equal(job.data.manifest.content_hash):
        raise UserError(["data: the processes of this launch hold different prepared data; compare the sources"])
    here = [job.about["fingerprint"], job.config.training.per_device_batch_size, state.stage, state.step, state.skipped]
    if not engine.world.all_equal(json.dumps(here)):
        raise UserError(
            [
                f"output_dir = {job.config.output_dir}: the processes of this launch have different settings, or see "
                "different checkpoints; it must be one folder on a disk that all nodes share"
            ]
        )


def _announce(job: Run, engine: Engine, state: State) -> None:
    """The first line says what really runs; then what it will do."""
    training = job.config.training
    print(
        f"relora {relora.__version__}: engine {engine.name}, world size {engine.world.num_processes}, "
        f"device {engine.world.device}, mixed precision {training.mixed_precision}, torch {torch.__version__}"
    )
    print(job.data.summary())
    numbers = derived_numbers(job.config, engine.world.num_processes)
    print(", ".join(f"{key} {value:,}" for key, value in numbers.items()))
    if training.method == "full":
        print("training.method = full: the settings of relora and lora are not used")
    if state.stage is not None:
        print(f"going on from step {state.step}")


def _open_folder(job: Run, engine: Engine, state: State) -> None:
    job.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    numbers = derived_numbers(job.config, engine.world.num_processes)
    settings = job.config.model_copy(update={"model": job.resolved_model})
    job.folder.write_config(settings, identity=job.identity, numbers=numbers)
    job.data.tokenizer().save_pretrained(job.folder.tokenizer)
    if not is_finished(job):
        job.folder.write_status("running", step=state.step)


def _routes(live: TrainState, config: Config) -> str:
    dtype = torch.bfloat16 if config.training.mixed_precision == "bf16" else torch.float32
    num_tokens = config.training.per_device_batch_size * config.data.sequence_length
    return "\n" + describe_routes(live.model, num_tokens, dtype)


def _title(stage: Stage) -> str:
    return f"stage {stage.name}: {'low' if stage.is_low_rank else 'full'}-rank to step {stage.end}"


@contextmanager
def _reason_in_status(folder: RunFolder, *, ours: bool) -> Iterator[None]:
    """Write why a run failed to its status.json, but never into a folder that is not `ours`."""
    try:
        yield
    except Stopped:
        raise  # in order: it says so itself
    except BaseException as error:
        if ours and is_first():
            # A disk that cannot be written to may be the very reason; the error itself says more.
            with suppress(OSError):
                folder.write_status("failed", step=folder.last_step(), reason=str(error) or type(error).__name__)
        raise


def _quiet_libraries() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
