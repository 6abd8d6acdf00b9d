"""The queue of prompts, their history, and the thread that works it off."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from ...flux_runtime.errors import FluxError
from ...nodes.load import warm_up
from .embedded import Interruption, empty_device_caches
from .executor import ExecutionResult, Executor
from .inputs import SENSITIVE
from .protocols import Events, Prompt

log = logging.getLogger("fluxcanvas")


@dataclass(frozen=True)
class QueueItem:
    """A validated prompt that waits or runs. Access tokens are apart from `extra_data`, which anybody may see."""

    number: float
    prompt_id: str
    prompt: Prompt
    extra_data: dict[str, Any]
    outputs: list[str]
    client_id: str | None
    create_time: int  # in ms since 1970
    tokens: dict[str, Any] = field(repr=False)
    interruption: Interruption = field(repr=False, default_factory=Interruption)

    def as_list(self) -> list[Any]:
        """The item as ComfyUI's queue and history show it."""
        return [self.number, self.prompt_id, self.prompt, self.extra_data, self.outputs]


class Chore(Enum):
    """What the worker does besides running prompts."""

    FREE_MEMORY = auto()
    WARM_UP = auto()  # not in a thread of its own: a prompt that imports the same packages meets them half imported


class PromptQueue:
    """Prompts in the order of their numbers, those that run, and those that have run. For use from any thread."""

    def __init__(self, events: Events | None = None, history_limit: int = 10_000) -> None:
        """Every change is broadcast on `events` as a status. Of the history the latest are kept, up to the limit."""
        self._events = events
        self._limit = history_limit
        self._changed = threading.Condition()
        self._count = itertools.count()
        self._order = itertools.count()
        self._pending: list[tuple[float, int, QueueItem]] = []
        self._running: dict[str, QueueItem] = {}
        self._history: dict[str, dict[str, Any]] = {}
        self._chores: list[Chore] = []
        self._closed = False

    def put(
        self,
        prompt_id: str,
        prompt: Prompt,
        extra_data: dict[str, Any],
        outputs: Sequence[str],
        client_id: str | None = None,
        number: float | None = None,
        front: bool = False,
    ) -> float:
        """Queue a prompt and return its number; lower numbers run first, and `front` makes it lower than all before.

        FluxError when the number is none, or when a prompt of this id is in the queue already.
        """
        if number is not None and not math.isfinite(number):
            raise FluxError(f"the prompt's number is {number}; it decides the order of the queue and must be finite")
        with self._changed:
            if prompt_id in self._running or any(item.prompt_id == prompt_id for _, _, item in self._pending):
                raise FluxError(f"a prompt with the id {prompt_id} is in the queue already; choose another id, or none")
            place = number if number is not None else self._next_number(front)
            now = int(time.time() * 1000)
            public = {key: value for key, value in extra_data.items() if key not in SENSITIVE}
            tokens = {key: value for key, value in extra_data.items() if key in SENSITIVE}
            public["create_time"] = now
            item = QueueItem(place, prompt_id, prompt, public, list(outputs), client_id, now, tokens)
            heapq.heappush(self._pending, (place, next(self._order), item))
            self._tell()
        return place

    def _next_number(self, front: bool) -> int:
        count = next(self._count)
        if not front:
            return count
        return min(-count, math.floor(self._pending[0][0]) - 1) if self._pending else -count

    def get(self, timeout: float | None = None) -> QueueItem | Chore | None:
        """The next thing to do, waiting for one; None when the queue was closed or the timeout (in s) has passed."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._chores or self._closed, timeout)
            if self._closed:
                return None
            if self._chores:
                return self._chores.pop(0)
            if not self._pending:
                return None
            item = heapq.heappop(self._pending)[2]
            self._running[item.prompt_id] = item
            self._tell()
            return item

    def done(self, item: QueueItem, result: ExecutionResult) -> None:
        """Move what has run into the history, and tell its client that nothing is being executed any more."""
        status = {
            "status_str": "success" if result.status == "success" else "error",
            "completed": result.status == "success",
            "messages": [list(message) for message in result.messages],
        }
        with self._changed:
            self._running.pop(item.prompt_id, None)
            self._history.pop(item.prompt_id, None)  # so that it comes last even when an id is used again
            self._history[item.prompt_id] = {
                "prompt": item.as_list(),
                "outputs": result.outputs,
                "status": status,
                "meta": result.meta,
            }
            while len(self._history) > self._limit:
                del self._history[next(iter(self._history))]
            self._tell()
            if self._events and item.client_id is not None:
                self._events.send("executing", {"node": None, "prompt_id": item.prompt_id}, item.client_id)

    def running(self) -> list[QueueItem]:
        with self._changed:
            return list(self._running.values())

    def pending(self) -> list[QueueItem]:
        """What waits, in the order in which it will run."""
        with self._changed:
            return [item for _, _, item in sorted(self._pending, key=lambda entry: entry[:2])]

    def remaining(self) -> int:
        """How many prompts wait or run."""
        with self._changed:
            return len(self._pending) + len(self._running)

    def delete(self, prompt_id: str) -> bool:
        """Take a waiting prompt out of the queue; False when it does not wait."""
        with self._changed:
            kept = [entry for entry in self._pending if entry[2].prompt_id != prompt_id]
            found = len(kept) < len(self._pending)
            if found:
                heapq.heapify(kept)
                self._pending = kept
                self._tell()
            return found

    def clear(self) -> None:
        """Take all waiting prompts out of the queue."""
        with self._changed:
            self._pending = []
            self._tell()

    def interrupt(self, prompt_id: str | None = None) -> bool:
        """Stop the prompt of this id if it runs, or whatever runs; False when there was nothing to stop."""
        with self._changed:
            items = [item for item in self._running.values() if prompt_id in (None, item.prompt_id)]
        for item in items:
            item.interruption.set()
        return bool(items)

    def history(
        self, max_items: int | None = None, offset: int | None = None, prompt_id: str | None = None
    ) -> dict[str, dict[str, Any]]:
        """What has run, oldest first: one prompt, or a page of all. Without an offset a page holds the newest."""
        with self._changed:
            if prompt_id is not None:
                return {key: self._history[key] for key in [prompt_id] if key in self._history}
            entries = list(self._history.items())
        count = len(entries) if max_items is None else max(max_items, 0)
        start = max(len(entries) - count, 0) if offset is None or offset < 0 else offset
        return dict(entries[start : start + count])

    def delete_history(self, prompt_id: str) -> bool:
        """Forget a prompt that has run; False when there is none of this id."""
        with self._changed:
            return self._history.pop(prompt_id, None) is not None

    def clear_history(self) -> None:
        """Forget all prompts that have run."""
        with self._changed:
            self._history.clear()

    def free(self, unload_models: bool = False, free_memory: bool = False) -> None:
        """Ask the worker to let go of memory before the next prompt, or at once when it has nothing to do.

        Models are results of nodes and kept with the others, so either wish lets go of all.
        """
        if unload_models or free_memory:
            self.ask(Chore.FREE_MEMORY)

    def ask(self, chore: Chore) -> None:
        """Have the worker do a chore before the next prompt."""
        with self._changed:
            if chore not in self._chores:
                self._chores.append(chore)
            self._changed.notify_all()

    def close(self) -> None:
        """Let whoever waits in `get` go home."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _tell(self) -> None:
        """Wake the worker and broadcast the state; within the lock, so that the states arrive in their order."""
        self._changed.notify_all()
        if self._events:
            status = {"exec_info": {"queue_remaining": len(self._pending) + len(self._running)}}
            self._events.send("status", {"status": status}, None)


class Worker:
    """The thread that runs what is queued, one prompt after another."""

    def __init__(self, queue: PromptQueue, executor: Executor) -> None:
        self._queue = queue
        self._executor = executor
        self._thread = threading.Thread(target=self._work, name="fluxcanvas worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Interrupt what runs and end the thread, waiting at most so many seconds. What still waits is not run."""
        self._queue.close()
        self._queue.interrupt()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            if isinstance(task, QueueItem):
                self._run(task)
            else:
                self._do(task)

    def _do(self, chore: Chore) -> None:
        try:
            if chore is Chore.WARM_UP:
                warm_up()
            else:
                self._executor.free()
                empty_device_caches()
        except Exception:  # a prompt that needs what failed here tells its user; the others run
            log.exception("%s failed", chore.name)

    def _run(self, item: QueueItem) -> None:
        try:
            extra_data = {**item.extra_data, **item.tokens}
            result = self._executor.execute(
                item.prompt_id, item.prompt, extra_data, item.outputs, item.client_id, interruption=item.interruption
            )
        except Exception:  # a fault of the host itself must not keep the other prompts from running
            log.exception("prompt %s failed outside of its nodes", item.prompt_id)
            result = ExecutionResult("error", {}, [], {})
        self._queue.done(item, result)
