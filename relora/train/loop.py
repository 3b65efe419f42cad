"""The training loop: take a batch, update, log, run the callbacks that are due."""

import hashlib
import math
import statistics
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from relora.checkpoint.format import History, LeftOut
from relora.config import Config
from relora.data import Batch, Samples
from relora.data.batches import index_of
from relora.engines import Engine, TrainState, Update
from relora.errors import Failed
from relora.method.optimizer import PEAK
from relora.method.schedule import Schedule
from relora.tracking.throughput import Meter
from relora.tracking.tracker import Tracker
from relora.train.callbacks import Callbacks
from relora.train.signals import StopRequest
from relora.train.spikes import NUM_LEFT_OUT, Spike, SpikeError

MAX_SKIPPED_IN_A_ROW = 10
# A spike lies so many robust standard deviations above the median of the losses before it.
NUM_LOSSES, LEAST_LOSSES, MAX_DEVIATIONS = 64, 32, 6.0
DEVIATION_OF_MAD = 1.4826  # of a normal distribution: its standard deviation / its median absolute deviation
LEAST_DEVIATION = 0.01  # of the median: losses that hardly differ make no spike of a small rise
UNJUDGED_STEPS = 10  # after a restart, at least


class NotFiniteError(Failed):
    """Too many updates in a row were skipped."""


class Losses:
    """The losses by which the next one is judged, in nats: of the newest updates that were applied.

    The losses of the first updates after a restart, or after the switch to low rank, neither judge nor are judged.

    Args:
        known: (step, loss), oldest first.
    """

    def __init__(self, schedule: Schedule, known: Iterable[tuple[int, float]] = ()) -> None:
        self.schedule = schedule
        # One more than is needed: the newest may have to be left out.
        self.known = deque(known, maxlen=NUM_LOSSES + 1)

    def limit(self, step: int) -> float | None:
        """The largest loss of the update that leads to `step` that is no spike, None if the update is not judged.

        Only what the updates up to `step - 2` have told counts: the host may not know the result of the one before
        when it launches this one. So the limit is the same whenever it is asked for, also in a resumed run.
        """
        restart = self.schedule.last_restart(step - 1)
        if restart is not None and step - restart <= max(self.schedule.restart_warmup_steps, UNJUDGED_STEPS):
            return None
        losses = [loss for at, loss in self.known if at < step - 1][-NUM_LOSSES:]
        if len(losses) < LEAST_LOSSES:
            return math.inf
        center = statistics.median(losses)
        deviation = DEVIATION_OF_MAD * statistics.median(abs(loss - center) for loss in losses)
        return center + MAX_DEVIATIONS * max(deviation, LEAST_DEVIATION * abs(center))


