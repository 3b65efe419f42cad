"""A plain Hugging Face folder: what transformers, vLLM and PEFT load."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from relora.checkpoint.format import TEMPORARY_PREFIX, sealed
from relora.checkpoint.portable import GENERATION, make_portable, write
from relora.checkpoint.run_model import RunModel
from relora.errors import Failed, UserError, disk_errors_name
from relora.files import publish_folder, remove, sha256_of, write_json
from relora.model.tasks import Task
from relora.text import code_block, without_secrets

RESULTS, CARD = "relora.json", "README.md"


@dataclass(frozen=True)
class Card:
    """What the model card tells.

    Attributes:
        name: of the run.
        results: by name, in the order of the table.
        settings: the configuration that made the model, as YAML.
    """

    name: str
    task: Task
    results: Mapping[str, Any]
    settings: str

    def text(self, versions: str) -> str:
        """The card in Markdown: results first, then the configuration; `versions` of transformers read the folder."""
        rows = "\n".join(f"| {key} | {value} |" for key, value in self.results.items())
        pipeline = "pipeline_tag: text-generation\n" if self.task.writes_text else ""
        return f"""---
library_name: transformers
{pipeline}tags: [relora]
---
# {" ".join(self.name.split())}

A {self.task.description} trained with ReLoRA (*High-Rank Training Through Low-Rank Updates*, arXiv 2307.05695).
All low-rank updates are merged: this is a plain model. It can be read by {versions}.

| result | value |
|---|---|
{rows}

## Configuration

{code_block(without_secrets(self.settings.strip()), "yaml")}
"""


def export_model(
    exported: RunModel,
    folder: Path,
    *,
    card: Card,
    dtype: torch.dtype = torch.float32,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, its tokenizer and its card to `folder`, whole or not at all.

    Args:
        about: the content of relora.json, where one is wanted; the hashes of the other files are added to it.

    Raises:
        UserError: a weight is too large for `dtype`.
        Failed: the disk refuses. Nothing is left behind then, and what was in `folder` is still there.
    """
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    cast(exported.model, dtype)
    try:
        remove(temporary)
        with disk_errors_name(folder):
            write_folder(exported, temporary, card=card, about=about)
            publish_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        needed_mb = sum(tensor.nbytes for tensor in exported.model.state_dict().values()) / 1e6
        reason = f"{folder}: the model could not be written ({error}); it takes {needed_mb:,.0f} MB"
        raise Failed(f"{reason}, and {free_mb(folder):,.0f} MB are free there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a model in float32 to `dtype`, in place; UserError for one that would become infinite."""
    limit = torch.finfo(dtype).max
    for name, tensor in model.state_dict().items():
        largest = tensor.abs().max().item() if tensor.is_floating_point() and tensor.numel() else 0.0
        if limit < largest < torch.inf:
            kind = str(dtype).removeprefix("torch.")
            raise UserError([f"--dtype {kind}: {name} holds {largest:.4g}, the largest {kind} is {limit:.4g}"])
    model.to(dtype)


def write_folder(exported: RunModel, folder: Path, *, card: Card, about: Mapping[str, Any] | None) -> None:
    """Write the files of an exported model to a draft folder."""
    exported.model.config.use_cache = True
    exported.model.save_pretrained(folder)
    exported.tokenizer.save_pretrained(folder)
    if exported.generation is not None:
        # Not by transformers, which refuses some of the settings that published models come with.
        write(folder / GENERATION, exported.generation)
    versions = make_portable(folder, exported.model)
    if about is not None:
        content = {**about, "files": file_hashes(folder, {path.name for path in folder.iterdir()})}
        write_json(folder / RESULTS, sealed(content))
    (folder / CARD).write_text(card.text(versions), encoding="utf-8")
    # safetensors makes its files for the owner alone, whatever the umask; those just written have the usual mode.
    mode = (folder / CARD).stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of each of these files in `folder` that is there; names that lead out of it are left out."""
    paths = {name: folder / name for name in sorted(names) if Path(name).name == name}
    return {name: sha256_of(path) for name, path in paths.items() if path.is_file()}


def free_mb(path: Path) -> float:
    """The space left, in MB, on the disk that a new file at `path` would be on."""
    nearest = next(place for place in path.absolute().parents if place.exists())
    return shutil.disk_usage(nearest).free / 1e6
