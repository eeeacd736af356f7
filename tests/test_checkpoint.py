"""How files are put in the place of others."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from segnext.checkpoint import replacing


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    with replacing(tmp_path / "pipe") as file:
        file.write(b"content")
    reader.join(10)
    assert read == [b"content"] and (tmp_path / "pipe").is_fifo()


def test_nothing_is_left_of_what_failed(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="no"), replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(OSError, match="absent/file'$"), replacing(tmp_path / "absent" / "file"):
        pass


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    """The system says nothing of it where a write fails."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*/file'$"), replacing(tmp_path / "file") as file:
        file.write(b"half")
    assert not list(tmp_path.iterdir())


def test_errors_of_other_kinds_stay_as_they_are(tmp_path):
    """As of a download, of which no file is to blame."""
    for error in (TimeoutError("the server is slow"), ConnectionResetError(errno.ECONNRESET, "reset")):
        with pytest.raises(OSError) as raised, replacing(tmp_path / "file"):
            raise error
        assert raised.value is error
