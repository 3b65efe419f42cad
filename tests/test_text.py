"""Text from elsewhere: secrets never reach a file or the screen, and code in Markdown stays code."""

import json
from pathlib import Path

import markdown
import pytest

from relora.checkpoint.run_folder import RunFolder
from relora.cli import main
from relora.config import check
from relora.errors import Failed, UserError
from relora.text import REDACTED, code_block, without_secrets
from tests.helpers.tiny import settings

HUB_TOKEN = "hf_" + "aB3" * 11
SECRETS = [
    (f"401 for {HUB_TOKEN}: denied", f"401 for {REDACTED}: denied"),
    ("https://me:pass%40word@host/x and https://you@there", f"https://{REDACTED}@host/x and https://{REDACTED}@there"),
    ("GET /f?token=abc&part=2", f"GET /f?token={REDACTED}&part=2"),
    (
        "https://s3/x?X-Amz-Signature=0fe1&X-Amz-Date=1",
        f"https://s3/x?X-Amz-Signature={REDACTED}&X-Amz-Date={REDACTED}",
    ),
    ("wandb: key 0123456789abcdef is wrong", f"wandb: key {REDACTED} is wrong"),
]
HARMLESS = ["hf_transfer", "a@b.org", "https://host/user@v2", "model:attribute", "?part=2&tokens=7", "TOKEN", "short-1"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_TOKEN", "short-1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-false")


@pytest.mark.parametrize(("text", "expected"), SECRETS)
def test_secrets_are_replaced_wherever_text_ends_up(text: str, expected: str, tmp_path: Path) -> None:
    assert without_secrets(text) == expected
    assert str(UserError([f"one\n{text}"])) == f"one {expected}"
    assert str(Failed(text)) == expected
    folder = RunFolder(tmp_path)
    folder.write_status("failed", step=0, reason=text)
    assert json.loads(folder.status.read_text())["reason"] == expected


@pytest.mark.parametrize("text", [*HARMLESS, "false-false"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(("text", "expected"), SECRETS)
def test_a_configuration_that_would_keep_a_secret_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    tree = settings(tmp_path, tmp_path / "run", data__tokenizer=text)
    tree["model"]["config"]["_name_or_path"] = text
    with pytest.raises(UserError) as caught:
        check(tree)
    [problem] = caught.value.problems
    assert problem.startswith("model.config._name_or_path, data.tokenizer: holds a password or a token")
    assert text not in problem and expected not in problem


def test_an_override_that_is_refused_for_another_reason_does_not_show_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "configs/quickstart.yaml", f"model.name_or_pat={HUB_TOKEN}"]) == 2
    complaint = capsys.readouterr().err
    assert REDACTED in complaint and HUB_TOKEN not in complaint


@pytest.mark.parametrize("text", ["plain", "```\n![](http://x/y.png)\n```", "a ```` b\n~~~", "`", ""])
def test_a_block_of_code_shows_its_text_and_nothing_else(text: str) -> None:
    shown = markdown.markdown(code_block(text) + "\n\n*after*", extensions=["fenced_code"])
    assert shown.count("<code>") == 1 and "<img" not in shown
    assert shown.endswith("<p><em>after</em></p>")
