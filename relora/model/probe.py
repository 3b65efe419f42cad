"""Run a model once before it is trained, on a copy of its structure, to see how it uses its layers."""

import mmap
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from relora.config import Config
from relora.data.batches import Batch, Row
from relora.method.usage import ModelUsage, usage_in_source, watch_usage
from relora.model.model import build_model, empty_model, first_lines, skeleton, vocab_size_of
from relora.model.tasks import Task

# Rows of this many tokens are enough for most models; some need whole chunks of a fixed length.
SHORT_ROW = 64
# Parameters. A smaller model is drawn; a larger one is all zeros, which take no memory until they are written.
MOST_DRAWN = 2**26


def probe(config: Config, hf_config: PretrainedConfig, task: Task) -> ModelUsage:
    """How the model of `config` uses its layers, from passes over two rows on the CPU in float32.

    The same in every process. Its weights are not those of the run, as their values do not matter: a pretrained model
    is not loaded. Where the model cannot be run, `not_run` says why, and the rest is what its source tells.
    """
    length = config.data.sequence_length
    with torch.random.fork_rng(devices=[]):
        model = _model_to_run(config, hf_config, task)
        for num_tokens in sorted({min(SHORT_ROW, length), length}):
            batch = _batch(config, task, vocab_size_of(hf_config), num_tokens)
            try:
                return _watch(model, task, batch)
            except Exception as error:  # whatever a model raises where it meets what it was not made for
                reason = first_lines(error)
    return replace(usage_in_source(model), not_run=reason)


def _watch(model: PreTrainedModel, task: Task, batch: Batch) -> ModelUsage:
    """The usage of `model` on `batch`; a model that writes text runs as in generation too, with a cache."""

    def loss(watched: nn.Module) -> Tensor:
        return task.loss(watched, batch)

    def generate(watched: nn.Module) -> Tensor:
        logits: Tensor = watched(**task.inputs(batch), use_cache=True).logits
        return logits

    return watch_usage(model, loss, generate=generate if task.writes_text else None, is_fresh=True)


def _batch(config: Config, task: Task, vocab_size: int, num_tokens: int) -> Batch:
    """Two rows of random tokens, each one document."""
    generator = np.random.default_rng(0)
    rows = [Row(generator.integers(vocab_size, size=num_tokens), np.zeros(1, dtype=np.int64)) for _ in range(2)]
    return task.make_batch(rows, num_tokens, eos_id=0, document_mask=config.data.document_mask)


def _model_to_run(config: Config, hf_config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """A model of the run's structure on the CPU, drawn, or without values worth the name."""
    kernel = config.model.attn_implementation
    kernel = kernel if kernel == "sdpa" else "eager"  # others need a GPU; they all get the same products
    section = config.model.model_copy(update={"name_or_path": None, "attn_implementation": kernel})
    num_parameters = sum(parameter.numel() for parameter in skeleton(section, hf_config, task).parameters())
    if num_parameters <= MOST_DRAWN:
        return build_model(section, hf_config, task, seed=0)
    model = empty_model(section, hf_config, task)
    for parameter in model.parameters():
        # Pages of an anonymous mapping that are only read are all one page of zeros.
        zeros = mmap.mmap(-1, max(1, parameter.nbytes))
        parameter.data = torch.frombuffer(zeros, dtype=parameter.dtype, count=parameter.numel()).view(parameter.shape)
    return model
