"""The Hugging Face causal language model: its config, its building, its loss."""

import copy
import difflib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from relora.config import DataSection, ModelSection, UserError, raise_if_any
from relora.model.loss import IGNORED_LABEL, summed_cross_entropy

# Inductor leaves rows that begin at cache lines to GPUs, though a CPU's products need them too (as `product`).
COMPILE_OPTIONS = {"disable_padding_cpu": False}


def load_hf_config(section: ModelSection) -> PretrainedConfig:
    """The Hugging Face config of the model, from the JSON file, the inline mapping or the pretrained model.

    Raises:
        UserError: no such file or folder, not JSON, an unknown model_type, a value that transformers refuses.
    """
    config = _config_from_scratch(section) if section.name_or_path is None else _pretrained_config(section)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not own_code:
        reason = f"model_type {config.model_type} has no causal language model in transformers"
        raise UserError([f"{said_of(section)}: {reason}"])
    return config


def read_hf_config(section: ModelSection, task: object) -> tuple[PretrainedConfig | None, list[str]]:  # noqa: ARG001
    """The Hugging Face config of the model, or what is wrong with it."""
    try:
        return load_hf_config(section), []
    except UserError as error:
        return None, error.problems


def said_of(section: ModelSection) -> str:
    """The key that the model comes from, with its value where that is short."""
    if section.name_or_path is not None:
        return f"model.name_or_path = {section.name_or_path}"
    return f"model.config = {section.config}" if isinstance(section.config, str) else "model.config"


def model_problems(model: PreTrainedModel, data: DataSection) -> list[str]:
    """What of the data's settings does not fit the model."""
    problems = []
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and data.sequence_length > limit:
        problems.append(
            f"data.sequence_length = {data.sequence_length}: the model has max_position_embeddings = {limit}"
        )
    takes_positions = "position_ids" in _arguments(model)
    if data.document_mask and not (takes_positions and not getattr(model.config, "alibi", False)):
        problems.append(
            f"data.document_mask = true: {type(model).__name__} takes no positions, by which documents are told apart"
        )
    return problems


