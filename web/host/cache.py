"""Results kept from prompt to prompt, found again by what went into them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ...flux_runtime.errors import FluxError
from .graph import Graph, is_link, links
from .mapping import Outputs
from .spec import NodeSpec, Specs

Changed = Callable[[str, NodeSpec], Awaitable[Any]]  # asks a node's IS_CHANGED


@dataclass(frozen=True)
class Entry:
    """What a node gave: a list of values for each slot, what it showed, and the last line that it told."""

    outputs: Outputs
    ui: dict[str, Any] | None = None
    text: str | None = None


class Cache(Protocol):
    """Results by signature. May be cleared from another thread while a prompt runs."""

    def begin(self, signatures: Iterable[str]) -> None:
        """A prompt with these nodes begins: the time to let go of what it has no use for."""

    def get(self, signature: str | None) -> Entry | None:
        """The result of a node; None when it is not there, or when the signature says that it can never be."""

    def put(self, signature: str | None, entry: Entry, owner: str | None) -> None:
        """Keep a result. `owner` is the signature of the prompt's own node that it belongs to."""

    def clear(self) -> None:
        """Let go of everything."""


class ClassicCache:
    """Keeps the results of the last prompt's nodes, and of the nodes that these expanded into."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, tuple[Entry, str | None]] = {}

    def begin(self, signatures: Iterable[str]) -> None:
        wanted = set(signatures)
        with self._lock:
            self._entries = {
                signature: (entry, owner)
                for signature, (entry, owner) in self._entries.items()
                if signature in wanted or owner in wanted
            }

    def get(self, signature: str | None) -> Entry | None:
        with self._lock:
            return self._entries.get(signature, (None, None))[0] if signature else None

    def put(self, signature: str | None, entry: Entry, owner: str | None) -> None:
        if signature:
            with self._lock:
                self._entries[signature] = (entry, owner)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


class LruCache:
    """Keeps the given number of results, of whatever prompt; those unused for longest go first."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._size = size
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def begin(self, signatures: Iterable[str]) -> None:
        for signature in signatures:
            self.get(signature)

    def get(self, signature: str | None) -> Entry | None:
        with self._lock:
            if signature not in self._entries:
                return None
            self._entries.move_to_end(signature)
            return self._entries[signature]

    def put(self, signature: str | None, entry: Entry, owner: str | None) -> None:
        if signature is None:
            return
        with self._lock:
            self._entries[signature] = entry
            self._entries.move_to_end(signature)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


def make_cache(mode: str, size: int = 0) -> Cache:
    """The cache for a mode: "classic", "lru" with its size, or "none"."""
    if mode == "classic":
        return ClassicCache()
    if mode == "none":
        return LruCache(0)
    if mode == "lru" and size > 0:
        return LruCache(size)
    raise FluxError(f"there is no cache {mode!r} of size {size}; use classic, none, or lru with a size of at least 1")


class Signatures:
    """For each node a digest of everything that its result depends on; None when it is never the same twice.

    It covers the class, what IS_CHANGED said, the literal inputs and the signatures at the other end of the links.
    The node's id is left out, so that equal nodes share results, unless the class says that the id matters.
    """

    def __init__(self, graph: Graph, specs: Specs, changed: Changed) -> None:
        self._graph = graph
        self._specs = specs
        self._changed = changed
        self._known: dict[str, str | None] = {}

    def __getitem__(self, node_id: str) -> str | None:
        return self._known.get(node_id)

    async def add(self, order: Iterable[str]) -> None:
        """Sign nodes, sources first; one whose sources have no signature gets none either."""
        for node_id in order:
            if node_id not in self._known:
                self._known[node_id] = await self._sign(node_id)

    async def _sign(self, node_id: str) -> str | None:
        node = self._graph.get_node(node_id)
        sources = {name: (self._known.get(source), slot) for name, source, slot in links(node)}
        if any(signature is None for signature, _ in sources.values()):
            return None
        try:
            spec = self._specs[node["class_type"]]
        except Exception:  # INPUT_TYPES is the pack author's code; should the node be run, this is raised and told then
            return None
        literals = {name: value for name, value in node["inputs"].items() if not is_link(value)}
        identity = node_id if spec.keyed_by_id else None
        changed = await self._changed(node_id, spec) if hasattr(spec.node_class, "IS_CHANGED") else None
        return _digest([node["class_type"], identity, changed, literals, sources])


def _digest(parts: list[Any]) -> str | None:
    """A digest of plain data; None when a part has no stable text (an object) or is unequal to itself (NaN)."""
    try:
        text = json.dumps(parts, sort_keys=True, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON lacks and IS_CHANGED likes to return: the bytes of a file's hash, a set of names."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(map(repr, value))}
    raise TypeError(f"{type(value).__name__} has no stable text")
