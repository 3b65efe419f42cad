"""The training loop: take a batch, update, log, run the callbacks that are due."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from relora.config import Config
from relora.data import Batch
from relora.engines import Engine, TrainState, Update
from relora.errors import Failed
from relora.method.schedule import Schedule
from relora.tracking.throughput import Meter
from relora.tracking.tracker import Tracker
from relora.train.callbacks import Callbacks
from relora.train.signals import StopRequest

MAX_SKIPPED_IN_A_ROW = 10


class NotFiniteError(Failed):
    """Too many updates in a row whose loss or gradient was not finite."""


@dataclass
class Loop:
    """The loop of one stage.

    Attributes:
        batches: for each update in turn this process's micro-batches, from the sample of the first step on.
        stop_request: whether this process has been asked to stop.
        num_skipped: updates of the run whose loss or gradient was not finite on some process.
        num_skipped_in_a_row: those of them since the last update that was not skipped.
    """

    config: Config
    schedule: Schedule
    engine: Engine
    state: TrainState
    tracker: Tracker
    batches: Iterator[Sequence[Batch]]
    callbacks: Callbacks
    stop_request: StopRequest
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0

    def run(self, step: int, *, until: int, callbacks_at_end: bool) -> tuple[int, bool]:
        """Update from `step` to step `until`, or to where some process has been asked to stop.

        Args:
            callbacks_at_end: False where a switch follows at `until`: what is due there comes after the switch.

        Returns:
            The step reached, and whether the run stops there, as some process has been asked to.

        Raises:
            NotFiniteError: 10 updates in a row had to be skipped.
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
                    stops = self.callbacks(step, self.num_skipped, stops=stops)
                next_due = self.callbacks.next_due(step)
        return step, stops

    def update(self, step: int, batches: Sequence[Batch]) -> Update:
        """The update from `step` to `step + 1`. The device may still be computing it afterwards."""
        rate = self.schedule.rate(step)
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate
        # Dropout: a seed for each micro-batch, a pure function of its place in the run.
        samples_seen, index = step * self.config.training.global_batch_size, self.engine.world.process_index
        keys = [f"{self.config.seed}|{samples_seen}|{index}|{i}|dropout" for i in range(len(batches))]
        seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
        return self.engine.update(self.state, batches, seeds=seeds, stop=self.stop_request.reason is not None)

    def read(self, step: int, update: Update) -> tuple[float, float, bool]:
        """Loss, gradient norm, and whether the update that led to `step` was skipped. Waits for the device."""
        loss, grad_norm = update.loss.item(), update.grad_norm.item()
        skipped = not math.isfinite(loss + grad_norm)
        self.num_skipped += skipped
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if skipped else 0
        if skipped:
            message = (
                f"step {step}: the batch ending at sample {step * self.config.training.global_batch_size} was skipped, "
                f"its loss is {loss} and its gradient norm {grad_norm}"
            )
            self.tracker.log(message)
            if self.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise NotFiniteError(
                    f"{message}; that is {self.num_skipped_in_a_row} in a row, so the run stops. No skipped batch has "
                    "changed the model; try a lower learning rate in a new output_dir (from a relora export of this "
                    "run), or look at the data there"
                )
        return loss, grad_norm, skipped

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
