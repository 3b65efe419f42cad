"""A run from its configuration to its final model."""

from relora.train.train import train

__all__ = ["train"]
