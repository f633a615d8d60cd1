"""Files written where the user says, never over an input and never over a file that is not ours.

What is written is listed with its checksum in a hidden file beside it, in the form that ``sha256sum -c`` reads. A file
that exists is only replaced if it is listed there and is still as it was written.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UserError, one_line

MANIFEST = ".autofocusformer.sha256"


class Outputs:
    """A folder that is written to.

    Parameters
    ----------
    folder : Path
        Made when the first file is written.
    inputs : iterable of Path
        Files that are read, and so never written to, ours or not.
    """

    def __init__(self, folder: Path, inputs: Iterable[Path] = ()):
        self.folder = Path(folder)
        self.inputs = {identity(path) for path in inputs} - {None}
        self.known: dict[str, set[str]] = {}
        try:
            lines = (self.folder / MANIFEST).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            lines = []
        for line in lines:
            checksum, _, name = line.partition("  ")
            self.known.setdefault(name, set()).add(checksum)

    def is_own(self, name: str) -> bool:
        """Whether a file is as it was written by us."""
        try:
            content = (self.folder / name).read_bytes() if name in self.known else None
        except OSError:
            return False
        return content is not None and hashlib.sha256(content).hexdigest() in self.known[name]

    def check(self, names: Iterable[str]) -> None:
        """Refuse names of files that are inputs, or exist and are not ours.

        Raises
        ------
        UserError
            It names the first one.
        """
        for name in names:
            path = self.folder / name
            if identity(path) in self.inputs:
                raise UserError(f"{path} is an input and is not written over: name another folder to write to")
            if os.path.lexists(path) and not self.is_own(name):
                reason = "was changed since it was written" if name in self.known else "was not written by this command"
                raise UserError(f"{path} exists and {reason}: name another folder to write to, or remove it")

    def write(self, name: str, content: bytes) -> Path:
        """Write a file whole, or not at all.

        Raises
        ------
        UserError
            As of ``check``, or the disk does not take it.
        """
        self.check([name])
        path, checksum = self.folder / name, hashlib.sha256(content).hexdigest()
        with draft_of(path, content) as draft:
            with open(self.folder / MANIFEST, "a", encoding="utf-8", errors="surrogateescape") as manifest:
                manifest.write(f"{checksum}  {name}\n")
            os.replace(draft, path)
        self.known.setdefault(name, set()).add(checksum)
        return path

    def remove(self, name: str) -> None:
        """Remove a file if it is as it was written by us."""
        if self.is_own(name):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write or replace a file that is known to be ours: whole, or not at all.

    Raises
    ------
    UserError
        The disk does not take it; what was there is as it was.
    """
    with draft_of(path, content) as draft:
        os.replace(draft, path)


@contextlib.contextmanager
def draft_of(path: Path, content: bytes) -> Iterator[Path]:
    """Write a draft beside a file, which is to take its name; it is removed if anything fails."""
    draft = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        yield draft
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def identity(path: Path) -> tuple[int, int] | None:
    """Return which file a path leads to, whatever its name; None if it leads nowhere."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
