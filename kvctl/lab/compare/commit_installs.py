"""A commit and the working tree, each installed in a Python of its own."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from kvcore.errors import SetupError

TURNS = "import kvctl.lab.interleaving"


@dataclass(frozen=True, slots=True)
class CommitInstalls:
    """Makes installations in a folder; what is there for a commit already is kept."""

    root: Path
    """Of the checkout."""
    folder: Path

    def commit(self, name: str) -> Path:
        """Install a commit; return its Python.

        Raises:
            SetupError: there is no such commit, or it cannot be installed.
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
        """Install what lies in the checkout, changes included; return its Python."""
        place = self.folder / "working-tree"
        _install(place, self.root)
        return place / "bin" / "python"

    def resolve(self, name: str) -> str:
        """Return a commit's full name."""
        commit = f"{name}^{{commit}}"
        asked = ("git", "-C", str(self.root), "rev-parse", "--verify", "--quiet")
        try:
            return _output(*asked, commit).decode().strip()
        except SetupError:
            raise SetupError(f"{name}: no such commit in {self.root}") from None


def knows_turns(python: Path, folder: Path) -> bool:
    """Say whether the kvctl of a Python takes turns; older ones do not."""
    asked = [str(python), "-c", TURNS]
    done = subprocess.run(asked, cwd=folder, capture_output=True, check=False)
    return done.returncode == 0


def _install(place: Path, source: Path) -> None:
    """Install a source, not editable, beside the same dependencies as any other."""
    python = str(place / "bin" / "python")
    if not Path(python).exists():
        _output(sys.executable, "-m", "venv", str(place))
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    _output(*pip, str(source))
    # The version may be the same: what was installed before would stay.
    _output(*pip, "--no-deps", "--force-reinstall", str(source))


def _output(*command: str) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise SetupError(f"{command[0]} is not here") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        said = lines[-1] if lines else f"exit code {error.returncode}"
        raise SetupError(f"{' '.join(command[:4])} ...: {said}") from None
