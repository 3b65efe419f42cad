"""Small models of every architecture that transformers can build from a config: what is wrapped, and what is left out.

    python -m benchmarks.architectures [--only llama mamba ...] [--out docs/results/architectures.md]

Each is built with two layers and random weights, run once by `inject_lora(example_loss=...)`, trained for two updates,
restarted, and trained for two updates more: then every factor must have moved. Some minutes on one core.
"""

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relora import LoRAConfig, build_optimizer, inject_lora, restart
from relora.method.lora import FACTORS, lora_layers

VOCAB, LENGTH, WIDTH = 64, 32, 32
MOST_PARAMETERS = 6_000_000
SLOW = {"kimi_linear"}  # the backward pass of its reference code takes minutes
LORA = LoRAConfig(r=4, lora_alpha=8, modules_to_save="rest")
# Settings that make a model small, by the names under which configs have them.
SMALL: Mapping[str, int] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "n_embed", "dim", "word_embed_proj_dim"], WIDTH),
    **dict.fromkeys(["embedding_size", "attention_hidden_size", "lru_width", "encoder_hidden_size"], WIDTH),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "dff", "n_inner", "ffn_hidden_size"], 48),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "block_ff_dim"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok", "moe_k", "top_k"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 2 * LENGTH),
    **dict.fromkeys(
        ["head_dim", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "sliding_window"], 8
    ),
    **dict.fromkeys(["sliding_window", "attention_window_size", "hidden_size_per_layer_input", "laurel_rank"], 8),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 24),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "index_head_dim"], 16),
    **dict.fromkeys(["state_size", "mamba_d_state", "mamba_d_head", "mamba_head_dim", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_num_heads", "mamba_n_heads"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["linear_num_key_heads", "index_n_heads"], 2),
    **dict.fromkeys(["linear_num_value_heads", "index_topk", "time_step_rank", "mamba_dt_rank"], 4),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_HIDDEN = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_COMMON = {"vocab_size": VOCAB, **_HIDDEN, "num_key_value_heads": 2, "max_position_embeddings": 2 * LENGTH}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
# Whole configs of those that the rules above do not fit.
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
    | {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "gpt_neo": {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "window_size": 8}
    | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 2 * LENGTH},
    "dots1": {**_COMMON, **_ROUTED, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {**_COMMON, "layer_types": ["conv", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 24, "num_dense_layers": 1},
    "falcon_h1": {**_COMMON, "head_dim": 8, "mamba_d_ssm": WIDTH, "mamba_n_heads": 4, "mamba_d_head": 8}
    | {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "zamba2": {**_COMMON, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16}
    | {"num_mem_blocks": 1, "hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid"]},
    "gemma3n_text": {**_COMMON, "num_hidden_layers": 4, "head_dim": 8, "num_kv_shared_layers": 2, "laurel_rank": 8}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
}


@dataclass(frozen=True)
class Row:
    """One architecture: how many layers are wrapped, which are left out and why, and what went wrong."""

    name: str
    num_wrapped: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)
    num_frozen: int = 0
    problem: str = ""


def small_config(model_type: str) -> PretrainedConfig:
    """A config of two narrow layers; settings that a config class refuses are left at their defaults."""
    kind = CONFIG_MAPPING[model_type]
    if model_type in SPECIAL:
        return kind(**SPECIAL[model_type])
    default = kind()
    settings: dict[str, Any] = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    for key in ("layer_types", "layers_block_type"):
        types, is_setting = getattr(default, key, None), not isinstance(getattr(kind, key, None), property)
        if types and is_setting:
            settings[key] = [types[0], types[-1]]
    if "qk_rope_head_dim" in settings:
        settings.pop("head_dim", None)  # derived from the others
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for _ in range(len(settings)):
        try:
            return kind(**settings)
        except Exception as error:  # each class refuses in its own words; they name the setting
            said = str(error).replace("layers_block_type", "layer_types")
            named = [key for key in settings if re.search(rf"\b{key}\b", said)]
            if not named:
                raise
            del settings[named[0]]
    return kind(**settings)


IDS = torch.randint(3, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS}
WAVES = {"input_values": SOUND}
_IMAGE = {**_HIDDEN, "image_size": 32, "patch_size": 8}
_SOUND = {**_HIDDEN, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0}
_SEQ2SEQ = {
    **{key: SMALL[key] for key in ("d_model", "d_ff", "num_layers")},
    "d_kv": 8,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {key: SMALL[key] for key in ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim")}
_BART |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCAB}
_ENDS = {f"{which}_token_id": i for i, which in enumerate(("pad", "bos", "eos", "cls", "sep"))}
_PAD = {**_ENDS, "decoder_start_token_id": 0, "max_position_embeddings": 2 * LENGTH}
_TEXT = {**_HIDDEN, "vocab_size": VOCAB, "max_position_embeddings": 2 * LENGTH}
# Name -> (class of the config, class of the model, settings, inputs).
OTHERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bert (encoder)": ("BertConfig", "AutoModel", _TEXT, TEXT),
    "roberta (masked)": ("RobertaConfig", "AutoModelForMaskedLM", _TEXT, TEXT),
    "bert (classifier)": ("BertConfig", "AutoModelForSequenceClassification", _TEXT, TEXT),
    "albert": ("AlbertConfig", "AutoModel", {**_TEXT, "embedding_size": 16}, TEXT),
    "deberta": ("DebertaConfig", "AutoModel", _TEXT, TEXT),
    "deberta-v2": ("DebertaV2Config", "AutoModel", _TEXT, TEXT),
    "distilbert": (
        "DistilBertConfig",
        "AutoModel",
        {"vocab_size": VOCAB, "dim": WIDTH, "n_layers": 2, "n_heads": 4},
        TEXT,
    ),
    "mobilebert": ("MobileBertConfig", "AutoModel", {**_TEXT, "embedding_size": 16, "intra_bottleneck_size": 16}, TEXT),
    "big_bird (encoder)": ("BigBirdConfig", "AutoModel", _TEXT, TEXT),
    "longformer": ("LongformerConfig", "AutoModel", {**_TEXT, "attention_window": 8}, TEXT),
    "modernbert": ("ModernBertConfig", "AutoModel", {**_TEXT, **_ENDS}, TEXT),
    "t5": ("T5Config", "AutoModelForSeq2SeqLM", {**_SEQ2SEQ, "vocab_size": VOCAB}, {**TEXT, "labels": IDS}),
    "mt5": ("MT5Config", "AutoModelForSeq2SeqLM", {**_SEQ2SEQ, "vocab_size": VOCAB}, {**TEXT, "labels": IDS}),
    "bart (both halves)": ("BartConfig", "AutoModelForSeq2SeqLM", _BART, {**TEXT, "labels": IDS}),
    "marian (both halves)": (
        "MarianConfig",
        "AutoModelForSeq2SeqLM",
        {**_BART, "pad_token_id": 0},
        {**TEXT, "labels": IDS},
    ),
    "vit": ("ViTConfig", "AutoModelForImageClassification", _IMAGE, {"pixel_values": IMAGES}),
    "deit": ("DeiTConfig", "AutoModel", _IMAGE, {"pixel_values": IMAGES}),
    "beit": ("BeitConfig", "AutoModel", _IMAGE, {"pixel_values": IMAGES}),
    "dinov2": ("Dinov2Config", "AutoModel", _IMAGE, {"pixel_values": IMAGES}),
    "siglip (vision)": ("SiglipVisionConfig", "AutoModel", _IMAGE, {"pixel_values": IMAGES}),
    "clip (vision)": ("CLIPVisionConfig", "AutoModel", _IMAGE, {"pixel_values": IMAGES}),
    "swin": (
        "SwinConfig",
        "AutoModel",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        {"pixel_values": IMAGES},
    ),
    "wav2vec2": ("Wav2Vec2Config", "AutoModel", _SOUND, WAVES),
    "hubert": ("HubertConfig", "AutoModel", _SOUND, WAVES),
    "wavlm": ("WavLMConfig", "AutoModel", _SOUND, WAVES),
    "whisper": (
        "WhisperConfig",
        "AutoModel",
        {**_BART, "max_source_positions": 32, "max_target_positions": 2 * LENGTH, "pad_token_id": 0}
        | {"num_mel_bins": 16, "decoder_start_token_id": 1},
        {"input_features": torch.randn(4, 16, 64), "decoder_input_ids": IDS},
    ),
    "audio-spectrogram-transformer": (
        "ASTConfig",
        "AutoModel",
        {**_HIDDEN, "max_length": 32, "num_mel_bins": 32},
        {"input_values": torch.randn(2, 32, 32)},
    ),
}


def causal_models() -> Iterator[tuple[str, Callable[[], nn.Module], dict[str, Any]]]:
    """(name, how to build it, its inputs) for each causal language model that a config of text alone describes."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - SLOW):
        yield model_type, lambda name=model_type: AutoModelForCausalLM.from_config(small_config(name)), TEXT


def other_models() -> Iterator[tuple[str, Callable[[], nn.Module], dict[str, Any]]]:
    """The same for encoders, encoder-decoders, vision and audio models."""
    for name, (config, factory, settings, inputs) in OTHERS.items():
        kind, auto = getattr(transformers, config), getattr(transformers, factory)
        yield name, lambda kind=kind, auto=auto, settings=settings: auto.from_config(kind(**settings)), inputs


def loss_on(inputs: Mapping[str, Any]) -> Callable[[nn.Module], Tensor]:
    """The model's own loss, or a fixed random sum of its first output."""

    def loss(model: nn.Module) -> Tensor:
        output = model(**inputs)
        own: Tensor | None = output.get("loss")
        if own is not None:
            return own
        first = next(value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point())
        weights: Tensor = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
        return (first.float() * weights).mean()

    return loss


def tried(name: str, make: Callable[[], nn.Module], inputs: Mapping[str, Any]) -> Row:
    """Wrap one architecture and train it over a restart."""
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in make().parameters())
        if num_parameters > MOST_PARAMETERS:
            return Row(name, problem=f"not tried: {num_parameters:,} parameters at the least")
        model = make()
    except Exception as error:  # a config of another form
        return Row(name, problem=f"not built: {first_line(error)}")
    loss = loss_on(inputs)
    try:
        model.config.use_cache = False
        report = inject_lora(model, LORA, example_loss=loss)
    except ValueError as error:
        return Row(name, problem=f"refused: {str(error).splitlines()[0]}")
    except Exception as error:
        return Row(name, problem=f"does not run on these inputs: {first_line(error)}")
    still = unmoved_factors(model, loss)
    without = sum(parameter.grad is None for parameter in model.parameters() if parameter.requires_grad)
    problem = f"{len(still)} factors never move, such as {still[0]}" if still else ""
    problem += f" {without} trained parameters without a gradient" if without else ""
    return Row(name, len(report.wrapped_layers), report.left_out, len(report.frozen_names), problem.strip())


def first_line(error: Exception) -> str:
    """The type of an exception and its first line, at most 100 characters, without what ends a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".replace("|", "/")[:100]


def unmoved_factors(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[str]:
    """The factors that two updates after a restart have not moved."""
    optimizer = build_optimizer(model, learning_rate=1e-2)
    model.train()
    for index in range(2):
        factors = {f"{n}.{one}": getattr(layer, one) for n, layer in lora_layers(model).items() for one in FACTORS}
        before = {name: factor.detach().clone() for name, factor in factors.items()}
        for _ in range(2):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        if index == 0:
            restart(model, optimizer, seed=0, index=1)
    return [name for name, factor in factors.items() if torch.equal(factor, before[name])]


def kinds(left_out: Mapping[str, str]) -> str:
    """`layers.*.mixer.dt_proj (2): reason` for each kind of layer that is left out."""
    counts = Counter((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), why) for name, why in left_out.items())
    return "; ".join(f"`{name}` ({count}) {why}" for (name, why), count in counts.items())


def page(rows: list[Row]) -> str:
    """The table as Markdown."""
    tried_rows = [row for row in rows if row.num_wrapped]
    clean = sum(not row.problem for row in tried_rows)
    lines = [
        "# Architectures",
        "",
        f"`python -m benchmarks.architectures`, transformers {transformers.__version__}, torch {torch.__version__}.",
        "",
        f"Of {len(rows)} architectures {len(tried_rows)} were wrapped; in {clean} of them every factor had moved two "
        "updates after a restart, and every trained parameter had a gradient. Small models, random weights, fp32.",
        "",
        "| architecture | wrapped layers | left out, and why | frozen: no gradient | |",
        "|---|--:|---|--:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.num_wrapped or ''} | {kinds(row.left_out)} | {row.num_frozen or ''} | {row.problem} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try all architectures, or those named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of architectures")
    parser.add_argument("--out", type=Path, help="also write the page there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    rows = list[Row]()
    for name, make, inputs in (*causal_models(), *other_models()):
        if options.only is None or name in options.only:
            rows.append(tried(name, make, inputs))
            print(f"{name}: {rows[-1].num_wrapped} wrapped {rows[-1].problem}", file=sys.stderr, flush=True)
    print(page(rows))
    if options.out is not None:
        options.out.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
