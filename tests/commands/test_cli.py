"""The command line: help, version, exit codes, and how little is imported for them."""

import subprocess
import sys
from pathlib import Path

import pytest

import relora
from relora.cli import COMMANDS, _parse, _parser, main

HEAVY = ("torch", "transformers", "datasets", "numpy")


def modules_after(arguments: list[str]) -> set[str]:
    """The modules that one call of the command line has imported, in a process of its own."""
    program = (
        "import sys\nfrom relora.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print('\\nMODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["train", "no.yaml"], ["plan", "no.yaml"]],
    ids=" ".join,
)
def test_help_and_mistakes_in_a_config_load_no_torch(arguments: list[str]) -> None:
    assert modules_after(arguments).isdisjoint(HEAVY)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["--version"])
    assert ending.value.code == 0
    assert capsys.readouterr().out == f"relora {relora.__version__}\n"
    settings = (Path(relora.__file__).parents[1] / "pyproject.toml").read_text()
    assert 'version = { attr = "relora.__version__" }' in settings.replace("{attr", "{ attr").replace('__"}', '__" }')


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_argument_has_a_help_text_with_an_example(name: str) -> None:
    command = COMMANDS[name]
    assert command.help and command.examples
    for argument in command.arguments:
        is_flag = argument.options.get("action") == "store_true"
        assert "such as" in argument.options["help"] or (is_flag and argument.options["help"]), argument.names
    for example in command.examples:
        assert example.split()[0] == name
        # An example that the parser does not take would end the process.
        assert _parse(_parser(), [word.strip('"') for word in example.replace("def main", "def").split()])


def test_a_file_in_the_working_folder_can_be_imported_by_the_installed_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(Path.cwd()))])
    (tmp_path / "mine_in_the_working_folder.py").write_text("value = 7\n")
    assert main(["train", "no.yaml"]) == 2
    assert __import__("mine_in_the_working_folder").value == 7
