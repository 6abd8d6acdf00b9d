"""The shape of a prompt: links, order, cycles, and nodes added by expansion."""

from __future__ import annotations

import pytest

from fluxcanvas.web.host.graph import Graph, GraphError, is_link, links, walk
from fluxcanvas.web.host.schedule import Schedule


@pytest.mark.parametrize("value", [["1", 0], ["node.0.3", 12]])
def test_links(value):
    assert is_link(value)


@pytest.mark.parametrize(
    "value",
    [[1, 0], ["1"], ["1", 0, 0], ["1", True], ["1", "0"], ["1", 0.5], ("1", 0), "1", None, {"__value__": ["1", 0]}],
)
def test_literals(value):
    assert not is_link(value)


def test_links_of_a_node():
    node = {"class_type": "Add", "inputs": {"a": ["1", 0], "b": 3, "c": ["2", 1]}}
    assert list(links(node)) == [("a", "1", 0), ("c", "2", 1)]


def test_walk_gives_sources_first_and_each_node_once():
    sources = {"out": ["a", "b"], "a": ["c"], "b": ["c"], "c": [], "unrelated": ["c"]}
    assert walk(["out"], sources.__getitem__) == (["c", "a", "b", "out"], [])


def test_walk_finishes_one_root_before_the_next():
    sources = {"out1": ["a"], "out2": ["b"], "a": [], "b": []}
    assert walk(["out1", "out2"], sources.__getitem__)[0] == ["a", "out1", "b", "out2"]


def test_walk_finds_cycles_and_goes_on():
    sources = {"out": ["a", "free"], "a": ["b"], "b": ["a"], "free": ["self"], "self": ["self"]}
    order, cycles = walk(["out"], sources.__getitem__)
    assert set(order) == set(sources)
    assert cycles == [["b", "a"], ["self"]]


def test_walk_needs_no_recursion():
    order, cycles = walk([0], lambda node: [node + 1] if node < 100_000 else [])
    assert order == list(range(100_000, -1, -1)) and cycles == []


def test_walk_lists_few_cycles_whole():
    """Every node links back to the first: thousands of cycles, whose paths together would fill the memory."""
    order, cycles = walk([0], lambda node: [0, node + 1] if node < 5000 else [0])
    assert len(order) == 5001
    assert len(cycles) == 5001
    assert sum(map(len, cycles)) < 6000


def test_an_expanded_node_knows_where_it_came_from():
    graph = Graph({"1": {"class_type": "Loop", "inputs": {}}})
    graph.add("1.a", {"class_type": "Loop", "inputs": {}}, parent="1")
    graph.add("1.a.b", {"class_type": "Add", "inputs": {}}, parent="1.a")
    graph.add("1.a.c", {"class_type": "Add", "inputs": {}, "override_display_id": "2"}, parent="1.a")
    graph.add("1.a.d", {"class_type": "Add", "inputs": {}, "override_display_id": "1.a.c"}, parent="1.a")
    assert graph.get_parent_node_id("1.a.b") == "1.a"
    assert graph.get_display_node_id("1.a.b") == graph.get_real_node_id("1.a.b") == "1"
    assert graph.get_display_node_id("1.a.c") == graph.get_display_node_id("1.a.d") == "2"
    assert graph.get_parent_node_id("1") is None
    assert graph.get_display_node_id("1") == graph.get_real_node_id("1") == "1"
    assert graph.all_node_ids() == {"1", "1.a", "1.a.b", "1.a.c", "1.a.d"}
    assert list(graph.get_original_prompt()) == ["1"]
    assert graph.has_node("1.a.c") and not graph.has_node("2")


def test_an_expanded_node_needs_a_new_id():
    graph = Graph({"1": {"class_type": "Loop", "inputs": {}}})
    with pytest.raises(GraphError, match="node 1, which exists already"):
        graph.add("1", {"class_type": "Add", "inputs": {}}, parent="1")
    with pytest.raises(GraphError, match="no node 2"):
        graph.get_node("2")


def test_schedule_runs_urgent_nodes_first_and_the_latest_batch_before_the_rest():
    schedule = Schedule()
    for node, urgent in [("a", False), ("b", False), ("async", True)]:
        schedule.add(node, [], urgent)
    assert schedule.pop() == "async"
    assert schedule.pop() == "a"
    schedule.begin_batch()
    schedule.add("from a", [])
    schedule.wait("a", ["from a"])
    assert schedule.pop() == "from a"
    schedule.finish("from a")
    assert schedule.pop() == "a"
    schedule.finish("a")
    assert schedule.pop() == "b"
    assert schedule.pop() is None


def test_schedule_waits_for_all_sources_and_tells_who_is_stuck():
    schedule = Schedule()
    schedule.add("last", ["first", "second"])
    schedule.add("first", [])
    schedule.add("second", ["last"])
    assert schedule.pop() == "first"
    schedule.finish("first")
    assert schedule.pop() is None
    assert schedule.stuck() == ["last", "second"]
    assert len(schedule) == 2 and "last" in schedule and "first" not in schedule
