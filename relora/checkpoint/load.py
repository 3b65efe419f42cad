"""Reading checkpoints: whole, damaged or absent is settled before anything is built from them."""

from collections.abc import Iterator, Mapping, Set
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import safe_open
from torch import Tensor

from relora.checkpoint.state import Clock, State
from relora.config import UserError
from relora.files import sha256_of
from relora.method.choices import StageName

FORMAT: Literal[1] = 1
MANIFEST = "MANIFEST.json"
# Groups of files whose tensors differ from process to process where these train apart, and what the names of
# all but the first one's begin with.
OWN, OTHERS = ("trained", "moments"), "rank-"
# Other groups than these are weights. Frozen weights stand beside their codes: a name and a suffix.
GROUPS, CODES = ("weights", "codes", "moments", "outer"), ":codes"


class Tensors(Mapping[str, Tensor]):
    """Tensors on disk by name, read one at a time when asked for.

    Args:
        files: the file of each tensor, by the name that it has there.
        prefix, suffix: what those names begin and end with and these do not, where they do.
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

    @property
    def names(self) -> Set[str]:
        return self.keys()

    def take(self, name: str) -> Tensor:
        return self[name]


class Moments(Mapping[str, Mapping[str, Tensor]]):
    """Optimizer moments on disk: parameter name -> slot -> tensor, stored as `name:slot`."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    @cached_property
    def slots(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self.tensors:
            name, _, slot = key.rpartition(":")
            found.setdefault(name, []).append(slot)
        return found

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return {slot: self.tensors[f"{name}:{slot}"] for slot in self.slots[name]}

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of the complete checkpoints in `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def last_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder)), default=0)


class FileFacts(BaseModel):
    """One file of a checkpoint: the group of tensors it belongs to, and what it must be."""

    group: str
    bytes: int
    sha256: str


class Weights(BaseModel):
    """A manifest of tensors: the files, and in which of them each tensor is."""

    format: Literal[1] = FORMAT
    files: dict[str, FileFacts]
    tensors: dict[str, str]


class Manifest(Weights):
    """The manifest of a checkpoint. `fingerprint` and `data` say of which run and which data.

    `num_shares` processes trained parameters of their own when it was written; 1 if all trained the same.
    """

    num_shares: int = 1
    evaluated: bool = True

    step: int
    samples_seen: int
    stage: StageName
    cycle: int
    steps: dict[str, float]
    fingerprint: str
    data: str


AnyManifest = TypeVar("AnyManifest", bound=Weights)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint; UserError if it cannot be read."""
    return _read(folder, Manifest)


def _read(folder: Path, kind: type[AnyManifest]) -> AnyManifest:
    try:
        return kind.model_validate_json((folder / MANIFEST).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "literal_error":
            raise UserError([f"{folder}: checkpoint format {first['input']}, this version reads {FORMAT}"]) from None
        where = ".".join(str(part) for part in first["loc"])
        raise _unreadable(folder, f"{MANIFEST} is damaged ({f'{where}: ' if where else ''}{first['msg']})") from None
    except OSError as error:
        raise _unreadable(folder, f"{MANIFEST} cannot be read ({error.strerror})") from None


def open_checkpoint(folder: Path, *, share: int = 0) -> State:
    """The state in a checkpoint folder; tensors are read when asked for. UserError if a file is missing.

    Args:
        share: whose parameters, of several processes that trained apart.
    """
    manifest = read_manifest(folder)
    prefix, groups = share_prefix(share), {group: dict[str, str]() for group in GROUPS}
    for name, file in manifest.tensors.items():
        kind = file.partition("-")[0]
        if kind not in OWN or name.startswith(prefix or OTHERS) == bool(prefix):
            groups[kind if kind in groups else "weights"][name] = file
    return State(
        clock=Clock(manifest.step, manifest.samples_seen),
        stage=manifest.stage,
        cycle=manifest.cycle,
        evaluated=manifest.evaluated,
        share=share,
        weights=Tensors(folder, groups["weights"], prefix=prefix),
        codes=Tensors(folder, groups["codes"], suffix=CODES),
        moments=Moments(Tensors(folder, groups["moments"], prefix=prefix)),
        outer=Tensors(folder, groups["outer"]),
        steps=manifest.steps,
    )


def open_shares(folder: Path) -> list[State]:
    """The states of all processes that trained apart, or the one of all."""
    return [open_checkpoint(folder, share=share) for share in range(read_manifest(folder).num_shares)]


def share_prefix(share: int) -> str:
    """How the names begin of what only the process of this rank trained; the first has plain names."""
    return f"{OTHERS}{share}/" if share else ""


def open_stage_start(folder: Path) -> Tensors:
    """The wrapped weights at the beginning of the low-rank stage, by canonical name."""
    return Tensors(folder, _read(folder, Weights).tensors)


def verify_checkpoint(folder: Path) -> None:
    """UserError that names the first file whose size, hash or form is not what the manifest says."""
    for name, facts in read_manifest(folder).files.items():
        path = folder / name
        if not path.is_file():
            raise _unreadable(folder, f"{name} is missing")
        if path.stat().st_size != facts.bytes or sha256_of(path) != facts.sha256:
            raise _unreadable(folder, f"{name} is not what was written (size or hash differs)")


def _unreadable(folder: Path, reason: str) -> UserError:
    return UserError([f"checkpoint {folder}: {reason}; remove the folder to go on from the checkpoint before it"])
