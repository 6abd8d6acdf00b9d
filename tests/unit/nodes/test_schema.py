"""`@node`: what a signature becomes, and that a malformed one does not load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import pytest

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from fluxcanvas.nodes.edges import FLUX_MODEL, IMAGE, LATENT
from fluxcanvas.nodes.schema import DefinitionError, Hidden, Output, mappings, node
from fluxcanvas.nodes.widgets import Choice, Flag, Range, Seed, Text

PUBLISHED = Path(__file__).with_name("node_signatures.json")
IDS = sorted(NODE_CLASS_MAPPINGS)
names = ["old.safetensors"]


@node("Blend Two", category="latent", aliases=("mix",), fingerprint=lambda **inputs: inputs["amount"] * 2)
def blend_two(
    first: Annotated[LATENT, "The first."],
    kind: Annotated[str, Choice(("add", "mean")), "How."] = "mean",
    amount: Annotated[float, Range(0, 1, 0.1), "How much."] = 0.5,
    count: Annotated[int, Range(1, 9), "How often."] = 2,
    seed: Annotated[int, Seed(), "A seed."] = 7,
    note: Annotated[str, Text(multiline=True, placeholder="a word", longest=5), "A note."] = "",
    file: Annotated[str, Choice(lambda: names), "A file."] = "old.safetensors",
    clamp: Annotated[bool, Flag(optional=True), "Whether to clamp."] = False,
    second: Annotated[LATENT | None, "The second."] = None,
    node_id: Annotated[str, Hidden("UNIQUE_ID")] = "",
) -> tuple[Annotated[LATENT, Output("blend"), "Both."], Annotated[IMAGE, Output("look"), "A look at it."]]:
    """Blends two latents.

    The second may be missing.
    """
    return first, (kind, amount, count, seed, note, clamp, second, node_id)


def run(**values):
    return blend_two.node_class().run(**values)


def test_a_signature_becomes_a_v1_class():
    made = blend_two.node_class
    assert (made.__name__, made.CATEGORY, made.FUNCTION) == ("BlendTwo", "FluxCanvas/latent", "run")
    assert made.OUTPUT_NODE is False
    assert made.SEARCH_ALIASES == ["mix"]
    assert made.DESCRIPTION == "Blends two latents.\n\nThe second may be missing."
    assert made.RETURN_TYPES == ("LATENT", "IMAGE") and made.RETURN_NAMES == ("blend", "look")
    assert made.OUTPUT_TOOLTIPS == ("Both.", "A look at it.")
    assert made.IS_CHANGED(amount=3) == 6 and not hasattr(made, "VALIDATE_INPUTS")
    assert mappings([blend_two]) == ({"FluxCanvas_BlendTwo": made}, {"FluxCanvas_BlendTwo": "Blend Two"})


def test_inputs_are_declared_in_the_order_of_the_signature():
    types = blend_two.node_class.INPUT_TYPES()
    assert types == {
        "required": {
            "first": ("LATENT", {"tooltip": "The first."}),
            "kind": (["add", "mean"], {"default": "mean", "tooltip": "How."}),
            "amount": ("FLOAT", {"min": 0, "max": 1, "step": 0.1, "default": 0.5, "tooltip": "How much."}),
            "count": ("INT", {"min": 1, "max": 9, "step": 1, "default": 2, "tooltip": "How often."}),
            "seed": (
                "INT",
                {"min": 0, "max": 2**64 - 1, "control_after_generate": True, "default": 7, "tooltip": "A seed."},
            ),
            "note": (
                "STRING",
                {
                    "multiline": True,
                    "dynamicPrompts": False,
                    "placeholder": "a word",
                    "default": "",
                    "tooltip": "A note.",
                },
            ),
            "file": (["old.safetensors"], {"default": "old.safetensors", "tooltip": "A file."}),
        },
        "optional": {
            "clamp": ("BOOLEAN", {"default": False, "tooltip": "Whether to clamp."}),
            "second": ("LATENT", {"tooltip": "The second."}),
        },
        "hidden": {"node_id": "UNIQUE_ID"},
    }
    assert list(types["required"]) == ["first", "kind", "amount", "count", "seed", "note", "file"]


def test_choices_are_asked_for_each_time(monkeypatch):
    monkeypatch.setitem(globals(), "names", ["new.safetensors"])
    assert blend_two.node_class.INPUT_TYPES()["required"]["file"][0] == ["new.safetensors"]


def test_the_function_stays_a_function_and_its_class_runs_it():
    latent = {"samples": 1}
    assert blend_two(latent) == run(first=latent)
    assert run(first=latent, amount=1, node_id="4", second=None)[1] == ("mean", 1, 2, 7, "", False, None, "4")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"amount": math.nan}, "'amount' is nan; it must be from 0 to 1"),
        ({"amount": math.inf}, "'amount' is inf"),
        ({"count": 0}, "'count' is 0; it must be from 1 to 9"),
        ({"count": 100_000}, "'count' is 100000"),
        ({"count": 1.5}, "'count' is 1.5; it must be a whole number"),
        ({"count": True}, "'count' is True, which is not a number"),
        ({"count": "2"}, "'count' is '2', which is not a number"),
        ({"seed": -1}, "'seed' is -1"),
        ({"kind": "product"}, "'kind' is 'product'; choose one of add, mean"),
        ({"file": ["a"]}, "'file' is ['a'], which is not one of the names"),
        ({"note": "x" * 10_000_000}, "'note' has 10,000,000 characters; shorten it to 5"),
        ({"note": "a\ud83e"}, "'note' has half a character at place 2"),
        ({"note": None}, "'note' is None, which is not a text"),
        ({"clamp": 1}, "'clamp' is 1; it must be true or false"),
        ({"first": None}, "'first' came empty: the node before it has nothing to give; connect it to Empty Canvas"),
        ({"first": 3.0}, "'first' got a float where a dict belongs"),
        ({"second": "text"}, "'second' got a str where a dict belongs"),
    ],
)
def test_a_bad_value_is_named_with_its_node(values, said):
    with pytest.raises(FluxError) as caught:
        run(**{"first": {}} | values)
    assert str(caught.value).startswith("Blend Two: the input ") and said in str(caught.value)


def test_an_output_node_may_return_nothing():
    @node("Look", category="latent", output_node=True, validate=lambda image: True)
    def look(image: Annotated[IMAGE | None, "What to look at."] = None) -> None:
        """Looks."""

    assert look.node_class.OUTPUT_NODE and look.node_class.RETURN_TYPES == ()
    assert look.node_class().run() == ()
    assert look.node_class.VALIDATE_INPUTS(image=None) is True


LATENT_OUT = Annotated[LATENT, Output("latent"), "A latent."]


def declare(default=..., hint=..., output=LATENT_OUT, doc="Does a thing."):
    """A node `FluxCanvas_Odd` whose one input `x` has this annotation and default."""

    def odd(x):
        return x

    odd.__doc__ = doc
    odd.__defaults__ = () if default is ... else (default,)
    odd.__annotations__ = ({} if hint is ... else {"x": hint}) | ({} if output is ... else {"return": output})
    return node("Odd", category="latent")(odd)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "input 'x': has no annotation"),
        ({"hint": "Missing"}, "an annotation that names nothing: name 'Missing' is not defined"),
        ({"hint": Annotated[int, "x"]}, "is no edge, and a plain type needs a widget"),
        ({"hint": LATENT}, "input 'x': has no tooltip"),
        ({"hint": Annotated[LATENT, " "]}, "input 'x': has no tooltip"),
        ({"hint": Annotated[LATENT | None, "x"]}, "an optional socket is annotated `| None`"),
        ({"hint": Annotated[LATENT, "x"], "default": None}, "an optional socket is annotated `| None`"),
        ({"hint": Annotated[LATENT | FLUX_MODEL, "x"]}, "is no edge"),
        ({"hint": Annotated[int, Range(1, 5)], "default": 2}, "input 'x': has no tooltip"),
        ({"hint": Annotated[int, Range(1, 5), "x"], "default": 6}, "has a default that is 6; it must be from 1 to 5"),
        (
            {"hint": Annotated[int, Range(1, 5), "x"], "default": 2.5},
            "a default that is 2.5; it must be a whole number",
        ),
        ({"hint": Annotated[float, Range(1, 5), "x"], "default": math.nan}, "has a default that is nan"),
        ({"hint": Annotated[int, Range(5, 1), "x"], "default": 2}, "has an empty range or step"),
        ({"hint": Annotated[int, Range(1, 5, 0), "x"], "default": 2}, "has an empty range or step"),
        ({"hint": Annotated[str, Range(1, 5), "x"], "default": 2}, "has a Range but is a str"),
        ({"hint": Annotated[bool, Range(0, 1), "x"], "default": True}, "has a Range but is a bool"),
        ({"hint": Annotated[int, Flag(), "x"], "default": 1}, "has a Flag but is a int"),
        ({"hint": Annotated[int, Text(), "x"], "default": 1}, "has a Text but is a int"),
        ({"hint": Annotated[int, Choice(("a",)), "x"], "default": 1}, "has a Choice but is a int"),
        ({"hint": Annotated[str, Choice(()), "x"], "default": "a"}, "offers nothing to choose from"),
        (
            {"hint": Annotated[str, Choice(("a", "b")), "x"], "default": "c"},
            "a default that is 'c'; choose one of a, b",
        ),
        ({"hint": Annotated[int, Range(1, 5, optional=True), "x"]}, "is optional and has no default"),
        ({"hint": Annotated[str, Hidden("SECRETS")], "default": ""}, "no host fills in 'SECRETS'"),
        ({"hint": Annotated[LATENT, "x"], "doc": None}, "has no docstring"),
        ({"hint": Annotated[LATENT, "x"], "output": ...}, "does not say what it returns"),
        ({"hint": Annotated[LATENT, "x"], "output": LATENT}, "output 0: has no name"),
        ({"hint": Annotated[LATENT, "x"], "output": Annotated[LATENT, Output("l")]}, "output 0: has no tooltip"),
        ({"hint": Annotated[LATENT, "x"], "output": tuple[LATENT_OUT, int]}, "output 1: <class 'int'> is no edge"),
    ],
)
def test_a_malformed_definition_does_not_load(parts, said):
    with pytest.raises(DefinitionError) as caught:
        declare(**parts)
    assert "FluxCanvas_Odd" in str(caught.value) and said in str(caught.value)


def test_star_arguments_and_one_id_for_two_nodes_do_not_load():
    with pytest.raises(DefinitionError, match="FluxCanvas_Stars, input 'values': a node takes no"):

        @node("Stars", category="latent")
        def stars(*values: Annotated[LATENT, "x"]) -> LATENT_OUT:
            """Takes anything."""

    with pytest.raises(DefinitionError, match="two nodes have the id FluxCanvas_BlendTwo"):
        mappings([blend_two, blend_two])


def test_a_plain_definition_does_load():
    """The planted errors above differ from this one in a single thing each."""
    assert declare(hint=Annotated[LATENT, "x"]).node_class.RETURN_NAMES == ("latent",)


@pytest.mark.parametrize("id", IDS)
def test_every_node_is_what_the_canvas_reads(id):
    made = NODE_CLASS_MAPPINGS[id]
    assert id == f"FluxCanvas_{made.__name__}" and NODE_DISPLAY_NAME_MAPPINGS[id]
    assert made.CATEGORY.startswith("FluxCanvas/") and made.DESCRIPTION and made.SEARCH_ALIASES
    assert len(made.RETURN_TYPES) == len(made.RETURN_NAMES) == len(made.OUTPUT_TOOLTIPS) > 0
    declared = made.INPUT_TYPES()
    assert set(declared) <= {"required", "optional", "hidden"}
    json.dumps(declared, allow_nan=False)
    for kind, options in [*declared["required"].values(), *declared.get("optional", {}).values()]:
        assert options["tooltip"].endswith(".")
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"] and options.get("step", 1) > 0
            assert type(options["default"]) is {"INT": int, "FLOAT": float}[kind]
        elif isinstance(kind, list):
            assert "default" not in options or options["default"] in kind
        elif kind in ("STRING", "BOOLEAN"):
            assert isinstance(options["default"], (str, bool))
        else:
            assert "default" not in options


def signature(made) -> dict:
    """What saved files depend on: the order of inputs and outputs, and their types."""
    groups = made.INPUT_TYPES()
    inputs = [
        [name, "COMBO" if isinstance(kind, list) else kind, group]
        for group in ("required", "optional")
        for name, (kind, _) in groups.get(group, {}).items()
    ]
    return {
        "inputs": inputs,
        "outputs": [list(pair) for pair in zip(made.RETURN_NAMES, made.RETURN_TYPES, strict=True)],
    }


def breach(published: dict, now: dict) -> str:
    """How a node's signature broke with the published one; "" when files saved before still open."""
    for side in ("inputs", "outputs"):
        kept = [one for one in now[side] if one in published[side]]
        if kept != published[side]:
            return f"its {side} were {published[side]} and are {now[side]}: saved files would open wrongly"
    new = [one for one in now["inputs"] if one not in published["inputs"]]
    if any(group == "required" for _, _, group in new):
        return f"it gained {new}: a new input is optional, so that API files without it still run"
    if any(now[side][: len(published[side])] != published[side] for side in ("inputs", "outputs")):
        return "something was inserted: new inputs and outputs go after the last"
    return ""


