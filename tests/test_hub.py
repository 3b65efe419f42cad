"""The hub answers within hub_timeout_s, or it is out of reach; and it is asked for nothing that looks local."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
from huggingface_hub import get_session
from huggingface_hub.utils._http import default_client_factory

import relora.commands.eval
import relora.commands.generate
import relora.commands.prepare
import relora.train.train  # noqa: F401  # imports, which take seconds, are not what is timed
from relora.cli import main
from relora.config import ModelSection
from relora.config.yaml12 import dump
from relora.files import looks_like_a_path
from relora.hub import HubUnreachable, bounded
from relora.model.model import read_hf_config
from relora.model.tasks import CausalLM
from tests.helpers import tiny
from tests.helpers.silent_hub import SilentHub, silent_hub

LIMIT_S = 0.5
SLACK_S = 2.0  # of a machine with other work


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentHub]:
    """The only way to the network, and no offline mode."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with silent_hub() as hub:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, hub.address)
        yield hub


@pytest.fixture
def config(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(dump(tiny.settings(corpus, tmp_path / "new") | {"hub_timeout_s": LIMIT_S}))
    return "c.yaml"


SILENCE = {
    ("hang", "http"): r"gave no answer within 0.5 s \(hub_timeout_s\)",
    ("hang", "https"): r"gave no answer within 0.5 s \(hub_timeout_s\)",
    ("trickle", "http"): r"gave no answer within 0.5 s \(hub_timeout_s\)",
    ("close", "https"): r"cannot be reached \(.+\)",
    ("503", "http"): "answers 503 Word",
    ("429", "http"): "answers 429 Word",
    ("404", "https"): "cannot be reached: the proxy answers 404 Word",
    ("407", "https"): "cannot be reached: the proxy answers 407 Word",
}


@pytest.mark.parametrize(("mode", "scheme"), SILENCE)
def test_a_silent_hub_is_asked_for_a_bounded_time_and_once(mode: str, scheme: str, hub: SilentHub) -> None:
    with bounded(LIMIT_S):
        hub.mode = "404"
        with suppress(HubUnreachable):  # a first request imports and reads certificates
            get_session().get("http://elsewhere.test")
        hub.mode = mode
        begin = time.monotonic()
        with pytest.raises(HubUnreachable, match=f"^{scheme}://nowhere.test {SILENCE[mode, scheme]}$"):
            get_session().get(f"{scheme}://nowhere.test/api/models", timeout=10)
        assert time.monotonic() - begin < LIMIT_S + SLACK_S
        asked = hub.asked
        with pytest.raises(HubUnreachable):
            get_session().get(f"{scheme}://nowhere.test/api/datasets")
        assert hub.asked == asked > 0
    assert get_session().timeout == default_client_factory().timeout  # the client of others is as it was


def test_an_answer_is_an_answer(hub: SilentHub) -> None:
    hub.mode = "404"
    with bounded(LIMIT_S):
        assert get_session().get("http://nowhere.test/api/models").status_code == 404
        hub.mode = "200"
        assert get_session().get("http://nowhere.test/api/models").status_code == 200


COMMANDS = {
    "model": ["train", "c.yaml", "model.config=null", "model.name_or_path=no/such-model"],
    "data": ["prepare", "c.yaml", "data.sources=[{path: no/such-data}]"],
    "tokenizer": ["prepare", "c.yaml", "data.tokenizer=no/such-tokenizer"],
    "eval": ["eval", "no/such-model", "--config", "c.yaml"],
}


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("mode", ["hang", "407"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_in_one_line(name: str, mode: str, hub: SilentHub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.mode = mode
    begin = time.monotonic()
    assert main(COMMANDS[name]) == 2
    assert time.monotonic() - begin < LIMIT_S + SLACK_S
    said = capfd.readouterr().err
    [line] = [line for line in said.splitlines() if line.startswith("relora: ")]
    assert f"https://huggingface.co {SILENCE[mode, 'https'].replace(chr(92), '')}" in line
    assert "Traceback" not in said
    assert "Retrying" not in said


def test_what_is_in_the_cache_is_used_without_the_hub(
    hub: SilentHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, commit = tmp_path / "hub_cache", "0" * 40
    snapshot = cache / "models--some--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(tiny.MODEL))
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    begin = time.monotonic()
    with bounded(LIMIT_S):
        found, problems = read_hf_config(ModelSection(name_or_path="some/model"), CausalLM())
    assert time.monotonic() - begin < LIMIT_S + SLACK_S
    assert hub.asked > 0
    assert problems == []
    assert found is not None and found.hidden_size == tiny.MODEL["hidden_size"]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("a_file").write_text("")


PATHS = ["./x", "../x", "/x", "~/x", ".", "runs/none", "runs", "a_file", "a/b/c", r"a\b", "x.json", "a/x.safetensors"]
IDS = ["gpt2", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "a/b.c", "none/runs"]


@pytest.mark.usefixtures("_folder")
def test_what_looks_like_a_path() -> None:
    assert {name: looks_like_a_path(name) for name in PATHS + IDS} == dict.fromkeys(PATHS, True) | dict.fromkeys(
        IDS, False
    )
    shutil.rmtree("runs")
    assert not looks_like_a_path("runs/none")


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("name", ["runs/none", "./none", r"a\b", "a/b/c", "none.safetensors"])
def test_the_hub_is_not_asked_for_a_path(
    name: str, hub: SilentHub, config: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["generate", name, "--prompt", "a"],
        ["train", config, "model.config=null", f"model.name_or_path={name}"],
        ["prepare", config, f"data.tokenizer={name}"],
        ["prepare", config, f"data.sources=[{{path: '{name}'}}]"],
    ):
        assert main(command) == 2
    assert hub.asked == 0
    assert capfd.readouterr().err.count("no such f") >= 4
