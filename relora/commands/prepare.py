"""`relora prepare CONFIG`: sources -> tokens on disk."""

from relora.config import Config
from relora.train.preflight import prepare_data


def prepare(config: Config) -> None:
    """Prepare the data of `config` and say what there is. UserError as in training."""
    print(prepare_data(config).summary())
