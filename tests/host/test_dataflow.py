"""How values reach a node: lazy inputs, lists and blockers."""

from __future__ import annotations

import asyncio

from fluxcanvas.web.host.blocker import ExecutionBlocker

# Lazy inputs


def test_a_lazy_input_that_is_not_asked_for_is_not_executed(bench, prompt, toys, choose):
    prompt.add("Left", "left")
    prompt.add("Right", "right")
    prompt.add("Choose", "choose", first=False, a=["left", 0], b=["right", 0])
    prompt.add("Show", "show", value=["choose", 0])
    assert bench.shown(prompt, "show") == [2]
    assert toys.calls == ["check None None", "Right", "check None 2", "Choose", "Show"]
    assert [data["node"] for data in bench.events.of("executing")] == ["right", "choose", "show"]
    prompt["choose"]["inputs"]["first"] = True
    assert bench.shown(prompt, "show") == [1]
    assert toys.calls == ["check None None", "Left", "check 1 None", "Choose", "Show"]


def test_lazy_inputs_of_lists(bench, prompt, toys, choose):
    toys.add("Flags", lambda: ([True, False],), returns=("BOOLEAN",), OUTPUT_IS_LIST=(True,))
    flags, left, right = (prompt.add(name) for name in ("Flags", "Left", "Right"))
    prompt.add("Choose", "choose", first=[flags, 0], a=[left, 0], b=[right, 0])
    prompt.add("Show", "show", value=["choose", 0])
    assert bench.shown(prompt, "show") == [1, 2]
    assert toys.calls.count("Choose") == 2


def test_a_lazy_input_without_a_say_is_executed_at_once(bench, prompt, toys):
    toys.add_output("Take", lambda value: {"ui": {"values": [value]}}, {"value": ("INT", {"lazy": True})})
    prompt.add("Take", "take", value=[prompt.add("Number", value=3), 0])
    assert bench.shown(prompt, "take") == [3]


def test_asynchronous_check_lazy_status(bench, prompt, toys):
    async def check_lazy_status(self, a=None):
        await asyncio.sleep(0)
        return ["a"]

    toys.add("Later", lambda a: (a,), {"a": ("INT", {"lazy": True})}, check_lazy_status=check_lazy_status)
    prompt.add("Show", "show", value=[prompt.add("Later", a=[prompt.add("Number", "n", value=4), 0]), 0])
    assert bench.shown(prompt, "show") == [4]


def test_a_raw_link_is_handed_over_as_it_is(bench, prompt, toys):
    toys.add_output("Raw", lambda value: {"ui": {"values": value}}, {"value": ("INT", {"rawLink": True})})
    prompt.add("Raw", "raw", value=[prompt.add("Number", value=3), 0])
    assert bench.shown(prompt, "raw") == ["1", 0] and toys.calls == ["Raw"]


# Lists


def test_lists_are_mapped_element_by_element(bench, prompt):
    prompt.add("Numbers", count=3)
    prompt.add("Add", a=["1", 0], b=10)
    prompt.add("Show", "show", value=["2", 0])
    assert bench.shown(prompt, "show") == [10, 11, 12]


def test_a_shorter_list_repeats_its_last(bench, prompt):
    prompt.add("Numbers", count=4)
    prompt.add("Numbers", count=2)
    prompt.add("Add", a=["1", 0], b=["2", 0])
    prompt.add("Show", "show", value=["3", 0])
    assert bench.shown(prompt, "show") == [0, 2, 3, 4]


def test_an_empty_list_means_no_call(bench, prompt, toys):
    prompt.add("Numbers", count=0)
    prompt.add("Add", a=["1", 0], b=1)
    prompt.add("Show", "show", value=["2", 0])
    result = bench.run(prompt)
    assert result.status == "success" and result.outputs == {} and toys.calls == ["Numbers"]


