"""The only training loop. It knows one clock, and neither stages nor engines.

updates -> log -> (restart -> evaluate -> checkpoint, where they are due) -> updates -> ...

Where the engine allows it, the device is given all updates up to the next step whose numbers somebody waits for. One
whose loss or gradient is not finite is not made there, nor are those behind it; the loop goes back to the next batch.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from relora.config import Config
from relora.engines import Batch, Engine, Queued, TrainState, Update, read
from relora.method.optimizer import set_learning_rate
from relora.method.schedule import Schedule
from relora.tracking.throughput import Meter, peak_memory_bytes
from relora.tracking.tracker import Tracker
from relora.train.signals import StopRequest

MAX_SKIPPED_IN_A_ROW = 10
MOST_QUEUED = 32  # updates whose batches wait in host memory; a wait for the device after so many costs nothing


@dataclass(frozen=True)
class Clock:
    """Batches consumed, and how many of them were skipped."""

    step: int
    skipped: int

    def applied(self) -> "Clock":
        return replace(self, step=self.step + 1)

    def after_skip(self) -> "Clock":
        return Clock(self.step + 1, self.skipped + 1)


class NotFiniteError(RuntimeError):
    """Too many updates in a row whose loss or gradient was not finite."""


@dataclass(frozen=True)
class Loop:
    """What the loop works with.

    Attributes:
        batches: for each update in turn this rank's micro-batches, from the step on.
        arrive: called at least at each step where something is due: restart, evaluation, checkpoint.
        due: whether anything is at a step.
        asked: whether this process has been asked to stop.
    """

    config: Config
    schedule: Schedule
    engine: Engine
    live: TrainState
    tracker: Tracker
    batches: Iterator[Sequence[Batch]]
    arrive: Callable[[int, int], None]
    due: Callable[[int], bool]
    asked: StopRequest

    def run(self, step: int, skipped: int, *, until: int, arrive_at_end: bool) -> tuple[int, int, bool]:
        """Update until the clock stands at step `until`, or some rank has been asked to stop.

        Args:
            arrive_at_end: False when a switch follows at `until`: what is due there comes after the switch.

        Returns:
            The clock, and whether the run is to stop here, before its time.

        Raises:
            NotFiniteError: 10 updates in a row had to be skipped.
        """
        clock, meter, in_a_row = Clock(step, skipped), Meter(self.engine, self.live, self.config), 0
        unused = deque[Sequence[Batch]]()
        while clock.step < until:
            # What is queued behind an update that is not made is not made either: after one, each is looked at.
            end = clock.step + 1 if in_a_row else self._next_look(clock.step, until)
            taken, queued = self._queue(clock, unused, meter, end=end)
            updates = read(queued)
            meter.waited(len(updates))
            for update in updates:
                clock, in_a_row = self._count(clock, update, in_a_row)
            unused.extendleft(reversed(taken[len(updates) :]))
            if not in_a_row:
                self._log(clock, updates[-1], meter)
            if queued[-1].stop and clock.step < until:
                return clock.step, clock.skipped, True
            if clock.step < until or arrive_at_end:
                self.arrive(clock.step, clock.skipped)
                meter.restart_clock()
        return clock.step, clock.skipped, False

    def _next_look(self, step: int, until: int) -> int:
        """The step up to which updates can be made without a look at what they measured."""
        if not self.engine.queues(self.live):
            return step + 1
        logging_steps, until = self.config.training.logging_steps, min(until, step + MOST_QUEUED)
        looks = (later for later in range(step + 1, until) if later % logging_steps == 0 or self.due(later))
        return next(looks, until)

    def _queue(
        self, clock: Clock, unused: deque[Sequence[Batch]], meter: Meter, *, end: int
    ) -> tuple[list[Sequence[Batch]], list[Queued]]:
        """Batches and updates up to step `end`, or to the one at which some rank has been asked to stop."""
        taken, queued = list[Sequence[Batch]](), list[Queued]()
        while clock.step < end and not (queued and queued[-1].stop):
            taken.append(unused.popleft() if unused else next(self.batches))
            with meter.measured(len(taken[-1])):
                queued.append(self._update(clock, taken[-1], after=queued[-1] if queued else None))
            clock = clock.applied()
        return taken, queued

    def _update(self, clock: Clock, batches: Sequence[Batch], *, after: Queued | None) -> Queued:
        set_learning_rate(self.live.optimizer, self.schedule.rate(clock.step))
        seed = self.config.seed
        seeds = [
            micro_batch_seed(seed, clock.step * self._num_samples, self.engine.world.process_index, i)
            for i in range(len(batches))
        ]
        return self.engine.update(self.live, batches, seeds=seeds, stop=self.asked.signal is not None, after=after)

    def _count(self, clock: Clock, update: Update, skipped: int) -> tuple[Clock, int]:
        """The clock after this update, and how many in a row were skipped."""
        if update.applied:
            return clock.applied(), 0
        clock = clock.after_skip()
        self._tell_skipped(clock, update, skipped + 1)
        return clock, skipped + 1

    @property
    def _num_samples(self) -> int:
        return self.config.training.global_batch_size

    def _log(self, clock: Clock, update: Update, meter: Meter) -> None:
        config = self.config
        due = clock.step % config.training.logging_steps == 0 or clock.step == self.schedule.max_steps
        if not due:
            return
        line = {
            "step": clock.step,
            "skipped": clock.skipped,
            "tokens": clock.step * self._num_samples * config.data.sequence_length,
            "loss": update.loss,
            "learning_rate": self.schedule.rate(clock.step - 1),
            "grad_norm": update.grad_norm,
            **meter.speed(),
            "peak_memory_bytes": peak_memory_bytes(self.engine.world.device),
            **meter.bytes_sent(),
        }
        self.tracker.line(line)
        self.tracker.progress(
            clock.step,
            loss=f"{update.loss:.3f}",
            lr=f"{line['learning_rate']:.2e}",
            tok_s=f"{line['tokens_per_second']:,.0f}",
            restarts=str(self.schedule.restarts_done(clock.step)),
        )

    def _tell_skipped(self, clock: Clock, update: Update, skipped: int) -> None:
        told = (
            f"step {clock.step}: the batch ending at sample {clock.step * self._num_samples} was skipped, its loss is "
            f"{update.loss} and its gradient norm {update.grad_norm}"
        )
        self.tracker.say(told)
        if skipped >= MAX_SKIPPED_IN_A_ROW:
            raise NotFiniteError(
                f"{told}; that is {skipped} in a row, so the run stops. No skipped batch has changed the model; try a "
                "lower learning rate in a new output_dir (from a relora export of this run), or look at the data there"
            )


def micro_batch_seed(seed: int, samples_seen: int, process_index: int, index: int) -> int:
    """The seed of dropout in one micro-batch, a pure function of the position."""
    digest = hashlib.sha256(f"{seed}|{samples_seen}|{process_index}|{index}|dropout".encode()).digest()
    return int.from_bytes(digest[:8], "big")
