"""A Hugging Face config becomes a model: read, checked, built."""

import copy
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from relora.config import Config, ModelSection, UserError, raise_if_any
from relora.files import missing_folder, plain_json_of
from relora.hub import unreachable
from relora.model.liger import liger_problems
from relora.model.pretrained import dequantization, folder_problems, quantization_problems, weight_problems
from relora.model.tasks import Task

MAX_PARTS, MAX_LABELS = 10_000, 1_000_000  # layers or experts of a model; labels, which its config names one by one
# Inductor aligns rows to cache lines on GPUs only, though the products of a CPU need it too (`kernels.product`).
COMPILE_OPTIONS = {"disable_padding_cpu": False}


def read_hf_config(section: ModelSection, task: Task) -> tuple[PretrainedConfig | None, list[str]]:
    """Read the Hugging Face config of the model: a JSON file, an inline mapping, or that of a pretrained model.

    Returns:
        The config, or None; and the problems: no such file or folder, not JSON, an unknown model_type, a value that
        transformers refuses, an architecture that has no model for the task. None if and only if there are any.
    """
    config, problems = _config_from_scratch(section) if section.name_or_path is None else _pretrained_config(section)
    if config is None:
        return None, problems
    auto_map = getattr(config, "auto_map", None)
    has_own_code = isinstance(auto_map, dict) and task.auto_class.__name__ in auto_map
    if type(config) not in task.auto_class._model_mapping and not has_own_code:
        reason = f"model_type {config.model_type} has no {task.description} in transformers"
        return None, [f"{setting_of(section)}: {reason}"]
    return config, []


def read_skeleton(
    section: ModelSection, hf_config: PretrainedConfig, task: Task
) -> tuple[PreTrainedModel | None, list[str]]:
    """Build the model without memory, on the meta device, for its names and shapes.

    Returns:
        The model, or None; and why it cannot be built: for its attention kernel, if it can be built with another.
    """
    try:
        return skeleton(section, hf_config, task), []
    except Exception as error:  # each architecture raises as it pleases
        reason = first_lines(error)
    try:
        skeleton(section.model_copy(update={"attn_implementation": "eager"}), hf_config, task)
    except Exception:
        return None, [f"{setting_of(section)}: transformers cannot build the model: {reason}"]
    setting = f"model.attn_implementation = {section.attn_implementation}"
    return None, [f"{setting}: cannot be used here, eager can: {reason}"]


def problems(model: PreTrainedModel, config: Config, task: Task) -> list[str]:
    """One line for each setting that does not fit the model, which may be a skeleton."""
    return [*task.problems(model, config), *liger_problems(config.model, model.config)]


def vocab_size_of(hf_config: PretrainedConfig) -> int:
    """The number of entries of the model's vocabulary, also where the text model is a part of a larger one."""
    return int(hf_config.get_text_config().vocab_size)


def setting_of(section: ModelSection) -> str:
    """The key that the model comes from, with its value where that is short: `model.name_or_path = gpt2`."""
    if section.name_or_path is not None:
        return f"model.name_or_path = {section.name_or_path}"
    return f"model.config = {section.config}" if isinstance(section.config, str) else "model.config"


