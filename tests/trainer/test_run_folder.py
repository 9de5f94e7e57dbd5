"""Files that host and training process write for each other."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from trainer.run_folder import StopRequest, write_whole


def test_a_file_for_which_the_disk_has_no_room_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stop.json"
    write_whole(path, StopRequest(save=True))
    before = path.read_bytes()
    (tmp_path / "stop.json.new").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_whole(path, StopRequest(save=False))
    assert caught.value.errno == errno.ENOSPC
    assert [each.name for each in tmp_path.iterdir()] == ["stop.json"]
    assert path.read_bytes() == before
