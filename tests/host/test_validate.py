"""Validation: every type of error in ComfyUI's shape, and that no prompt whatever makes it raise."""

from __future__ import annotations

import asyncio
import json

import pytest

PROBLEM = {"type", "message", "details", "extra_info"}


def problems(verdict, node_id):
    """The types of a node's errors; every error has ComfyUI's shape and goes through JSON."""
    entry = verdict.node_errors.get(node_id, {"errors": []})
    json.dumps(verdict.node_errors, allow_nan=False)
    assert all(set(error) == PROBLEM for error in entry["errors"])
    return [error["type"] for error in entry["errors"]]


def only(verdict, node_id):
    """A node's only error."""
    assert len(verdict.node_errors[node_id]["errors"]) == 1
    return verdict.node_errors[node_id]["errors"][0]


def show(prompt, source):
    return prompt.add("Show", value=[source, 0])


def test_a_good_prompt(bench, chain):
    verdict = bench.validate(chain)
    assert (verdict.error, verdict.node_errors, verdict.outputs) == (None, {}, ["3"])


@pytest.mark.parametrize("prompt, kind, words", [
    (None, "no_prompt", "No prompt"),
    ({}, "prompt_no_outputs", "no outputs"),
    ([], "invalid_prompt", "not an object"),
    ("text", "invalid_prompt", "not an object"),
    ({"1": None}, "invalid_prompt", "class_type"),
    ({"1": {"inputs": {}}}, "invalid_prompt", "class_type"),
    ({"1": {"class_type": ["Show"], "inputs": {}}}, "invalid_prompt", "class_type"),
    ({"1": {"class_type": "Show"}}, "invalid_prompt", "no inputs"),
    ({"1": {"class_type": "Show", "inputs": ["value"]}}, "invalid_prompt", "no inputs"),
    ({"1": {"class_type": "Nope", "inputs": {}}}, "invalid_prompt", "no node type Nope"),
    ({"1": {"class_type": "Number", "inputs": {"value": 1}}}, "prompt_no_outputs", "no outputs"),
])
def test_what_is_no_prompt_at_all(bench, prompt, kind, words):
    verdict = bench.validate(prompt)
    assert set(verdict.error) == PROBLEM
    assert verdict.error["type"] == kind
    assert words in verdict.error["message"]
    assert (verdict.node_errors, verdict.outputs) == ({}, [])


def test_an_unknown_node_is_named(bench):
    prompt = {"7": {"class_type": "Nope", "inputs": {}, "_meta": {"title": "My node"}}}
    error = bench.validate(prompt).error
    assert error["details"] == "Node ID '#7'"
    assert error["extra_info"] == {"node_id": "7", "class_type": "Nope", "node_title": "My node"}


def test_required_input_missing(bench, prompt):
    show(prompt, prompt.add("Add", a=1))
    verdict = bench.validate(prompt)
    assert verdict.error["type"] == "prompt_outputs_failed_validation"
    assert verdict.outputs == []
    assert problems(verdict, "1") == ["required_input_missing"]
    assert only(verdict, "1")["details"] == "b"
    assert only(verdict, "1")["extra_info"]["input_name"] == "b"
    assert verdict.node_errors["1"]["dependent_outputs"] == ["2"]
    assert verdict.node_errors["1"]["class_type"] == "Add"
    assert "2" not in verdict.node_errors


def test_null_is_missing_too(bench, prompt):
    show(prompt, prompt.add("Add", a=1, b=None))
    assert problems(bench.validate(prompt), "1") == ["required_input_missing"]


@pytest.mark.parametrize("link, words", [
    (["1"], "no pair"), ([], "no pair"), (["1", 0, 0], "no pair"), ([1, 0], "no pair"), (["1", "0"], "no pair"),
    (["99", 0], "node 99 is not in the prompt"), (["1", 5], "has no output 5"), (["1", -1], "count from 0"),
    (["2", 0], "has no output 0"),
])
def test_bad_linked_input(bench, prompt, link, words):
    prompt.add("Number", value=1)
    prompt.add("Show", value=["1", 0])
    prompt.add("Show", "bad", value=link)
    verdict = bench.validate(prompt)
    assert problems(verdict, "bad") == ["bad_linked_input"]
    assert words in only(verdict, "bad")["details"]
    assert only(verdict, "bad")["extra_info"]["received_value"] == link
    assert verdict.outputs == ["2"] and verdict.error is None


def test_a_broken_undeclared_link_is_found(bench, prompt):
    prompt.add("Show", value={"__value__": [1]}, extra=["99", 0])
    assert problems(bench.validate(prompt), "1") == ["bad_linked_input"]


