"""One prompt being executed: from its outputs back to what they need, node by node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .blocker import ExecutionBlocker
from .cache import Cache, Entry, Signatures
from .embedded import Executing, Interruption, enter, leave
from .graph import Graph, GraphError, is_link, links, walk
from .inputs import Gathered, Inputs, linked
from .mapping import Outputs, Returned, Values, call_each, join, join_ui, read_return, slot_values
from .reporter import Reporter
from .schedule import Schedule
from .spec import NodeSpec, Specs

log = logging.getLogger("fluxcanvas")
NODES_SHOWN = 24  # of those that wait in a circle
NEVER = float("nan")  # unequal to itself: a node that says so has changed every time


class NodeFailure(Exception):
    """A node raised; the exception is the cause."""

    def __init__(self, node_id: str, inputs: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(node_id)
        self.node_id = node_id
        self.inputs = inputs


@dataclass(frozen=True)
class Expansion:
    """A node that waits for the graph it expanded into, and what its calls returned."""

    calls: list[Returned]
    ui: dict[str, Any] | None


class PromptRun:
    """Executes one prompt. Values between nodes are shared, so nothing here changes them."""

    def __init__(
        self,
        graph: Graph,
        specs: Specs,
        cache: Cache,
        instances: Callable[[str, NodeSpec], Any],
        reporter: Reporter,
        extra_data: Mapping[str, Any],
        interruption: Interruption,
    ) -> None:
        self._graph = graph
        self._specs = specs
        self._cache = cache
        self._instance = instances
        self._reporter = reporter
        self._interruption = interruption
        self._inputs = Inputs(graph, specs, extra_data)
        self._signatures = Signatures(graph, specs, self._changed)
        self._schedule = Schedule()
        self._results: dict[str, Entry] = {}
        self._expansions: dict[str, Expansion] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._started: str | None = None  # the node begun last

    async def run(self, outputs: Sequence[str]) -> None:
        """Execute these nodes and what they need. Raises NodeFailure, or GraphError when the wiring is at fault."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        try:
            with self._interruption.waking(lambda: loop.call_soon_threadsafe(stop.set)):
                await self._find_cached()
                self._request(outputs)
                await self._drain(asyncio.ensure_future(stop.wait()))
        finally:
            leave()

    # Before the first node

    async def _find_cached(self) -> None:
        """Sign every node that leads to an output, requested or not, and tell which of them need not run."""
        prompt = self._graph.get_original_prompt()
        roots = [node_id for node_id in prompt if self._is_output(node_id)]
        order, _ = walk(roots, lambda node_id: [source for _, source, _ in links(prompt[node_id]) if source in prompt])
        await self._signatures.add(order)
        self._cache.begin(signature for signature in map(self._signatures.__getitem__, order) if signature)
        kept = {node_id: entry for node_id in order if (entry := self._cache.get(self._signatures[node_id]))}
        self._reporter.cached(kept)
        for node_id, entry in kept.items():
            if entry.text is not None:  # a page loaded since then has not seen it
                self._reporter.text(node_id, entry.text)

    def _is_output(self, node_id: str) -> bool:
        node_class = self._specs.nodes.get(self._graph.get_node(node_id)["class_type"])
        return getattr(node_class, "OUTPUT_NODE", False) is True

    async def _changed(self, node_id: str, spec: NodeSpec) -> Any:
        """What IS_CHANGED says of the literal inputs; when it fails, the node counts as changed."""
        values = self._inputs.gather(node_id, {}).values
        try:
            return await call_each(spec.node_class.IS_CHANGED, values, whole=spec.wants_lists)
        except Exception as error:  # the node itself can still run, so its author's mistake only costs the cache
            log.warning(
                "IS_CHANGED of node %s (%s) failed, so it is never cached: %s", node_id, spec.node_class.__name__, error
            )
            return NEVER

    # What has to run

    def _request(self, outputs: Iterable[str]) -> list[str]:
        """Schedule these nodes; those already there show what they showed before. Returns the ones to wait for."""
        outputs = list(outputs)
        unfinished = self._enlist(outputs)
        for node_id in outputs:
            self._show_again(node_id)
        return unfinished

    def _enlist(self, node_ids: Iterable[str]) -> list[str]:
        """Schedule nodes and all that they need, except what is there already. Returns the ones to wait for."""
        node_ids = list(node_ids)
        order, cycles = walk(node_ids, lambda node_id: () if self._is_known(node_id) else self._needs(node_id))
        if cycles:
            raise GraphError(f"the nodes {' -> '.join(cycles[0])} depend on each other in a circle")
        self._schedule.begin_batch()
        for node_id in order:
            if not self._is_known(node_id):
                waits = [source for source in self._needs(node_id) if source not in self._results]
                self._schedule.add(node_id, waits, urgent=self._spec(node_id).is_async)
        return [node_id for node_id in node_ids if node_id not in self._results]

    def _is_known(self, node_id: str) -> bool:
        """Whether a node is scheduled or its result is there; a cached result is fetched."""
        if node_id not in self._results and node_id not in self._schedule:
            entry = self._cache.get(self._signatures[node_id])
            if entry is None:
                return False
            self._results[node_id] = entry
        return True

    def _needs(self, node_id: str) -> list[str]:
        """The nodes whose results a node must have before it is asked anything."""
        spec = self._spec(node_id)
        return [
            source
            for name, source, _ in links(self._graph.get_node(node_id))
            if not spec.is_lazy(name) and not spec.is_raw_link(name)
        ]

    def _spec(self, node_id: str) -> NodeSpec:
        return self._specs[self._graph.get_node(node_id)["class_type"]]

    def _show_again(self, node_id: str) -> None:
        entry = self._results.get(node_id)
        if entry and entry.ui is not None:
            self._reporter.shown(node_id, entry.ui)

    # Running

    @property
    def current(self) -> str | None:
        """The node being executed: the oldest of several, the latest begun when none is."""
        return next(iter(self._tasks.values()), self._started)

    async def _drain(self, stop: asyncio.Future[Any]) -> None:
        """Run nodes until none is left. Only one runs at a time, but asynchronous ones go on while they wait."""
        while self._schedule:
            self._interruption.check()
            node_id = self._schedule.pop()
            if node_id is not None:
                self._started = node_id
                self._tasks[asyncio.ensure_future(self._attempt(node_id))] = node_id
                await asyncio.sleep(0)  # lets the node run up to the first thing that it awaits
            elif self._tasks:
                await asyncio.wait([*self._tasks, stop], return_when=asyncio.FIRST_COMPLETED)
            else:
                raise GraphError(
                    f"the nodes {', '.join(self._schedule.stuck()[:NODES_SHOWN])} wait for each other; "
                    "an expanded graph must not link to what depends on it"
                )
            self._collect()

    def _collect(self) -> None:
        """Take the nodes that are done off the list; raise what one of them raised."""
        for task in [task for task in self._tasks if task.done()]:
            if task.cancelled():
                raise NodeFailure(self._tasks[task], {}) from RuntimeError("the node cancelled its own work")
            task.result()
            del self._tasks[task]

    async def _attempt(self, node_id: str) -> None:
        """Run a node as far as it goes, and say which one it was when it fails."""
        inputs: dict[str, Sequence[Any]] = {}
        try:
            await self._advance(node_id, inputs)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # whatever it is, it ends this prompt and no other
            raise NodeFailure(node_id, inputs) from error

    async def _advance(self, node_id: str, inputs: dict[str, Sequence[Any]]) -> None:
        """Run a node: its result may be there, or wanted inputs or an expansion may have to be waited for first."""
        if node_id in self._expansions:
            return self._conclude(node_id, self._expansions.pop(node_id))
        if self._is_there(node_id):
            return self._schedule.finish(node_id)
        gathered = self._inputs.gather(node_id, self._results)
        inputs.update(gathered.values)
        spec = self._spec(node_id)
        instance = self._instance(node_id, spec)
        if gathered.missing and (wanted := await self._wanted(node_id, spec, instance, gathered)):
            return self._schedule.wait(node_id, self._enlist(wanted))
        self._reporter.node_started(node_id)
        returned = await self._call(node_id, getattr(instance, spec.function), spec, gathered.values)
        await self._take(node_id, spec, [read_return(value, spec) for value in returned])

    def _is_there(self, node_id: str) -> bool:
        """Whether an equal node has been executed since this one was scheduled; then it shows what that one showed."""
        entry = self._cache.get(self._signatures[node_id])
        if entry is not None:
            self._results[node_id] = entry
            self._show_again(node_id)
        return entry is not None

    async def _wanted(self, node_id: str, spec: NodeSpec, instance: Any, gathered: Gathered) -> list[str]:
        """The nodes at the other end of the lazy inputs that a node asks for, of those that are not there."""
        answers = await self._call(node_id, instance.check_lazy_status, spec, gathered.values)
        names = {name for answer in answers if isinstance(answer, (list, tuple, set)) for name in answer}
        return [
            source
            for name, source, _ in links(self._graph.get_node(node_id))
            if name in names and name in gathered.missing
        ]

    async def _call(self, node_id: str, function: Callable[..., Any], spec: NodeSpec, values: Values) -> list[Any]:
        """Call a node's method over its inputs, each call in the context in which the host knows whose it is."""
        executing = Executing(node_id, self._reporter.prompt_id, self._reporter, self._interruption)

        def before(call: int) -> None:
            self._interruption.check()
            enter(replace(executing, call=call))

        def blocked(blocker: Any) -> ExecutionBlocker:
            if (message := getattr(blocker, "message", None)) is not None:
                self._reporter.blocked(node_id, message)
            return ExecutionBlocker()  # what was to be said has been said

        return await call_each(function, values, whole=spec.wants_lists, before=before, blocked=blocked)

    # Results

    async def _take(self, node_id: str, spec: NodeSpec, calls: list[Returned]) -> None:
        """Take what a node's calls returned: its results, or graphs whose results are to become its own."""
        ui = join_ui([call.ui for call in calls]) or None
        if ui:
            self._reporter.shown(node_id, ui)
        expansion = Expansion(calls, ui)
        if all(call.expand is None for call in calls):
            self._conclude(node_id, expansion)
        else:
            self._expansions[node_id] = expansion
            self._schedule.wait(node_id, await self._expand(node_id, calls))

    async def _expand(self, node_id: str, calls: list[Returned]) -> list[str]:
        """Add the graphs that a node expanded into. Returns the nodes that it has to wait for."""
        added = [new for call in calls for new in self._graft(node_id, call.expand or {})]
        order, cycles = walk(
            added,
            lambda new: [
                source
                for _, source, _ in links(self._graph.get_node(new))
                if self._graph.get_parent_node_id(source) == node_id
            ],
        )
        if cycles:
            raise GraphError(f"the graph it expands into has a circle: {' -> '.join(cycles[0])}")
        await self._signatures.add(order)
        linked = [value[0] for call in calls if call.expand is not None for value in call.values if is_link(value)]
        return self._enlist(linked) + self._request(new for new in added if self._is_output(new))

    def _graft(self, node_id: str, expanded: Mapping[str, Any]) -> list[str]:
        """Add one graph to the prompt's; GraphError when it has a node of no known class, or one whose id is taken."""
        for new_id, node in expanded.items():
            if not isinstance(node, Mapping) or node.get("class_type") not in self._specs:
                raise GraphError(f"the graph it expands into has a node {new_id} of no known class")
            self._graph.add(new_id, {"inputs": {}, **node}, node_id)
        return list(expanded)

    def _conclude(self, node_id: str, expansion: Expansion) -> None:
        """Keep a node's result, which is final now, and let its dependants run."""
        spec = self._spec(node_id)
        outputs = join([self._outputs(call, spec) for call in expansion.calls], slots=len(spec.returns))
        entry = Entry(outputs, expansion.ui, self._reporter.texts.get(node_id))
        self._results[node_id] = entry
        self._cache.put(self._signatures[node_id], entry, self._signatures[self._graph.get_real_node_id(node_id)])
        self._reporter.node_finished(node_id)
        self._schedule.finish(node_id)

    def _outputs(self, call: Returned, spec: NodeSpec) -> Outputs:
        """The slots of one call; a slot that links into an expanded graph has the values at the other end."""
        if call.expand is None:
            return tuple(slot_values(value, slot, spec) for slot, value in enumerate(call.values))
        return tuple(
            tuple(linked(value, self._results)) if is_link(value) else slot_values(value, slot, spec)
            for slot, value in enumerate(call.values)
        )
