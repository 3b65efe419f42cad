"""A run from its configuration to its final model: `train.py` tells its story."""
