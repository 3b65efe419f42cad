"""What is given as a pretrained model is one, whole, in weights that can be trained; else one line says what it is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from relora.cli import main
from relora.config import ModelSection, UserError
from relora.data.tokenizer import read_tokenizer
from relora.model.model import build_model, empty_model, load_hf_config, read_hf_config
from relora.model.tasks import CausalLM
from tests.helpers.tiny import MODEL

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 124\n"
PULL = "is a pointer of Git LFS, not the content; run `git lfs pull`"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in three files of weights."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL))
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def one_file(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def add_to_config(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def only_training_arguments(folder: Path) -> None:
    one_file(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "training_args.bin").write_bytes(b"PK")


def half_a_pytorch_file(folder: Path) -> None:
    only_training_arguments(folder)
    torch.save({"a": torch.ones(9)}, folder / "pytorch_model.bin")
    os.truncate(folder / "pytorch_model.bin", 700)


def in_place_of_config(name: str) -> Callable[[Path], object]:
    def rename(folder: Path) -> None:
        (folder / "config.json").rename(folder / name)

    return rename


def saved_data(folder: Path, *, splits: bool) -> None:
    shutil.rmtree(folder)
    data = Dataset.from_dict({"text": ["a"]})
    (DatasetDict({"train": data}) if splits else data).save_to_disk(folder)


INPUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (lambda folder: shard(folder).write_text(POINTER), f"model-00002-of-00003.safetensors {PULL}"),
    "half": (
        lambda folder: os.truncate(shard(folder), 20_000),
        "model-00002-of-00003.safetensors is damaged or was downloaded in part",
    ),
    "empty": (lambda folder: os.truncate(shard(folder), 0), "model-00002-of-00003.safetensors is damaged or"),
    "missing": (lambda folder: shard(folder).unlink(), "model-00002-of-00003.safetensors is missing"),
    "pointer to an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(POINTER),
        f"model.safetensors.index.json {PULL}",
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "model.safetensors.index.json is not an index of weights",
    ),
    "pointer to a config": (lambda folder: (folder / "config.json").write_text(POINTER), f"config.json {PULL}"),
    "training arguments": (only_training_arguments, "the folder holds no weights (model.safetensors)"),
    "shards without their index": (one_file, "the folder holds no weights (model.safetensors)"),
    "half of a pytorch file": (half_a_pytorch_file, "pytorch_model.bin is damaged or was downloaded in part"),
    "adapter": (in_place_of_config("adapter_config.json"), "is a PEFT adapter, not a model"),
    "data set": (lambda folder: saved_data(folder, splits=False), "is a data set (datasets' save_to_disk)"),
    "data sets": (lambda folder: saved_data(folder, splits=True), "is several data sets (datasets' save_to_disk)"),
    "checkpoint": (in_place_of_config("MANIFEST.json"), "is a checkpoint of a run, not a model"),
    "run": (in_place_of_config("status.json"), "is a run folder: its model is in"),
    "4 bits": (
        lambda folder: add_to_config(
            folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
        ),
        "its weights are quantized (bitsandbytes), which cannot be trained on",
    ),
    "awq": (
        lambda folder: add_to_config(folder, quantization_config={"quant_method": "awq", "bits": 4}),
        "its weights are quantized (awq), which cannot be trained on",
    ),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_what_is_no_whole_model_is_named(kind: str, whole: Path, tmp_path: Path) -> None:
    change, words = INPUTS[kind]
    folder = tmp_path / "given"
    shutil.copytree(whole, folder)
    change(folder)
    config, problems = read_hf_config(ModelSection(name_or_path=str(folder)), CausalLM())
    assert config is None
    [problem] = problems
    assert problem.startswith(f"model.name_or_path = {folder}: ")
    assert words in problem


def test_it_is_found_before_the_data_are_prepared_and_by_every_command(
    whole: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    shutil.copytree(whole, folder)
    shard(folder).write_text(POINTER)
    arguments = [f"model.name_or_path={folder}", f"data.sources=[{{path: {corpus}}}]", "data.sequence_length=32"]
    arguments += [f"output_dir={tmp_path / 'run'}", f"data.prepared_dir={tmp_path / 'prepared'}", "model.config=null"]
    assert main(["train", "configs/quickstart.yaml", *arguments]) == 2
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(f"model-00002-of-00003.safetensors {PULL}" in line for line in lines)
    assert not (tmp_path / "prepared").exists()


def test_a_tokenizer_that_was_not_downloaded(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    assert read_tokenizer(str(tmp_path), key="data.tokenizer")[1] == []
    (tmp_path / "tokenizer.json").write_text(POINTER)
    assert read_tokenizer(str(tmp_path), key="data.tokenizer")[1][0].endswith(f"tokenizer.json {PULL} there")


def test_weights_in_fp8_are_turned_into_plain_ones(whole: Path, tmp_path: Path) -> None:
    plain, folder, task = AutoModelForCausalLM.from_pretrained(whole), tmp_path / "fp8", CausalLM()
    block, tensors = 16, dict(plain.state_dict())
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].reshape(rows // block, block, columns // block, block)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    add_to_config(folder, quantization_config=quantization)

    section = ModelSection(name_or_path=str(folder))
    hf_config = load_hf_config(section, task)
    model = build_model(section, hf_config, task, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, values in model.named_parameters():
        expected = tensors[name].float()
        if name.endswith("proj.weight"):
            expected = expected * tensors[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
        torch.testing.assert_close(values.data, expected, rtol=1e-6, atol=0)
    # The model that a run trains and exports is built from the same config.
    empty_model(section, hf_config, task).save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {values.dtype for values in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_weights_that_the_library_cannot_read_are_one_line(whole: Path, tmp_path: Path) -> None:
    folder, section = tmp_path / "given", ModelSection(name_or_path=str(tmp_path / "given"))
    shutil.copytree(whole, folder)
    config = load_hf_config(section, CausalLM())
    os.truncate(shard(folder), 20_000)  # between the check and the use, as a disk may
    with pytest.raises(UserError, match="the weights cannot be loaded: SafetensorError"):
        build_model(section, config, CausalLM(), seed=0)