def test_return_type_mismatch(bench, prompt):
    prompt.add("Text", text="word")
    show(prompt, prompt.add("Add", a=["1", 0], b=1))
    error = only(bench.validate(prompt), "2")
    assert error["type"] == "return_type_mismatch"
    assert error["extra_info"]["input_name"] == "a"
    assert error["extra_info"]["received_type"] == "STRING"
    assert error["extra_info"]["linked_node"] == ["1", 0]
    assert error["extra_info"]["input_config"][0] == "INT"


class Anything(str):
    """A type that some packs use to fit everything."""

    def __ne__(self, other):
        return False


@pytest.mark.parametrize("given, wanted, good", [
    ("INT", "INT", True), ("INT", "INT,FLOAT", True), ("INT,FLOAT", "FLOAT", True), ("INT", "STRING", False),
    ("INT", "FLOAT, STRING", False), ("*", "LATENT", True), ("LATENT", "*", True), ("INT", "FLOAT", False),
    (["a", "b"], ["a", "b"], True), (["a", "b"], "COMBO", True), ("COMBO", ["a", "b"], True), (["a"], ["b"], False),
    ("STRING", ["a", "b"], False), (Anything("*"), "INT", True), ("INT", Anything("x"), True),
])
def test_types_of_links(bench, toys, prompt, given, wanted, good):
    toys.add("Give", lambda: (1,), returns=(given,))
    toys.add_output("Take", lambda value: (), {"value": (wanted, {})})
    prompt.add("Give")
    prompt.add("Take", value=["1", 0])
    assert problems(bench.validate(prompt), "2") == ([] if good else ["return_type_mismatch"])


@pytest.mark.parametrize("kind, value", [
    ("INT", "five"), ("INT", 5.5), ("INT", "5.5"), ("INT", float("nan")), ("INT", float("inf")), ("INT", {}),
    ("FLOAT", "x"), ("FLOAT", float("nan")), ("FLOAT", float("-inf")), ("FLOAT", "nan"), ("FLOAT", {"a": 1}),
    ("STRING", {"a": 1}), ("BOOLEAN", "maybe"), ("BOOLEAN", {}), ("INT,FLOAT", float("nan")),
    ("INT", {"__value__": [1, 2]}), ("FLOAT", 10**400), ("INT", "9" * 5000),
])
def test_invalid_input_type(bench, toys, prompt, kind, value):
    toys.add_output("Take", lambda value: (), {"value": (kind, {})})
    prompt.add("Take", value=value)
    error = only(bench.validate(prompt), "1")
    assert problems(bench.validate(prompt), "1") == ["invalid_input_type"]
    assert error["extra_info"]["input_name"] == "value"
    assert error["extra_info"]["exception_message"] in error["details"]
    assert len(error["details"]) < 300


@pytest.mark.parametrize("kind, value, meant", [
    ("INT", "5", 5), ("INT", 5.0, 5), ("INT", " -7 ", -7), ("INT", True, 1), ("INT", 2**64 - 1, 2**64 - 1),
    ("INT", str(2**64 - 1), 2**64 - 1), ("FLOAT", 1, 1.0), ("FLOAT", "2.5", 2.5), ("STRING", 7, "7"),
    ("BOOLEAN", "false", False), ("BOOLEAN", "True", True), ("BOOLEAN", 0, False),
    ("STRING", "", ""), ("ODD_TYPE", False, False),
])
def test_literals_become_what_the_widget_holds(bench, toys, prompt, kind, value, meant):
    toys.add_output("Take", lambda value: {"ui": {"values": [value]}}, {"value": (kind, {})})
    prompt.add("Take", value=value)
    result = bench.shown(prompt, "1")
    assert result == [meant] and type(result[0]) is type(meant)
    assert prompt["1"]["inputs"]["value"] == value and type(prompt["1"]["inputs"]["value"]) is type(value)


@pytest.mark.parametrize("value, kind", [(-1001, "value_smaller_than_min"), (1001, "value_bigger_than_max"),
                                         ("1001", "value_bigger_than_max"), (10**30, "value_bigger_than_max")])
def test_values_out_of_range(bench, prompt, value, kind):
    show(prompt, prompt.add("Number", value=value))
    error = only(bench.validate(prompt), "1")
    assert error["type"] == kind
    assert error["extra_info"]["received_value"] == value
    assert error["extra_info"]["input_config"][1]["max"] == 1000
    assert "1000" in error["message"]


@pytest.mark.parametrize("kind", [["red", "green"], "COMBO"])
def test_value_not_in_list(bench, toys, prompt, kind):
    toys.add_output("Take", lambda value: (), {"value": (kind, {"options": ["red", "green"]})})
    prompt.add("Take", value="green")
    prompt.add("Take", value="blue")
    verdict = bench.validate(prompt)
    assert verdict.outputs == ["1"]
    assert problems(verdict, "2") == ["value_not_in_list"]
    assert "'blue' is not in ['red', 'green']" in only(verdict, "2")["details"]


