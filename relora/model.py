"""The Hugging Face causal language model: its config, its building, its loss."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from relora.config import ModelSection, UserError

IGNORED_LABEL = -100


def load_hf_config(section: ModelSection) -> PretrainedConfig:
    """The Hugging Face config of the model, from the JSON file, the inline mapping or the pretrained model.

    Raises:
        UserError: no such file or folder, not JSON, an unknown model_type, a value that transformers refuses.
    """
    if section.name_or_path is not None:
        return _pretrained_config(section, section.name_or_path)
    mapping = _read_json(section.config) if isinstance(section.config, str) else dict(section.config or {})
    said = f"model.config = {section.config}" if isinstance(section.config, str) else "model.config"
    model_type = mapping.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UserError([f"{said}: needs model_type, the name of the architecture in transformers, such as llama"])
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **mapping)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError([f"{said}: transformers refuses it for model_type {model_type} ({reason})"]) from None
    except Exception as error:
        raise UserError([f"{said}: transformers refuses it ({type(error).__name__}: {error})"]) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError([f"{said}: model_type {model_type} has no causal language model in transformers"])
    return config


def model_problems(hf_config: PretrainedConfig, sequence_length: int) -> list[str]:
    """What of the rest of the configuration does not fit the model."""
    limit = getattr(hf_config, "max_position_embeddings", None)
    if limit is None or sequence_length <= limit:
        return []
    return [f"data.sequence_length = {sequence_length}: the model has max_position_embeddings = {limit}"]


def skeleton(section: ModelSection, hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory, on the meta device: for its names and shapes."""
    with torch.device("meta"):
        return _from_config(section, hf_config)


def build_model(section: ModelSection, hf_config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """The model in float32 on the CPU: pretrained, or drawn from `seed`, the same on every rank."""
    if section.name_or_path is None:
        torch.manual_seed(seed)
        return _from_config(section, hf_config)
    return _trainable_by_us(
        AutoModelForCausalLM.from_pretrained(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            attn_implementation=section.attn_implementation,
            dtype=torch.float32,
        )
    )


def empty_model(section: ModelSection, hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model in float32 on the CPU, its weights about to be overwritten from a state."""
    return _from_config(section, hf_config)


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
    """Sum of the cross-entropies of the label tokens of a batch, in nats, float32.

    Args:
        batch: input_ids and labels (batch, sequence), labels unshifted and -100 where nothing is learned, as in
            transformers; position_ids where the documents of a row are kept apart.
    """
    inputs = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
    logits = model(**inputs).logits
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def num_label_tokens(batch: Mapping[str, Tensor]) -> int:
    """How many tokens of the batch are predicted: the first of a row never is."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


@torch.no_grad()
def keeps_documents_apart(model: nn.Module, vocab_size: int) -> bool:
    """Whether positions that restart cut the attention: changing document 1 leaves document 2's logits alone."""
    first, second = 4, 5
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, first + second), generator=generator)
    other = torch.cat([(ids[:, :first] + 1) % vocab_size, ids[:, first:]], dim=1)
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = [model(input_ids=x.to(device), position_ids=positions.to(device)).logits for x in (ids, other)]
    model.train(was_training)
    return torch.allclose(logits[0][:, first:], logits[1][:, first:], atol=1e-5)


def _pretrained_config(section: ModelSection, name: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError([f"model.name_or_path = {name}: no model can be loaded from it ({reason})"]) from None
    return config


def _read_json(path: str) -> dict[str, Any]:
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError([f"model.config = {path}: there is no such file"]) from None
    except (OSError, ValueError) as error:
        raise UserError([f"model.config = {path}: is not a readable JSON file ({error})"]) from None
    if not isinstance(mapping, dict):
        raise UserError([f"model.config = {path}: must hold a JSON mapping, not {type(mapping).__name__}"])
    return mapping