def skeleton(section: ModelSection, hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory, on the meta device: for its names and shapes."""
    with torch.device("meta"):
        return _from_config(section, hf_config)


def build_model(section: ModelSection, hf_config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """The model in float32 on the CPU: pretrained, or drawn from `seed`, the same on every rank."""
    if section.name_or_path is None:
        torch.manual_seed(seed)
        return _from_config(section, hf_config)
    model, loading = AutoModelForCausalLM.from_pretrained(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        attn_implementation=section.attn_implementation,
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError([f"{said_of(section)}: lacks {len(missing)} weights of the model, such as {missing[0]}"])
    return _trainable_by_us(model)


def empty_model(section: ModelSection, hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model in float32 on the CPU, its parameters without values, and so without memory of their own yet.

    The system gives a page of memory when it is first written to. An engine that shards the parameters only
    ever writes this rank's share.
    """
    with no_init_weights():
        model = _from_config(section, hf_config)
    model.tie_weights()
    return model


def _from_config(section: ModelSection, hf_config: PretrainedConfig) -> PreTrainedModel:
    return _trainable_by_us(
        AutoModelForCausalLM.from_config(
            # A copy: the model writes its dtype and our settings into the config it is given.
            copy.deepcopy(hf_config),
            dtype=torch.float32,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
        )
    )


def _trainable_by_us(model: PreTrainedModel) -> PreTrainedModel:
    # Packed documents are told apart by their positions, and transformers looks only where there is no cache.
    model.config.use_cache = False
    return model


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of the cross-entropies of the label tokens of a batch, in nats, in at least float32.

    Args:
        batch: input_ids and labels (batch, sequence), labels unshifted and -100 where nothing is learned, as in
            transformers; position_ids where the documents of a row are kept apart.
    """
    inputs = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
    logits = model(**inputs).logits
    # The labels are shifted, not the logits, which would be copied.
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
    return summed_cross_entropy(logits.flatten(0, 1), targets.flatten())


def recompute_activations(model: nn.Module) -> None:
    """Keep the inputs of each block only, and compute the rest again in the backward pass."""
    cast(PreTrainedModel, model).activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )


def compile_in_place(module: nn.Module) -> None:
    """Let torch.compile compute `module`, which stays the object that it is."""
    module.compile(options=COMPILE_OPTIONS)


def num_label_tokens(batch: Mapping[str, Tensor]) -> int:
    """How many tokens of the batch are predicted: the first of a row never is."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def attention_problems(model: nn.Module, vocab_size: int, *, document_mask: bool) -> list[str]:
    """What is wrong with who sees whom, tried out on a few tokens: a look into the future, or into other documents."""
    problems, name = [], type(model).__name__
    ids = torch.randint(vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    if _sees(model, ids, vocab_size, changed=slice(8, 9), seen_from=slice(0, 8), positions=torch.arange(9)):
        problems.append(f"model: {name} sees the tokens that it is to predict: it is no causal language model")
    packed = torch.cat([torch.arange(4), torch.arange(5)])
    if document_mask and _sees(model, ids, vocab_size, changed=slice(0, 4), seen_from=slice(4, 9), positions=packed):
        problems.append(
            f"data.document_mask = true: {name} lets attention through between documents whose positions restart; "
            "set it to false for this model"
        )
    return problems


@torch.no_grad()
def _sees(
    model: nn.Module, ids: Tensor, vocab_size: int, *, changed: slice, seen_from: slice, positions: Tensor
) -> bool:
    """Whether the logits at `seen_from` change with the tokens at `changed`."""
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % vocab_size
    was_training, device = model.training, next(model.parameters()).device
    places = {"position_ids": positions[None].to(device)} if "position_ids" in _arguments(model) else {}
    model.eval()
    one, two = (model(input_ids=x.to(device), **places).logits[:, seen_from].float() for x in (ids, other))
    model.train(was_training)
    return not torch.allclose(one, two, atol=1e-5)


def _arguments(model: nn.Module) -> Iterable[str]:
    return inspect.signature(model.forward).parameters


def _pretrained_config(section: ModelSection) -> PretrainedConfig:
    name = str(section.name_or_path)
    path = Path(name).expanduser()
    if looks_like_a_path(name) and not path.exists():
        raise UserError([f"{said_of(section)}: there is no such folder"])
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # whatever a model's own code may raise
        where = "" if path.exists() else "no such folder here, and none can be loaded from the hub: "
        raise UserError([f"{said_of(section)}: {where}{refusal(error)}"]) from None
    if path.is_dir() and not any(match for pattern in ("*.safetensors*", "*.bin*") for match in path.glob(pattern)):
        raise UserError([f"{said_of(section)}: the folder holds no weights (model.safetensors)"])
    return config


def looks_like_a_path(name: str) -> bool:
    """Whether this cannot be a hub id, which would be asked for over the network."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _config_from_scratch(section: ModelSection) -> PretrainedConfig:
    said = said_of(section)
    mapping = _read_json(section.config) if isinstance(section.config, str) else dict(section.config or {})
    model_type = mapping.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UserError([f"{said}: needs model_type, the name of the architecture in transformers, such as llama"])
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise UserError(
            [f"{said}: model_type {model_type} is unknown to transformers {transformers.__version__}{hint}"]
        )
    try:
        default = AutoConfig.for_model(model_type)
        config: PretrainedConfig = AutoConfig.for_model(model_type, **mapping)
    except Exception as error:  # each architecture raises as it pleases
        raise UserError([f"{said}: transformers refuses it for model_type {model_type}: {refusal(error)}"]) from None
    raise_if_any(f"{said}: unknown key {key}; the nearest is {near}" for key, near in _misspelt(mapping, default))
    return config


def _misspelt(mapping: Mapping[str, Any], default: PretrainedConfig) -> list[tuple[str, str]]:
    """Unknown keys, which transformers takes in silence, each with the known one that is nearly the same.

    Others are left alone: files from the hub carry keys of other versions and of other programs.
    """
    known = [*default.to_dict(), *default.attribute_map]
    unknown = [key for key in mapping if not hasattr(default, key)]
    return [(key, near) for key in unknown for near in difflib.get_close_matches(key, known, n=1, cutoff=0.9)]


def refusal(error: Exception) -> str:
    """What a library has against its input, in a line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300] if lines else type(error).__name__


def _read_json(path: str) -> dict[str, Any]:
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError([f"model.config = {path}: there is no such file"]) from None
    except (OSError, ValueError) as error:
        raise UserError([f"model.config = {path}: is not a readable JSON file ({error})"]) from None
    if not isinstance(mapping, dict):
        raise UserError([f"model.config = {path}: must hold a JSON mapping, not a {type(mapping).__name__}"])
    return mapping
