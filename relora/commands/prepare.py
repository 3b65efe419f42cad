"""`relora prepare CONFIG`: sources -> tokens on disk."""

from pathlib import Path

from relora.checkpoint.run_folder import RunFolder
from relora.config import Config, raise_if_any
from relora.data import amount_problems
from relora.train.run import check_surroundings, prepare_data


def prepare(config: Config) -> None:
    """Prepare the data of `config` and say what there is. UserError as in training."""
    hf_config = check_surroundings(config, RunFolder(Path(config.output_dir)), extend=True)
    data = prepare_data(config, hf_config)
    raise_if_any(amount_problems(data, config.data))
    print(data.summary())
