"""How much memory a process has used at most."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes allocated on the GPU, or on a CPU the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
