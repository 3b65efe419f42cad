"""How fast is one wrapped layer, and what does it keep for its backward pass?

    python -m benchmarks.layer                                    # minutes; an idle machine, all cores
    python -m benchmarks.layer --shapes 256x256 --tokens 512 --r 16 --repeats 3    # a smoke run

Forward and backward of a layer with d_in x d_out weights: trained in full (nn.Linear), PEFT's LoRA layer, and ours by
each route; then q, k and v on one x, together and one by one. All take turns in one process; medians. Held against the
FLOPs of the better route: factored 2/3 + r (d_in + d_out) / (d_in d_out) of full rank's, merged
2/3 + 2/3 r (d_in + d_out) / (d_in d_out) + r / (3 T).
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relora import LoRAConfig, inject_lora
from relora.method.lora import LoRALinear
from relora.method.merged_cache import attach_caches
from relora.method.routes import flop_limit

OURS: dict[str, dict[str, Any]] = {
    "ours merged": {"forward": "merged"},
    "ours merged, cached": {"forward": "merged", "keep_merged": True},
    "ours factored": {"forward": "factored"},
    "ours auto, cached": {"forward": "auto", "keep_merged": True},
}
COLUMNS = ("layer", "ms", "of full rank", "FLOP limit", "over the limit", "of PEFT", "saved MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="INxOUT", default=["2048x2048", "2048x5461", "1024x1024"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own choice if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, T = {options.tokens}, r = {options.r}, {options.repeats} repeats")
    rows = []
    for shape in options.shapes:
        d_in, d_out = (int(side) for side in shape.split("x"))
        for precision in options.precisions:
            rows += compared(d_in, d_out, precision, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def compared(d_in: int, d_out: int, precision: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one shape, which are also printed."""
    calls = {name: Call(module, options, d_in, precision) for name, module in layers(d_in, d_out, options.r).items()}
    times = interleaved({name: call.seconds for name, call in calls.items()}, options.repeats)
    limit = flop_limit(options.tokens, d_in, d_out, options.r)
    print(f"\n{d_in} x {d_out}, {precision}\n\n| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows = []
    for name, seconds in times.items():
        # Three layers are held against three.
        in_full, peft = (3 * times[key] if "q, k, v" in name else times[key] for key in ("full rank", "PEFT"))
        rows.append(
            {"d_in": d_in, "d_out": d_out, "precision": precision, "tokens": options.tokens, "r": options.r}
            | {"layer": name, "seconds": seconds, "of_full_rank": seconds / in_full, "flop_limit": limit}
            | {
                "over_the_limit": seconds / in_full / limit,
                "of_peft": seconds / peft,
                "saved_bytes": calls[name].saved(),
            }
        )
        print(printed(rows[-1]), flush=True)
    return rows


def printed(row: dict[str, Any]) -> str:
    ratios = [f"{row[key]:.3f}" for key in ("of_full_rank", "flop_limit", "over_the_limit", "of_peft")]
    if row["layer"] == "full rank":
        ratios[1:3] = ["", ""]
    cells = [row["layer"], f"{1000 * row['seconds']:.1f}", *ratios, f"{row['saved_bytes'] / 2**20:.1f}"]
    return "| " + " | ".join(cells) + " |"


def layers(d_in: int, d_out: int, r: int) -> dict[str, nn.Module]:
    import peft

    plain = nn.Linear(d_in, d_out, bias=False)
    config = peft.LoraConfig(r=r, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(d_in, d_out, bias=False)))[0]
    ours = {name: wrapped(d_in, d_out, LoRAConfig(r=r, **how)) for name, how in OURS.items()}
    together = {
        "q, k, v together, cached": three(d_in, d_out, r),
        "q, k, v one by one, cached": three(d_in, d_out, r, apart=True),
    }
    return {"full rank": plain, "PEFT": theirs, **ours, **together}


def wrapped(d_in: int, d_out: int, config: LoRAConfig) -> LoRALinear:
    layer = LoRALinear.from_linear(nn.Linear(d_in, d_out, bias=False), config)
    if config.keep_merged:
        attach_caches([layer])
    nn.init.normal_(layer.lora_B, std=0.02)
    return layer


class Projections(nn.Module):
    """q, k and v of one x."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_in, d_out, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def three(d_in: int, d_out: int, r: int, *, apart: bool = False) -> Projections:
    model = Projections(d_in, d_out)
    inject_lora(model, LoRAConfig(r=r, keep_merged=True))
    if apart:
        for layer in model.children():
            assert isinstance(layer, LoRALinear)
            layer.siblings = None
    return model


class Call:
    """One layer, and the x and dy that it is called with."""

    def __init__(self, module: nn.Module, options: argparse.Namespace, d_in: int, precision: str) -> None:
        self._module = module.to(options.device)
        self._x = torch.randn(options.tokens, d_in, device=options.device, requires_grad=True)
        self._precision, self._device = precision, options.device
        self._dys = [torch.randn_like(y) for y in self._outputs()]

    def seconds(self) -> float:
        """Of one forward and backward pass."""
        for module in self._module.modules():
            if isinstance(module, LoRALinear) and module.cache is not None:
                module.cache.drop()
        start = self._now()
        torch.autograd.backward(self._outputs(), self._dys)
        end = self._now()
        self._x.grad = None
        self._module.zero_grad()
        return end - start

    def saved(self) -> int:
        """Bytes that are kept for the backward pass, each storage once, but for the parameters."""
        own = {p.untyped_storage().data_ptr() for p in self._module.parameters()}
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._outputs()
        return sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in own)

    def _outputs(self) -> tuple[Tensor, ...]:
        with self._autocast():
            y = self._module(self._x)
        return y if isinstance(y, tuple) else (y,)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._precision == "bf16")

    def _now(self) -> float:
        if self._device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def interleaved(timed: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of each, all taking turns; the first turn is not counted."""
    turns = [{name: seconds() for name, seconds in timed.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(turn[name] for turn in turns) for name in timed}


if __name__ == "__main__":
    main()
