"""The story of a run: preflight, connect, build and train each stage, finish."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from transformers.utils import logging as transformers_logging

from relora.checkpoint.load import last_step
from relora.checkpoint.run_folder import RunFolder, Status
from relora.checkpoint.save import Checkpoints, write_stage_start
from relora.checkpoint.state import State
from relora.checkpoint.verify import open_stage_start
from relora.config import Config
from relora.data import micro_batches
from relora.engines import Engine, TrainState, connect, is_first
from relora.errors import Failed, Stopped, UserError, disk_errors_name, raise_if_any
from relora.files import write_json
from relora.method.parameter_report import describe_routes, parameter_report
from relora.tracking.tracker import SinkContext, Tracker, open_tracker
from relora.train.callbacks import Callbacks
from relora.train.finish import finish, is_finished
from relora.train.headings import header, title
from relora.train.loop import Loop, Losses
from relora.train.preflight import preflight
from relora.train.run import Run, check_agreement, newest_state, write_settings
from relora.train.signals import StopRequest, stop_signals
from relora.train.spikes import SpikeError, go_back
from relora.train.stages import Stage, build, stages, switch
from relora.train.watch import Watch, watched


def train(config: Config, *, dry_run: bool = False, extend: bool = False, strict: bool = False) -> None:
    """Train, from the newest whole checkpoint of the run if it has one.

    Args:
        dry_run: stop after building the model and one forward pass; nothing is written to the run folder.
        extend: allow a larger max_steps than the run began with.
        strict: refuse to resume where the newest checkpoint is damaged; without it the one before is used.

    Raises:
        UserError: a mistake in the configuration, the files, the data or the launch.
        Stopped: some process was asked to stop; the same call resumes the run later.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = RunFolder(Path(config.output_dir))
    with ExitStack() as stack:
        request = stack.enter_context(stop_signals())
        request.outcome = "ended before the first update; the same command starts again"
        with end_in_status(folder, request, may_write=not folder.is_run and not dry_run):
            run = preflight(config, extend=extend)
        if not dry_run:
            if is_first():
                stack.enter_context(folder.locked())
            stack.enter_context(end_in_status(folder, request, may_write=True))
        engine = connect(config)
        engine.world.before_ending(partial(request.last_words, "failed"))
        try:
            state = newest_state(run, engine.world, strict=strict, may_change=not dry_run)
            check_agreement(run, engine.world, state)
            if is_first():
                print(header(run, engine, state))
            if dry_run:
                rehearse(run, engine, state)
            else:
                with disk_errors_name(folder.path):
                    train_past_spikes(run, engine, state, request)
        except BaseException as error:
            if not request.obeyed:  # else all processes end in the same way
                first = engine.world.report_failure(error)
                if first and isinstance(error, Exception) and not isinstance(error, UserError | Failed):
                    # Most likely that a peer is gone: of this neither status.json nor the launcher shall tell.
                    raise Failed(f"{first}; here followed {type(error).__name__}: {error}") from error
                raise
            engine.world.close()
            raise
        engine.world.close()


@dataclass(frozen=True)
class Context:
    """Everything that the stages of a run have in common."""

    run: Run
    engine: Engine
    tracker: Tracker
    checkpoints: Checkpoints
    stop_request: StopRequest


def train_past_spikes(run: Run, engine: Engine, state: State, stop_request: StopRequest) -> None:
    """As `train_stages`, which begins again from an earlier checkpoint for each spike that the run goes back for."""
    while True:
        try:
            train_stages(run, engine, state, stop_request)
            return
        except SpikeError as error:
            spike = error.spike  # the error itself holds the model of the stage
        go_back(run.folder, engine.world, spike)
        stop_request.outcome = "going back to an earlier checkpoint; the same command goes on"
        stop_request.end_postponement()
        state = newest_state(run, engine.world, may_change=True)


