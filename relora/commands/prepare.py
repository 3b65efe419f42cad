"""`relora prepare CONFIG`: sources -> tokens on disk."""

from pathlib import Path

from relora.checkpoint.run_folder import RunFolder
from relora.config import Config, raise_if_any
from relora.data import check_amount
from relora.train.run import check_surroundings, prepare_data


def prepare(config: Config) -> None:
    """Prepare the data of `config` and print a summary. UserError as in training."""
    hf_config = check_surroundings(config, RunFolder(Path(config.output_dir)), extend=True)
    data = prepare_data(config, hf_config)
    raise_if_any(check_amount(data, config.data))
    print(data.summary())
