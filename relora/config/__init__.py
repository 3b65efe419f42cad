"""The typed tree of settings, its rules, and the numbers derived from it."""

from relora.config.load import check, load_config
from relora.config.problems import UserError, raise_if_any
from relora.config.tree import Config, DataSection, LoraSection, ModelSection, SourceSection

__all__ = [
    "Config",
    "DataSection",
    "LoraSection",
    "ModelSection",
    "SourceSection",
    "UserError",
    "check",
    "load_config",
    "raise_if_any",
]
