"""The device of these tests: a GPU where there is one, else the CPU, on which they show that they are right themselves.

python -m pytest -m gpu          # what a GPU can show, in minutes; benchmarks/gpu/run.sh begins with it
"""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
