"""Read checkpoints. Whether one is whole is settled by `verify.py` before anything is built from it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from relora.checkpoint.format import (
    BASE,
    BUFFERS,
    EXTRA,
    FORMAT,
    HASH,
    MANIFEST,
    MOMENTS,
    PER_PROCESS,
    QUANTIZED,
    QUANTIZED_SUFFIX,
    TRAINED,
    History,
    Manifest,
    TensorManifest,
    checkpoint_name,
    format_problem,
    sealed,
)
from relora.checkpoint.state import State, Weights
from relora.config import UserError
from relora.engines.state_entry import STATE_PREFIX, state_prefix
from relora.files import json_of


class DamagedError(UserError):
    """A folder of ours is not what was written: the reason, and the folder."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__([f"checkpoint {folder}: {reason}"])
        self.folder, self.reason = folder, reason


class TensorFiles(Mapping[str, Tensor]):
    """Tensors on disk by name, read one at a time when asked for.

    Args:
        files: the file of each tensor, by its name in the file.
        prefix, suffix: cut off from those names.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], *, prefix: str = "", suffix: str = "") -> None:
        self.folder = folder
        self.places = {name.removeprefix(prefix).removesuffix(suffix): (file, name) for name, file in files.items()}

    def __getitem__(self, name: str) -> Tensor:
        path, key = self.places[name]
        try:
            with safe_open(self.folder / path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (OSError, SafetensorError) as error:  # it was whole when it was opened first
            raise DamagedError(self.folder, f"{path} cannot be read any more ({error})") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by the name of its folder; None for any other name."""
    match = re.fullmatch(r"step-([0-9]{8,15})", path.name)
    return int(match[1]) if match is not None and path.name == checkpoint_name(int(match[1])) else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of the complete checkpoints in `folder`, oldest first."""
    found = {step_of(path.parent): path.parent for path in folder.glob(f"step-*/{MANIFEST}") if path.is_file()}
    return [found[step] for step in sorted(step for step in found if step is not None)]


def last_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    return max((step_of(path) or 0 for path in complete_checkpoints(folder)), default=0)


def format_problems(folder: Path) -> list[str]:
    """One line if the newest complete checkpoint in `folder` has a format that this version does not read."""
    for newest in complete_checkpoints(folder)[-1:]:
        try:
            read_manifest(newest)
        except DamagedError:
            break  # damage is another matter
        except UserError as error:
            return error.problems
    return []


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint.

    Raises:
        DamagedError: it is not what was written, or is that of another folder.
        UserError: it has another format, or cannot be read.
    """
    manifest = _read(folder, Manifest)
    if step_of(folder) not in (None, manifest.step):
        raise DamagedError(folder, f"{MANIFEST} is that of step {manifest.step}")
    return manifest


def open_checkpoint(folder: Path, *, state_index: int = 0) -> State:
    """The state in a checkpoint folder; its tensors are read when asked for.

    Args:
        state_index: the process whose parameters are wanted, of several that trained separately.

    Raises:
        UserError: as `read_manifest`.
    """
    manifest, prefix = read_manifest(folder), state_prefix(state_index)
    groups: dict[str, dict[str, str]] = {BASE: {}, QUANTIZED: {}, BUFFERS: {}, TRAINED: {}, MOMENTS: {}, EXTRA: {}}
    for name, file in manifest.tensors.items():
        group = file.partition("-")[0]  # base-00002-00001.safetensors
        # "process-1/..." is wanted by process 1 alone, a plain name by process 0 alone.
        if group not in PER_PROCESS or name.startswith(prefix or STATE_PREFIX) == bool(prefix):
            groups[group][name] = file
    weights = TensorFiles(folder, groups[BASE] | groups[BUFFERS] | groups[TRAINED], prefix=prefix)
    slots: dict[str, dict[str, str]] = {}
    for name, file in groups[MOMENTS].items():
        parameter = name.rpartition(":")[0]  # process-1/model.norm.weight:exp_avg
        slots.setdefault(parameter, {})[name] = file
    moments = {
        parameter.removeprefix(prefix): TensorFiles(folder, files, prefix=f"{parameter}:")
        for parameter, files in slots.items()
    }
    return State(
        step=manifest.step,
        history=History(**{name: getattr(manifest, name) for name in History.model_fields}),
        stage=manifest.stage,
        cycle=manifest.cycle,
        weights=Weights(weights.keys(), weights.__getitem__),
        quantized=TensorFiles(folder, groups[QUANTIZED], suffix=QUANTIZED_SUFFIX),
        moments=moments,
        steps=manifest.steps,
        evaluated=manifest.evaluated,
        metrics=manifest.metrics,
        state_index=state_index,
        extra=TensorFiles(folder, groups[EXTRA]),
    )


def open_states(folder: Path) -> list[State]:
    """The states of all processes that trained separately, or the one that is common to all."""
    return [open_checkpoint(folder, state_index=index) for index in range(read_manifest(folder).num_states)]


def read_tensors(folder: Path) -> TensorManifest:
    """The manifest of a folder of tensors that is no checkpoint; the errors are those of `read_manifest`."""
    return _read(folder, TensorManifest)


AnyManifest = TypeVar("AnyManifest", bound=TensorManifest)


def _read(folder: Path, kind: type[AnyManifest]) -> AnyManifest:
    """MANIFEST.json as `kind`; the errors are those of `read_manifest`."""
    try:
        content = json_of((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DamagedError(folder, f"{MANIFEST} is missing") from None
    except OSError as error:
        raise UserError([f"checkpoint {folder}: {MANIFEST} cannot be read ({error.strerror})"]) from None
    except ValueError as error:
        raise DamagedError(folder, f"{MANIFEST} is damaged ({str(error)[:80]})") from None
    if not isinstance(content, dict):
        raise DamagedError(folder, f"{MANIFEST} is damaged (no mapping)")
    # The hash comes first: where it differs, a strange format is damage too.
    if HASH in content and content[HASH] != sealed(content)[HASH]:
        raise DamagedError(folder, f"{MANIFEST} is damaged (its hash differs)")
    number = content.get("format")
    if isinstance(number, int) and number not in (2, FORMAT):
        raise UserError([format_problem(folder, number)])
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])[:80]
        told = f"{f'{key}: ' if key else ''}{first['msg'].removeprefix('Value error, ')}"
        raise DamagedError(folder, f"{MANIFEST} is damaged ({told})") from None
