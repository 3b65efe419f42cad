"""DeepSpeed, imported for the CPU: it chooses the kind of device as it is imported, and keeps to it.

Not where torch knows GPUs, whose tests are to have DeepSpeed for those.
"""

import os
from unittest.mock import patch

import torch

if torch.version.cuda is None:
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        import deepspeed.runtime.engine
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # ZeRO imports it late, whatever the optimizer
