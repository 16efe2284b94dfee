"""Files and folders are there whole or not at all, and a disk that refuses them is one clear error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from agentrl.errors import CannotWrite, UserError
from agentrl.files import remove_folder, write_folder, write_text, writing


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_text_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for text in ("old", "new é"):
        write_text(tmp_path / "file", text)
        assert [path.read_text() for path in tmp_path.iterdir()] == [text]


def test_a_full_disk_leaves_the_old_text_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CannotWrite, match="file could not be written: No space left on device"):
        write_text(tmp_path / "file", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_leaves_the_old_folder_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "folder", lambda folder: (folder / "a").write_text("old"))
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CannotWrite, match="folder could not be written"):
        write_folder(tmp_path / "folder", lambda folder: (folder / "a").write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "a").read_text() == "old"


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "rest").touch()
    write_folder(tmp_path / "folder", lambda folder: (folder / "a").touch())
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["folder", "folder/a"]


def test_a_bug_in_the_writer_is_not_called_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "folder", lambda folder: 1 / 0)
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_is_not_there_is_removed_already(tmp_path: Path) -> None:
    remove_folder(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    remove_folder(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_removal_that_was_cut_off_leaves_a_name_that_nothing_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda *args, **settings: None)
    remove_folder(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.old.partial"]


def test_the_error_is_one_line_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, writing(tmp_path / "nowhere" / "file"):
        (tmp_path / "nowhere" / "file").write_text("x")
    assert "No such file or directory" in str(caught.value)
    assert "\n" not in str(caught.value)
