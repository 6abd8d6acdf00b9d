"""What a person at the terminal, a slow browser and a broken disk get to see."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.web.host import cli, examples, files
from fluxcanvas.web.host.core_nodes import core_nodes
from fluxcanvas.web.host.events import _Client, text_frame
from fluxcanvas.web.host.folders import Folders
from fluxcanvas.web.host.logs import LogBuffer
from fluxcanvas.web.host.options import HostOptions
from fluxcanvas.web.host.pictures import eight_bit
from fluxcanvas.web.host.routes.view import one_channel, preview
from fluxcanvas.web.host.security import HostRule, _same_origin

FAILS = """
class Fails:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}
    def run(self):
        raise ValueError("the wheel came off; put it on again")
NODE_CLASS_MAPPINGS = {"Fails": Fails}
"""


@pytest.fixture
def base(tmp_path):
    packs = tmp_path / "base" / "custom_nodes"
    packs.mkdir(parents=True)
    (packs / "fails.py").write_text(FAILS)
    (packs / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "base" / "prompt.json").write_text(json.dumps({"1": {"class_type": "Fails", "inputs": {}}}))
    return tmp_path / "base"


def run(base, *options: str) -> int:
    return cli.main(["run", str(base / "prompt.json"), "--base-directory", str(base), *options])


def test_a_failed_node_is_told_once_and_without_its_traceback(base, capsys):
    assert run(base) == 1
    told = capsys.readouterr().err
    assert told.count("the wheel came off") == 1 and "File " not in told
    assert told.endswith("error: node 1 (Fails): the wheel came off; put it on again\n")
    with pytest.raises(FluxError):
        run(base, "--debug")
    assert 'raise ValueError("the wheel came off' in capsys.readouterr().err


def test_a_pack_that_does_not_load_is_told_without_its_traceback(base, capsys):
    run(base)
    told = capsys.readouterr().err
    assert "broken.py did not load: ModuleNotFoundError: No module named 'nothing_of_this_name'\n" in told


def test_a_device_that_is_not_there_is_told_before_anything_runs(base, capsys):
    assert run(base, "--device", "xpu:7") == 1
    told = capsys.readouterr().err
    assert "xpu:7 cannot be used here" in told and "--device cpu" in told and "Fails ..." not in told


def waiting(client: _Client) -> int:
    return client.outbox.qsize()


def test_of_a_busy_client_only_previews_are_dropped():
    async def fill() -> tuple[int, int]:
        client = _Client(SimpleNamespace())
        for _ in range(100):
            client.put(b"preview", preview=True)
        before = waiting(client)
        client.put(text_frame("done", "1", None))
        client.put("{}")
        return before, waiting(client)

    assert asyncio.run(fill()) == (32, 34)


def test_half_an_emoji_can_be_told():
    assert text_frame("cat \ud83d", "1", None).endswith(b"cat ?")
    assert b"?" in text_frame("cat", "\ud83d", "\ud83d")  # ids are the client's own


@pytest.mark.parametrize("origin", ["http://[", "http://a]b", "http://[::1"])
def test_a_malformed_origin_is_foreign(origin):
    assert not _same_origin(origin, "127.0.0.1:8188")
    assert _same_origin("http://127.0.0.1:8188", "127.0.0.1:8188")


def test_an_allowed_host_may_be_given_with_its_port():
    rule = HostRule(HostOptions(allowed_hosts=("Box.lan:8188", "other.lan.")))
    assert rule.allows("box.lan") and rule.allows("BOX.lan:80") and rule.allows("other.lan")
    assert not rule.allows("lan") and not rule.allows("evil.example")


def test_a_new_file_is_whole_from_its_first_moment(tmp_path, monkeypatch):
    """A program killed between two steps, or another that looks in, must not meet an empty file."""
    seen = []
    monkeypatch.setattr(files.os, "open", lambda path, *rest: seen.append(path))
    monkeypatch.setattr(files, "_scratch", lambda path, data: str(tmp_path / ".x.part"))
    (tmp_path / ".x.part").write_bytes(b"whole")
    files.write_atomic(tmp_path / "a.png", b"whole", overwrite=False)
    assert (tmp_path / "a.png").read_bytes() == b"whole" and os.listdir(tmp_path) == ["a.png"] and not seen


def test_where_there_are_no_hard_links_no_file_is_overwritten_either(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    files.write_atomic(tmp_path / "a.png", b"first", overwrite=False)
    with pytest.raises(files.Taken):
        files.write_atomic(tmp_path / "a.png", b"second", overwrite=False)
    assert (tmp_path / "a.png").read_bytes() == b"first" and os.listdir(tmp_path) == ["a.png"]


def test_a_full_disk_leaves_no_half_of_a_shipped_picture(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.DiskFull):
        examples.provide_inputs(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_malformed_log_line_does_not_fail_who_logs_it(monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    buffer = LogBuffer(lambda *message: None)
    log = logging.Logger("some library")
    log.addHandler(buffer)
    log.warning("%d pieces", "many")
    log.warning("%d pieces", 3)
    assert [entry["m"] for entry in buffer.entries()] == ["3 pieces\n"]


def test_a_linked_picture_name_is_judged_when_it_is_known(tmp_path):
    load = core_nodes(Folders(tmp_path))["LoadImage"]
    assert load.VALIDATE_INPUTS(None) is True
    assert "gone.png" in load.VALIDATE_INPUTS("gone.png")


def test_deep_grey_is_shown_as_grey(tmp_path):
    levels = np.full((4, 4), 0x8000, dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "depth.png")
    (tmp_path / "out.webp").write_bytes(preview(tmp_path / "depth.png", "webp", 100, "rgba"))
    (tmp_path / "out.png").write_bytes(one_channel(tmp_path / "depth.png", "rgb"))
    for name in ("out.webp", "out.png"):
        assert abs(Image.open(tmp_path / name).convert("RGB").getpixel((1, 1))[0] - 128) <= 2, name
    plain = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    assert eight_bit(plain) is plain


def test_a_missing_canvas_is_told_before_anything_is_served(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "comfyui_frontend_package", None)
    assert cli.main(["serve", "--no-open", "--port", "0", "--base-directory", str(tmp_path)]) == 1
    assert "comfyui_frontend_package is not installed" in capsys.readouterr().err


def test_two_threads_get_one_temporary_folder(tmp_path, monkeypatch):
    made = []

    def slowly(prefix: str) -> str:
        folder = tmp_path / f"{prefix}{len(made)}"
        made.append(folder)
        time.sleep(0.05)  # time enough for the other thread to come in
        return str(folder)

    monkeypatch.setattr(tempfile, "mkdtemp", slowly)
    folders = Folders(tmp_path / "base")
    with ThreadPoolExecutor(2) as threads:
        found = {thread.result() for thread in [threads.submit(lambda: folders.temp) for _ in range(2)]}
    assert len(found) == len(made) == 1
