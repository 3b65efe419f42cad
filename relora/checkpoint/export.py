"""A plain Hugging Face folder: what transformers, vLLM and PEFT load."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora.checkpoint.format import TEMPORARY_PREFIX
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
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(dtype)
    model.config.use_cache = True
    settings: Any
    for settings in (model.config, model.generation_config):
        # A config from scratch does not know the tokenizer, and generation would not end at its EOS.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token_id = getattr(tokenizer, name)
            if token_id is not None:
                setattr(settings, name, token_id)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for name, text in files.items():
        (temporary / name).write_text(text, encoding="utf-8")
    publish_folder(temporary, folder)


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
