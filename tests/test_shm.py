"""Shared memory segments: rights, ranges, refusals, and whose they are."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcore import shm
from kvcore.errors import Closed, HandleError, SetupError
from kvcore.shm import SHM_DIR, Claim, Segment, populate, remove_dead


@pytest.fixture
def name() -> Iterator[str]:
    """A free name; what begins with it is gone after the test."""
    prefix = f"kvtest-{os.getpid()}-{os.urandom(4).hex()}"
    yield prefix
    for path in SHM_DIR.glob(f"{prefix}*"):
        path.unlink()


@pytest.mark.parametrize("touch", [True, False])
def test_attached_range_shows_the_creators_bytes(name: str, touch: bool) -> None:
    """A range from any offset is the creator's memory, both ways."""
    with Segment.create(name, 10_000, touch=touch) as mine:
        mine.array[:] = np.arange(10_000) % 251
        theirs = Segment.attach(name, offset=4_099, length=1_000)
        assert theirs.array.shape == (1_000,)
        assert np.array_equal(theirs.array, mine.array[4_099:5_099])
        theirs.array[0] = 255
        assert mine.array[4_099] == 255
        theirs.close()


def test_segment_is_for_its_user_alone(name: str) -> None:
    """The file is as large as asked for and closed to other users."""
    with Segment.create(name, 5_000, touch=True):
        status = os.stat(SHM_DIR / name)
        assert status.st_mode & 0o777 == 0o600
        assert status.st_size == 5_000
        assert status.st_blocks * 512 >= 5_000
    assert not (SHM_DIR / name).exists()


@pytest.mark.parametrize(
    "bad", ["", ".hidden", "..", "a/b", "../etc/passwd", "nul\0", "x y", "é", "a" * 256]
)
def test_other_names_are_refused(bad: str) -> None:
    """Nothing outside /dev/shm and no odd name can be named in a handle."""
    with pytest.raises(HandleError, match="is no segment name"):
        Segment.attach(bad, offset=0, length=1)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 10), (0, 0), (0, -5), (0, 4_097), (4_096, 1), (2**70, 1)],
)
def test_ranges_outside_are_refused(name: str, offset: int, length: int) -> None:
    """A handle that claims more than the file has is refused, by name."""
    with (
        Segment.create(name, 4_096, touch=False),
        pytest.raises(HandleError, match=name),
    ):
        Segment.attach(name, offset=offset, length=length)


def test_missing_and_foreign_files_are_refused(name: str) -> None:
    """No file, a symbolic link, a FIFO, a folder: an error, and no hanging open."""
    with pytest.raises(HandleError, match="it is gone"):
        Segment.attach(name, offset=0, length=1)
    (SHM_DIR / f"{name}-link").symlink_to("/etc/passwd")
    os.mkfifo(SHM_DIR / f"{name}-fifo")
    for kind in ("link", "fifo"):
        with pytest.raises(HandleError):
            Segment.attach(f"{name}-{kind}", offset=0, length=1)
    assert remove_dead(name) == []


def test_taken_name_is_refused(name: str) -> None:
    """A second creator of a name is told so; the first keeps its segment."""
    with Segment.create(name, 4_096, touch=False) as first:
        with pytest.raises(SetupError, match="File exists"):
            Segment.create(name, 4_096, touch=False)
        first.array[0] = 1


@pytest.mark.parametrize("touch", [True, False])
def test_too_small_dev_shm_is_named(name: str, touch: bool) -> None:
    """Wanting more than /dev/shm has says how much, and leaves nothing behind."""
    with pytest.raises(SetupError, match=r"wants 1,152,921.*/dev/shm has.*enlarge"):
        Segment.create(name, 2**60, touch=touch)
    assert not (SHM_DIR / name).exists()


def test_too_little_memory_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wanting more than the machine or the container has says which of them."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:       4 kB\n")
    limit = tmp_path / "memory.max"
    limit.write_text("8192\n")
    monkeypatch.setattr(shm, "_MEMINFO", meminfo)
    monkeypatch.setattr(shm, "_CGROUP_LIMIT", limit)
    with pytest.raises(SetupError, match="machine's free memory has 4,096"):
        Segment.create(name, 4_097, touch=True)
    meminfo.write_text("MemAvailable: 100 kB\n")
    with pytest.raises(SetupError, match="the container has 8,192"):
        Segment.create(name, 8_193, touch=True)
    limit.write_text("max\n")
    Segment.create(name, 8_193, touch=True).__exit__(None, None, None)


