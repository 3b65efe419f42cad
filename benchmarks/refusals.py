"""Why launches are refused, in a few lines each.

python -m benchmarks.refusals fsdp1 | zero_bf16 | zero_0 | adamw_8bit
"""

import os
import sys

import torch
from torch import distributed, nn

NUM_MERGES, RELATIVE_SIZE = 10, 0.003


def fsdp1() -> None:
    """A frozen weight and a trained one in a unit of FSDP version 1."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    block = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    block[0].weight.requires_grad_(False)
    try:
        FullyShardedDataParallel(block, device_id=torch.device("cpu"))
    except ValueError as error:
        print(f"ValueError: {error}")


def zero_bf16() -> None:
    """What a frozen weight loses of small merges once DeepSpeed's bf16 section has rounded it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 1, bias=False))
    frozen = block[0].weight.requires_grad_(False)
    settings = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    trained = torch.optim.AdamW(block[1].parameters())
    deepspeed.initialize(model=block, optimizer=trained, config=settings, dist_init_required=False)
    start, merged = frozen.detach().clone().float(), torch.zeros(512, 512)
    for _ in range(NUM_MERGES):
        delta = torch.randn(512, 512) * frozen.float().std() * RELATIVE_SIZE
        merged += delta
        frozen.data += delta.to(frozen.dtype)
    lost = (frozen.float() - start - merged).norm() / merged.norm()
    print(f"the frozen weight is {frozen.dtype}, its fp32 master {safe_get_full_fp32_param(frozen)}")
    print(f"{NUM_MERGES} merges of {RELATIVE_SIZE:.1%} of |W|: {lost:.0%} of what was merged is lost")


def zero_0() -> None:
    """What DeepSpeed makes of an optimizer without ZeRO."""
    import deepspeed

    layer = nn.Linear(8, 8)
    given = torch.optim.AdamW(layer.parameters())
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 0}}
    _, optimizer, *_ = deepspeed.initialize(model=layer, optimizer=given, config=settings, dist_init_required=False)
    print(f"the optimizer is the one it was given: {optimizer is given}")


def adamw_8bit() -> None:
    """An update by bitsandbytes' 8-bit AdamW of a weight that FSDP2 has sharded."""
    from bitsandbytes.optim import AdamW8bit
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = nn.Linear(128, 128, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    layer(torch.randn(4, 128)).sum().backward()
    try:
        AdamW8bit(layer.parameters()).step()
    except RuntimeError as error:
        print(f"RuntimeError: {error}")


if __name__ == "__main__":
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    {"fsdp1": fsdp1, "zero_bf16": zero_bf16, "zero_0": zero_0, "adamw_8bit": adamw_8bit}[sys.argv[1]]()
    distributed.destroy_process_group()
