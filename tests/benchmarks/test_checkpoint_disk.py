"""What the driver knows of the file system, and plain writing and reading on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.checkpoint import disk
from benchmarks.checkpoint.contenders.floor import Floor

MOUNTS = """\
/dev/root / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/nvme0n1 /tmp/fast xfs rw 0 0
server:/x /a\\040b nfs4 rw 0 0
overlay /tmp/fast overlay rw 0 0
"""
MIB = 2**20


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A folder whose page cache can be dropped."""
    if disk.file_system(tmp_path) in disk.IN_MEMORY:
        pytest.skip("the folder for tests is in memory")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/user", "ext4"),
        ("/", "ext4"),
        ("/tmp/x", "tmpfs"),
        ("/tmpfile", "ext4"),
        ("/tmp/fast", "overlay"),  # mounted over the one before
        ("/a b/c", "nfs4"),
    ],
)
def test_a_path_is_on_the_innermost_mount(path: str, kind: str) -> None:
    assert disk.parse_mounts(MOUNTS, Path(path)) == kind


def test_sizes_are_of_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(bytes(10))
    (tmp_path / "a" / "b" / "two").write_bytes(bytes(20))
    assert disk.size_of(tmp_path) == 30


def test_files_leave_the_page_cache_and_come_back(on_disk: Path) -> None:
    for name in ("one", "two"):
        (on_disk / name).write_bytes(bytes(MIB))
    (on_disk / "empty").touch()
    disk.sync(on_disk)
    assert disk.drop_cache(on_disk) == 0.0
    assert disk.warm_cache(on_disk) == 1.0
    assert disk.cached_bytes(on_disk) == 2 * MIB


@pytest.mark.parametrize("size", [3 * MIB, 3 * MIB + 4096, MIB // 2])
def test_the_floor_reads_what_it_wrote(tmp_path: Path, size: int) -> None:
    floor = Floor(size, 1, buffer_bytes=MIB, flags=0)
    floor.fill()
    floor.save(tmp_path / "new")
    floor.load(tmp_path / "new")
    floor.check()
    assert disk.size_of(tmp_path) == floor.state_bytes() == size
    assert [path.name for path in disk.files_in(tmp_path)] == ["rank1"]


def test_the_floor_notices_what_it_did_not_write(tmp_path: Path) -> None:
    floor = Floor(2 * MIB, 0, buffer_bytes=MIB, flags=0)
    floor.fill()
    floor.save(tmp_path / "new")
    (tmp_path / "new" / "rank0").write_bytes(bytes(2 * MIB))
    floor.load(tmp_path / "new")
    with pytest.raises(ValueError, match="not what was written"):
        floor.check()