def first_lines(error: Exception) -> str:
    """The type and the first two lines of an exception of a library, at most 300 characters in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300] if lines else type(error).__name__


def reason_of(error: Exception, *, remedy: str = "model.trust_remote_code = true") -> str:
    """Why a model, or a part of it, cannot be loaded: the hub is out of reach, its code may not run, or else.

    Args:
        remedy: the setting by which the user trusts code that comes with a model.
    """
    if "trust_remote_code" in str(error):
        return f"it comes with code of its own, which is run only with {remedy}; read it first"
    return unreachable(error) or first_lines(error)


def skeleton(section: ModelSection, hf_config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """The model without memory, on the meta device: for its names and shapes."""
    with torch.device("meta"):
        return _from_config(section, hf_config, task)


def build_model(
    section: ModelSection,
    hf_config: PretrainedConfig,
    task: Task,
    *,
    seed: int,
    may_lack: Callable[[nn.Module], Collection[str]] = lambda _: (),
) -> PreTrainedModel:
    """The model in float32 on the CPU: pretrained, or drawn from `seed`, the same in every process.

    Args:
        may_lack: the names of the parameters of a model that its pretrained weights may lack; they are drawn.

    Raises:
        UserError: the pretrained weights are incomplete or damaged.
    """
    torch.manual_seed(seed)
    if section.name_or_path is None:
        return _from_config(section, hf_config, task)
    try:
        model, loading = task.auto_class.from_pretrained(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            attn_implementation=section.attn_implementation,
            dtype=torch.float32,
            output_loading_info=True,
            **dequantization(hf_config),
        )
    except (OSError, SafetensorError) as error:
        raise UserError([f"{setting_of(section)}: the weights cannot be loaded: {first_lines(error)}"]) from error
    missing = sorted({*loading["missing_keys"]} - {*may_lack(model)})
    if missing:
        raise UserError([f"{setting_of(section)}: lacks {len(missing)} weights of the model, such as {missing[0]}"])
    return without_cache(model)


def empty_model(section: ModelSection, hf_config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """The model in float32 on the CPU with uninitialized parameters, which take no memory yet.

    The system provides a page of memory when it is first written to. An engine that shards the parameters only ever
    writes the shard of this process.
    """
    with no_init_weights():
        model = _from_config(section, hf_config, task)
    model.tie_weights()
    return model


def _from_config(section: ModelSection, hf_config: PretrainedConfig, task: Task) -> PreTrainedModel:
    # A copy: the model writes its dtype and our settings into the config it is given.
    settings = copy.deepcopy(hf_config)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config  # the weights are plain from here on, and so is the exported model
    return without_cache(
        task.auto_class.from_config(
            settings,
            dtype=torch.float32,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
        )
    )


def without_cache(model: PreTrainedModel) -> PreTrainedModel:
    """Switch the key-value cache off: with one, transformers ignores the positions that separate packed documents.

    Generation asks for a cache by itself.
    """
    model.config.use_cache = False
    return model


def recompute_activations(model: nn.Module) -> None:
    """Save the inputs of each block only, and compute the rest again in the backward pass."""
    cast(PreTrainedModel, model).activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )


def compile_in_place(module: nn.Module) -> None:
    """Let torch.compile compute `module`, which stays the same object."""
    module.compile(options=COMPILE_OPTIONS)


def _pretrained_config(section: ModelSection) -> tuple[PretrainedConfig | None, list[str]]:
    name, setting = str(section.name_or_path), setting_of(section)
    path = Path(name)
    missing = missing_folder(name)
    if missing is not None:
        return None, [f"{setting}: {missing}"]
    if path.is_dir() and (other := folder_problems(setting, path)):
        return None, other
    if (path / "config.json").is_file():
        mapping, problems = _read_json(str(path / "config.json"), setting)
        problems += [f"{setting}: {problem}" for problem in _too_many(mapping)]
        if problems:
            return None, problems
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        config.to_dict()  # written to every checkpoint
    except Exception as error:  # whatever a model's own code may raise
        where = "" if path.exists() else "no such folder here, and none can be loaded from the hub: "
        return None, [f"{setting}: {where}{reason_of(error)}"]
    found = [*quantization_problems(setting, config), *(weight_problems(setting, path) if path.is_dir() else [])]
    return (None, found) if found else (config, [])


def _config_from_scratch(section: ModelSection) -> tuple[PretrainedConfig | None, list[str]]:
    setting = setting_of(section)
    given = section.config or {}
    mapping, problems = _read_json(given, setting) if isinstance(given, str) else (given, [])
    if problems:
        return None, problems
    settings = dict(mapping)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str):
        return None, [f"{setting}: needs model_type, the name of the architecture in transformers, such as llama"]
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1)
        hint = f"; the nearest is {close[0]}" if close else ""
        unknown = f"model_type {model_type} is unknown to transformers {transformers.__version__}{hint}"
        return None, [f"{setting}: {unknown}"]
    too_many = next(_too_many(settings), None)
    if too_many is not None:
        return None, [f"{setting}: {too_many}"]
    try:
        default = AutoConfig.for_model(model_type)
        config: PretrainedConfig = AutoConfig.for_model(model_type, **settings)
        config.to_dict()  # written to every checkpoint
    except Exception as error:  # each architecture raises as it pleases
        return None, [f"{setting}: transformers refuses it for model_type {model_type}: {first_lines(error)}"]
    typos = [f"{setting}: unknown key {key}; the nearest is {near}" for key, near in _typos(settings, default)]
    return (None, typos) if typos else (config, [])


def _typos(mapping: Mapping[str, Any], default: PretrainedConfig) -> list[tuple[str, str]]:
    """Likely typos: unknown keys, which transformers accepts silently, paired with the closest known key.

    Other unknown keys are left alone: files from the hub carry keys of other versions and of other programs.
    """
    known = [*default.to_dict(), *default.attribute_map]
    unknown = [key for key in mapping if not hasattr(default, key)]
    return [(key, near) for key in unknown for near in difflib.get_close_matches(key, known, n=1, cutoff=0.9)]


def _too_many(settings: Mapping[str, Any]) -> Iterator[str]:
    """Numbers of layers, experts or labels that no model has: transformers would try to build them one by one."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from (f"{key}.{problem}" for problem in _too_many(value))
        most = MAX_LABELS if key == "num_labels" else MAX_PARTS
        is_number_of_parts = key == "num_labels" or re.search(
            r"(^|_)n?_?(layers?|blocks?|experts?|depths?|stages?)($|_)", key
        )
        for number in value if isinstance(value, list) else [value]:
            if is_number_of_parts and isinstance(number, int) and number > most:
                yield f"{key} = {number}: more than {most:,} of them cannot be built"


def _read_json(path: str, setting: str) -> tuple[dict[str, Any], list[str]]:
    """A mapping from a JSON file, or an empty one and why it cannot be read."""
    try:
        mapping = plain_json_of(Path(path).read_bytes())
    except FileNotFoundError:
        return {}, [f"{setting}: there is no such file"]
    except (OSError, ValueError) as error:
        return {}, [f"{setting}: is not a readable JSON file ({' '.join(str(error).split())})"]
    if not isinstance(mapping, dict):
        return {}, [f"{setting}: must hold a JSON mapping, not a {type(mapping).__name__}"]
    return mapping, []


def load_hf_config(section: ModelSection, task: Task) -> PretrainedConfig:
    """The Hugging Face config of the model; UserError with the problems of `read_hf_config`."""
    config, found = read_hf_config(section, task)
    raise_if_any(found)
    assert config is not None
    return config