def test_input_is_list(bench, prompt, toys):
    toys.add(
        "Sum",
        lambda values, scale: (sum(values) * scale[0],),
        {"values": ("INT", {}), "scale": ("INT", {})},
        INPUT_IS_LIST=True,
    )
    prompt.add("Numbers", count=4)
    prompt.add("Show", "show", value=[prompt.add("Sum", values=["1", 0], scale=2), 0])
    assert bench.shown(prompt, "show") == [12]


def test_a_node_cannot_change_another_ones_list(bench, prompt, toys):
    toys.add("Eat", lambda values: (values.clear(),), {"values": ("INT", {})}, INPUT_IS_LIST=True)
    prompt.add("Numbers", count=2)
    prompt.add("Show", "eaten", value=[prompt.add("Eat", values=["1", 0]), 0])
    prompt.add("Show", "show", value=["1", 0])
    assert bench.shown(prompt, "show") == [0, 1]


def test_lists_of_lists_join(bench, prompt):
    prompt.add("Numbers", count=3)
    prompt.add("Numbers", count=["1", 0])
    prompt.add("Show", "show", value=["2", 0])
    assert bench.shown(prompt, "show") == [0, 0, 1]


# Blockers


def test_a_blocker_skips_what_depends_on_it(bench, prompt, toys):
    prompt.add("Block", value=1, at=1)
    prompt.add("Add", a=["1", 0], b=1)
    prompt.add("Show", "blocked", value=["2", 0])
    prompt.add("Show", "free", value=5)
    result = bench.run(prompt)
    assert result.status == "success"
    assert result.outputs == {"free": {"values": [5]}}
    assert toys.calls == ["Block", "Show"]
    assert bench.events.of("execution_error") == []


def test_a_blocker_in_a_list_blocks_its_element_alone(bench, prompt):
    prompt.add("Numbers", count=4)
    prompt.add("Block", value=["1", 0], at=2)
    prompt.add("Add", a=["2", 0], b=10)
    prompt.add("Show", "show", value=["3", 0])
    assert bench.shown(prompt, "show") == [10, 11, 13]


def test_a_blocker_in_the_list_of_an_output(bench, prompt, toys):
    toys.add("Wrap", lambda value: ([value, value],), toys.NUMBER, OUTPUT_IS_LIST=(True,))
    prompt.add("Numbers", count=3)
    prompt.add("Block", value=["1", 0], at=1)
    prompt.add("Show", "show", value=[prompt.add("Wrap", value=["2", 0]), 0])
    assert bench.shown(prompt, "show") == [0, 0, 2, 2]


def test_a_blocker_blocks_a_node_that_wants_lists(bench, prompt, toys):
    toys.add("Sum", lambda values: (sum(values),), {"values": ("INT", {})}, INPUT_IS_LIST=True)
    prompt.add("Numbers", count=3)
    prompt.add("Block", value=["1", 0], at=1)
    prompt.add("Show", "show", value=[prompt.add("Sum", values=["2", 0]), 0])
    assert bench.run(prompt).outputs == {} and "Sum" not in toys.calls


def test_a_blockers_message_is_shown_once_and_does_not_end_the_prompt(bench, prompt):
    prompt.add("Block", value=1, at=1, message="nothing to do")
    prompt.add("Add", a=["1", 0], b=1)
    prompt.add("Show", value=["2", 0])
    prompt.add("Show", "free", value=5)
    result = bench.run(prompt)
    assert result.status == "success" and result.outputs == {"free": {"values": [5]}}
    errors = bench.events.of("execution_error")
    assert [(error["node_id"], error["exception_type"]) for error in errors] == [("2", "ExecutionBlocked")]
    assert "nothing to do" in errors[0]["exception_message"]


def test_a_whole_result_may_be_a_blocker_even_a_foreign_one(bench, prompt, toys):
    foreign = type("ExecutionBlocker", (), {"message": None})
    for name, kind in (("Ours", ExecutionBlocker), ("Theirs", foreign)):
        toys.add(name, lambda kind=kind: kind(), returns=("INT", "INT"))
        prompt.add("Show", f"show {name}", value=[prompt.add(name, name), 1])
    assert bench.run(prompt).outputs == {}
