"""Model FLOPs utilisation: what part of the devices' peak goes into FLOPs that training by its method needs (MFU)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TERA = 1e12


@dataclass(frozen=True)
class Peak:
    """Dense TFLOP/s of one GPU: matrix units in bf16 with fp32 sums, and plain float32."""

    bf16: float
    fp32: float


# By torch.cuda.get_device_name, from NVIDIA's data sheets and architecture papers; half of what they give for sparse.
_A100, _H100_SXM = Peak(312, 19.5), Peak(989.4, 67)
PEAKS = {
    "NVIDIA A10": Peak(125, 31.2),
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA GeForce RTX 3090": Peak(71, 35.6),
    "NVIDIA GeForce RTX 4090": Peak(165.2, 82.6),
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": Peak(756, 51),
    "NVIDIA H200": _H100_SXM,
    "NVIDIA L4": Peak(121, 30.3),
    "NVIDIA L40S": Peak(362, 91.6),
}


def peak_flops(device: torch.device, *, mixed_precision: str, stated_tflops: float | None) -> float | None:
    """FLOP/s of one device at best: as stated, else by the name of the GPU; None if that is not known."""
    if stated_tflops is not None:
        return stated_tflops * TERA
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    return TERA * (peak.bf16 if mixed_precision == "bf16" else peak.fp32)


def flops_per_token(
    model: nn.Module, *, sequence_length: int, shape: Callable[[nn.Parameter], torch.Size] = lambda p: p.shape
) -> float:
    """FLOPs of an update for each token of its batch, as the training method needs them:

        4 N_frozen + 6 N_trained + 12 layers heads head_dim T

    N counts the entries of what tokens are multiplied with: no vectors, no embedding tables unless they are the output
    head too, of experts those that a token goes to. A frozen weight W takes 2 N for y = x W^T and 2 N for the gradient
    of x; a trained one, the factors A and B among them, 2 N more for its own. The last term is the attention of every
    token to a whole sequence, as in arXiv 2204.02311, appendix B. What is computed again to save memory does not
    count, nor does by which route a wrapped layer computes.

    Args:
        model: of transformers.
        shape: the full shape of a parameter, where an engine leaves the model only a part of it.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    tables -= {id(getattr(head, "weight", None))}
    experts_per_token = getattr(config, "num_experts_per_tok", None)
    flops = 0.0
    for parameter in model.parameters():
        size = shape(parameter)
        if len(size) > 1 and id(parameter) not in tables:
            used = experts_per_token / size[0] if len(size) == 3 and experts_per_token else 1
            flops += (6 if parameter.requires_grad else 4) * used * size.numel()
    return flops + 12 * sequence_length * _attention_width(config)


def _attention_width(config: Any) -> int:
    """Of all layers and heads together; 0 for a model without attention."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return 0
    return int(config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))
