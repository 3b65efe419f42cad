"""Whether checkpoints are whole, and which one a run resumes from if some are not.

A checkpoint is whole if its manifest is the one that was written (a hash of its own, `format.py`), belongs to this
folder, and each file has the size, the hash and the tensors that the manifest says. Files that checkpoints of a cycle
share by hard links are read once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from relora.checkpoint.format import FORMAT, MANIFEST, TensorManifest
from relora.checkpoint.load import DamagedError, TensorFiles, read_manifest, read_tensors, step_of
from relora.config import UserError
from relora.errors import warn
from relora.files import DAMAGED, set_aside, sha256_of

Hashes = dict[tuple[int, int], str]  # by device and inode


def checkpoint_problems(folder: Path) -> list[str]:
    """One line that says in what way a checkpoint is not what was written; none if it is whole.

    Raises:
        UserError: it has another format, or a file cannot be read.
    """
    try:
        check_files(folder, read_manifest(folder), {})
    except DamagedError as error:
        return error.problems
    return []


def check_files(folder: Path, manifest: TensorManifest, hashes: Hashes) -> None:
    """Compare the files in `folder` with its manifest.

    Args:
        hashes: of files that were read before; those read now are added.

    Raises:
        DamagedError: one is missing or differs, or the manifest leaves tensors of it out.
        UserError: a file cannot be read, for a reason that is not the content of the folder.
    """
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(folder, f"{name} is missing")
        try:
            status = path.stat()
            place = status.st_dev, status.st_ino
            if status.st_size == facts.bytes and place not in hashes:
                hashes[place] = sha256_of(path)
        except OSError as error:
            raise UserError([f"checkpoint {folder}: {name} cannot be read ({error.strerror})"]) from None
        if status.st_size != facts.bytes or hashes[place] != facts.sha256:
            raise DamagedError(folder, f"{name} is not what was written (size or hash differs)")
        listed = {tensor for tensor, file in manifest.tensors.items() if file == name}
        if _tensors_in(path) != listed:
            raise DamagedError(folder, f"{MANIFEST} lists other tensors than {name} holds")
    # Without a hash of its own a manifest from which a whole file was left out would not be noticed.
    strangers = sorted({path.name for path in folder.glob("*.safetensors")} - manifest.files.keys())
    if strangers and manifest.format != FORMAT:
        raise DamagedError(folder, f"{MANIFEST} does not list {strangers[0]}")


def _tensors_in(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file; none if it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError:
        return set()


@dataclass(frozen=True)
class Newest:
    """Where a run resumes.

    Attributes:
        folder: the newest whole checkpoint; None for a run that has none yet.
        damaged: by folder why those after it are not used, newest first.
    """

    folder: Path | None
    damaged: dict[Path, str]

    def explain(self) -> str:
        """The damaged folders and the reasons, on one line of bounded length."""
        told = [f"{folder.name}: {reason}" for folder, reason in self.damaged.items()]
        return "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")


def newest_whole(checkpoints: Path) -> Newest:
    """The newest whole checkpoint in the folder `checkpoints`, and those after it, which are damaged.

    Raises:
        UserError: there are checkpoints, and none is whole; or one cannot be read, or has another format.
    """
    damaged: dict[Path, str] = {}
    hashes: Hashes = {}
    entries = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    by_step = {step: path for path in entries if (step := step_of(path)) is not None}
    for _, folder in sorted(by_step.items(), reverse=True):
        try:
            check_files(folder, read_manifest(folder), hashes)
        except DamagedError as error:
            damaged[folder] = error.reason
        else:
            return Newest(folder, damaged)
    aside = sorted(path.name for path in entries if DAMAGED in path.name)
    if damaged or aside:
        there = Newest(None, damaged).explain() if damaged else f"all were set aside: {', '.join(aside[:3])}"
        raise UserError(
            [
                f"{checkpoints}: no checkpoint is whole ({there}); put one back from a copy, or remove this folder to "
                "begin at step 0"
            ]
        )
    return Newest(None, {})


def put_damaged_aside(newest: Newest) -> None:
    """Rename the damaged folders, so that nobody takes them for checkpoints, each with a warning of what is lost."""
    assert newest.folder is not None
    for folder, reason in newest.damaged.items():
        lost = (step_of(folder) or 0) - (step_of(newest.folder) or 0)
        warn(
            f"checkpoint {folder} is damaged ({reason}); it is kept as {set_aside(folder).name}, and the run resumes "
            f"from {newest.folder.name}: {lost} updates are trained again"
        )


def open_stage_start(folder: Path) -> Mapping[str, Tensor]:
    """The wrapped weights at the beginning of the low-rank stage, by canonical name.

    Empty, with a warning, where they are not whole: spectra are drawn from them, and nothing else.
    """
    try:
        manifest = read_tensors(folder)
        check_files(folder, manifest, {})
    except UserError as error:
        warn(f"{error}; no spectra of W - W_start are drawn")
        return {}
    return TensorFiles(folder, manifest.tensors)