@pytest.mark.parametrize("id", IDS)
def test_published_signatures_are_only_appended_to(id):
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    now = signature(NODE_CLASS_MAPPINGS[id])
    assert id in published, f'publish it: add "{id}": {json.dumps(now)} to {PUBLISHED.name}'
    assert not breach(published[id], now), f"{id}: {breach(published[id], now)}"
    assert published[id] == now, f'publish what was appended: "{id}": {json.dumps(now)} in {PUBLISHED.name}'


def test_published_nodes_still_exist():
    assert set(json.loads(PUBLISHED.read_text(encoding="utf-8"))) <= set(IDS)


def test_a_breach_of_the_order_is_seen():
    a, b, c = ["a", "INT", "required"], ["b", "INT", "required"], ["c", "INT", "optional"]
    out = [["x", "LATENT"]]
    published = {"inputs": [a, b], "outputs": out}
    assert not breach(published, {"inputs": [a, b, c], "outputs": [*out, ["y", "IMAGE"]]})
    assert not breach(published, published)
    assert "open wrongly" in breach(published, {"inputs": [b, a], "outputs": out})
    assert "open wrongly" in breach(published, {"inputs": [a], "outputs": out})
    assert "inserted" in breach(published, {"inputs": [a, c, b], "outputs": out})
    assert "gained" in breach(published, {"inputs": [a, b, ["c", "INT", "required"]], "outputs": out})
    assert "inserted" in breach(published, {"inputs": [a, b], "outputs": [["y", "IMAGE"], *out]})
