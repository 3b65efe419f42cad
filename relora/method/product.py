"""An optimizer of the factors that steps in their product: the size of a step is that of the change of W.

With momenta m_A, m_B of the gradients scale * B^T G and scale * G A^T (G is the gradient of W), S_A = A A^T and
S_B = B^T B, both (r, r):

    D_A = S_B^-1/2 msign(S_B^-1/2 m_A)      D_B = msign(m_B S_A^-1/2) S_A^-1/2       (LoRA-Muon, arXiv 2606.12921)
    A <- A - rho D_A / |D_A|_2              B <- B - rho D_B / |D_B|_2               (PoLoRA, arXiv 2607.17620)

msign(U diag(S) V^T) = U V^T. The directions of B D_A and D_B A depend on B A and G alone, not on which A, B have this
product. rho is the largest for which no step changes scale * B A by more than the rate, as

    |(B - rho D_B) (A - rho D_A) - B A|_2 <= rho (|A|_2 + |B|_2) + rho^2             (Spectron, arXiv 2602.12429)

where Spectron has rho for rho^2. With B = 0 it is the root of the rate: A rests, as it has no gradient, and B steps.

Three products with the long side a factor, and the two in each iteration of msign; all else is on r x r matrices. The
state is one momentum in the shape of the factor.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from relora.method.combined_optimizer import evaluated
from relora.method.delta import full_precision
from relora.method.matrix_functions import inverse_root, matrix_sign, norm_bound
from relora.method.optimizer_state import OptimizerKind

MOMENTUM = "momentum_buffer"
MAX_ENTRIES = 2**23  # of the factors that are computed at once: temporaries are some ten times as large
Pair = tuple[Tensor, Tensor]


class Product(Optimizer):
    """Steps pairs of factors; each group is A, B, A, B, ... of wrapped layers, and has their `scale`.

    Raises:
        ValueError: parameters that are no such pairs.
    """

    # It reads `found_inf` and `grad_scale` on the device, as torch's fused optimizers: see Engine.step.
    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        for group in self.param_groups:
            factors = group["params"]
            odd = [
                f"{tuple(A.shape)}, {tuple(B.shape)}"
                for A, B in _pairs(factors)
                if (A.ndim, A.shape[:1]) != (2, B.shape[1:])
            ]
            if "scale" not in group or len(factors) % 2 or odd:
                raise ValueError(
                    "the product optimizer steps LoRA factors A (r, d_in), B (d_out, r) in turn, in a group with their "
                    f"scale; {odd[0] if odd else f'{len(factors)} parameters'} are none"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all pairs that have gradients; none at all if `found_inf` is set."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for pairs in _batches(group["params"]):
                with full_precision(pairs[0][0].device.type):
                    self._step(pairs, group)
        return loss

    def _step(self, pairs: list[Pair], group: dict[str, Any]) -> None:
        """One update of pairs of one shape."""
        unscale, is_bad = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        found, momenta = [], []
        for factors in zip(*pairs, strict=True):
            buffers = [self.state[p].setdefault(MOMENTUM, torch.zeros_like(p)) for p in factors]
            gradient = torch.stack([p.grad for p in factors])
            if unscale is not None:
                gradient = gradient / unscale
            momentum = torch.stack(buffers).lerp_(gradient, 1 - group["momentum"])
            found.append((factors, torch.stack(factors), buffers, momentum))
            momenta.append(momentum.lerp(gradient, 1 - group["momentum"]))  # Nesterov's
        (_, A, *_), (_, B, *_) = found
        steps = product_step(A, B, *momenta, rate=group["lr"] / group["scale"])
        keep = math.sqrt(max(0.0, 1 - group["lr"] * group["weight_decay"]))  # of each factor, so its square of B @ A
        for (factors, old, buffers, momentum), step in zip(found, steps, strict=True):
            new = keep * old - step
            if is_bad is not None:
                new = torch.where(is_bad > 0, old, new)
                momentum = torch.where(is_bad > 0, torch.stack(buffers), momentum)
            torch._foreach_copy_(list(factors), list(new.unbind()))
            torch._foreach_copy_(buffers, list(momentum.unbind()))


def product_step(A: Tensor, B: Tensor, m_A: Tensor, m_B: Tensor, *, rate: float) -> Pair:
    """What to take off A (n, r, d_in) and B (n, d_out, r): |(B - step_B) (A - step_A) - B A|_2 <= rate.

    Args:
        m_A, m_B: momenta, of any size.
        rate: of the product B @ A.
    """
    S_A, S_B = A @ A.mT, B.mT @ B  # (n, r, r)
    root_A, root_B = inverse_root(S_A), inverse_root(S_B)
    D_A = root_B @ matrix_sign(root_B @ m_A) / norm_bound(root_B)  # (n, r, d_in), of norm 1 at most
    D_B = root_A @ matrix_sign(root_A @ m_B.mT) / norm_bound(root_A)  # (n, r, d_out)
    # rho^2 + (|A|_2 + |B|_2) rho = rate; this form of the root has no difference of nearly equal numbers.
    size = norm_bound(S_A).sqrt() + norm_bound(S_B).sqrt()  # (n, 1, 1)
    rho = 2 * rate / (size + (size.square() + 4 * rate).sqrt()).clamp_min(torch.finfo(A.dtype).tiny)
    return rho * D_A, (rho * D_B).mT


def _pairs(factors: list[Tensor]) -> Iterator[Pair]:
    return zip(factors[::2], factors[1::2], strict=False)


def _batches(factors: list[Tensor]) -> Iterator[list[Pair]]:
    """The pairs that have gradients, by shape, dtype and device, so many at once that temporaries stay small."""
    alike: dict[object, list[Pair]] = {}
    for A, B in _pairs(factors):
        if A.grad is not None and B.grad is not None:
            alike.setdefault((A.shape, B.shape, A.dtype, A.device), []).append((A, B))
    for pairs in alike.values():
        most = max(1, MAX_ENTRIES // sum(factor.numel() for factor in pairs[0]))
        yield from (pairs[first : first + most] for first in range(0, len(pairs), most))


def _build(groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    return Product(groups, lr=settings["lr"], momentum=settings["betas"][0])


PRODUCT = OptimizerKind(_build, scalars=())  # no step count: a direction alone needs no correction of its bias