def train_stages(run: Run, engine: Engine, state: State, stop_request: StopRequest) -> None:
    """Train the stages of a run from `state` to its end, and write the final model.

    Raises:
        Stopped: as `train`.
        SpikeError: the loss of an update is a spike, and `training.on_spike` is rollback.
    """
    config, folder, writes = run.config, run.folder, engine.world.process_index == 0
    if writes:
        write_settings(run, engine.world.num_processes)
        if not is_finished(run):
            folder.write_status("running", step=state.step)
    tracker = Tracker([])
    if writes:
        sinks = SinkContext(
            folder=folder.path,
            start_step=None if state.stage is None else state.step,
            cycle=state.cycle,
            total_steps=run.schedule.max_steps,
            hparams=run.identity,
            evaluated=state.evaluated,
            metrics=state.metrics,
        )
        tracker = open_tracker(sinks, config.training.report_to)
    checkpoints = Checkpoints(
        folder.checkpoints,
        limit=config.training.save_total_limit,
        writes=writes,
        in_background=config.training.async_save,
        warn=tracker.log,
    )
    if writes:
        checkpoints.remove_leftovers()
    watch = Watch(
        folder,
        stop_request,
        max_hours=config.training.max_hours,
        timeout_minutes=config.training.timeout_minutes,
        expected_save_s=checkpoints.expected_seconds,
        tell_others=engine.world.report_failure,
    )
    with closing(tracker), closing(checkpoints), watched(watch) if writes else nullcontext():
        context = Context(run, engine, tracker, checkpoints, stop_request)
        for stage in stages(run.schedule):
            if state.step < stage.end or (state.stage == stage.name and not state.evaluated):
                state = train_stage(stage, state, context)
        if not checkpoints.wait():
            raise Failed(
                f"training has ended, but the checkpoint of step {state.step} could not be written; the same command "
                f"resumes from step {last_step(folder.checkpoints)} when there is room"
            )
    stop_request.outcome = "all updates are done; the same command writes the final model"
    stop_request.end_postponement()
    if writes:
        print(finish(run), flush=True)
    engine.world.barrier()


def train_stage(stage: Stage, state: State, context: Context) -> State:
    """Build the stage from `state`, train it to its end, and return the state that the next one begins with.

    Raises:
        Stopped: some process was asked to stop. A checkpoint has been written, if there was time for one.
    """
    run, engine, is_new = context.run, context.engine, state.stage != stage.name
    live = build(stage, state, config=run.config, hf_config=run.hf_config, engine=engine, usage=run.usage)
    # It takes weights to see whether tokens leak: this check cannot come before the model is built.
    with engine.inference(live):
        mask = run.config.data.document_mask
        raise_if_any(run.task.leaks(live.model, run.vocab_size, document_mask=mask))
    if run.config.model.torch_compile:
        engine.compile(live)
    if engine.world.device.type == "cuda":
        # The peak that is logged is that of the stage: the warm start's would hide the low-rank one's.
        torch.cuda.reset_peak_memory_stats(engine.world.device)
    callbacks = begin_stage(stage, live, context, is_new=is_new)
    context.stop_request.postpone()
    if callbacks(state.step, state.history) if is_new else callbacks.catch_up(state):
        stop(state.step, context)
    loop, is_last = loop_from(state, live, callbacks, context), stage.end == run.schedule.max_steps
    with closing(loop.batches):  # ends the processes that read ahead
        try:
            step, stops = loop.run(state.step, until=stage.end, callbacks_at_end=is_last)
        except SpikeError:
            engine.release(live)  # the stage will be built anew
            raise
        if stops:
            stop(step, context)
    if is_last:
        return State(step=step, history=loop.history(), stage=stage.name)
    return switch(live, engine, step=step, history=loop.history())


def loop_from(state: State, live: TrainState, callbacks: Callbacks, context: Context) -> Loop:
    """The loop that goes on from `state`, with the data that come next."""
    run, engine, training, history = context.run, context.engine, context.run.config.training, state.history
    samples = run.data.samples(
        run.config.data,
        run.config.seed,
        make_batch=run.task.make_batch,
        left_out=[(entry.first, entry.end) for entry in history.left_out],
    )
    batches = micro_batches(
        samples,
        start=state.step * training.global_batch_size,
        global_batch_size=training.global_batch_size,
        per_device_batch_size=training.per_device_batch_size,
        process_index=engine.world.process_index,
        num_processes=engine.world.num_processes,
        num_workers=run.config.data.num_workers,
        pin_memory=engine.world.device.type != "cpu",
    )
    return Loop(
        config=run.config,
        schedule=run.schedule,
        engine=engine,
        state=live,
        tracker=context.tracker,
        samples=samples,
        batches=batches,
        callbacks=callbacks,
        stop_request=context.stop_request,
        losses=Losses(run.schedule, history.losses),
        left_out=history.left_out,
        num_skipped=history.skipped,
        num_spikes=history.spikes,
    )


