"""Nodes that expand into graphs, and the loops made of them."""

from __future__ import annotations

import pytest

from fluxcanvas.web.host.embedded import executing
from fluxcanvas.web.host.graph import is_link, links

NEVER_SAME = float("nan")


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def test_a_node_may_expand_into_a_graph(bench, prompt, toys):
    def expand(value):
        return {
            "result": (["x.sum", 0], 7),
            "expand": {"x.sum": node("Add", a=value, b=["x.one", 0]), "x.one": node("Number", value=1)},
        }

    toys.add("Plus", expand, toys.NUMBER, returns=("INT", "INT"))
    prompt.add("Plus", "plus", value=4)
    prompt.add("Show", "sum", value=["plus", 0])
    prompt.add("Show", "literal", value=["plus", 1])
    result = bench.run(prompt)
    assert result.outputs == {"sum": {"values": [5]}, "literal": {"values": [7]}}
    assert toys.calls == ["Plus", "Number", "Add", "Show", "Show"]
    states = bench.events.of("progress_state")[-1]["nodes"]
    assert states["x.sum"]["display_node_id"] == states["x.sum"]["parent_node_id"] == "plus"
    assert [(data["node"], data["display_node"]) for data in bench.events.of("executing")][:3] == [
        ("plus", "plus"),
        ("x.one", "plus"),
        ("x.sum", "plus"),
    ]
    bench.run(prompt)
    assert toys.calls == []


def test_the_nodes_of_an_expansion_are_cached_too(bench, prompt, toys):
    toys.add("Plus", lambda value: {"result": (["x", 0],), "expand": {"x": node("Add", a=1, b=2)}}, toys.NUMBER)
    prompt.add("Show", "show", value=[prompt.add("Plus", value=1), 0])
    bench.run(prompt)
    prompt["1"]["inputs"]["value"] = 2
    assert bench.shown(prompt, "show") == [3] and toys.calls == ["Plus", "Add", "Show"]
    prompt.add("Show", "again", value=[prompt.add("Plus", "2", value=3), 0])
    bench.run(prompt)
    assert toys.calls == ["Plus", "Show"], "what the first node expanded into is kept as long as that node is"
    del prompt["2"], prompt["again"]
    bench.use_cache("lru", 100)
    for value in (1, 2):
        prompt["1"]["inputs"]["value"] = value
        bench.run(prompt)
    assert toys.calls == ["Plus", "Show"], "the graph it expanded into equals that of the run before"


def count_down(remaining, total, me):
    """Adds up 1 + 2 + ... by expanding into itself."""
    if remaining == 0:
        return (total,)
    add, again = f"{me}.add", f"{me}.again"
    return {
        "result": ([again, 0],),
        "expand": {
            add: node("Add", a=total, b=remaining),
            again: node("Loop", remaining=remaining - 1, total=[add, 0]),
        },
    }


