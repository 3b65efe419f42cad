"""The folder of a pretrained model: what it is, whether its weights are whole, and how quantized ones are loaded."""

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import FineGrainedFP8Config, PretrainedConfig

from relora.files import is_lfs_pointer

# The files that transformers looks for, in its order: weights in one file, or an index that names several.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Other folders that are taken for models, by a file that only they have.
LOOKALIKES = {
    "adapter_config.json": "a PEFT adapter, not a model: merge it into its base with merge_and_unload, save that, and "
    "name its folder",
    "dataset_info.json": "a data set (datasets' save_to_disk), not a model: it belongs to data.sources",
    "dataset_dict.json": "several data sets (datasets' save_to_disk), not a model: they belong to data.sources",
    "MANIFEST.json": "a checkpoint of a run, not a model: `relora export RUN --output FOLDER` makes one of it",
    "status.json": "a run folder: its model is in {path}/final when it has finished; `relora export` writes one before",
}


READ_WITH_THE_CONFIG = (".json", ".jinja", ".txt", ".py")
POINTER = "is a pointer of Git LFS, not the content; run `git lfs pull` in that folder"


def folder_problems(setting: str, path: Path) -> list[str]:
    """Why `path` is no folder of a pretrained model: it is something else, or files were not downloaded.

    Args:
        setting: the key and its value, for the problem.
    """
    if not (path / "config.json").is_file():
        kinds = [kind for name, kind in LOOKALIKES.items() if (path / name).is_file()]
        return [f"{setting}: is {kind.format(path=path)}" for kind in kinds[:1]]
    texts = sorted(file for file in path.iterdir() if file.suffix in READ_WITH_THE_CONFIG)
    return [f"{setting}: {text.name} {POINTER}" for text in texts if is_lfs_pointer(text)][:1]


def weight_problems(setting: str, path: Path) -> list[str]:
    """Why the weights in the folder `path` cannot be loaded: none there, a file missing, or only a part of one."""
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        return [f"{setting}: the folder holds no weights (model.safetensors)"]
    files = [found]
    if found.suffix == ".json":
        try:
            files = [path / name for name in sorted(set(json.loads(found.read_bytes())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [f"{setting}: {found.name} is not an index of weights"]
    damaged = [(file.name, damage) for file in files if (damage := _damage(file))]
    if not damaged:
        return []
    name, damage = damaged[0]
    others = f" ({len(damaged) - 1} other files of weights are missing or damaged too)" if damaged[1:] else ""
    return [f"{setting}: {name} {damage}{others}"]


def quantization_problems(setting: str, config: PretrainedConfig) -> list[str]:
    """Why the weights of a published model cannot be trained on: they are stored in a form for inference alone."""
    settings = getattr(config, "quantization_config", None)
    method = _quantization_method(config)
    if settings is None or method == "fp8":
        return []
    return [
        f"{setting}: its weights are quantized ({method}), which cannot be trained on or merged into; name the model "
        "that they were made from (fp8 alone is turned into plain weights), and see lora.base_dtype for less memory"
    ]


def dequantization(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` that turn fp8 weights into plain ones; none for plain weights."""
    if _quantization_method(config) is None:
        return {}
    return {"quantization_config": FineGrainedFP8Config(dequantize=True)}


def _quantization_method(config: PretrainedConfig) -> str | None:
    """The method in the model's quantization_config, such as fp8, awq or bitsandbytes; None for plain weights."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method is None and isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"  # it wrote no method at first
    return str(getattr(method, "value", method))


def _damage(path: Path) -> str | None:
    """What is wrong with a file of weights; None for a whole one."""
    if not path.is_file():
        return "is missing; download it again"
    if is_lfs_pointer(path):
        return POINTER
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except (SafetensorError, OSError) as error:
            return f"is damaged or was downloaded in part ({error}); download it again"
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if path.stat().st_size == 0 or (is_archive and not zipfile.is_zipfile(path)):
        return "is damaged or was downloaded in part; download it again"
    return None