@dataclass
class Loop:
    """The loop of one stage.

    Attributes:
        samples: the training samples; `batches` are theirs.
        batches: for each update in turn this process's micro-batches, from the sample of the first step on.
        stop_request: whether this process has been asked to stop.
        losses: by which a spike is told.
        left_out: the training data that the run leaves out, as it has gone back for them.
        num_skipped: updates of the run that were skipped by all processes.
        num_skipped_in_a_row: those of them since the last update that was not skipped.
        num_spikes: updates of the run whose loss was a spike.
    """

    config: Config
    schedule: Schedule
    engine: Engine
    state: TrainState
    tracker: Tracker
    samples: Samples
    batches: Generator[Sequence[Batch], None, None]
    callbacks: Callbacks
    stop_request: StopRequest
    losses: Losses
    left_out: Sequence[LeftOut] = ()
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    num_spikes: int = 0

    def run(self, step: int, *, until: int, callbacks_at_end: bool) -> tuple[int, bool]:
        """Update from `step` to step `until`, or to where some process has been asked to stop.

        Args:
            callbacks_at_end: False where a switch follows at `until`: what is due there comes after the switch.

        Returns:
            The step reached, and whether the run stops there, as some process has been asked to.

        Raises:
            NotFiniteError: 10 updates in a row had to be skipped.
            SpikeError: with `training.on_spike` rollback the loss of an update is a spike. No checkpoint has been
                written since.
        """
        meter, unread, stops = Meter(self.engine, self.state, self.config), list[Update](), False
        next_due = self.callbacks.next_due(step)
        while step < until and not stops:
            batches = next(self.batches)
            with meter.measure(len(batches)):
                unread.append(self.update(step, batches))
            step, stops = step + 1, unread[-1].stop and step + 1 < until
            is_logged = step % self.config.training.logging_steps == 0 or step == self.schedule.max_steps
            is_due = stops or (step == next_due and (step < until or callbacks_at_end))
            self.stop_request.num_moves += 1
            # The host reads the result of an update while the device computes the next one, and waits for the device
            # only where somebody needs the newest.
            if len(unread) > 1:
                self.read(step - 1, unread.pop(0))
            if is_logged or is_due or step == until:
                loss, grad_norm, skipped = self.read(step, unread.pop())
                if is_logged and not skipped:
                    self.log(step, loss, grad_norm, meter)
            if is_due:
                with meter.pause():
                    stops = self.callbacks(step, self.history(), stops=stops)
                next_due = self.callbacks.next_due(step)
        return step, stops

    def update(self, step: int, batches: Sequence[Batch]) -> Update:
        """The update from `step` to `step + 1`. The device may still be computing it afterwards."""
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step, peak=group[PEAK])
        # Dropout: a seed for each micro-batch, a pure function of its place in the run.
        samples_seen, index = step * self.config.training.global_batch_size, self.engine.world.process_index
        keys = [f"{self.config.seed}|{samples_seen}|{index}|{i}|dropout" for i in range(len(batches))]
        seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
        limit = self.losses.limit(step + 1) if self.config.training.on_spike == "skip" else None
        return self.engine.update(
            self.state,
            batches,
            seeds=seeds,
            stop=self.stop_request.reason is not None,
            max_loss=math.inf if limit is None else limit,
        )

    def read(self, step: int, update: Update) -> tuple[float, float, bool]:
        """Loss, gradient norm, and whether the update that led to `step` was skipped. Waits for the device.

        Raises:
            NotFiniteError, SpikeError: as `run`.
        """
        loss, grad_norm, limit = update.loss.item(), update.grad_norm.item(), self.losses.limit(step)
        is_spike = limit is not None and limit < loss < math.inf
        # As every process and its device have decided.
        skipped = not math.isfinite(loss + grad_norm) or (is_spike and self.config.training.on_spike == "skip")
        if limit is not None and not skipped:
            self.losses.known.append((step, loss))
        self.num_skipped += skipped
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if skipped else 0
        self.num_spikes += is_spike
        if is_spike and limit is not None:
            self.report_spike(step, loss, limit)
        if skipped:
            self.report_skipped(step, loss, grad_norm)
        return loss, grad_norm, skipped

    def report_spike(self, step: int, loss: float, limit: float) -> None:
        """Tell of the spike in the update that led to `step`, and go back if that is asked for (SpikeError)."""
        batch, ranges = self.config.training.global_batch_size, self.samples.left_out
        before = max(0, step - NUM_LEFT_OUT) * batch
        first, last = index_of((step - 1) * batch, ranges), index_of(step * batch - 1, ranges)
        self.tracker.log(
            f"step {step}: the loss {loss:.4f} is a spike, above the limit {limit:.4f} that the losses before it set "
            f"(samples {first} to {last})"
        )
        places = {"first_sample": first, "last_sample": last}
        self.tracker.line(
            {"step": step, "spike_loss": loss, "spike_limit": limit} | places | {"spikes": self.num_spikes}
        )
        if self.config.training.on_spike == "rollback":
            raise SpikeError(Spike(step, loss, limit, index_of(before, ranges), last + 1))

    def report_skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """Tell that the update that led to `step` was skipped; NotFiniteError for the tenth in a row."""
        batch, ranges = self.config.training.global_batch_size, self.samples.left_out
        first, last = index_of((step - 1) * batch, ranges), index_of(step * batch - 1, ranges)
        message = (
            f"step {step}: the batch of the samples {first} to {last} was skipped, its loss is {loss} and its gradient "
            f"norm {grad_norm}"
        )
        self.tracker.log(message)
        if self.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NotFiniteError(
                f"{message}; that is {self.num_skipped_in_a_row} in a row, so the run stops. No skipped batch has "
                "changed the model; try a lower learning rate in a new output_dir (from a relora export of this "
                "run), or look at the data there"
            )

    def history(self) -> History:
        """What the updates so far have told; the results of all of them have been read."""
        return History(
            skipped=self.num_skipped,
            spikes=self.num_spikes,
            losses=list(self.losses.known),
            left_out=list(self.left_out),
        )

    def log(self, step: int, loss: float, grad_norm: float, meter: Meter) -> None:
        """One line of metrics on the update that led to `step`, and the progress bar."""
        samples_seen, speed = step * self.config.training.global_batch_size, meter.fields()
        rate = self.schedule.rate(step - 1)
        self.tracker.line(
            {
                "step": step,
                "samples_seen": samples_seen,
                "tokens": samples_seen * self.config.data.sequence_length,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "skipped": self.num_skipped,
                **speed,
            }
        )
        self.tracker.progress(
            step,
            loss=f"{loss:.3f}",
            lr=f"{rate:.2e}",
            tok_s=f"{speed['tokens_per_second']:,.0f}",
            restarts=str(self.schedule.restarts_done(step)),
        )
