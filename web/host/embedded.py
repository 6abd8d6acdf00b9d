"""The embedded host as the nodes see it: progress, previews, interruption, model folders, device and memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...flux_runtime.errors import FluxError
from .protocols import ModelFolders

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Interrupted(Exception):
    """The user asked to stop the prompt. A node must let it through."""


class Interruption:
    """The stop switch of one prompt: set from any thread, seen by the running node at its next step."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may call `set` while this thread is in `waking`
        self._set = False
        self._wake: Callable[[], None] | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Stop the prompt, at once where it waits for something, else at its next check."""
        with self._lock:
            self._set = True
            if self._wake:
                self._wake()

    def check(self) -> None:
        """Raise `Interrupted` once the switch is set."""
        if self._set:
            raise Interrupted("the prompt was interrupted")

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within, `wake` is called when the switch is set, or at once if it is already."""
        with self._lock:
            self._wake = wake
            if self._set:
                wake()
        try:
            yield
        finally:
            with self._lock:
                self._wake = None


class Listener(Protocol):
    """Who hears what a running node tells."""

    def progress(self, node_id: str, value: float, total: float, preview: Image.Image | None = None) -> None:
        """A node is `value` of `total` steps far."""

    def text(self, node_id: str, text: str) -> None:
        """A node has a line to show."""


@dataclass(frozen=True)
class Executing:
    """The node that is being executed, and which of its calls when its inputs are lists."""

    node_id: str
    prompt_id: str
    listener: Listener
    interruption: Interruption
    call: int = 0


_executing: ContextVar[Executing | None] = ContextVar("executing", default=None)
_latest: list[Executing] = []  # the node entered last, for threads that nodes start: these inherit no context


def executing() -> Executing | None:
    """The node that the calling code belongs to; None when no node is being executed."""
    return _executing.get() or next(iter(_latest), None)


def enter(node: Executing) -> None:
    """Say what the present task executes from now on."""
    _executing.set(node)
    _latest[:] = [node]


def leave() -> None:
    """Say that no node is being executed any more."""
    _latest.clear()


class EmbeddedHost:
    """Answers what nodes ask (`nodes/host.py: Host`). Outside of a node there is nobody to tell and nothing to stop."""

    def __init__(self, folders: ModelFolders, device: str | None = None) -> None:
        """`device` is a torch device such as "cuda:1"; None takes the best there is."""
        self._folders = folders
        self._device = device
        self.release: Callable[[], None] | None = None  # lets go of what the executor has cached

    def progress(self, value: int, total: int, preview: Image.Image | None = None) -> None:
        if node := executing():
            node.listener.progress(node.node_id, value, total, preview)

    def text(self, text: str) -> None:
        if node := executing():
            node.listener.text(node.node_id, text)

    def check_interrupt(self) -> None:
        if node := executing():
            node.interruption.check()

    def interrupted(self, error: BaseException) -> bool:
        return isinstance(error, Interrupted)

    def folders(self, category: str) -> list[Path]:
        return self._folders.roots(category)

    def files(self, category: str) -> list[str]:
        return self._folders.list(category)

    def resolve(self, category: str, name: str) -> Path:
        return self._folders.resolve(category, name)

    def device(self) -> torch.device:
        """The chosen device; a FluxError names one that torch does not know."""
        import torch

        if self._device is None:
            return torch.device(_best_device())
        try:
            return torch.device(self._device)
        except RuntimeError as error:
            raise FluxError(f"there is no device {self._device!r}; use cpu, cuda, cuda:1 or mps") from error

    def check_device(self) -> None:
        """FluxError when this machine or this torch does not have the device: told before anything is loaded."""
        import torch

        device = self.device()
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend refuses in its own way
            reason = str(error).partition("\n")[0].rstrip(".")
            raise FluxError(
                f"The device {device} cannot be used here: {reason}. Choose another, such as --device cpu."
            ) from error

    def free_memory(self, bytes_needed: int) -> None:
        """Let go of cached results when the device has fewer bytes free."""
        device = self.device()
        if free_bytes(device) >= bytes_needed:
            return
        if self.release:
            self.release()
        empty_device_caches()


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def free_bytes(device: torch.device) -> float:
    """The free memory of a device, unlimited where there is no telling."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def empty_device_caches() -> None:
    """Collect garbage and give back the memory that torch keeps for reuse."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that RAM or the device's memory was used up; torch's CPU and MPS say so only in words."""
    names = {kind.__name__ for kind in type(error).__mro__}
    words = str(error).lower()
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words)
    )
