"""The value that keeps a branch of the graph from running."""

from __future__ import annotations

from typing import Any


class ExecutionBlocker:
    """Returned by a node in place of an output: whatever would read it is skipped.

    With a message the first skipped node shows it as an error; the rest of the prompt runs on either way.
    """

    blocks_execution = True

    def __init__(self, message: str | None = None) -> None:
        self.message = message


def is_blocker(value: Any) -> bool:
    """Whether a value blocks: ours by its marker, one made by another program's class of the same name by that name."""
    kind = type(value)
    return getattr(kind, "blocks_execution", False) is True or kind.__name__ == "ExecutionBlocker"