def begin_stage(stage: Stage, live: TrainState, context: Context, *, is_new: bool) -> Callbacks:
    """Log and save the stage's starting point, and build its callbacks."""
    run, engine, folder = context.run, context.engine, context.run.folder
    report, is_first_process = parameter_report(live.model, engine.store.shape), engine.world.process_index == 0
    lines = [title(stage), report.table()]
    if stage.is_low_rank:
        dtype = torch.bfloat16 if run.config.training.mixed_precision == "bf16" else torch.float32
        num_tokens = run.config.training.per_device_batch_size * run.config.data.sequence_length
        lines.append(describe_routes(live.model, num_tokens, dtype))
    context.tracker.log("\n".join(lines))
    if is_first_process:
        write_json(folder.path / f"parameters_{stage.name}.json", report.as_dict())
    if stage.is_low_rank and is_new:
        write_stage_start(folder.stage_start, live, engine, writes=is_first_process)
    return Callbacks(
        run=run,
        stage=stage,
        engine=engine,
        state=live,
        tracker=context.tracker,
        checkpoints=context.checkpoints,
        stage_start=open_stage_start(folder.stage_start) if stage.is_low_rank and is_first_process else {},
        stop_request=context.stop_request,
    )


def stop(step: int, context: Context) -> NoReturn:
    """Stop the run cleanly. The status is written before any process exits: a launcher then kills the others."""
    request, folder, world = context.stop_request, context.run.folder, context.engine.world
    context.checkpoints.wait()
    world.barrier()  # the first process has written its checkpoint
    resume_step = last_step(folder.checkpoints)
    reason = f"{request.reason or 'asked to stop'}: ended after update {step}; resumes from step {resume_step}"
    if world.process_index == 0:
        folder.write_status("preempted", step=resume_step, reason=reason)
        if str(folder.stop) in reason:
            folder.stop.unlink(missing_ok=True)
    world.barrier()
    request.obeyed, request.postpones = True, False
    raise Stopped(reason)


def rehearse(run: Run, engine: Engine, state: State) -> None:
    """Build the stage that comes next and run one forward pass."""
    all_stages = stages(run.schedule)
    stage = next((stage for stage in all_stages if state.step < stage.end), all_stages[-1])
    # Masters in memory: those mapped from files would be files in the run folder.
    config = run.config.model_copy(update={"lora": run.config.lora.model_copy(update={"master": "host"})})
    live = build(stage, state, config=config, hf_config=run.hf_config, engine=engine, usage=run.usage)
    samples = run.data.samples(run.config.data, run.config.seed, make_batch=run.task.make_batch)
    batch = samples.__getitems__(range(run.config.training.per_device_batch_size))
    with engine.inference(live):
        loss = engine.loss(live, batch).item() / max(1, run.task.num_labels(batch))
    if engine.world.process_index == 0:
        print(f"{title(stage)}\n{parameter_report(live.model, engine.store.shape).table()}")
        print(f"dry run: built the model and ran one forward pass, loss {loss:.4f} nats; no run was started")


@contextmanager
def end_in_status(folder: RunFolder, request: StopRequest, *, may_write: bool) -> Iterator[None]:
    """However this ends early, write why to the run's status.json if `may_write`: it may be another run's folder."""

    def write(status: Status, reason: str) -> None:
        if may_write and is_first():
            # A disk that cannot be written to may be the very reason; the error itself is more important.
            with suppress(OSError):
                folder.write_status(status, step=last_step(folder.checkpoints), reason=reason)

    request.last_words = write
    try:
        yield
    except BaseException as error:
        if request.interrupted:  # the error may be what a library has made of it
            write("preempted", f"{request.reason}: {request.outcome}")
        elif not request.obeyed:  # else `stop` has written it
            write("failed", str(error) or type(error).__name__)
        raise
