"""UI-format workflows become prompts exactly as the canvas's own graphToPrompt makes them.

`canvas_cases.json` holds workflows and what the real canvas (the frontend named in it) made of each; the tests below it
state the rules one by one.
"""

from __future__ import annotations

import copy
import json
import random
from datetime import datetime
from pathlib import Path

import pytest

from fluxcanvas.web.host.convert import WorkflowError, convert, is_prompt

RECORDED = json.loads((Path(__file__).parent / "canvas_cases.json").read_text())
TOYS = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}, "output": ["MODEL", "CLIP"], "display_name": "Load It"},
    "Draw": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0, "min": 0, "max": 99, "control_after_generate": True}],
                "kind": [["one", "two"], {}],
                "start": ["LATENT", {}],
            },
            "optional": {"scale": ["FLOAT", {"default": 1.5}]},
        },
        "output": ["LATENT"],
    },
    "Text": {"input": {"required": {"text": ["STRING", {"dynamicPrompts": True}]}}, "output": ["STRING"]},
    "LoadImage": {"input": {"required": {"image": [["in.png"], {"image_upload": True}]}}, "output": ["IMAGE", "MASK"]},
    "Size": {
        "input": {"required": {"width": ["INT", {"default": 64, "min": 16, "max": 256, "step": 16}]}},
        "output": ["LATENT"],
    },
    "SaveImage": {
        "input": {"required": {"images": ["IMAGE", {}], "filename_prefix": ["STRING", {"default": "p"}]}},
        "output": [],
        "output_node": True,
    },
    "Forced": {"input": {"required": {"a": ["INT", {"forceInput": True}], "b": ["INT", {}]}}, "output": ["INT"]},
    "Choices": {"input": {"required": {"of": ["COMBO", {"options": ["x", "y"], "multi_select": True}]}}, "output": []},
}


def node(key, type, values=None, *, ins=(), outs=(), **more):
    """A saved node; `ins` are (name, link) pairs."""
    inputs = [{"name": name, "type": "*", "link": link} for name, link in ins]
    outputs = [{"name": kind, "type": kind, "links": []} for kind in outs]
    return {
        "id": key,
        "type": type,
        "inputs": inputs,
        "outputs": outputs,
        **({} if values is None else {"widgets_values": values}),
        **more,
    }


def workflow(*nodes, links=(), **more):
    return {"nodes": list(nodes), "links": [list(link) for link in links], "version": 0.4, **more}


def inputs(prompt, key):
    return prompt[str(key)]["inputs"]


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_equals_what_the_canvas_made_of_it(name):
    saved, made = RECORDED["cases"][name]
    expected = {
        key: {"class_type": kind, "_meta": {"title": title}, "inputs": values}
        for key, (kind, title, values) in made.items()
    }
    assert convert(saved, RECORDED["nodes"]) == expected


def test_the_file_is_left_as_it_is():
    saved = RECORDED["cases"]["two_inst"][0]
    before = copy.deepcopy(saved)
    convert(saved, RECORDED["nodes"])
    assert saved == before


def test_a_whole_entry():
    saved = workflow(
        node(1, "Load", ["b"]),
        node(2, "Draw", [7, "fixed", "two", 0.5], ins=[("model", 1)], title="My draw"),
        links=[(1, 1, 0, 2, 0, "MODEL")],
    )
    assert convert(saved, TOYS) == {
        "1": {"inputs": {"name": "b"}, "class_type": "Load", "_meta": {"title": "Load It"}},
        "2": {
            "inputs": {"seed": 7, "kind": "two", "scale": 0.5, "model": ["1", 0]},
            "class_type": "Draw",
            "_meta": {"title": "My draw"},
        },
    }


def test_missing_values_are_defaults():
    assert inputs(convert(workflow(node(1, "Draw", [7])), TOYS), 1) == {"seed": 7, "kind": "one", "scale": 1.5}


@pytest.mark.parametrize("saved", [{"widgets_values": {"kind": "two"}}, {"widgets_values_named": {"kind": "two"}}])
def test_values_by_name(saved):
    assert inputs(convert(workflow(node(1, "Draw", **saved)), TOYS), 1) == {"seed": 0, "kind": "two", "scale": 1.5}


def test_positions_win_over_names():
    saved = workflow(node(1, "Draw", [7, "fixed", "two", 2], widgets_values_named={"seed": 9}))
    assert inputs(convert(saved, TOYS), 1)["seed"] == 7


def test_values_of_forced_inputs_in_old_files_are_dropped():
    assert inputs(convert(workflow(node(1, "Forced", [5, 6])), TOYS), 1) == {"b": 6}
    assert inputs(convert(workflow(node(1, "Forced", [6])), TOYS), 1) == {"b": 6}


def test_lists_are_wrapped():
    assert inputs(convert(workflow(node(1, "Choices", [["x", "y"]])), TOYS), 1) == {"of": {"__value__": ["x", "y"]}}


