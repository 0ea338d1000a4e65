"""Writing that loses nothing: what a new folder may take the place of, and what the disk says."""

from pathlib import Path

import pytest

from lora_mini_jax import UserError
from lora_mini_jax.files import new_folder, write_text


def write(path: Path | str, text: str = "new") -> None:
    """A folder with one file."""
    with new_folder(path) as folder:
        write_text(folder / "own.txt", text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_of_the_same_files_or_of_none_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    for text in ("first", "second"):
        write(tmp_path / "out", text)
        assert (tmp_path / "out" / "own.txt").read_text() == text
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("other", ["thesis.txt", "own.txt/deep.txt", "more/deep.txt"])
def test_a_folder_that_holds_anything_else_is_kept(tmp_path, other):
    file = tmp_path / "out" / other
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(UserError, match=f"holds something else, {Path(other).parts[0]}: choose"):
        write(tmp_path / "out")
    assert file.read_text() == "years of work"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("path", ["gs://bucket/out", Path("gs://bucket/out")])
def test_an_address_is_no_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"gs:/.*bucket/out is an address"):
        write(path)
    assert not names(tmp_path)


def test_the_current_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", tmp_path):
        with pytest.raises(UserError, match="is the current directory"):
            write(path)


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "own.txt").read_text() == "second"
    assert names(tmp_path) == ["disk", "link"]


def test_what_the_disk_does_not_take_is_one_line(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        write(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="Is a directory"):
        write_text(tmp_path, "new")
