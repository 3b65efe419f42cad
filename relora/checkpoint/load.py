"""Read checkpoints. Whether one is complete, damaged or absent is settled before anything is built from it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from relora.checkpoint.format import (
    BASE,
    BUFFERS,
    EXTRA,
    FORMAT,
    MANIFEST,
    MOMENTS,
    PER_PROCESS,
    QUANTIZED,
    QUANTIZED_SUFFIX,
    TRAINED,
    Manifest,
    TensorManifest,
    format_problem,
)
from relora.checkpoint.state import State, Weights
from relora.config import UserError
from relora.engines.state_entry import STATE_PREFIX, state_prefix
from relora.files import sha256_of


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
        with safe_open(self.folder / path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of the complete checkpoints in `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def last_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder)), default=0)


def format_problems(folder: Path) -> list[str]:
    """One line if the newest complete checkpoint in `folder` has a format that this version does not read."""
    for newest in complete_checkpoints(folder)[-1:]:
        try:
            content = json.loads((newest / MANIFEST).read_bytes())
        except (OSError, ValueError):
            continue  # damage is reported when the manifest is read
        if isinstance(content, dict) and "format" in content and content["format"] != FORMAT:
            return [format_problem(newest, content["format"])]
    return []


def checkpoint_problems(folder: Path) -> list[str]:
    """One line for the first file of a checkpoint whose size or hash is not that of its manifest.

    Raises:
        UserError: the manifest cannot be read.
    """
    for name, facts in read_manifest(folder).files.items():
        path = folder / name
        if not path.is_file():
            return [_unreadable(folder, f"{name} is missing")]
        if path.stat().st_size != facts.bytes or sha256_of(path) != facts.sha256:
            return [_unreadable(folder, f"{name} is not what was written (size or hash differs)")]
    return []


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint; UserError if it cannot be read."""
    return _read(folder, Manifest)


def open_checkpoint(folder: Path, *, state_index: int = 0) -> State:
    """The state in a checkpoint folder; its tensors are read when asked for.

    Args:
        state_index: the process whose parameters are wanted, of several that trained separately.

    Raises:
        UserError: the manifest cannot be read.
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
        skipped=manifest.skipped,
        stage=manifest.stage,
        cycle=manifest.cycle,
        weights=Weights(weights.keys(), weights.__getitem__),
        quantized=TensorFiles(folder, groups[QUANTIZED], suffix=QUANTIZED_SUFFIX),
        moments=moments,
        steps=manifest.steps,
        evaluated=manifest.evaluated,
        state_index=state_index,
        extra=TensorFiles(folder, groups[EXTRA]),
    )


def open_states(folder: Path) -> list[State]:
    """The states of all processes that trained separately, or the one that is common to all."""
    return [open_checkpoint(folder, state_index=index) for index in range(read_manifest(folder).num_states)]


def open_stage_start(folder: Path) -> TensorFiles:
    """The wrapped weights at the beginning of the low-rank stage, by canonical name."""
    return TensorFiles(folder, _read(folder, TensorManifest).tensors)


AnyManifest = TypeVar("AnyManifest", bound=TensorManifest)


def _read(folder: Path, kind: type[AnyManifest]) -> AnyManifest:
    """MANIFEST.json as `kind`; UserError that says what is wrong with it."""
    try:
        return kind.model_validate_json((folder / MANIFEST).read_bytes())
    except ValidationError as error:
        # The format is the first field: where it is not ours, what else is wrong follows from it.
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "literal_error":
            raise UserError([format_problem(folder, first["input"])]) from None
        key = ".".join(str(part) for part in first["loc"])
        reason = f"{MANIFEST} is damaged ({f'{key}: ' if key else ''}{first['msg']})"
    except OSError as error:
        reason = f"{MANIFEST} cannot be read ({error.strerror})"
    raise UserError([_unreadable(folder, reason)])


def _unreadable(folder: Path, reason: str) -> str:
    return f"checkpoint {folder}: {reason}; remove the folder to resume from the checkpoint before it"
