"""The hash of a file is that of its content, however little of it is read again."""

import json
import os

import pytest

from relora.data import content
from relora.data.content import cache_folder, content_hashes
from relora.files import sha256_of


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{number}.bin" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (content.BLOCK_BYTES * (1 + 30 * number) + number))
    return paths


@pytest.fixture
def read(monkeypatch):
    """The files that were read in full."""
    paths = []
    monkeypatch.setattr(content, "sha256_of", lambda path: paths.append(path) or sha256_of(path))
    return paths


def test_a_file_is_read_in_full_once(files, read):
    expected = [sha256_of(path) for path in files]
    assert content_hashes(files) == expected and sorted(read) == files
    assert content_hashes(files) == expected and len(read) == 3
    assert content_hashes([]) == []


def test_an_edit_that_keeps_size_and_time_is_seen(files, read):
    content_hashes(files)
    before, large = files[2].stat(), bytearray(files[2].read_bytes())
    large[content.BLOCK_BYTES * 3 // 2] ^= 255  # in no sampled block
    files[2].write_bytes(large)
    os.utime(files[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_hashes(files) == [sha256_of(path) for path in files] and len(read) == 4


def test_a_block_that_went_bad_on_the_disk_is_seen(files, read):
    """Where the file system says that nothing has changed, the sampled blocks are compared."""
    content_hashes(files)
    files[1].write_bytes(bytes([9]) * files[1].stat().st_size)
    stat = files[1].stat()
    (record,) = (cache_folder() / "content").glob("*.json")
    known = json.loads(record.read_text())
    known[str(files[1])]["stat"] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    record.write_text(json.dumps(known))
    assert content_hashes(files)[1] == sha256_of(files[1]) and read[3:] == [files[1]]


@pytest.mark.parametrize("record", ["", "[]", "{", '{"%s": 1}', '{"%s": {"stat": 1, "blocks": 2, "sha256": "x"}}'])
def test_a_record_that_is_none_is_made_again(files, read, record):
    expected = content_hashes(files)
    (path,) = (cache_folder() / "content").glob("*.json")
    path.write_text(record % files[0] if "%" in record else record)
    assert content_hashes(files) == expected and len(read) > 3


def test_without_a_cache_every_use_is_the_first(files, read, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "file"))
    assert content_hashes(files) == content_hashes(files) and len(read) == 6


def test_a_missing_file(files):
    files[0].unlink()
    with pytest.raises(OSError, match=r"0\.bin"):
        content_hashes(files)
