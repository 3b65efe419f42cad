"""A plain Hugging Face folder: what transformers, vLLM and PEFT load."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora.files import publish_folder


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    files: Mapping[str, str],
) -> None:
    """Write `model` (plain, not wrapped), its tokenizer and text `files` to `folder`, whole or not at all."""
    draft = folder.with_name(f".draft-{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    model.to(dtype)
    model.config.use_cache = True
    for settings in (model.config, model.generation_config):
        _name_special_tokens(settings, tokenizer)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    for name, text in files.items():
        (draft / name).write_text(text, encoding="utf-8")
    publish_folder(draft, folder)


def _name_special_tokens(settings: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """A config from scratch knows nothing of the tokenizer, and generation would not end at its EOS."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = getattr(tokenizer, name)
        if own is not None:
            setattr(settings, name, own)


def model_card(name: str, *, results: Mapping[str, Any], settings: str) -> str:
    """The card of an exported model: results first, then the configuration that made it."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in results.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [relora]
---
# {name}

A causal language model trained with ReLoRA (*High-Rank Training Through Low-Rank Updates*, arXiv 2307.05695).
All low-rank updates are merged: this is a plain model.

| result | value |
|---|---|
{rows}

## Configuration

```yaml
{settings.strip()}
```
"""
