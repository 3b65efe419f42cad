"""The typed tree of settings, how it is loaded, its rules, and the numbers derived from it."""

from relora.config.config_file import find_config
from relora.config.input_sections import DataSection, ModelSection, SourceSection
from relora.config.load import check, load_config
from relora.config.schema import Config, LoraSection
from relora.errors import UserError, raise_if_any

__all__ = [
    "Config",
    "DataSection",
    "LoraSection",
    "ModelSection",
    "SourceSection",
    "UserError",
    "check",
    "find_config",
    "load_config",
    "raise_if_any",
]
