"""Are the kernels of `lora.kernels: triton` faster than torch's products? Until a GPU says so, torch is the default.

    python -m benchmarks.kernels                                                       # a GPU; minutes
    TRITON_INTERPRET=1 python -m benchmarks.kernels --shapes 40x56 --tokens 24 --r 4   # a CPU: that it runs, no more

A row for each shape d_in x d_out of W and each number of tokens: the forward pass of the factored route, and its
backward pass, each with the small products that are torch's in either case; W is stored in the dtype of the products.
A row for each shape: W + s B A of the merged route, formed from W in fp32 and rounded to that dtype. torch and triton
take turns in one process; medians. The first turn, in which Triton compiles and chooses its blocks, is not counted.

5461 is odd: no row of such a matrix is aligned, so no kernel can read it in whole words. 5632 is its neighbour that is.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor, nn

from benchmarks import llama
from benchmarks.layer import interleaved
from benchmarks.tables import Limit, Row, options_of, publish
from relora import LoRAConfig
from relora.method.choices import Kernels, Route
from relora.method.lora import LoRALinear
from relora.method.triton_extra import kernels_problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Timed = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shapes = ["2048x2048", "2048x5461", "5461x2048", "2048x5632", "5632x2048", "4096x14336"]
    parser.add_argument("--shapes", nargs="+", metavar="INxOUT", default=shapes)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and the products")
    parser.add_argument("--repeats", type=int, default=9)
    options = options_of(parser)
    problem = kernels_problem("triton")
    if problem is not None:
        parser.error(problem)
    rows = [row for shape in options.shapes for row in compared(shape, options)]
    limits = [
        Limit(f"{what}, largest triton / torch", worst, at_most=1.0)
        for what in dict.fromkeys(row["what"] for row in rows)
        for worst in [max(row["triton / torch"] for row in rows if row["what"] == what)]
    ]
    publish({f"Kernels, r = {options.r}, {options.dtype}": rows}, limits, json_path=options.json)


def compared(shape: str, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one shape."""
    d_in, d_out = (int(side) for side in shape.split("x"))
    dtype, names = DTYPES[options.dtype], get_args(Kernels)
    layers = {name: layer_of(d_in, d_out, options.r, "factored", name, dtype) for name in names}
    for tokens in options.tokens:
        x = torch.randn(tokens, d_in, device=llama.device(), dtype=dtype, requires_grad=True)
        passes = {name: Passes(layer, x) for name, layer in layers.items()}
        for what in ("forward", "backward"):
            timed: dict[str, Timed] = {name: getattr(found, what) for name, found in passes.items()}
            yield row(what, shape, tokens, interleaved(timed, options.repeats))
    merged = {name: layer_of(d_in, d_out, options.r, "merged", name, torch.float32) for name in names}
    forms = {name: forming(layer, dtype) for name, layer in merged.items()}
    yield row("W + s B A", shape, None, interleaved(forms, options.repeats))


def layer_of(d_in: int, d_out: int, r: int, route: Route, kernels: Kernels, stored: torch.dtype) -> LoRALinear:
    """A layer without a bias, whose W is stored in `stored`."""
    plain = nn.Linear(d_in, d_out, bias=False, device=llama.device(), dtype=stored)
    layer = LoRALinear.from_linear(plain, LoRAConfig(r=r, forward=route, kernels=kernels))
    nn.init.normal_(layer.lora_B, std=0.02)
    return layer


class Passes:
    """The passes of one layer over one x (tokens, d_in)."""

    def __init__(self, layer: LoRALinear, x: Tensor) -> None:
        self._layer, self._x = layer, x
        self._dy = torch.randn_like(layer(x))

    def forward(self) -> float:
        """Seconds of y, with all that is saved for the backward pass."""
        start = llama.clock_s()
        self._layer(self._x)
        return llama.clock_s() - start

    def backward(self) -> float:
        """Seconds of dx, dA and dB."""
        y, wanted = self._layer(self._x), [self._x, self._layer.lora_A, self._layer.lora_B]
        start = llama.clock_s()
        torch.autograd.grad(y, wanted, self._dy)
        return llama.clock_s() - start


def forming(layer: LoRALinear, dtype: torch.dtype) -> Timed:
    """Seconds of W + s B A in `dtype`."""
    projection = layer.projection(torch.empty(1, layer.in_features, device=llama.device()))

    @torch.no_grad()
    def seconds() -> float:
        start = llama.clock_s()
        projection.form(dtype)
        return llama.clock_s() - start

    return seconds


def row(what: str, shape: str, tokens: int | None, seconds: dict[str, float]) -> Row:
    milliseconds = {f"{name}, ms": 1000 * seconds[name] for name in ("torch", "triton")}
    ratio = seconds["triton"] / seconds["torch"]
    return {"what": what, "shape": shape, "tokens": tokens} | milliseconds | {"triton / torch": ratio}


if __name__ == "__main__":
    main()
