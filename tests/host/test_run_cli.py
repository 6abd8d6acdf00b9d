"""`fluxcanvas run`: what it reads, what it changes, what it prints, and how it ends."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fluxcanvas.web.host import cli
from fluxcanvas.web.host.convert import WorkflowError
from fluxcanvas.web.host.examples import WORKFLOWS, provide_inputs
from fluxcanvas.web.host.overrides import apply_settings, reflect
from fluxcanvas.web.host.terminal import Terminal, bar
from fluxcanvas.web.host.workflow_file import read_workflow

PACK = """
from fluxcanvas.nodes import host
import time

class Slow:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"rounds": ("INT", {"default": 3, "min": 1, "max": 5000})}}
    def run(self, rounds):
        for number in range(rounds):
            host.current().check_interrupt()
            host.current().progress(number + 1, rounds)
            if rounds > 3:
                time.sleep(0.02)
        host.current().text("went round")
        return {}

class Fails(Slow):
    def run(self, rounds):
        raise ValueError("the wheel came off; put it on again")

NODE_CLASS_MAPPINGS = {"Slow": Slow, "Fails": Fails}
NODE_DISPLAY_NAME_MAPPINGS = {"Slow": "Slow One"}
"""
DEFINITIONS = {
    "Kinds": {
        "input": {
            "required": {
                "whole": ["INT", {"control_after_generate": True}],
                "part": ["FLOAT", {}],
                "flag": ["BOOLEAN", {}],
                "text": ["STRING", {}],
                "combo": [["a", 2], {}],
                "several": ["COMBO", {"options": ["x", "y"], "multi_select": True}],
                "picture": ["IMAGE", {}],
            },
            "optional": {"extra": ["INT", {}]},
        },
        "output": ["INT"],
    }
}


@pytest.fixture
def base(tmp_path) -> Path:
    """A base folder with a node pack and two input pictures."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "pack.py").write_text(PACK)
    (tmp_path / "input").mkdir()
    Image.new("RGB", (32, 16), "red").save(tmp_path / "input" / "red.png")
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "input" / "blue.png")
    return tmp_path


COPY = {
    "nodes": [
        {
            "id": 1,
            "type": "LoadImage",
            "title": "Which",
            "widgets_values": ["red.png", "image"],
            "inputs": [],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
        },
        {
            "id": 2,
            "type": "SaveImage",
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
            "outputs": [],
            "widgets_values": ["copy"],
        },
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    "version": 0.4,
}


def run(base, content, *options) -> int:
    path = base / "workflow.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return cli.main(["run", str(path), "--base-directory", str(base), *options])


def of(kind, **inputs):
    return {"1": {"class_type": kind, "inputs": inputs, "_meta": {"title": "The node"}}}


def test_prints_the_path_and_nothing_else(base, capsys):
    assert run(base, COPY, "-o", str(base / "there")) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{base / 'there' / 'copy_00001_.png'}\n"
    assert "Save Image ..." in printed.err
    with Image.open(base / "there" / "copy_00001_.png") as picture:
        assert picture.size == (32, 16) and picture.getpixel((0, 0)) == (255, 0, 0)


def test_the_picture_carries_the_changed_workflow_and_runs_again(base, capsys):
    assert run(base, COPY, "--set", "Which.image=blue.png") == 0
    first = Path(capsys.readouterr().out.strip())
    saved = read_workflow(first)
    assert saved.prompt["1"]["inputs"]["image"] == "blue.png"
    assert saved.workflow["nodes"][0]["widgets_values"] == ["blue.png", "image"]
    assert cli.main(["run", str(first), "--base-directory", str(base)]) == 0
    second = Path(capsys.readouterr().out.strip())
    assert second.name == "copy_00002_.png" and Image.open(second).getpixel((0, 0)) == (0, 0, 255)


def test_previews_are_kept(base, capsys):
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "red.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    assert run(base, prompt) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == base / "output" and path.is_file()


def test_progress_and_words_of_nodes_are_plain_lines_when_nobody_watches(base, capsys):
    assert run(base, of("Slow", rounds=2)) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "The node ...\n" in told.err and "The node 100% |########################| 2/2" in told.err
    assert "The node: went round\n" in told.err and "\r" not in told.err


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (of("Slow", rounds=0), ["node 1 (The node)", "rounds", "--set"]),
        (of("Slow"), ["node 1 (The node)", "rounds", "required"]),
        (of("Gone"), ["Gone"]),
        (of("LoadImage", image="red.png"), ["no outputs"]),
        (
            {"1": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "x"}}},
            ["node 1", "node 7", "again"],
        ),
        (of("Fails", rounds=1), ["node 1 (The node): the wheel came off; put it on again"]),
        ("{", ["not valid JSON (line 1)"]),
        ({"a": 1}, ["no workflow"]),
        ([], ["no workflow"]),
    ],
)
def test_what_is_wrong_is_told_in_words(base, capsys, prompt, words):
    assert run(base, prompt) == 1
    told = capsys.readouterr()
    assert told.out == "" and "Traceback" not in told.err
    assert all(word in told.err for word in words), told.err