def test_the_upload_button_is_not_sent():
    assert inputs(convert(workflow(node(1, "LoadImage", ["in.png", "image"])), TOYS), 1) == {"image": "in.png"}


@pytest.mark.parametrize("as_objects", [False, True])
def test_links_as_lists_and_as_objects(as_objects):
    links = [[4, 1, 0, 2, 0, "MODEL"]]
    if as_objects:
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [dict(zip(keys, links[0], strict=True))]
    saved = {"nodes": [node(1, "Load"), node(2, "Draw", ins=[("model", 4)])], "links": links}
    assert inputs(convert(saved, TOYS), 2)["model"] == ["1", 0]


def chain(*between):
    """Load (1) through `between` to Draw (9)."""
    nodes, links = [node(1, "Load", ["a"])], []
    for number, middle in enumerate(between):
        links.append((number + 1, nodes[-1]["id"], 0, middle["id"], 0, "MODEL"))
        middle["inputs"] = [{"name": "", "type": "*", "link": number + 1}]
        nodes.append(middle)
    links.append((99_999, nodes[-1]["id"], 0, 9, 0, "MODEL"))
    return workflow(*nodes, node(9, "Draw", ins=[("model", 99_999)]), links=links)


def test_reroutes_vanish():
    prompt = convert(chain(node(2, "Reroute"), node(3, "Reroute")), TOYS)
    assert set(prompt) == {"1", "9"} and inputs(prompt, 9)["model"] == ["1", 0]


def test_reroutes_in_a_circle_are_an_error():
    saved = workflow(
        node(1, "Reroute", ins=[("", 2)]),
        node(2, "Reroute", ins=[("", 1)]),
        node(3, "Draw", ins=[("model", 3)]),
        links=[(1, 1, 0, 2, 0, "*"), (2, 2, 0, 1, 0, "*"), (3, 2, 0, 3, 0, "*")],
    )
    with pytest.raises(WorkflowError, match=r"circle behind the input 'model' of node 3 \(Draw\)"):
        convert(saved, TOYS)


def test_ten_thousand_reroutes_are_followed():
    assert inputs(convert(chain(*(node(key, "Reroute") for key in range(10, 10_010))), TOYS), 9)["model"] == ["1", 0]


def test_notes_are_left_out():
    assert convert(workflow(node(1, "Note", ["x"]), node(2, "MarkdownNote", ["y"])), TOYS) == {}


def test_a_muted_node_and_the_links_from_it_are_left_out():
    saved = chain()
    saved["nodes"][0]["mode"] = 2
    prompt = convert(saved, TOYS)
    assert set(prompt) == {"9"} and "model" not in inputs(prompt, 9)


def test_a_bypassed_node_hands_on_the_input_of_the_same_type():
    saved = workflow(
        node(1, "Size", [32]),
        node(2, "Draw", ins=[("start", 1)], mode=4),
        node(3, "Draw", ins=[("start", 2)]),
        links=[(1, 1, 0, 2, 0, "LATENT"), (2, 2, 0, 3, 0, "LATENT")],
    )
    prompt = convert(saved, TOYS)
    assert set(prompt) == {"1", "3"} and inputs(prompt, 3)["start"] == ["1", 0]


def test_a_bypassed_node_without_such_an_input_hands_on_nothing():
    saved = chain()
    saved["nodes"][0]["mode"] = 4
    assert "model" not in inputs(convert(saved, TOYS), 9)


@pytest.mark.parametrize(("value", "sent"), [(48, 48), (50, 48), (1000, 256), (None, 16), ("many", "many")])
def test_a_primitive_sets_the_widget_within_its_limits(value, sent):
    saved = workflow(
        node(1, "PrimitiveNode", [value, "fixed"]),
        node(2, "Size", [64], ins=[("width", 1)]),
        links=[(1, 1, 0, 2, 0, "INT")],
    )
    assert convert(saved, TOYS) == {"2": {"inputs": {"width": sent}, "class_type": "Size", "_meta": {"title": "Size"}}}


