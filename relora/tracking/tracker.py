"""Reports of a run: a tracker hands everything to a list of sinks.

Only the first process has sinks; the tracker of every other process is `Tracker([])`. A new sink is a subclass of
`Sink`, named in `training.report_to`: by its key in SINKS, or as `module:attribute`.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries
from tqdm import tqdm

from relora.checkpoint.format import MetricsFacts
from relora.checkpoint.run_folder import RunFolder
from relora.errors import warn
from relora.method.registry import resolve
from relora.text import code_block
from relora.tracking.metrics_file import KINDS, cut_metrics, written_again
from relora.tracking.plots import INSTALL, has_matplotlib, spectrum_picture, wait_until_newest

P = ParamSpec("P")
LOGGED_BAR_S = 60.0  # between two states of the progress bar in a file: that of a batch job has no terminal


@dataclass(frozen=True)
class SinkContext:
    """The run that a sink is opened for.

    Attributes:
        folder: the run folder, which is there.
        start_step: the step that the run resumes from; None for a new run.
        cycle: restarts behind it at that step.
        total_steps: the step at which the run ends.
        hparams: the settings that make the run what it is, by dotted key.
        evaluated: whether the evaluation that was due at `start_step`, if any, has been made.
        metrics: metrics.jsonl as it was at `start_step`; None where nobody recorded it.
    """

    folder: Path
    start_step: int | None
    cycle: int
    total_steps: int
    hparams: Mapping[str, Any]
    evaluated: bool = True
    metrics: MetricsFacts | None = None


class Sink:
    """One place that a run reports to. Each method does nothing unless a subclass wants to know of it.

    A sink is constructed with a `SinkContext`, in the first process alone, and is used by one thread. A resumed run
    reports the steps past its checkpoint again, also to a sink that has seen them before.
    """

    def __init__(self, context: SinkContext) -> None:
        self.context = context

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Record one line of metrics.

        Args:
            line: `step`, and fields of numbers, strings or None. The kind of the line is in `KINDS`; each kind and step
                comes once in a run that is not resumed.
        """

    def progress(self, step: int, **fields: str) -> None:
        """Show how far the run is.

        Args:
            step: batches consumed, out of `context.total_steps`.
            fields: short values of the newest update, ready to print, such as loss="2.315".
        """

    def message(self, text: str) -> None:
        """Show a message to whoever watches the run; `text` may have several lines."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a piece of text, such as a sample.

        Args:
            tag: names the series that the text belongs to, such as sample/0.
        """

    def spectra(self, spectra: Mapping[str, Tensor], step: int) -> None:
        """Record singular values of W - W_start.

        Args:
            spectra: by layer name, 1-D, float32 on the CPU, descending.
        """

    def sync(self, step: int) -> None:
        """Bring everything recorded up to `step` to the disk. The checkpoint of the step is written afterwards, and a
        run that resumes from it does not report these steps again.
        """

    def close(self) -> None:
        """The run has ended, or failed; nothing comes after this."""


class Tracker:
    """Hands everything that a run reports to its sinks, in their order; the arguments are those of `Sink`."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks
        self.line = to_all(Sink.metrics, [sink.metrics for sink in sinks])
        self.progress = to_all(Sink.progress, [sink.progress for sink in sinks])
        self.log = to_all(Sink.message, [sink.message for sink in sinks])
        self.text = to_all(Sink.text, [sink.text for sink in sinks])
        self.spectra = to_all(Sink.spectra, [sink.spectra for sink in sinks])
        self.sync = to_all(Sink.sync, [sink.sync for sink in sinks])

    def close(self) -> None:
        """Close every sink, whatever becomes of the others.

        Raises:
            Exception: the last one that a sink raised.
        """
        with ExitStack() as stack:
            for sink in reversed(self.sinks):
                stack.callback(sink.close)


def to_all(default: Callable[..., None], methods: Sequence[Callable[P, None]]) -> Callable[P, None]:
    """A function that calls all of `methods` with its arguments, but for those that are the do-nothing `default`."""
    methods = [method for method in methods if getattr(method, "__func__", None) is not default]

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        for method in methods:
            method(*args, **kwargs)

    return call


def open_tracker(context: SinkContext, report_to: Sequence[str]) -> Tracker:
    """The tracker of the first process: metrics.jsonl, the sinks of `training.report_to`, progress bar and status.

    Raises:
        ValueError: as `sink_problems`.
    """
    sinks: list[Sink] = [MetricsFile(context)]
    sinks += [resolve("training.report_to", name, SINKS)(context) for name in report_to]
    return Tracker([*sinks, ProgressBar(context), StatusFile(context)])


def sink_problems(report_to: Sequence[str]) -> list[str]:
    """One line for each name in `training.report_to` that is no sink or cannot be imported."""
    problems = []
    for name in report_to:
        try:
            sink: Any = resolve("training.report_to", name, SINKS)
        except ValueError as error:
            problems.append(str(error))
        else:
            if not callable(sink):
                problems.append(f"training.report_to = {name}: must be a subclass of relora.tracking.tracker.Sink")
    return problems


class MetricsFile(Sink):
    """metrics.jsonl: one JSON object a line, with the `time` (UTC) at which it was written.

    A resumed run cuts off the lines past its checkpoint. Where the file is removed, replaced or shortened while the run
    writes it, the lines that can still be read are written again, with a warning, at the next `sync`.
    """

    def __init__(self, context: SinkContext) -> None:
        super().__init__(context)
        self.path = RunFolder(context.folder).metrics
        cut_metrics(
            self.path,
            after_step=context.start_step,
            cycle=context.cycle,
            evaluated=context.evaluated,
            facts=context.metrics,
        )
        self._open()

    def _open(self) -> None:
        """Open the file for lines to be added. Its end is noted: nobody else may write there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Readable too: a file that is removed while it is open can still be read.
        self._file = self.path.open("a+", encoding="utf-8")
        self._size = os.fstat(self._file.fileno()).st_size

    def metrics(self, line: Mapping[str, Any]) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._size += self._file.write(json.dumps({**line, "time": time}) + "\n")  # ASCII: a byte for each character
        self._file.flush()

    def sync(self, step: int) -> None:
        if written_again(self.path, self._file, self._size, before_step=step):
            self._open()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync(self.context.total_steps)
        self._file.close()


