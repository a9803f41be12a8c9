"""Installations of a commit and of the working tree, each in its own environment."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from kvcore.errors import SetupError

INTERLEAVING_CHECK = "import kvctl.lab.run_turns"


@dataclass(frozen=True, slots=True)
class CommitInstalls:
    """Installations in one folder; that of a commit is reused."""

    root: Path
    """Root of the checkout."""
    folder: Path

    def commit(self, name: str) -> Path:
        """Install a commit and return the path of its Python.

        Raises:
            SetupError: the commit does not exist or cannot be installed.
        """
        full = self.resolve(name)
        place = self.folder / full[:12]
        python = place / "bin" / "python"
        done = place / "installed"
        if not done.exists():
            source = place / "source"
            archive = _output("git", "-C", str(self.root), "archive", full)
            with tarfile.open(fileobj=BytesIO(archive)) as tree:
                tree.extractall(source, filter="data")
            _install(place, source)
            done.touch()
        return python

    def working_tree(self) -> Path:
        """Install the checkout with its changes and return the path of its Python."""
        place = self.folder / "working-tree"
        _install(place, self.root)
        return place / "bin" / "python"

    def resolve(self, name: str) -> str:
        """Return the full hash of a commit.

        Raises:
            SetupError: the commit does not exist.
        """
        commit = f"{name}^{{commit}}"
        command = ("git", "-C", str(self.root), "rev-parse", "--verify", "--quiet")
        try:
            return _output(*command, commit).decode().strip()
        except SetupError:
            raise SetupError(f"{name}: no such commit in {self.root}") from None


def supports_interleaving(python: Path, folder: Path) -> bool:
    """Return whether an installation supports interleaved runs; older ones do not."""
    command = [str(python), "-c", INTERLEAVING_CHECK]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return done.returncode == 0


def _install(place: Path, source: Path) -> None:
    """Install a source tree, not editable, into an environment."""
    python = str(place / "bin" / "python")
    if not Path(python).exists():
        _output(sys.executable, "-m", "venv", str(place))
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    _output(*pip, str(source))
    # With an equal version, pip would keep the earlier installation.
    _output(*pip, "--no-deps", "--force-reinstall", str(source))


def _output(*command: str) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise SetupError(f"{command[0]}: command not found") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {error.returncode}"
        raise SetupError(f"{' '.join(command[:4])} ...: {reason}") from None