def test_outputs_that_can_run_do_and_the_others_are_told(base, capsys):
    prompt = {**of("Slow", rounds=1), "2": {"class_type": "Slow", "inputs": {"rounds": 0}}}
    assert run(base, prompt) == 1
    told = capsys.readouterr().err
    assert "left out: node 2 (Slow)" in told and "The node: went round" in told


def test_files_that_carry_no_workflow(base, tmp_path):
    for name, words in (("red.png", "carries no workflow"), ("gone.json", "no workflow file"), ("blue.txt", "JSON")):
        (base / "input" / "blue.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(WorkflowError, match=words):
            read_workflow(base / "input" / name)
    (tmp_path / "false.png").write_text("text")
    with pytest.raises(WorkflowError, match="no picture that can be read"):
        read_workflow(tmp_path / "false.png")


def test_ctrl_c_stops_at_the_next_step(base):
    path = base / "workflow.json"
    path.write_text(json.dumps(of("Slow", rounds=5000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxcanvas.web.host", "run", str(path), "--base-directory", str(base)],
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("The node ..."):
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in told and "went round" not in told


# --set


def kinds(**inputs):
    return {"4": {"class_type": "Kinds", "inputs": inputs, "_meta": {"title": "Kinds"}}}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("4.whole=7", 7),
        ("Kinds.part=0.5", 0.5),
        ("kinds.flag=yes", True),
        ("Kinds.flag=off", False),
        ("4.text=a=b.c", "a=b.c"),
        ("4.combo=2", 2),
        ("4.combo=zz", "zz"),
        ("4.several=x,y", {"__value__": ["x", "y"]}),
        ('4.several=["y"]', {"__value__": ["y"]}),
        ("4.extra=3", 3),
        ("4.loose=word", "word"),
        ("4.text=", ""),
    ],
)
def test_values_have_the_type_of_their_input(setting, value):
    prompt = kinds(loose="old")
    apply_settings(prompt, [setting], DEFINITIONS)
    name = setting.partition("=")[0].partition(".")[2]
    assert prompt["4"]["inputs"][name] == value and type(prompt["4"]["inputs"][name]) is type(value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("4.whole=x", "'x' is not a whole number"),
        ("4.part=x", "not a number"),
        ("4.flag=maybe", "true or false"),
        ("4.gone=1", r"node 4 \(Kinds\) has no input 'gone'; it has whole, part"),
        ("Gone.whole=1", r"there are 4 \(Kinds\)"),
        ("4.picture=1", "takes a connection"),
    ],
)
def test_settings_that_do_not_fit_name_what_would(setting, words):
    with pytest.raises(WorkflowError, match=words):
        apply_settings(kinds(), [setting], DEFINITIONS)


def test_a_title_that_several_nodes_have_is_ambiguous():
    prompt = {**kinds(), "5:3": kinds()["4"]}
    with pytest.raises(
        WorkflowError, match=r"several nodes are called 'Kinds': 4 \(Kinds\), 5:3 \(Kinds\); use the id"
    ):
        apply_settings(prompt, ["Kinds.whole=1"], DEFINITIONS)
    apply_settings(prompt, ["5:3.whole=1"], DEFINITIONS)
    assert prompt["5:3"]["inputs"] == {"whole": 1}


def test_titles_may_have_dots():
    prompt = {"1": {"class_type": "Kinds", "inputs": {}, "_meta": {"title": "v1.5 model"}}}
    apply_settings(prompt, ["v1.5 model.whole=2"], DEFINITIONS)
    assert prompt["1"]["inputs"] == {"whole": 2}


def test_a_change_without_a_widget_in_the_file_is_not_reflected():
    saved = {"nodes": [{"id": 4, "type": "Kinds", "widgets_values": [1, "fixed", 0.5], "inputs": []}]}
    changes = apply_settings(kinds(), ["4.part=0.75"], DEFINITIONS)
    assert reflect(saved, changes, DEFINITIONS) and saved["nodes"][0]["widgets_values"] == [1, "fixed", 0.75]
    assert not reflect(saved, apply_settings(kinds(), ["4.text=x"], DEFINITIONS), DEFINITIONS)


# the terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_that_stays_on_its_line():
    screen = Screen()
    terminal = Terminal(screen)
    terminal.begin(of("Slow"))
    terminal.send("executing", {"node": "1"}, None)
    for value in (1, 2):
        terminal.send("progress", {"node": "1", "value": value, "max": 2}, None)
    terminal.line("done")
    shown = screen.getvalue()
    assert shown.count("\n") == 2 and shown.endswith("\ndone\n")
    assert "\r\x1b[2KThe node  50% |############            | 1/2" in shown


def test_the_bar_counts_time():
    assert bar("Sample", 4, 8, 61) == "Sample  50% |############            | 4/8 [01:01<01:01]"
    assert bar("Sample", 0, 0, 5) == "Sample   0% |                        | 0/0 [00:05<?]"


# what comes along


def test_shipped_pictures_are_provided_once(tmp_path):
    names = sorted(path.name for path in (WORKFLOWS / "inputs").iterdir())
    assert [path.name for path in provide_inputs(tmp_path / "input")] == names
    (tmp_path / "input" / names[0]).write_text("mine")
    assert provide_inputs(tmp_path / "input") == [] and (tmp_path / "input" / names[0]).read_text() == "mine"
