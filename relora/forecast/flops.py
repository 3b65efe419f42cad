"""What an update costs in FLOPs, in full rank and in low rank. A multiplication and an addition are two.

Products alone are counted: what is done number by number takes time too, the same in both. The layers' own formulas
are those by which they choose their route (`relora/method/routes.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from relora.config import Config
from relora.config.derived import lora_config
from relora.forecast.dry_run import fake, fake_batch, fake_model
from relora.method.choices import Forward, Route
from relora.method.lora import is_linear
from relora.method.parameter_report import parameter_report
from relora.method.routes import choose_route, factored_flops, form_cost, full_rank_flops, merged_flops
from relora.train.stages import Stage

Shape = tuple[int, int]  # (d_out, d_in)


@dataclass(frozen=True)
class LayerWork:
    """The products of a model.

    Attributes:
        wrapped: (d_out, d_in) of the layers that the low-rank stage wraps.
        rest: FLOPs per token, forward and backward, of what is not wrapped (output head), as each stage trains it.
        attention: FLOPs per token of the products between tokens.
        can_merge: W is stored exactly and there is no dropout.
        forward: which route is asked for.
        num_forms: as in `merged_flops`.
        form_cost: what a FLOP of W + delta costs beside one of a product, where routes are compared.
    """

    wrapped: Sequence[Shape]
    rest_full: float
    rest_low: float
    attention: float
    can_merge: bool
    forward: Forward
    num_forms: float = 2.0
    form_cost: float = 1.0


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
    """An update of `num_calls` micro-batches of `num_tokens`, all weights trained."""
    wrapped = sum(full_rank_flops(num_tokens, d_in, d_out) for d_out, d_in in work.wrapped)
    return _update(num_calls, wrapped, work.rest_full * num_tokens, work.attention * num_tokens)


def low_rank_update(work: LayerWork, *, num_calls: int, num_tokens: int, r: int) -> UpdateFlops:
    """The same, the wrapped layers frozen beside factors of rank r."""
    wrapped = sum(_low_rank_layer(work, num_tokens, d_in, d_out, r) for d_out, d_in in work.wrapped)
    return _update(num_calls, wrapped, work.rest_low * num_tokens, work.attention * num_tokens)


def num_merged(work: LayerWork, *, num_tokens: int, r: int) -> int:
    """How many of the wrapped layers compute with W + delta."""
    return sum(_route(work, num_tokens, d_in, d_out, r) == "merged" for d_out, d_in in work.wrapped)


def break_even_rank(work: LayerWork, *, num_tokens: int) -> int:
    """The largest r at which low-rank updates need no more FLOPs than full-rank ones; 0 if there is none."""
    full = full_rank_update(work, num_calls=1, num_tokens=num_tokens).total

    def is_worth_it(r: int) -> bool:
        return low_rank_update(work, num_calls=1, num_tokens=num_tokens, r=r).total <= full

    return _last(is_worth_it, most=min(min(shape) for shape in work.wrapped))


def _last(holds: Callable[[int], bool], *, most: int) -> int:
    """The largest number in 1..most for which `holds`, which is true up to some number; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _low_rank_layer(work: LayerWork, num_tokens: int, d_in: int, d_out: int, r: int) -> float:
    if _route(work, num_tokens, d_in, d_out, r) == "merged":
        return merged_flops(num_tokens, d_in, d_out, r, num_forms=work.num_forms)
    return factored_flops(num_tokens, d_in, d_out, r)


def _route(work: LayerWork, num_tokens: int, d_in: int, d_out: int, r: int) -> Route:
    return choose_route(
        num_tokens,
        d_in,
        d_out,
        r,
        forward=work.forward,
        can_merge=work.can_merge,
        num_forms=work.num_forms * work.form_cost,
    )


def _update(num_calls: int, wrapped: float, rest: float, attention: float) -> UpdateFlops:
    return UpdateFlops(num_calls * wrapped, num_calls * rest, num_calls * attention)


_BETWEEN_TOKENS = ("bmm", "baddbmm", "attention")


def layer_work(config: Config, hf_config: PretrainedConfig, *, device_type: str = "cpu") -> LayerWork:
    """What updates multiply, in both stages. A backward pass is twice a forward pass where weights are trained.

    What is computed again to save memory (checkpointing) does not count.
    """
    counted, lora = _forward(config, hf_config), lora_config(config)
    full = _linear_layers(Stage("full_rank", 1), config, hf_config)
    low = _linear_layers(Stage("low_rank", 1), config, hf_config) if config.training.method != "full" else full
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
        model = fake_model(Stage("full_rank", 1), config.model_copy(update={"model": eager}), hf_config).eval()
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
        wrapped = list(parameter_report(model).wrapped_layers.values())
        others = [module.weight for module in model.modules() if is_linear(module)]
    trained = sum(weight.numel() for weight in others if weight.requires_grad)
    return _Linear(wrapped, trained / max(1, sum(weight.numel() for weight in others)))
