"""Prepared data that are not what was written are seen, set aside and prepared again, and no kill leaves a dead end."""

import copy
import json
import os
import subprocess
import sys

import pytest

from relora.data import find_prepared, open_prepared, prepare
from relora.data.dataset import verified
from relora.data.manifest import DamagedError
from relora.data.prepared_folder import complete, lock_of, read_unfinished, write_unfinished
from relora.errors import UserError

DAMAGES = {
    "truncated": lambda content: content[:-8],
    "emptied": lambda _: b"",
    "zeroed": lambda content: bytes(len(content)),
    "flipped at the start": lambda content: flipped(content, 0),
    "flipped in the middle": lambda content: flipped(content, len(content) // 2),
    "flipped at the end": lambda content: flipped(content, len(content) - 1),
    "longer": lambda content: content + b"\n",
    "ids out of range": lambda content: content[: len(content) // 2] + b"\xff\xff" + content[len(content) // 2 + 2 :],
}


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_every_damage_of_every_file_is_seen_and_the_file_named(prepared):
    files = files_of(prepared.folder)
    assert {"manifest.json", "tokenizer.json", "00-train-00000.arrow", "01-eval-00000.arrow"} <= {p.name for p in files}
    for path in files:
        content, times = path.read_bytes(), path.stat()
        for change in DAMAGES.values():
            path.write_bytes(change(content))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a fault of the disk would leave it
            if path.name == "manifest.json" and change(content).strip() == content.strip():
                continue  # one more line break says nothing else
            with pytest.raises(DamagedError, match=path.name):
                verified(prepared.folder)
        path.unlink()
        if path.name != "manifest.json":
            with pytest.raises(DamagedError, match=path.name):
                verified(prepared.folder)
        path.write_bytes(content)
    assert verified(prepared.folder) == prepared


def test_files_that_have_changed_places_are_seen(prepared):
    one, two = sorted((prepared.folder / "tokens").glob("*-eval-*.arrow"))
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    with pytest.raises(DamagedError, match=one.name):
        verified(prepared.folder)


def changes(value, put):
    """Call `put` with other values in the place of each value inside `value`, one after the other."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            changes(value[key], lambda new, key=key: put(replaced(value, key, new)))
        others = [[], {}, [1], {"x": 1}]
    else:
        others = [None, -1, "", [value], value + 1 if isinstance(value, int) else f"{value}x"]
    for new in others:
        if new != value:
            put(new)


def replaced(container, key, new):
    other = copy.copy(container)
    other[key] = new
    return other


def test_every_edited_field_of_the_manifest_is_seen(prepared):
    path = prepared.folder / "manifest.json"
    seen = []

    def check(edited):
        path.write_text(json.dumps(edited))
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            verified(prepared.folder)
        seen.append(edited)

    content = json.loads(path.read_text())
    changes(content, check)
    for key in content:
        check({name: value for name, value in content.items() if name != key})
    assert len(seen) > 200


@pytest.mark.parametrize("name", ["tokens/00-train-00000.arrow", "tokenizer/tokenizer.json", "manifest.json"])
def test_damaged_data_are_set_aside_and_prepared_again(data, prepared, prepared_of, name, caplog):
    damaged = prepared.folder / name
    content = flipped(damaged.read_bytes(), 50)
    damaged.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{damaged.name}.*relora prepare CONFIG"):
        open_prepared(prepared.folder)
    assert find_prepared(data, vocab_size=300, tokenizer=None) is None
    again = prepared_of(data)
    assert again.manifest == prepared.manifest and verified(prepared.folder) == again
    aside = prepared.folder.with_name(f"{prepared.folder.name}.damaged")
    assert (aside / name).read_bytes() == content
    assert damaged.name in caplog.text and f"kept as {aside} and prepared again" in caplog.text


def test_a_manifest_that_is_gone(data, prepared, prepared_of):
    (prepared.folder / "manifest.json").unlink()
    assert prepared_of(data).manifest == prepared.manifest


def test_damage_without_the_sources_is_refused(data, prepared, prepared_of, tmp_path):
    (prepared.folder / "tokens" / "00-train-00000.arrow").write_bytes(b"")
    (tmp_path / "one.jsonl").unlink()
    with pytest.raises(UserError, match="no such file"):
        prepared_of(data)
    assert not prepared.folder.with_name(f"{prepared.folder.name}.damaged").exists()


def test_data_of_an_older_version_are_prepared_again(data, prepared_of, caplog):
    folder = prepared_of(data.model_copy(update={"prepared_dir": data.sources[0].path + ".prepared"})).folder
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "format_version": 1}))
    again = prepared_of(data.model_copy(update={"prepared_dir": str(folder)}))
    assert again.manifest.content_hash == content["content_hash"]
    assert "format_version is 1, this program writes and reads 2" in caplog.text


# --- killed at any time

KILLED_IN_WRITE = """
import os, sys
from pathlib import Path
from relora.files import write_json
Path.replace = lambda draft, final: os.kill(os.getpid(), 9)
write_json(Path(sys.argv[1]) / "unfinished.json", {})
"""


def test_a_kill_while_the_record_is_written_is_no_dead_end(data, tmp_path):
    folder = tmp_path / "prepared"
    folder.mkdir()
    process = subprocess.run([sys.executable, "-c", KILLED_IN_WRITE, str(folder)], check=False, timeout=60)
    (draft,) = folder.iterdir()
    assert process.returncode == -9 and draft.match(".unfinished.json*.draft")
    data = data.model_copy(update={"prepared_dir": str(folder)})
    assert find_prepared(data, vocab_size=300, tokenizer=None) is None  # what another process would see meanwhile
    assert prepare(data, vocab_size=300, tokenizer=None, quiet=True).folder == folder


@pytest.mark.parametrize("content", ["", "{", "[]", '{"made_from": {}}', '{"made_from": {}, "num_pieces": [1, 1]}'])
def test_a_damaged_record_of_a_preparation_begins_anew(data, prepared_of, tmp_path, content):
    folder = tmp_path / "prepared"
    (folder / "tokens").mkdir(parents=True)
    (folder / "unfinished.json").write_text(content)
    (folder / "tokens" / "00-train-00000.arrow").write_bytes(b"unfinished")
    data = data.model_copy(update={"prepared_dir": str(folder)})
    if content == "{":  # the others in short: they are recognised alike
        assert prepared_of(data).folder == folder
        assert (tmp_path / "prepared.damaged" / "tokens" / "00-train-00000.arrow").read_bytes() == b"unfinished"
    else:
        with pytest.raises(DamagedError, match=r"unfinished\.json"):
            read_unfinished(folder)


def test_a_record_comes_back_as_written(tmp_path):
    written = write_unfinished(tmp_path, {"tokenizer": "x"}, [3, 1])
    assert read_unfinished(tmp_path) == written and written["num_pieces"] == [3, 1]
    assert read_unfinished(tmp_path / "nowhere") is None
    assert complete(tmp_path, {"tokenizer": "x"}, sets_aside=False) is None
    with pytest.raises(UserError, match="made from something else"):
        complete(tmp_path, {"tokenizer": "y"}, sets_aside=True)


def test_a_half_written_file_of_a_killed_preparation_is_written_again(data, prepared, prepared_of, tmp_path, caplog):
    """As a power failure leaves it: the name is there, the content is not."""
    folder = tmp_path / "prepared"
    (folder / "tokens").mkdir(parents=True)
    write_unfinished(folder, prepared.manifest.made_from, [1, 1])
    for name in ("00-train-00000.arrow", "00-eval-00000.arrow"):
        (folder / "tokens" / name).write_bytes(bytes(500))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    again = prepared_of(data.model_copy(update={"prepared_dir": str(folder)}))
    assert again.manifest == prepared.manifest
    assert "00-train-00000.arrow cannot be read" in caplog.text


def test_a_lock_is_held_by_one(tmp_path):
    with lock_of(tmp_path / "new", None):
        assert (tmp_path / "new" / ".lock").exists()
    with lock_of(tmp_path / "new", None):  # and is free again
        pass