def subgraph(key="sub", name="Inside"):
    """A subgraph with Draw (13): model comes from outside, its seed is shown on the instance."""
    links = [
        {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 13, "target_slot": 0, "type": "MODEL"},
        {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 13, "target_slot": 1, "type": "INT"},
        {"id": 3, "origin_id": 13, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"},
    ]
    return {
        "id": key,
        "name": name,
        "nodes": [node(13, "Draw", [5, "fixed", "two", 2], ins=[("model", 1), ("seed", 2)])],
        "links": links,
        "inputs": [{"name": "model", "type": "MODEL", "linkIds": [1]}, {"name": "seed", "type": "INT", "linkIds": [2]}],
        "outputs": [{"name": "LATENT", "type": "LATENT", "linkIds": [3]}],
    }


def with_instances(*values, **more):
    nodes = [
        node(20 + index, "sub", value, ins=[("model", 100 + index), ("seed", None)], **more)
        for index, value in enumerate(values)
    ]
    links = [(100 + index, 1, 0, 20 + index, 0, "MODEL") for index in range(len(values))]
    return workflow(
        node(1, "Load", ["a"]),
        *nodes,
        node(30, "Draw", ins=[("start", 99)]),
        links=[*links, (99, 20, 0, 30, 1, "LATENT")],
        definitions={"subgraphs": [subgraph()]},
    )


def test_instances_of_a_subgraph_have_ids_and_values_of_their_own():
    prompt = convert(with_instances([70], [71], None), TOYS)
    assert [inputs(prompt, f"{key}:13")["seed"] for key in (20, 21, 22)] == [70, 71, 5]
    assert inputs(prompt, "21:13") == {"seed": 71, "kind": "two", "scale": 2, "model": ["1", 0]}
    assert inputs(prompt, 30)["start"] == ["20:13", 0]


def test_widgets_shown_by_older_files():
    shown = {"properties": {"proxyWidgets": [["-1", "seed"], ["13", "kind"]]}}
    assert inputs(convert(with_instances([70, "one"], **shown), TOYS), "20:13")["kind"] == "one"


def test_a_bypassed_instance_is_left_out():
    prompt = convert(with_instances([70], mode=4), TOYS)
    assert set(prompt) == {"1", "30"} and "start" not in inputs(prompt, 30)


def test_a_subgraph_inside_itself_is_an_error():
    inside = subgraph()
    inside["nodes"].append(node(14, "sub"))
    saved = with_instances([70])
    saved["definitions"]["subgraphs"] = [inside]
    with pytest.raises(WorkflowError, match="without an end"):
        convert(saved, TOYS)


def test_dynamic_prompts_choose_and_comments_go():
    texts = {
        inputs(
            convert(
                workflow(node(1, "Text", ["a {red|{blue|green}} house // note\n/* x */!"])),
                TOYS,
                rng=random.Random(seed),
            ),
            1,
        )["text"]
        for seed in range(20)
    }
    assert texts == {"a red house \n!", "a blue house \n!", "a green house \n!"}


def test_file_names_are_filled_in():
    saved = workflow(
        node(1, "SaveImage", ["%Size.width%_%date:yyyy-MM-dd_hhmmss%_%width%_%Text.text%"]),
        node(2, "Size", [32]),
        node(3, "Text", ["a/b?c"]),
    )
    sent = inputs(convert(saved, TOYS, now=datetime(2026, 3, 4, 5, 6, 7)), 1)["filename_prefix"]
    assert sent == "32_2026-03-04_050607_%width%_a_b_c"


BROKEN = {
    "no object": ([], "not a JSON object"),
    "no nodes": ({}, "no list of nodes"),
    "node without id": (workflow({"type": "Load"}), "without id or type"),
    "two of one id": (workflow(node(1, "Load"), node(1, "Load")), "two nodes with the id 1"),
    "broken link": (workflow(node(1, "Load"), links=[(1, 1, "x", 2, 0)]), "link that cannot be read"),
    "links no list": ({"nodes": [], "links": {}}, "'links' is not a list"),
    "unknown class": (workflow(node(4, "Gone", title="T")), "class of node 4 of type 'Gone'; install"),
    "subgraph without id": (workflow(definitions={"subgraphs": [{"nodes": []}]}), "has no id"),
    "subgraph without nodes": (
        workflow(definitions={"subgraphs": [{"id": "a", "name": "Box"}]}),
        "subgraph 'Box' has no list",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_file_is_told_in_a_sentence(name):
    saved, sentence = BROKEN[name]
    with pytest.raises(WorkflowError, match=sentence):
        convert(saved, TOYS)


@pytest.mark.parametrize("name", ["two_inst", "nested", "prim_two", "chain(4, 4)", "proxy_mix"])
@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_file_is_an_error_in_words_or_a_prompt(name, seed):
    rng, saved = random.Random(seed), copy.deepcopy(RECORDED["cases"][name][0])
    for _ in range(3):
        damage(saved, rng)
    try:
        assert isinstance(convert(saved, RECORDED["nodes"]), dict)
    except WorkflowError as error:
        assert len(str(error)) > 20


def damage(value, rng):
    """Replace one value somewhere in a JSON structure by nonsense."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(value[key], (dict, list)) or not value[key] or rng.random() < 0.15:
            value[key] = rng.choice([None, -1, 10**9, "x", [], {}, True, [[]], 1.5])
            return
        value = value[key]


def test_formats_are_told_apart():
    assert is_prompt({"1": {"class_type": "Load", "inputs": {}}})
    assert not is_prompt(workflow(node(1, "Load"))) and not is_prompt([]) and not is_prompt({"a": 1})
