"""Models that come with code of their own: run for one's own run, refused with the remedy for others."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from relora.checkpoint.run_folder import RunFolder
from relora.cli import main
from relora.config import check
from relora.config.derived import identity
from tests.helpers import tiny

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.fixture
def final(run: Path, corpus: Path, tmp_path: Path) -> Path:
    """The final folder of a run that was told to run the code which comes with its model."""
    final = tmp_path / "run" / "final"
    settings = {key: value for key, value in tiny.MODEL.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(final)
    AutoTokenizer.from_pretrained(run / "tokenizer").save_pretrained(final)
    of_model = json.loads((final / "config.json").read_text())
    (final / "config.json").write_text(json.dumps(of_model | {"model_type": "own_llama", "auto_map": AUTO_MAP}))
    (final / "own.py").write_text(OWN_CODE)
    tree: dict[str, Any] = tiny.settings(corpus, tmp_path / "run")
    tree["model"] = {"name_or_path": str(final), "trust_remote_code": True}
    config = check(tree)
    RunFolder(tmp_path / "run").write_config(config, identity=identity(config, {}), numbers={})
    return final


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


GENERATE = ["--prompt", "red", "--max-new-tokens", "2"]


def test_ones_own_run_runs_its_code_and_asks_nobody(final: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(final), *GENERATE]) == 0
    assert capsys.readouterr().out.startswith("red")


def test_the_code_of_others_is_refused_with_the_remedy(
    final: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = final.rename(tmp_path / "other")
    assert main(["generate", str(other), *GENERATE]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("relora: ")]
    assert "it comes with code of its own, which is run only with generate --trust-remote-code" in line
    assert main(["generate", str(other), *GENERATE, "--trust-remote-code"]) == 0
