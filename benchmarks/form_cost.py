"""What forming W + delta costs: the FORM_COST of relora/method/routes.py, measured.

    python -m benchmarks.form_cost                                     # seconds on a GPU, a minute on two cores
    python -m benchmarks.form_cost --shapes 4096x11008 --rank 64

W + scale * B A is formed in fp32 and rounded once to 16 bits, 2 r d_in d_out FLOPs; the product that it saves,
x (rows, d_in) by W^T, is computed in 16 bits. The cost of a FLOP of the first relative to one of the second is what the
choice between the two routes of a layer needs. Both take turns in one process; medians.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks import llama
from benchmarks.tables import Row, options_of, publish
from relora import LoRAConfig
from relora.method.lora import LoRALinear
from relora.method.routes import form_cost

DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", metavar="INxOUT", default=["1024x1024", "2048x2048", "2048x5461"])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4096, help="of x")
    parser.add_argument("--repeats", type=int, default=21)
    options = options_of(parser)
    rows = [row(*map(int, shape.split("x")), options) for shape in options.shapes]
    publish({f"r = {options.rank}, {options.rows} rows, bf16": rows}, [], json_path=options.json)


def row(d_in: int, d_out: int, options: argparse.Namespace) -> Row:
    plain = torch.nn.Linear(d_in, d_out, bias=False, device=llama.device())
    layer = LoRALinear.from_linear(plain, LoRAConfig(r=options.rank))
    x = torch.randn(options.rows, d_in, device=llama.device(), dtype=DTYPE)
    W = layer.weight.detach().to(DTYPE)
    forms, products = list[float](), list[float]()
    with torch.no_grad():
        projection = layer.projection(x)
        for _ in range(options.repeats):
            forms.append(seconds(lambda: projection.form(DTYPE)))
            products.append(seconds(lambda: x @ W.T))
    form_s, product_s = statistics.median(forms), statistics.median(products)
    per_flop = form_s / (2 * options.rank * d_in * d_out), product_s / (2 * options.rows * d_in * d_out)
    return {
        "W": f"{d_in} x {d_out}",
        "form, ms": 1e3 * form_s,
        "product, ms": 1e3 * product_s,
        "product, TFLOP/s": 1e-12 / per_flop[1],
        "cost of a FLOP": per_flop[0] / per_flop[1],
        "FORM_COST": form_cost(llama.device().type, DTYPE),
    }


def seconds(call: Callable[[], object]) -> float:
    began = llama.clock_s()
    call()
    return llama.clock_s() - began


if __name__ == "__main__":
    main()
