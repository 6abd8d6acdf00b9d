"""Files that the canvas keeps for its user: saved workflows above all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .files import SCRATCH, PathError, Taken, contained, told, write_atomic


class Conflict(Exception):
    """There is a file at the place already, and it was not to be overwritten."""


class Missing(Exception):
    """There is no such file or folder."""


class UserData:
    """The files below one folder. Every path is relative to it, with '/' between its names, and cannot leave it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _file(self, name: str) -> Path:
        path = contained(self.root, name)
        if path == contained(self.root):
            raise PathError("A file name is missing.")
        return path

    def existing(self, name: str) -> Path:
        """The path of a file that is there, else Missing."""
        path = self._file(name)
        if not path.is_file():
            raise Missing(name)
        return path

    def info(self, path: Path, below: Path) -> dict[str, Any]:
        """Path (relative to `below`), size in bytes, times in milliseconds."""
        stat = path.stat()
        return {
            "path": path.relative_to(below).as_posix(),
            "size": stat.st_size,
            "modified": stat.st_mtime_ns // 1_000_000,
            "created": stat.st_ctime_ns // 1_000_000,
        }

    def entry(self, name: str, full_info: bool) -> dict[str, Any] | str:
        """What a reply says of a stored file: its info, or its path alone."""
        path, root = self._file(name), contained(self.root)
        return self.info(path, root) if full_info else path.relative_to(root).as_posix()

    def list(self, folder: str, recurse: bool, full_info: bool, split: bool) -> list[Any]:
        """The files of a folder in the form asked for, or Missing. Links that lead out of the root are left out."""
        base = contained(self.root, folder)
        if not base.is_dir():
            raise Missing(folder)
        found = []
        for path in sorted(base.rglob("*") if recurse else base.iterdir()):
            if not path.is_file() or path.name.endswith(SCRATCH) or not self._inside(path):
                continue
            name = path.relative_to(base).as_posix()
            found.append(self.info(path, base) if full_info else [name, *name.split("/")] if split else name)
        return found

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(contained(self.root))

    def write(self, name: str, data: bytes, overwrite: bool) -> None:
        """Store a file, whole or not at all; Conflict when it is there and must stay."""
        path = self._file(name)
        if path.is_dir():
            raise Conflict(name)
        try:
            write_atomic(path, data, overwrite)
        except Taken as error:
            raise Conflict(name) from error

    def delete(self, name: str) -> None:
        """Remove a file, or Missing."""
        path = self.existing(name)
        try:
            path.unlink()
        except OSError as error:
            raise told(error, path) from error

    def move(self, source: str, target: str, overwrite: bool) -> None:
        """Rename a file; Missing, or Conflict when the target is there and must stay."""
        old, new = self.existing(source), self._file(target)
        if new.is_dir() or (new.exists() and not overwrite):
            raise Conflict(target)
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            os.replace(old, new)
        except OSError as error:
            raise told(error, new) from error