@pytest.mark.parametrize("times", [0, 1, 5, 300])
def test_loops_by_expansion(bench, prompt, toys, times):
    toys.add("Loop", count_down, {"remaining": ("INT", {}), "total": ("INT", {})}, hidden={"me": "UNIQUE_ID"})
    prompt.add("Show", "show", value=[prompt.add("Loop", remaining=times, total=0), 0])
    assert bench.shown(prompt, "show") == [times * (times + 1) // 2]
    assert toys.calls.count("Loop") == times + 1


def copy_loop(opening, remaining, value, graph, me):
    """Closes a loop: copies the nodes between the opening node and this one, until nothing remains."""
    if remaining == 0:
        return (value,)

    def leads_back(node_id):
        return node_id == opening[0] or any(leads_back(source) for _, source, _ in links(graph.get_node(node_id)))

    inside = [
        node_id
        for node_id in graph.all_node_ids()
        if node_id == opening[0]
        or (
            graph.get_parent_node_id(node_id) == graph.get_parent_node_id(me)
            and leads_back(node_id)
            and graph.get_node(node_id)["class_type"] != "Show"
        )
    ]
    names = {node_id: f"{me}>{'again' if node_id == me else node_id.split('>')[-1]}" for node_id in inside}
    expanded = {}
    for node_id, name in names.items():
        original = graph.get_node(node_id)
        inputs = {
            key: [names.get(given[0], given[0]), given[1]] if is_link(given) else given
            for key, given in original["inputs"].items()
        }
        expanded[name] = {"class_type": original["class_type"], "inputs": inputs, "override_display_id": node_id}
    expanded[names[opening[0]]]["inputs"] = {"remaining": remaining, "value": value}
    return {"result": ([names[me], 0],), "expand": expanded}


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("cache", ["classic", "none"])
def test_a_loop_that_copies_the_nodes_between_two_others(bench, prompt, toys, times, cache):
    bench.use_cache(cache)
    toys.add("Source", lambda: (1000,), IS_CHANGED=classmethod(lambda cls: NEVER_SAME))
    toys.add(
        "Open",
        lambda remaining, value: ("flow", remaining - 1, value),
        {"remaining": ("INT", {}), "value": ("*",)},
        returns=("FLOW", "INT", "*"),
    )
    toys.add(
        "Close",
        copy_loop,
        {"opening": ("FLOW", {"rawLink": True}), "remaining": ("INT", {}), "value": ("*",)},
        returns=("*",),
        hidden={"graph": "DYNPROMPT", "me": "UNIQUE_ID"},
    )
    toys.add("Halve", lambda value: (value / 2,), {"value": ("*",)}, returns=("*",))
    prompt.add("Open", "open", remaining=times, value=[prompt.add("Source", "source"), 0])
    prompt.add("Halve", "halve", value=["open", 2])
    prompt.add("Close", "close", opening=["open", 0], remaining=["open", 1], value=["halve", 0])
    prompt.add("Show", "show", value=["close", 0])
    for _ in range(2):
        assert bench.shown(prompt, "show") == [1000 / 2**times]
        assert toys.calls.count("Halve") == times
        assert {data["display_node"] for data in bench.events.of("executing")} == set(prompt)


def test_calls_over_a_list_may_expand_or_not(bench, prompt, toys):
    def mixed(value):
        if value == 0:
            return (100, "plain")
        if value == 1:
            return {"result": (101, "dict")}
        prefix = f"{executing().node_id}.{executing().call}."
        return {"result": ([f"{prefix}n", 0], "expanded"), "expand": {f"{prefix}n": node("Number", value=100 + value)}}

    toys.add("Mixed", mixed, toys.NUMBER, returns=("INT", "STRING"))
    prompt.add("Mixed", "mixed", value=[prompt.add("Numbers", "numbers", count=4), 0])
    prompt.add("Show", "show", value=["mixed", 0])
    prompt.add("Show", "names", value=["mixed", 1])
    result = bench.run(prompt)
    assert result.outputs == {
        "show": {"values": [100, 101, 102, 103]},
        "names": {"values": ["plain", "dict", "expanded", "expanded"]},
    }


def test_a_list_from_an_expansion(bench, prompt, toys):
    toys.add("Many", lambda: {"result": (["x", 0],), "expand": {"x": node("Numbers", count=3)}}, OUTPUT_IS_LIST=(True,))
    prompt.add("Show", "show", value=[prompt.add("Many"), 0])
    assert bench.shown(prompt, "show") == [0, 1, 2]


def test_outputs_in_an_expansion_run_and_show(bench, prompt, toys):
    toys.add_output("Report", lambda: {"ui": {"own": [1]}, "result": (), "expand": {"x": node("Show", value=9)}}, {})
    prompt.add("Report", "report")
    result = bench.run(prompt)
    assert result.outputs == {"report": {"own": [1]}, "x": {"values": [9]}}
    assert result.meta["x"] == {
        "node_id": "x",
        "display_node": "report",
        "parent_node": "report",
        "real_node_id": "report",
    }
    assert [(data["node"], data["display_node"]) for data in bench.events.of("executed")] == [
        ("report", "report"),
        ("x", "report"),
    ]


def test_an_expansion_may_use_objects_and_lazy_nodes(bench, prompt, toys, choose):
    value = object()

    def expand():
        return {
            "result": (["c", 0],),
            "expand": {
                "c": node("Choose", first=True, a=["s", 0], b=["r", 0]),
                "s": node("Same", value=value),
                "r": node("Right"),
            },
        }

    toys.add("Same", lambda value: (value,), {"value": ("*", {})})
    toys.add("Objects", expand)
    prompt.add("Show", "show", value=[prompt.add("Objects"), 0])
    assert bench.shown(prompt, "show") == [value]
    assert "Right" not in toys.calls


@pytest.mark.parametrize(
    "expand, words",
    [
        ({"a": node("Add", a=["b", 0], b=1), "b": node("Add", a=["a", 0], b=1)}, "circle"),
        ({"a": node("Add", a=["show", 0], b=1)}, "wait for each other"),
        ({"a": node("Add", a=["gone", 0], b=1)}, "no node gone"),
        ({"a": node("Gone")}, "no known class"),
        ({"a": None}, "no known class"),
        ({"show": node("Number", value=1)}, "exists already"),
        ({}, "no node a"),
    ],
)
def test_a_bad_expansion_is_the_fault_of_its_node(bench, prompt, toys, expand, words):
    toys.add("Bad", lambda: {"result": (["a", 0],), "expand": expand})
    toys["Show"].RETURN_TYPES = ("INT",)
    prompt.add("Show", "show", value=[prompt.add("Bad", "bad"), 0])
    error = bench.error_of(bench.run(prompt))
    assert words in error["exception_message"]
    assert error["node_id"] == "bad" and error["node_type"] == "Bad"


def test_an_error_in_an_expansion_is_shown_on_the_node_of_the_prompt(bench, prompt, toys):
    toys.add("Fail", lambda: 1 / 0)
    toys.add("Outer", lambda: {"result": (["inner", 0],), "expand": {"inner": node("Inner")}})
    toys.add("Inner", lambda: {"result": (["fail", 0],), "expand": {"fail": node("Fail")}})
    prompt.add("Show", value=[prompt.add("Outer", "outer"), 0])
    error = bench.error_of(bench.run(prompt))
    assert (error["node_id"], error["node_type"]) == ("outer", "Outer")
