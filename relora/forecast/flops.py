"""FLOPs of an update, in full rank and in low rank. A multiplication and an addition are two.

Only matrix products count: elementwise operations take time too, the same in both. The formulas of the wrapped layers
are those by which they choose their route (`relora/method/routes.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from relora.config import Config
from relora.config.derived import lora_config
from relora.forecast.dry_run import example_batch, fake, fake_batch, fake_model
from relora.method.choices import Forward, Route
from relora.method.parameter_report import parameter_report
from relora.method.plain_layers import is_linear
from relora.method.routes import choose_route, factored_flops, form_cost, full_rank_flops, merged_flops
from relora.model.tasks import task_of
from relora.train.stages import Stage

Shape = tuple[int, int]  # (d_out, d_in)
# Names of the operations that multiply tokens with each other, as torch's counter has them.
BETWEEN_TOKENS = ("bmm", "baddbmm", "attention")


@dataclass(frozen=True)
class LayerWork:
    """The products of a model.

    Attributes:
        wrapped: (d_out, d_in) of the layers that the low-rank stage wraps.
        rest_full: FLOPs per token, forward and backward, of the other layers (output head) in the full-rank stage.
        rest_low: the same in the low-rank stage.
        attention: FLOPs per token, forward and backward, of the products between tokens.
        can_merge: W is stored exactly and there is no dropout.
        forward: the route that `lora.forward` asks for.
        num_forms: as in `merged_flops`.
        form_cost: time of a FLOP of forming W + delta over that of one of a product, where routes are compared.
    """

    wrapped: Sequence[Shape]
    rest_full: float
    rest_low: float
    attention: float
    can_merge: bool
    forward: Forward
    num_forms: float = 2.0
    form_cost: float = 1.0

    def route(self, shape: Shape, *, num_tokens: int, r: int) -> Route:
        """The route that a wrapped layer of (d_out, d_in) takes for a micro-batch of so many tokens."""
        d_out, d_in = shape
        return choose_route(
            num_tokens,
            d_in,
            d_out,
            r,
            forward=self.forward,
            can_merge=self.can_merge,
            num_forms=self.num_forms * self.form_cost,
        )


@dataclass(frozen=True)
class UpdateFlops:
    """FLOPs of one update over all processes, by what computes them."""

    wrapped: float
    rest: float
    attention: float

    @property
    def total(self) -> float:
        return self.wrapped + self.rest + self.attention


def full_rank_update(work: LayerWork, *, num_calls: int, num_tokens: int) -> UpdateFlops:
    """The FLOPs of an update of `num_calls` micro-batches of `num_tokens`, all weights trained."""
    wrapped = sum(full_rank_flops(num_tokens, d_in, d_out) for d_out, d_in in work.wrapped)
    return UpdateFlops(
        wrapped=num_calls * wrapped,
        rest=num_calls * (work.rest_full * num_tokens),
        attention=num_calls * (work.attention * num_tokens),
    )


def low_rank_update(work: LayerWork, *, num_calls: int, num_tokens: int, r: int) -> UpdateFlops:
    """The same with the wrapped layers frozen beside factors of rank r, each on the route that it takes."""
    wrapped = 0.0
    for d_out, d_in in work.wrapped:
        if work.route((d_out, d_in), num_tokens=num_tokens, r=r) == "merged":
            wrapped += merged_flops(num_tokens, d_in, d_out, r, num_forms=work.num_forms)
        else:
            wrapped += factored_flops(num_tokens, d_in, d_out, r)
    return UpdateFlops(
        wrapped=num_calls * wrapped,
        rest=num_calls * (work.rest_low * num_tokens),
        attention=num_calls * (work.attention * num_tokens),
    )


def num_merged(work: LayerWork, *, num_tokens: int, r: int) -> int:
    """The number of wrapped layers that compute with W + delta."""
    return sum(work.route(shape, num_tokens=num_tokens, r=r) == "merged" for shape in work.wrapped)


def break_even_rank(work: LayerWork, *, num_tokens: int) -> int:
    """The largest r at which low-rank updates need no more FLOPs than full-rank ones; 0 if there is none."""
    full = full_rank_update(work, num_calls=1, num_tokens=num_tokens).total
    # By bisection: FLOPs grow with r, so low rank pays off at `low` and does not above `high`.
    low, high = 0, min(min(shape) for shape in work.wrapped)
    while low < high:
        middle = (low + high + 1) // 2
        pays_off = low_rank_update(work, num_calls=1, num_tokens=num_tokens, r=middle).total <= full
        low, high = (middle, high) if pays_off else (low, middle - 1)
    return low


def layer_work(config: Config, hf_config: PretrainedConfig, *, device_type: str = "cpu") -> LayerWork:
    """Count the products of both stages. A backward pass is twice a forward pass where weights are trained.

    Recomputation to save memory (checkpointing) does not count.
    """
    of_weights, between_tokens = forward_flops(config, hf_config)
    lora = lora_config(config)
    wrapped, share_full = linear_layers(Stage("full_rank", 1), config, hf_config)
    share_low = share_full
    if config.training.method != "full":
        wrapped, share_low = linear_layers(Stage("low_rank", 1), config, hf_config)
    rest = of_weights - sum(2 * d_in * d_out for d_out, d_in in wrapped)
    dtype = torch.bfloat16 if config.training.mixed_precision == "bf16" else torch.float32
    return LayerWork(
        wrapped=wrapped,
        rest_full=rest * (2 + share_full),
        rest_low=rest * (2 + share_low),
        attention=3 * between_tokens,
        can_merge=lora.base_dtype in (None, "float32") and lora.lora_dropout == 0,
        forward=lora.forward,
        num_forms=1.0 if lora.keep_merged else 2.0,
        form_cost=form_cost(device_type, dtype),
    )


@torch.no_grad()
def forward_flops(config: Config, hf_config: PretrainedConfig) -> tuple[float, float]:
    """FLOPs per token of a full-rank forward pass: of products with weights, and of tokens with each other."""
    # The eager kernel's products are plain ones, which torch counts; those of sdpa on a CPU it does not.
    eager = config.model.model_copy(update={"attn_implementation": "eager"})
    example, task = example_batch(config, batch_size=2), task_of(config)
    with fake():
        model = fake_model(Stage("full_rank", 1), config.model_copy(update={"model": eager}), hf_config).eval()
        batch = fake_batch(example)
        with FlopCounterMode(display=False) as counter:
            model(**task.inputs(batch))
    flops = counter.get_flop_counts()["Global"]
    between = sum(count for op, count in flops.items() if any(name in str(op) for name in BETWEEN_TOKENS))
    num_tokens = 2 * config.data.sequence_length
    return (sum(flops.values()) - between) / num_tokens, between / num_tokens


def linear_layers(stage: Stage, config: Config, hf_config: PretrainedConfig) -> tuple[list[Shape], float]:
    """(d_out, d_in) of the layers that a stage wraps, and the share of its other linear weights that it trains."""
    with fake():
        model = fake_model(stage, config, hf_config)
        wrapped = list(parameter_report(model).wrapped_layers.values())
        others = [module.weight for module in model.modules() if is_linear(module)]
    num_trained = sum(weight.numel() for weight in others if weight.requires_grad)
    return wrapped, num_trained / max(1, sum(weight.numel() for weight in others))
