"""Files in shared folders: links refused, mode 0600 with any umask."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcore.blend.document_index import DocumentJournal
from kvcore.errors import SetupError
from kvcore.private_file import open_private
from kvcore.server.recorder import Recorder
from kvcore.storage.journal import VERSION, Journal, JournalOpened, read
from kvctl.commands.serve import write_ready_file

OPENED = JournalOpened(VERSION, 4096, 4096)


def keep_journal(path: Path) -> None:
    """Write an empty journal."""
    journal = Journal(path, OPENED)
    journal.begin()
    journal.close()


WRITERS: dict[str, Callable[[Path], None]] = {
    "ready file": lambda path: write_ready_file(path, "tcp://127.0.0.1:1"),
    "recording": lambda path: Recorder(path, 256).close(),
    "journal": keep_journal,
    "document journal": lambda path: DocumentJournal(path, 256).close(),
}
TEMPORARY = {"ready file": "file.part", "journal": "file.new"}


@pytest.fixture
def no_umask() -> Iterator[None]:
    """Set a umask that removes no permission."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_is_this_user_s_alone(tmp_path: Path, writer: str, exists: bool) -> None:
    """An existing file with another mode gets mode 0600."""
    path = tmp_path / "file"
    if exists:
        path.touch(0o666)
    WRITERS[writer](path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("writer", WRITERS)
def test_a_symbolic_link_is_not_followed(tmp_path: Path, writer: str) -> None:
    """The error names the link; the link's target is unchanged."""
    target = tmp_path / "target"
    target.write_text("precious")
    link = tmp_path / TEMPORARY.get(writer, "file")
    link.symlink_to(target)
    with pytest.raises(SetupError, match="symbolic link"):
        WRITERS[writer](tmp_path / "file")
    assert target.read_text() == "precious"


def test_a_journal_is_not_read_through_a_symbolic_link(tmp_path: Path) -> None:
    """A journal that is a symbolic link is refused."""
    keep_journal(tmp_path / "target")
    (tmp_path / "file").symlink_to(tmp_path / "target")
    with pytest.raises(SetupError, match="symbolic link"):
        list(read(tmp_path / "file", OPENED))


def test_a_device_keeps_its_mode() -> None:
    """`--record /dev/null` is allowed, and only root could change its mode."""
    before = Path("/dev/null").stat().st_mode
    os.close(open_private(Path("/dev/null"), os.O_WRONLY | os.O_TRUNC))
    assert Path("/dev/null").stat().st_mode == before
