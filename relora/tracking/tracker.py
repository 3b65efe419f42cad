"""What a run shows while it goes on: metrics.jsonl, TensorBoard, the progress bar. Only rank 0 talks."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries
from tqdm import tqdm

from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.state import State
from relora.tracking.metrics_file import MetricsFile, cut_metrics
from relora.tracking.plots import spectrum_picture

# The first key of a line says what kind it is; its fields go to TensorBoard under the name of the kind.
_KINDS = {"loss": "train", "eval_loss": "eval", "restart": "restart", "probe_loss": "probe"}


class Tracker(Protocol):
    """Where the loop reports to. Other ranks have one that does nothing."""

    def line(self, line: Mapping[str, Any]) -> None:
        """Record one line of metrics; it carries its `step`."""

    def progress(self, step: int, **shown: str) -> None:
        """Move the progress bar."""

    def say(self, text: str) -> None:
        """Print, without tearing the progress bar."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a piece of text in TensorBoard."""

    def spectra(self, spectra: Mapping[str, Tensor], step: int) -> None:
        """Show singular values, descending, as one picture."""

    def sync(self, step: int) -> None:
        """Everything recorded up to `step` is on the disk afterwards; its checkpoint comes next."""

    def close(self) -> None: ...


class SilentTracker:
    """For all ranks but the first."""

    def line(self, line: Mapping[str, Any]) -> None: ...

    def progress(self, step: int, **shown: str) -> None: ...

    def say(self, text: str) -> None: ...

    def text(self, tag: str, text: str, step: int) -> None: ...

    def spectra(self, spectra: Mapping[str, Tensor], step: int) -> None: ...

    def sync(self, step: int) -> None: ...

    def close(self) -> None: ...


class RunTracker:
    """metrics.jsonl, TensorBoard and the progress bar of one run, from `start` on."""

    def __init__(self, folder: RunFolder, state: State, *, total: int, hparams: Mapping[str, Any]) -> None:
        """`state` is what the run goes on from."""
        self._folder = folder
        start = None if state.stage is None else state.step
        cut_metrics(folder.metrics, after_step=start, cycle=state.cycle)
        self._metrics = MetricsFile(folder.metrics)
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=0 if start is None else start + 1)
        self._bar = tqdm(total=total, initial=start or 0, unit="step", dynamic_ncols=True, mininterval=1.0)
        if start is None:
            self._hparams(hparams)

    def line(self, line: Mapping[str, Any]) -> None:
        self._metrics.write(line)
        kind = next(kind for key, kind in _KINDS.items() if key in line)
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{_short(key, kind)}", value, line["step"])

    def progress(self, step: int, **shown: str) -> None:
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        tqdm.write(text)

    def text(self, tag: str, text: str, step: int) -> None:
        self._board.add_text(tag, f"```\n{text}\n```", step)

    def spectra(self, spectra: Mapping[str, Tensor], step: int) -> None:
        picture = spectrum_picture(spectra, title=f"W - W_start after {step} updates")
        if picture is not None:
            self._board.add_image("spectrum", picture, step, dataformats="HWC")

    def sync(self, step: int) -> None:
        self._metrics.sync()
        self._board.flush()
        self._folder.write_status("running", step=step)

    def close(self) -> None:
        self._bar.close()
        self._metrics.close()
        self._board.close()

    def _hparams(self, hparams: Mapping[str, Any]) -> None:
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in hparams.items()}
        # Not add_hparams: it opens a second file of events, and TensorBoard would leave the first one behind.
        for summary in hparams_summaries(plain, {"hparam/started": 1}):  # type: ignore[no-untyped-call]
            self._board.file_writer.add_summary(summary)  # type: ignore[attr-defined]


def _short(key: str, kind: str) -> str:
    return key.removeprefix(f"{kind}_")
