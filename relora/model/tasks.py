"""Tasks: how a model of one kind is trained and checked."""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from relora.config import Config
from relora.model.model import model_problems


class Task:
    """Next-token prediction with a causal language model."""

    auto_class: Any = AutoModelForCausalLM

    def problems(self, model: PreTrainedModel, config: Config) -> list[str]:
        """Settings that do not fit the model."""
        return model_problems(model, config.data)


def task_of(config: Config) -> Task:  # noqa: ARG001
    """The task of a configuration."""
    return Task()