def test_a_long_list_is_not_repeated(bench, toys, prompt):
    toys.add_output("Take", lambda value: (), {"value": ([f"file {index}" for index in range(500)],)})
    prompt.add("Take", value="gone")
    error = only(bench.validate(prompt), "1")
    assert error["extra_info"]["input_config"] is None
    assert error["details"] == "value: 'gone' is not in the 500 choices"


def test_several_choices(bench, toys, prompt):
    toys.add_output("Take", lambda value: (), {"value": (["red", "green"], {"multi_select": True})})
    prompt.add("Take", value={"__value__": ["red", "green"]})
    prompt.add("Take", value={"__value__": ["red", "blue"]})
    verdict = bench.validate(prompt)
    assert verdict.outputs == ["1"] and problems(verdict, "2") == ["value_not_in_list"]


def test_a_list_literal_is_no_link(bench, prompt):
    prompt.add("Show", value={"__value__": ["1", 0]})
    assert bench.shown(prompt, "1") == [["1", 0]]


def test_custom_validation(bench, toys, prompt):
    def judge(cls, value, other=None):
        return True if value < 10 else f"{value} is too much"

    toys.add_output("Take", lambda value, other: (), {"value": ("INT", {"max": 5}), "other": ("INT", {"max": 5})},
                    VALIDATE_INPUTS=classmethod(judge))
    prompt.add("Take", value=9, other=1)
    prompt.add("Take", value=11, other=1)
    verdict = bench.validate(prompt)
    assert verdict.outputs == ["1"], "an input that the class judges itself is not held to its range"
    assert problems(verdict, "2") == ["custom_validation_failed"] * 2
    assert verdict.node_errors["2"]["errors"][0]["details"] == "value - 11 is too much"
    assert verdict.node_errors["2"]["errors"][0]["extra_info"]["input_name"] == "value"


def test_custom_validation_judges_only_what_it_names(bench, toys, prompt):
    toys.add_output("Take", lambda value, other: (), {"value": ("INT", {"max": 5}), "other": ("INT", {"max": 5})},
                    VALIDATE_INPUTS=classmethod(lambda cls, value: True))
    prompt.add("Take", value=9, other=9)
    assert problems(bench.validate(prompt), "1") == ["value_bigger_than_max"]


def test_custom_validation_of_any_input(bench, toys, prompt):
    def judge(cls, **inputs):
        return "no sevens" if inputs["value"] == 7 else True

    toys.add_output("Take", lambda value: (), {"value": ("INT", {"max": 5})}, VALIDATE_INPUTS=classmethod(judge))
    prompt.add("Take", value=6)
    prompt.add("Take", value=7)
    verdict = bench.validate(prompt)
    assert verdict.outputs == ["1"] and problems(verdict, "2") == ["custom_validation_failed"]


def test_custom_validation_sees_none_for_links_and_may_judge_their_types(bench, toys, prompt):
    seen = []

    def judge(cls, value, input_types):
        seen.append((value, input_types))
        return input_types["value"] in ("INT", "STRING") or "bad type"

    toys.add_output("Take", lambda value: (), {"value": ("LATENT", {})}, VALIDATE_INPUTS=classmethod(judge))
    prompt.add("Number", value=1)
    prompt.add("Take", value=["1", 0])
    assert bench.validate(prompt).outputs == ["2"]
    assert seen == [(None, {"value": "INT"})]


async def judge_slowly(cls, value):
    await asyncio.sleep(0)
    return value != 13 or "unlucky"


def test_asynchronous_custom_validation(bench, toys, prompt):
    toys.add_output("Take", lambda value: (), {"value": ("INT", {})}, VALIDATE_INPUTS=classmethod(judge_slowly))
    prompt.add("Take", value=12)
    prompt.add("Take", value=13)

    async def within_a_loop():
        return bench.validate(prompt)

    for verdict in (bench.validate(prompt), asyncio.run(within_a_loop())):
        assert verdict.outputs == ["1"] and problems(verdict, "2") == ["custom_validation_failed"]


def test_exception_during_validation(bench, toys, prompt):
    def judge(cls, value):
        raise RuntimeError("the judge is ill")

    toys.add("Ill", lambda value: (value,), {"value": ("INT", {})}, VALIDATE_INPUTS=classmethod(judge))
    prompt.add("Ill", value=1)
    prompt.add("Show", value=["1", 0])
    prompt.add("Show", value=1)
    verdict = bench.validate(prompt)
    assert verdict.outputs == ["3"]
    assert problems(verdict, "1") == ["exception_during_validation"]
    assert "the judge is ill" in only(verdict, "1")["details"]
    assert only(verdict, "1")["extra_info"]["exception_type"] == "RuntimeError"
    assert problems(verdict, "2") == ["exception_during_inner_validation"]
    assert only(verdict, "2")["extra_info"]["input_name"] == "value"
    assert only(verdict, "2")["extra_info"]["linked_node"] == ["1", 0]