def test_full_dev_shm_at_the_last_moment_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When another took the room after the check, the error is the same kind."""

    def full(mapping: object, fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shm, "_touch", full)
    with pytest.raises(SetupError, match="No space left"):
        Segment.create(name, 4_096, touch=True)
    assert not (SHM_DIR / name).exists()


def test_close_leaves_living_views_alone(name: str) -> None:
    """A view outlives close and unlink; the segment itself refuses to be read."""
    segment = Segment.create(name, 4_096, touch=True)
    view = segment.array[:10]
    view[:] = 7
    for _ in range(2):
        segment.unlink()
        segment.close()
    assert view.tolist() == [7] * 10
    with pytest.raises(Closed):
        _ = segment.array
    assert "closed" in repr(segment)


def test_attacher_cannot_unlink(name: str) -> None:
    """Only the creator removes the name."""
    with Segment.create(name, 4_096, touch=False):
        with Segment.attach(name, offset=0, length=1):
            pass
        assert (SHM_DIR / name).exists()


def test_unlink_spares_a_later_segment_of_that_name(name: str) -> None:
    """A second unlink does nothing, whoever has the name by then."""
    first = Segment.create(name, 4_096, touch=False)
    first.unlink()
    with Segment.create(name, 4_096, touch=False):
        first.unlink()
        assert (SHM_DIR / name).exists()
    first.close()


def test_only_segments_of_the_dead_are_removed(name: str) -> None:
    """A killed process's segment goes; those of the living, and others', stay."""
    program = (
        "import sys; from kvcore.shm import Segment\n"
        "segment = Segment.create(sys.argv[1], 4096, touch=True)\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    dead = f"{name}-dead"
    with subprocess.Popen(
        [sys.executable, "-c", program, dead],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(shm.__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with Segment.create(f"{name}-alive", 4_096, touch=True):
            assert remove_dead(name) == []
            process.kill()
            process.wait()
            assert remove_dead(name) == [dead]
            assert (SHM_DIR / f"{name}-alive").exists()


def test_create_starts_anew_when_its_file_is_removed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A remover that comes between creating and locking costs a second try."""
    lock, calls = fcntl.flock, []

    def removed_first(fd: int, operation: int) -> None:
        if not calls:
            (SHM_DIR / name).unlink()
        calls.append(operation)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with Segment.create(name, 4_096, touch=False):
        assert len(calls) == 2
        assert (SHM_DIR / name).exists()


def test_remover_spares_a_name_that_changed_hands(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a dead segment that a new owner took meanwhile stays."""
    Segment.create(name, 4_096, touch=False).close()
    lock, made = fcntl.flock, []

    def change_hands(fd: int, operation: int) -> None:
        if not made:
            (SHM_DIR / name).unlink()
            made.append(None)
            made.append(Segment.create(name, 4_096, touch=False))
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", change_hands)
    assert remove_dead(name) == []
    assert (SHM_DIR / name).exists()
    made[1].__exit__(None, None, None)


def test_removers_never_take_a_living_segment(name: str) -> None:
    """Beside a remover that never rests, what was created keeps its name."""
    done = threading.Event()

    def remove() -> None:
        while not done.is_set():
            remove_dead(name)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for i in range(300):
            with Segment.create(f"{name}-{i}", 64, touch=False) as segment:
                assert (SHM_DIR / segment.name).exists()
    finally:
        done.set()
        remover.join()


def test_a_claim_makes_anothers_segment_ours(name: str) -> None:
    """It has our name, is taken for living, and goes when it is released."""
    (SHM_DIR / f"{name}-theirs").write_bytes(b"bytes")
    claim = Claim(f"{name}-theirs", f"{name}-ours")
    assert not (SHM_DIR / f"{name}-theirs").exists()
    assert remove_dead(name) == []
    assert os.pread(claim.fd, 5, 0) == b"bytes"
    claim.release()
    claim.release()
    assert not (SHM_DIR / f"{name}-ours").exists()


def test_a_claim_of_what_is_not_there_or_owned_is_refused(name: str) -> None:
    """And changes nothing."""
    with pytest.raises(HandleError, match="no segment"):
        Claim(f"{name}-theirs", f"{name}-ours")
    with Segment.create(name, 64, touch=False):
        with pytest.raises(HandleError, match=name):
            Claim(name, f"{name}-ours")
        assert (SHM_DIR / name).exists()


def test_a_mapping_is_populated_while_it_is_wanted(name: str) -> None:
    """A piece at a time; the bytes stay as they are."""
    with Segment.create(name, 1 << 20, touch=True) as made:
        made.array[:] = 7
        mapped = Segment.attach(name, offset=0, length=1 << 20)
        before = resident(name)
        populate(mapped.array, lambda: False)
        assert resident(name) == before
        populate(mapped.array, lambda: True)
        assert resident(name) - before == 1024
        assert (mapped.array == 7).all()
        mapped.close()


def test_pages_that_are_cut_off_are_found_before_they_are_touched(name: str) -> None:
    """Touching one would end the process with SIGBUS."""
    with Segment.create(name, 1 << 20, touch=True):
        mapped = Segment.attach(name, offset=1 << 19, length=1 << 19)
        mapped.check_pages()
        os.truncate(SHM_DIR / name, 1 << 19)
        with pytest.raises(HandleError, match="has shrunk to 524,288 bytes"):
            mapped.check_pages()
        mapped.close()


IN_A_FULL_FOLDER = """
import os
from kvcore.errors import HandleError, SetupError
from kvcore.shm import SHM_DIR, Segment
MIB = 1 << 20
sparse = Segment.create("sparse", 2 * MIB, touch=False)
mapped = Segment.attach("sparse", offset=0, length=2 * MIB)
with (SHM_DIR / "kept").open("wb") as kept:
    kept.truncate(2 * MIB)
Segment.create("filler", 3 * MIB, touch=True)
for use in (mapped.check_pages, lambda: Segment.adopt("kept", 2 * MIB)):
    try:
        use()
    except (HandleError, SetupError) as error:
        print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a folder")
def test_pages_for_which_there_is_no_room_are_found_before_they_are_touched() -> None:
    """A sparse segment of a worker, and the arena of a start that was killed."""
    mount = 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", mount, sys.executable, IN_A_FULL_FOLDER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sparse, kept = done.stdout.splitlines()
    assert "cannot all be used: No space left on device" in sparse
    assert "'kept': No space left on device; make /dev/shm larger" in kept


def resident(name: str) -> int:
    """KiB of a segment's mappings that have their pages in this process."""
    kib, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            is_ours = line.endswith(name)
        elif is_ours and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib
