"""Loading node packs as ComfyUI does, and refusing definitions that would break the canvas."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fluxcanvas.web.host.folders import Folders
from fluxcanvas.web.host.node_info import NodeDefinitionError, node_info, object_info
from fluxcanvas.web.host.packs import load_packs

NODE = """
class {name}:
    CATEGORY, RETURN_TYPES, FUNCTION = "t", ("IMAGE",), "run"
    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{}}}}
    def run(self):
        return (None,)
"""


def pack(base: Path, name: str, text: str, **more: str) -> Path:
    folder = base / "custom_nodes" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(text)
    for file, content in more.items():
        (folder / f"{file}.py").write_text(content)
    return folder


def one_node(name: str) -> str:
    return NODE.format(name=name) + f'\nNODE_CLASS_MAPPINGS = {{"{name}": {name}}}\n'


@pytest.fixture
def base(tmp_path):
    return tmp_path / "base"


def test_awkward_folders_load_with_relative_imports(base):
    for folder in ("my-Pack.v2", "nodes", "with space"):
        name = "Node" + folder[:2].title()
        pack(
            base,
            folder,
            "from .inner import NODE_CLASS_MAPPINGS, NAME\nWEB_DIRECTORY = 'web'\n",
            inner=one_node(name) + "NAME = __name__\n",
        )
    packs = load_packs(Folders(base))
    assert packs.failures == {}
    assert {"NodeMy", "NodeNo", "NodeWi"} <= set(packs.nodes)
    assert packs.nodes["NodeMy"].RELATIVE_PYTHON_MODULE == "custom_nodes.my-Pack.v2"
    expected = str(base / "custom_nodes" / "my-Pack.v2").replace(".", "_x_")
    assert f"{expected}.inner" == sys.modules[expected].NAME


def test_a_broken_pack_does_not_stop_the_others(base):
    pack(base, "a_raises", "raise RuntimeError('oh')")
    pack(base, "b_exits", "import sys; sys.exit(3)")
    pack(base, "c_syntax", "def (")
    pack(base, "d_missing", "import no_such_module_anywhere")
    pack(base, "e_no_nodes", "x = 1")
    pack(base, "f_v3", "async def comfy_entrypoint(): ...")
    (base / "custom_nodes" / "g_empty").mkdir()
    pack(base, "h_good", one_node("Good"))
    packs = load_packs(Folders(base))
    assert "Good" in packs.nodes
    assert set(packs.failures) == {"a_raises", "b_exits", "c_syntax", "d_missing", "e_no_nodes", "f_v3", "g_empty"}
    assert "oh" in packs.failures["a_raises"] and "V3" in packs.failures["f_v3"]


def test_disabled_and_hidden_packs_are_skipped(base):
    for name in ("off.disabled", ".hidden", "__pycache__"):
        pack(base, name, "raise RuntimeError")
    (base / "custom_nodes" / "notes.txt").write_text("x")
    assert load_packs(Folders(base)).failures == {}


def test_a_single_file_is_a_pack_and_replaces_no_module(base):
    pack(base, "unused", one_node("Unused"))
    (base / "custom_nodes" / "json.py").write_text(one_node("Single"))
    packs = load_packs(Folders(base))
    assert "Single" in packs.nodes and packs.nodes["Single"].RELATIVE_PYTHON_MODULE == "custom_nodes.json"
    assert sys.modules["json"] is json


def test_core_nodes_are_kept_and_later_packs_win(base):
    pack(
        base,
        "a",
        NODE.format(name="LoadImage")
        + NODE.format(name="Twice")
        + "Twice.mark = 'a'\n"
        + "NODE_CLASS_MAPPINGS = {'LoadImage': LoadImage, 'Twice': Twice}",
    )
    pack(base, "b", NODE.format(name="Twice") + "Twice.mark = 'b'\nNODE_CLASS_MAPPINGS = {'Twice': Twice}")
    packs = load_packs(Folders(base))
    assert packs.nodes["LoadImage"].RELATIVE_PYTHON_MODULE == "nodes"
    assert packs.nodes["Twice"].mark == "b"


def test_packs_of_an_extra_config_load(base, tmp_path):
    pack(tmp_path / "else", "far", one_node("Far"))
    config = tmp_path / "extra.yaml"
    config.write_text(f"t:\n  base_path: {tmp_path}/else\n  custom_nodes: custom_nodes\n")
    assert "Far" in load_packs(Folders(base, extra_config=[config])).nodes


def test_web_folders_stay_in_their_pack(base):
    good = pack(base, "good", one_node("A") + "WEB_DIRECTORY = './js'")
    (good / "js").mkdir()
    pack(base, "escape", one_node("B") + "WEB_DIRECTORY = '../..'")
    pack(base, "absent", one_node("C") + "WEB_DIRECTORY = 'none'")
    pack(base, "odd", one_node("D") + "WEB_DIRECTORY = 5")
    packs = load_packs(Folders(base))
    assert packs.web_folders().get("good") == good / "js"
    assert not {"escape", "absent", "odd"} & set(packs.web_folders())


def definition(**changes):
    members = {
        "CATEGORY": "t",
        "RETURN_TYPES": ("IMAGE",),
        "FUNCTION": "run",
        "run": lambda self: (None,),
        "INPUT_TYPES": classmethod(lambda cls: {"required": {"a": ("INT", {"default": 1})}}),
    }
    return type("Toy", (), {name: value for name, value in {**members, **changes}.items() if value is not None})


def inputs(value):
    return classmethod(lambda cls: value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"INPUT_TYPES": None}, "INPUT_TYPES is missing"),
        ({"INPUT_TYPES": inputs([])}, "must return a dict"),
        ({"INPUT_TYPES": inputs({"required": []})}, "must be a dict"),
        ({"INPUT_TYPES": inputs({"required": {"a": "INT"}})}, "must be a tuple"),
        ({"INPUT_TYPES": inputs({"required": {"a": ()}})}, "must be a tuple"),
        ({"INPUT_TYPES": inputs({"required": {"a": (5,)}})}, "type name"),
        ({"INPUT_TYPES": inputs({"optional": {"a": ("INT", 5)}})}, "in a dict"),
        ({"INPUT_TYPES": inputs({"required": {5: ("INT",)}})}, "text as its name"),
        ({"FUNCTION": None}, "FUNCTION must name"),
        ({"FUNCTION": "none"}, "does not have"),
        ({"RETURN_TYPES": None}, "RETURN_TYPES"),
        ({"RETURN_TYPES": "IMAGE"}, "RETURN_TYPES"),
        ({"RETURN_NAMES": ("a", "b")}, "2 entries for 1"),
        ({"OUTPUT_IS_LIST": (True, False)}, "2 entries"),
        ({"RETURN_NAMES": (5,)}, "texts"),
        ({"SEARCH_ALIASES": [5]}, "SEARCH_ALIASES"),
    ],
)
def test_malformed_definitions_are_named(changes, says):
    with pytest.raises(NodeDefinitionError, match=says):
        node_info("Toy", definition(**changes))


def test_a_malformed_node_of_a_pack_is_left_out(base):
    pack(base, "mixed", NODE.format(name="Fine") + "NODE_CLASS_MAPPINGS = {'Fine': Fine, 'Bad': object, 'Worse': 5}")
    packs = load_packs(Folders(base))
    assert "Fine" in packs.nodes and "Bad" not in packs.nodes and "Worse" not in packs.nodes
    assert {"mixed/Bad", "mixed/Worse"} <= set(packs.failures)


def test_one_failing_definition_does_not_empty_the_library():
    def fails(cls):
        raise OSError("the folder is gone")

    info = object_info(
        {"Good": definition(), "Bad": definition(INPUT_TYPES=classmethod(fails))}, {"Good": "A good one"}
    )
    assert list(info) == ["Good"] and info["Good"]["display_name"] == "A good one"


def test_a_definition_in_full():
    class Any(str):
        def __ne__(self, other):
            return False

    combo = ["a", "b"]
    info = node_info(
        "Toy",
        definition(
            INPUT_TYPES=inputs(
                {
                    "required": {"x": (combo,), "any": (Any("*"),)},
                    "optional": {"y": ("FLOAT", {"min": 0.0})},
                    "hidden": {"id": "UNIQUE_ID"},
                }
            ),
            RETURN_TYPES=("IMAGE", combo),
            OUTPUT_IS_LIST=(False, True),
            OUTPUT_TOOLTIPS=("t", None),
            OUTPUT_NODE=True,
            INPUT_IS_LIST=True,
            DEPRECATED=True,
            EXPERIMENTAL=True,
            DESCRIPTION="d",
        ),
        "Toy!",
    )
    assert info["input"] == {
        "required": {"x": [combo, {}], "any": ["*", {}]},
        "optional": {"y": ["FLOAT", {"min": 0.0}]},
        "hidden": {"id": "UNIQUE_ID"},
    }
    assert info["input_order"] == {"required": ["x", "any"], "optional": ["y"], "hidden": ["id"]}
    assert info["output"] == ["IMAGE", combo] and info["output_name"] == ["IMAGE", "COMBO"]
    assert (
        info["output_is_list"] == [False, True]
        and info["is_input_list"]
        and info["deprecated"]
        and info["experimental"]
    )
    assert json.loads(json.dumps(info)) == info