def test_a_class_whose_inputs_cannot_be_asked(bench, toys, prompt, chain):
    def broken(cls):
        raise OSError("the models folder is gone")

    toys.add_output("Broken", lambda: (), {}, INPUT_TYPES=classmethod(broken))
    chain.add("Broken")
    verdict = bench.validate(chain)
    assert verdict.outputs == ["3"] and problems(verdict, "4") == ["exception_during_validation"]
    assert bench.run(chain).status == "success", "and it does not disturb the outputs that are in order"


@pytest.mark.parametrize("links", [{"1": "1"}, {"1": "2", "2": "1"}, {"1": "2", "2": "3", "3": "1"}])
def test_dependency_cycle(bench, prompt, links):
    for node, source in links.items():
        prompt.add("Add", node, a=[source, 0], b=1)
    prompt.add("Show", "out", value=["1", 0])
    prompt.add("Show", "good", value=1)
    verdict = bench.validate(prompt)
    assert verdict.outputs == ["good"]
    assert all(problems(verdict, node) == ["dependency_cycle"] for node in links)
    assert set(verdict.node_errors) == set(links)
    assert only(verdict, "1")["extra_info"]["node_id"] == "1"
    assert set(only(verdict, "1")["extra_info"]["cycle_nodes"]) == set(links)
    assert only(verdict, "1")["details"].count("->") == len(links)
    assert verdict.node_errors["1"]["dependent_outputs"] == ["out"]


def test_problems_name_the_outputs_that_depend_on_them(bench, prompt):
    prompt.add("Number", "low", value=-5000)
    prompt.add("Number", "high", value=5000)
    prompt.add("Add", "sum", a=["low", 0], b=["high", 0])
    prompt.add("Show", "both", value=["sum", 0])
    prompt.add("Show", "one", value=["high", 0])
    prompt.add("Show", "none", value=1)
    verdict = bench.validate(prompt)
    assert verdict.error is None and verdict.outputs == ["none"]
    assert verdict.node_errors["low"]["dependent_outputs"] == ["both"]
    assert verdict.node_errors["high"]["dependent_outputs"] == ["both", "one"]


def test_nodes_that_lead_to_no_output_are_not_judged(bench, chain):
    chain.add("Add", a=["1", 0])
    verdict = bench.validate(chain)
    assert verdict.node_errors == {} and verdict.outputs == ["3"]


def test_targets(bench, chain):
    chain.add("Show", value="x")
    assert bench.validate(chain, ["4"]).outputs == ["4"]
    assert bench.validate(chain, ["2"]).error["type"] == "prompt_no_outputs"
    assert bench.validate(chain, []).error["type"] == "prompt_no_outputs"


def test_a_bad_branch_outside_the_targets_does_not_matter(bench, chain):
    chain.add("Show", value=["99", 0])
    verdict = bench.validate(chain, ["3"])
    assert verdict.node_errors == {} and verdict.outputs == ["3"]


@pytest.mark.parametrize("closed", [False, True])
def test_ten_thousand_nodes_in_a_row(bench, prompt, closed):
    prompt.add("Number", "0", value=1)
    for index in range(1, 10_000):
        prompt.add("Add", str(index), a=[str(index - 1), 0], b=0)
    prompt.add("Show", "out", value=["9999", 0])
    if closed:
        prompt["1"]["inputs"]["b"] = ["9999", 0]
    verdict = bench.validate(prompt)
    assert verdict.outputs == ([] if closed else ["out"])
    assert len(verdict.node_errors) == (9999 if closed else 0)


def test_thousands_of_outputs_with_errors(bench, prompt):
    for index in range(30_000):
        prompt.add("Show", str(index), value=["gone", 0])
    verdict = bench.validate(prompt)
    assert len(verdict.node_errors) == 30_000
    assert verdict.node_errors["29999"]["dependent_outputs"] == ["29999"]


def test_thousands_of_outputs_on_a_row_of_errors(bench, prompt):
    prompt.add("Number", "0", value=5000)
    for index in range(1, 5000):
        prompt.add("Add", str(index), a=[str(index - 1), 0], b=5000)
        prompt.add("Show", f"show {index}", value=[str(index), 0])
    verdict = bench.validate(prompt)
    assert len(verdict.node_errors) == 5000 and verdict.outputs == []
    assert verdict.node_errors["0"]["dependent_outputs"][:2] == ["show 1", "show 2"]


def test_a_prompt_of_ten_megabytes(bench, toys, prompt):
    toys.add("Long", lambda text: (len(text),), {"text": ("STRING", {"multiline": True})})
    prompt.add("Long", text="word " * 2_000_000)
    show(prompt, "1")
    assert bench.shown(prompt, "2") == [10_000_000]