class TensorBoard(Sink):
    """Scalars under the kind of their line, samples as text, spectra as pictures, the settings as hyperparameters.

    Where the folder is removed while the run writes to it, a new file of events begins, with a warning.
    """

    def __init__(self, context: SinkContext) -> None:
        super().__init__(context)
        start = context.start_step
        self.folder = RunFolder(context.folder).tensorboard
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        wait_until_newest(self.folder)
        self._board = SummaryWriter(str(self.folder), purge_step=0 if start is None else start + 1)
        if not has_matplotlib():
            print(f"no pictures in TensorBoard: matplotlib is missing ({INSTALL})", file=sys.stderr)
        if start is None:
            plain = (int, float, str)
            settings = {key: v if isinstance(v, plain) else str(v) for key, v in context.hparams.items()}
            # Not add_hparams: it opens a second file of events, and TensorBoard would leave the first one behind.
            for summary in hparams_summaries(settings, {"hparam/started": 1}):  # type: ignore[no-untyped-call]
                self._board.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def metrics(self, line: Mapping[str, Any]) -> None:
        # {"step": 7, "eval_loss": 2.3} -> eval/loss at 7
        kind = next(kind for key, kind in KINDS.items() if key in line)
        try:
            for key, value in line.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{key.removeprefix(f'{kind}_')}", value, line["step"])
        except FileNotFoundError:
            self._begin_again()
            self.metrics(line)

    def text(self, tag: str, text: str, step: int) -> None:
        try:
            self._board.add_text(tag, code_block(text), step)
        except FileNotFoundError:
            self._begin_again()
            self.text(tag, text, step)

    def spectra(self, spectra: Mapping[str, Tensor], step: int) -> None:
        picture = spectrum_picture(spectra, title=f"W - W_start after {step} updates") if spectra else None
        try:
            if picture is not None:
                self._board.add_image("spectrum", picture, step, dataformats="HWC")
        except FileNotFoundError:
            self._begin_again()
            self.spectra(spectra, step)

    def sync(self, step: int) -> None:  # noqa: ARG002
        try:
            self._board.flush()
        except FileNotFoundError:
            self._begin_again()

    def close(self) -> None:
        try:
            with suppress(FileNotFoundError):
                self._board.close()
        finally:
            threading.excepthook = self._hook

    def _thread_failed(self, failure: Any) -> None:
        """Say nothing of the writer's thread, whose error the next call of the board raises here; else as before."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._hook(failure)

    def _begin_again(self) -> None:
        """Open a new file of events, in the folder made anew: that of the old one is gone."""
        warn(f"{self.folder} was removed; a new file of events begins there, what the old one held is lost")
        with suppress(OSError):
            self._board.close()
        self._board = SummaryWriter(str(self.folder))


class ProgressBar(Sink):
    """The progress bar on stderr, and messages on stdout, which do not tear it."""

    def __init__(self, context: SinkContext) -> None:
        super().__init__(context)
        self._bar = tqdm(
            total=context.total_steps,
            initial=context.start_step or 0,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0 if sys.stderr.isatty() else LOGGED_BAR_S,
        )

    def progress(self, step: int, **fields: str) -> None:
        self._bar.set_postfix(fields, refresh=False)
        self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        tqdm.write(text)

    def close(self) -> None:
        self._bar.close()


class StatusFile(Sink):
    """status.json: the step up to which everything is on the disk. It comes last, after all others have synced."""

    def sync(self, step: int) -> None:
        RunFolder(self.context.folder).write_status("running", step=step)


SINKS: Mapping[str, Callable[[SinkContext], Sink]] = {"tensorboard": TensorBoard}
