"""Files are replaced as a whole, and neither written nor removed through a link."""

from pathlib import Path

import pytest

from relora.files import folder_problems, json_of, publish_folder, remove, set_aside, write_text


@pytest.fixture
def treasure(tmp_path: Path) -> Path:
    """A folder outside that nothing may touch."""
    folder = tmp_path / "treasure"
    folder.mkdir()
    (folder / "gold").write_text("mine")
    return folder


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path, treasure: Path) -> None:
    path = tmp_path / "run" / "status.json"
    path.parent.mkdir()
    (path.parent / ".status.json.draft").symlink_to(treasure / "gold")
    path.symlink_to(treasure / "gold")
    write_text(path, "new")
    assert (path.read_text(), path.is_symlink(), (treasure / "gold").read_text()) == ("new", False, "mine")
    assert sorted(each.name for each in path.parent.iterdir()) == [".status.json.draft", "status.json"]


def test_a_folder_in_the_way_of_a_file_is_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "status.json").mkdir()
        (tmp_path / "status.json" / "inside").write_text(str(number))
        write_text(tmp_path / "status.json", "new")
        remove(tmp_path / "status.json")
    assert (tmp_path / "status.json.damaged" / "inside").read_text() == "1"
    assert (tmp_path / "status.json.damaged-2" / "inside").read_text() == "2"


def test_no_draft_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "\ud800")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["nothing", "folder", "file", "link", "link to nothing"])
def test_a_folder_is_published_whatever_is_there(what: str, tmp_path: Path, treasure: Path) -> None:
    draft, final = tmp_path / "draft", tmp_path / "final"
    draft.mkdir()
    (draft / "new").write_text("new")
    if what == "folder":
        final.mkdir()
        (final / "link").symlink_to(treasure)
    elif what == "file":
        final.write_text("a user's own")
    elif what != "nothing":
        final.symlink_to(treasure if what == "link" else tmp_path / "nowhere")
    publish_folder(draft, final)
    assert [path.name for path in final.iterdir()] == ["new"]
    assert not final.is_symlink()
    assert (treasure / "gold").read_text() == "mine"
    assert (tmp_path / "final.damaged").exists() == (what == "file")


def test_removal_stops_at_links(tmp_path: Path, treasure: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (folder / "inside").symlink_to(treasure)
    link.symlink_to(treasure)
    for path in (folder, link, tmp_path / "nowhere"):
        remove(path)
        assert not path.is_symlink()
    assert not folder.exists()
    assert (treasure / "gold").read_text() == "mine"


def test_names_aside_are_never_taken_twice(tmp_path: Path) -> None:
    (tmp_path / "a.damaged").symlink_to("nowhere")
    (tmp_path / "a").mkdir()
    assert set_aside(tmp_path / "a").name == "a.damaged-2"


def test_a_link_to_nothing_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    [problem] = folder_problems("output_dir = runs/x", str(tmp_path / "runs" / "x"))
    assert problem.endswith(f"runs is a link to {tmp_path}/unmounted, which is not there")


def test_json_that_is_nested_too_deep_is_no_json() -> None:
    for content in (b"[" * 200_000, b"\xff", b'{"a": 1', b"1" * 5000):
        with pytest.raises(ValueError):
            json_of(content)
