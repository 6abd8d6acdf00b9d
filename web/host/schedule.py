"""Which node runs next, in a graph that grows while it runs."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class Schedule:
    """Nodes and what they wait for. Unlike graphlib's sorter it takes new nodes and new waits at any time.

    Ready nodes come in the order in which they were added, so that a walk from the outputs finishes one output before
    it begins the next; the latest batch goes first, so that what has expanded is finished before anything new begins;
    and urgent nodes (the asynchronous ones) go before all others, so that they overlap with them.
    """

    def __init__(self) -> None:
        self._waits: dict[str, set[str]] = {}  # every unfinished node, with the nodes that must finish before
        self._dependants: dict[str, list[str]] = {}
        self._ranks: dict[str, tuple[bool, int, int]] = {}
        self._ready: list[tuple[tuple[bool, int, int], str]] = []
        self._batch = 0

    def __len__(self) -> int:
        """How many nodes are not finished."""
        return len(self._waits)

    def __contains__(self, node: object) -> bool:
        return node in self._waits

    def begin_batch(self) -> None:
        """The nodes added from now on go before the earlier ones."""
        self._batch += 1

    def add(self, node: str, waits_for: Iterable[str], urgent: bool = False) -> None:
        """Add a node that runs after others, which must be in the schedule already or be added before it is asked."""
        self._ranks[node] = (not urgent, -self._batch, len(self._ranks))
        self.wait(node, waits_for)

    def wait(self, node: str, waits_for: Iterable[str]) -> None:
        """Let a node, new or taken by `pop` before, run (again) after others."""
        waits = set(waits_for)
        self._waits[node] = waits
        for source in waits:
            self._dependants.setdefault(source, []).append(node)
        if not waits:
            self._make_ready(node)

    def pop(self) -> str | None:
        """The next node that waits for nothing; None when all wait or are being run."""
        return heapq.heappop(self._ready)[1] if self._ready else None

    def finish(self, node: str) -> None:
        """A node is done; those that waited for nothing else become ready."""
        del self._waits[node]
        for dependant in self._dependants.pop(node, ()):
            waits = self._waits[dependant]
            waits.discard(node)
            if not waits:
                self._make_ready(dependant)

    def stuck(self) -> list[str]:
        """The nodes that wait for others; once nothing runs and nothing is ready, they wait in a circle."""
        return [node for node, waits in self._waits.items() if waits]

    def _make_ready(self, node: str) -> None:
        heapq.heappush(self._ready, (self._ranks[node], node))
