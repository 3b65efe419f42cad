"""DeepSpeed, imported for the CPU: it chooses the kind of device as it is imported, and keeps to it."""

import os
from unittest.mock import patch

with patch.dict(os.environ, DS_ACCELERATOR="cpu"):
    import deepspeed.runtime.engine
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # ZeRO imports it late, whatever the optimizer
