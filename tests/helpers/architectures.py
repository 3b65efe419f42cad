"""Tiny random models of many architectures, a text they can learn, and what the tests ask of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer

from relora import LoRAConfig, build_optimizer, inject_lora
from relora.method.lora import LoRALinear, lora_layers

VOCAB = 64
NUM_POSITIONS = 32

# scale = 3.7 / 4, and not a power of two, so that a forgotten scale or one applied twice is seen.
CONFIG = LoRAConfig(r=4, lora_alpha=3.7, modules_to_save="rest")

_ROTARY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": NUM_POSITIONS,
    "initializer_range": 0.1,
}
_HEAD_DIM = {**_ROTARY, "head_dim": 8}
_NO_GROUPS = {key: value for key, value in _ROTARY.items() if key != "num_key_value_heads"}
_NO_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Name -> (class of the config, its arguments).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_ROTARY, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", {**_ROTARY, "tie_word_embeddings": True, "attention_bias": True}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_positions": NUM_POSITIONS,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.1,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_NO_GROUPS, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", _HEAD_DIM),
    "gemma": ("GemmaConfig", _HEAD_DIM),
    "gemma2": ("Gemma2Config", {**_HEAD_DIM, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**_HEAD_DIM, "sliding_window": 8}),
    "mistral": ("MistralConfig", {**_ROTARY, "sliding_window": 8}),
    "phi": ("PhiConfig", _ROTARY),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": NUM_POSITIONS,
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": False,
            "dropout": 0.0,
            "init_std": 0.1,
        },
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    ),
    "falcon": (
        "FalconConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"initializer_range": 0.1, "bias": True},
    ),
    "mixtral": ("MixtralConfig", {**_ROTARY, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_HEAD_DIM, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
    ),
}
TIED = ("llama_tied", "gpt2", "gemma", "opt", "bloom", "t5")
MIXTURES = ("mixtral", "qwen3_moe")


def build(name: str) -> nn.Module:
    """A float32 model with the seed's random weights, in evaluation mode: no dropout."""
    class_name, arguments = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**{**_NO_IDS, **arguments})
    torch.manual_seed(0)
    factory = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model: nn.Module = factory.from_config(config).eval()
    return model


def batch() -> dict[str, Tensor]:
    """Rows in which each token follows from the last; an encoder-decoder repeats its input."""
    start = torch.arange(8)[:, None]
    ids = 3 + (start * 7 + torch.arange(16)[None] * (1 + start % 3)) % (VOCAB - 3)
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(**batch()).logits.clone()
    return output


def update(model: nn.Module, optimizer: Optimizer, num_updates: int = 1) -> None:
    """Updates of the language-model loss on the fixed batch; the last gradients stay to be looked at."""
    for _ in range(num_updates):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()


def injected(name: str, config: LoRAConfig = CONFIG) -> tuple[nn.Module, Optimizer]:
    model = build(name)
    inject_lora(model, config, seed=0)
    return model, build_optimizer(model, learning_rate=1e-2)


def trained(name: str, num_updates: int = 4) -> tuple[nn.Module, Optimizer]:
    """A wrapped model whose A and B have both moved."""
    model, optimizer = injected(name)
    update(model, optimizer, num_updates)
    return model, optimizer


@torch.no_grad()
def learned_by_factors(model: nn.Module) -> float:
    """How much the logits change when the factors are switched off."""
    with_factors = logits(model)
    kept = {layer: layer.lora_B.clone() for layer in lora_layers(model).values()}
    for layer in kept:
        layer.lora_B.zero_()
    without = logits(model)
    for layer, B in kept.items():
        layer.lora_B.copy_(B)
    return (with_factors - without).abs().max().item()


def copies(layers: Mapping[str, LoRALinear], factor: str) -> dict[str, Tensor]:
    return {name: getattr(layer, factor).detach().clone() for name, layer in layers.items()}


def names_where(layers: Mapping[str, LoRALinear], holds: Callable[[str, LoRALinear], bool]) -> set[str]:
    return {name for name, layer in layers.items() if holds(name, layer)}


def without_gradient(model: nn.Module, factor: str) -> set[str]:
    """The wrapped layers whose factor got no gradient, or one that is zero."""

    def dead(_: str, layer: LoRALinear) -> bool:
        gradient = getattr(layer, factor).grad
        return gradient is None or not gradient.any()

    return names_where(lora_layers(model), dead)
