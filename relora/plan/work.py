"""The products that a model makes for a token, counted in a forward pass without values."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from relora.config import Config
from relora.config.derived import lora_config
from relora.method.census import census
from relora.method.lora import is_linear
from relora.method.routes import form_cost
from relora.plan.flops import LayerWork
from relora.plan.rehearsal import fake, fake_batch, fake_model
from relora.stages import Stage

_BETWEEN_TOKENS = ("bmm", "baddbmm", "attention")


def layer_work(config: Config, hf_config: PretrainedConfig, *, device_type: str = "cpu") -> LayerWork:
    """What updates multiply, in both stages. A backward pass is twice a forward pass where weights are trained.

    What is computed again to save memory (checkpointing) does not count.
    """
    counted, lora = _forward(config, hf_config), lora_config(config)
    full = _linear_layers(Stage("warm_start", 1), config, hf_config)
    low = _linear_layers(Stage("relora", 1), config, hf_config) if config.training.method != "full" else full
    dtype = torch.bfloat16 if config.training.mixed_precision == "bf16" else torch.float32
    rest = counted.of_weights - sum(2 * d_in * d_out for d_out, d_in in low.wrapped)
    return LayerWork(
        wrapped=low.wrapped,
        rest_full=rest * (2 + full.trained_share),
        rest_low=rest * (2 + low.trained_share),
        attention=3 * counted.between_tokens,
        can_merge=lora.base_dtype in (None, "float32") and lora.lora_dropout == 0,
        forward=lora.forward,
        num_forms=1.0 if lora.keep_merged else 2.0,
        form_cost=form_cost(device_type, dtype),
    )


@dataclass(frozen=True)
class _Counted:
    """FLOPs per token of a forward pass: products with weights, and of tokens with each other."""

    of_weights: float
    between_tokens: float


@dataclass(frozen=True)
class _Linear:
    """What a stage wraps, and how much of its other matrices it trains."""

    wrapped: list[tuple[int, int]]
    trained_share: float


@torch.no_grad()
def _forward(config: Config, hf_config: PretrainedConfig) -> _Counted:
    # The eager kernel's products are plain ones, which torch counts; sdpa's on a CPU it does not.
    eager = config.model.model_copy(update={"attn_implementation": "eager"})
    with fake():
        model = fake_model(Stage("warm_start", 1), config.model_copy(update={"model": eager}), hf_config).eval()
        batch = fake_batch(config, batch_size=2)
        del batch["labels"]
        with FlopCounterMode(display=False) as counter:
            model(**batch)
    flops = counter.get_flop_counts()["Global"]
    between = sum(count for op, count in flops.items() if any(name in str(op) for name in _BETWEEN_TOKENS))
    num_tokens = 2 * config.data.sequence_length
    return _Counted((sum(flops.values()) - between) / num_tokens, between / num_tokens)


def _linear_layers(stage: Stage, config: Config, hf_config: PretrainedConfig) -> _Linear:
    with fake():
        model = fake_model(stage, config, hf_config)
        wrapped = list(census(model).wrapped_layers.values())
        others = [module.weight for module in model.modules() if is_linear(module)]
    trained = sum(weight.numel() for weight in others if weight.requires_grad)
    return _Linear(wrapped, trained / max(1, sum(weight.numel() for weight in others)))
