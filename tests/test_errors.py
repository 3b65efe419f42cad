"""Failures of a disk: the file is named, what stood there stays, and the command ends with one line."""

import errno
from pathlib import Path

import pytest

from relora.cli import main
from relora.errors import EXIT_FAILED, Failed, disk_errors_name, disk_failure
from relora.files import write_text
from tests.helpers.full_disk import no_file_over

LIMIT = 2**16


def test_a_file_that_cannot_be_written_is_named_and_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_text(path, "before")
    with no_file_over(LIMIT), pytest.raises(OSError) as raised:
        write_text(path, "x" * (LIMIT + 1))
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "before"
    assert str(disk_failure(raised.value)).startswith(f"{path}: File too large")


def test_an_error_that_is_not_the_disks_keeps_its_traceback() -> None:
    assert disk_failure(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),  # of Rust
        ValueError("I/O operation on closed file"),  # of another process, in the words of multiprocessing
        OSError("[Errno 28] Error writing bytes to file"),  # of a library that forgot the number
    ],
)
def test_a_full_disk_in_the_words_of_a_library(error: Exception, tmp_path: Path) -> None:
    if isinstance(error, ValueError):
        error.__cause__ = Exception('"""\nTraceback ...\nOSError: [Errno 28] No space left on device\n"""')
    with pytest.raises(OSError) as raised, disk_errors_name(tmp_path):
        raise error
    assert (
        disk_failure(raised.value)
        == f"{tmp_path}: No space left on device; the same command goes on when this is mended"
    )
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("5"), BrokenPipeError(errno.EPIPE, "x"), Failed("(os error 28)")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, disk_errors_name(tmp_path):
        raise error
    assert raised.value is error
    assert getattr(error, "filename", None) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ('OSError(28, "No space left on device", "/data/run")', "relora: /data/run: No space left on device"),
        ('relora.errors.Failed("the run diverged")', "relora: the run diverged\n"),
    ],
)
def test_a_failure_ends_with_one_line(
    error: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As a sink of the user's own would: imported while the command runs, and it raises there.
    (tmp_path / "failing_sink.py").write_text(f"import relora.errors\nraise {error}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = "model: {config: {model_type: llama, vocab_size: 64}}"
    config = f"output_dir: run\n{model}\ndata: {{sources: [{{path: python-stdlib}}]}}\n"
    (tmp_path / "config.yaml").write_text(config)
    assert main(["train", "config.yaml", "training.report_to=[failing_sink:Sink]"]) == EXIT_FAILED
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1
