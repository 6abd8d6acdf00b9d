"""Paths that cannot leave their folder, and writes that cannot lose the old file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from pathlib import Path

from ...flux_runtime.errors import FluxError

_DRIVE = re.compile(r"^[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_NAME = 255
_LONGEST_PATH = 2048
SCRATCH = ".part"  # how the name of a half-written file ends


class PathError(FluxError):
    """A path that leaves its folder or is no proper name."""


def _check_part(part: str) -> None:
    """Refuse whatever some operating system would read as more than a relative path of plain names."""
    if not isinstance(part, str):
        raise PathError(f"A path must be text, not {type(part).__name__}.")
    shown = repr(part[:80])
    if _CONTROL.search(part):
        raise PathError(f"The path {shown} has a control character in it; use a plain file name.")
    if "\\" in part or _DRIVE.match(part) or part.startswith("/"):
        raise PathError(f"The path {shown} is not a relative path with '/' between its names.")
    if ".." in part.split("/"):
        raise PathError(f"The path {shown} leads out of its folder ('..').")
    try:
        names = [name.encode("utf-8") for name in part.split("/")]
    except UnicodeEncodeError:
        raise PathError(f"The path {shown} is not valid Unicode text.") from None
    if len(part) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in names):
        raise PathError(f"The path {shown}... is too long; a name may have {_LONGEST_NAME} bytes.")


def relative(*parts: str) -> str:
    """Join parts to one relative path with '/', refusing what `_check_part` refuses."""
    for part in parts:
        _check_part(part)
    return "/".join(name for part in parts for name in part.split("/") if name not in ("", "."))


def contained(root: Path, *parts: str) -> Path:
    """The real path of `root/parts`, symbolic links resolved; PathError when that lies outside the real `root`."""
    base = os.path.realpath(root)
    real = os.path.realpath(os.path.join(base, relative(*parts)))
    if real != base and not real.startswith(base.rstrip(os.sep) + os.sep):
        raise PathError(f"The path {'/'.join(parts)!r} leads out of its folder through a link.")
    return Path(real)


def told(error: OSError, path: Path) -> FluxError:
    """The sentence for a failed write: what could not be written, why, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"No space is left on the disk of {path.parent}: {path.name} was not saved. "
            "Free some space and save again; the earlier file is untouched."
        )
    reason = error.strerror or str(error)
    remedy = "Choose a shorter name" if error.errno == errno.ENAMETOOLONG else "Check the folder's permissions"
    return FluxError(f"{path.name} could not be written to {path.parent}: {reason}. {remedy}.")


class DiskFull(FluxError):
    """The disk has no space left for what was to be saved."""


class Taken(FluxError):
    """There is a file of this name already, and it was not to be overwritten."""


def _scratch(path: Path, data: bytes) -> str:
    """A complete file with the data beside `path`, under a name of its own."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=SCRATCH)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
    except OSError:
        os.unlink(scratch)
        raise
    return scratch


def _claim(scratch: str, path: Path) -> None:
    """Give the complete file its name too, of two writers to one of them; Taken for the other."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        raise Taken(f"There is a file {path.name} already.") from None
    except OSError:  # a file system without hard links: there the name holds nothing for a moment
        _reserve(path)
        os.replace(scratch, path)


def _reserve(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        raise Taken(f"There is a file {path.name} already.") from None


def write_atomic(path: Path, data: bytes, overwrite: bool = True) -> None:
    """Write `data` so that `path` holds either its old or its new content at every moment, even after a kill.

    Raises FluxError (DiskFull when the disk is full, Taken when it is there and not to be overwritten) and leaves the
    old file as it was.
    """
    scratch = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch(path, data)
        if overwrite:
            os.replace(scratch, path)
        else:
            _claim(scratch, path)
    except OSError as error:
        raise told(error, path) from error
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has become the file
            os.unlink(scratch)
