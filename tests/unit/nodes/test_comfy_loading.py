"""The folder as a pack in ComfyUI: how it is imported there, and what it asks of ComfyUI."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from fluxcanvas import NODE_CLASS_MAPPINGS
from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.nodes import host as hosts
from fluxcanvas.nodes.comfy_host import ComfyHost

HEAVY = {"torch", "transformers", "huggingface_hub", "diffusers", "aiohttp", "numpy", "PIL"}
OURS = {"fluxcanvas", "flux_runtime", "web", "demo", "schema", "edges", "host", "load"}

# What ComfyUI does with a folder in custom_nodes, beside its own top-level module `nodes`.
LOAD = """
import importlib.util, json, os, sys, types

sys.modules["nodes"] = foreign = types.ModuleType("nodes")
folder, search_path = sys.argv[1], list(sys.path)
before = set(sys.modules)
name = folder.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
pack = importlib.util.module_from_spec(spec)
sys.modules[name] = pack
spec.loader.exec_module(pack)
at_once = set(sys.modules) - before
nodes = pack.NODE_CLASS_MAPPINGS
declared = {id: made.INPUT_TYPES() for id, made in nodes.items()}
print(json.dumps({
    "ids": sorted(nodes), "shown": pack.NODE_DISPLAY_NAME_MAPPINGS, "version": pack.__version__,
    "web": os.path.isfile(os.path.join(folder, pack.WEB_DIRECTORY, "index.js")),
    "at_once": len(at_once), "top_level": sorted({m.partition(".")[0] for m in set(sys.modules) - before}),
    "foreign": sys.modules["nodes"] is foreign and not vars(foreign).get("NODE_CLASS_MAPPINGS"),
    "path": sys.path == search_path, "inputs": {id: list(types["required"]) for id, types in declared.items()},
}))
"""

DRAW = """
def run(id, **inputs):
    made = nodes["FluxCanvas_" + id]
    return getattr(made(), made.FUNCTION)(**inputs)

model, text, vae = run("LoadFlux", source="demo")
(positive,) = run("EncodePrompt", text=text, prompt="a red house")
(latent,) = run("EmptyCanvas", width=32, height=32)
(latent,) = run("Sample", model=model, positive=positive, latent=latent, steps=1)
print(json.dumps(list(run("Decode", vae=vae, latent=latent)[0].shape)))
print(json.dumps(sorted({m.partition(".")[0] for m in sys.modules})))
"""


def python(code: str, folder: Path) -> list:
    """Run code in a fresh interpreter, away from the checkout; one JSON value a line comes back."""
    call = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code, str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=folder.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", ["my-Pack.v2", "nodes", "fluxcanvas"])
def test_the_pack_loads_under_any_folder_name_and_imports_nothing_heavy(tmp_path, checkout, name):
    folder = tmp_path / "custom_nodes" / name
    folder.parent.mkdir()
    folder.symlink_to(checkout, target_is_directory=True)
    (found,) = python(LOAD, folder)
    assert found["foreign"] and found["path"] and found["web"]
    assert found["version"] and found["at_once"] < 10, "the root module must import nothing until asked"
    assert not HEAVY & set(found["top_level"]) and not OURS & set(found["top_level"])
    assert found["ids"] == sorted(NODE_CLASS_MAPPINGS) and set(found["shown"]) == set(found["ids"])
    assert found["inputs"]["FluxCanvas_LoadFlux"][0] == "source"


def test_a_copy_under_an_awkward_name_draws(tmp_path, checkout):
    folder = tmp_path / "custom_nodes" / "my-Pack.v2"
    for part in ("nodes", "flux_runtime", "web/js", "demo/weights"):
        shutil.copytree(checkout / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(checkout / "__init__.py", folder)
    _, shape, modules = python(LOAD + DRAW, folder)
    assert shape == [1, 32, 32, 3]
    assert not {"fluxcanvas", "flux_runtime", "comfy", "folder_paths", "diffusers"} & set(modules)


def test_the_root_module_knows_no_other_names():
    import fluxcanvas

    assert fluxcanvas.WEB_DIRECTORY == "./web/js"
    with pytest.raises(AttributeError, match="has no attribute 'NODES'"):
        _ = fluxcanvas.NODES


class InterruptProcessingException(Exception):
    """Named as ComfyUI's."""


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """The few names of ComfyUI that the adapter uses, recording their calls; gone after the test."""
    said = SimpleNamespace(bars=[], texts=[], freed=[], stop=False)
    said.models, said.extra = tmp_path / "models", tmp_path / "extra"

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            said.bars.append((value, total, preview))

    def stop():
        if said.stop:
            raise InterruptProcessingException

    folders = {"vae": ([str(said.models / "vae"), str(said.extra)], {".safetensors", ".pt"})}
    modules = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {
            "InterruptProcessingException": InterruptProcessingException,
            "throw_exception_if_processing_interrupted": stop,
            "get_torch_device": lambda: "cuda:3",
            "free_memory": lambda size, device: said.freed.append((size, device)),
        },
        "folder_paths": {
            "models_dir": str(said.models),
            "folder_names_and_paths": folders,
            "get_folder_paths": lambda category: list(folders[category][0]),
            "get_filename_list": lambda category: ["z.pt", "sub\\b.safetensors", "a.safetensors"],
        },
        "server": {
            "PromptServer": SimpleNamespace(
                instance=SimpleNamespace(
                    send_progress_text=lambda text, node: said.texts.append((text, node)), last_node_id="9"
                )
            )
        },
        "comfy_execution": {},
        "comfy_execution.utils": {"get_executing_context": lambda: SimpleNamespace(node_id="4")},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["comfy"].model_management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(hosts, "_registered", [])
    return said


def test_inside_comfyui_its_adapter_answers(comfy):
    assert isinstance(hosts.current(), ComfyHost)
    assert hosts.current() is hosts.current()


def test_a_registered_host_goes_before_comfyui(comfy):
    own = hosts.LocalHost()
    hosts.use(own)
    assert hosts.current() is own


def test_without_comfyui_plain_python_answers(monkeypatch):
    monkeypatch.setattr(hosts, "_registered", [])
    assert isinstance(hosts.current(), hosts.LocalHost) and hosts.current().files("vae") == []


def test_progress_previews_and_text_reach_comfyui(comfy):
    picture = Image.new("RGB", (8, 8))
    host = ComfyHost()
    host.progress(2, 5)
    host.progress(3, 5, picture)
    host.text("hello")
    assert comfy.bars == [(2, 5, None), (3, 5, ("JPEG", picture, 512))]
    assert comfy.texts == [("hello", "4")]


def test_text_reaches_versions_without_an_executing_context(comfy, monkeypatch):
    monkeypatch.delattr(sys.modules["comfy_execution.utils"], "get_executing_context")
    ComfyHost().text("hello")
    assert comfy.texts == [("hello", "9")]


def test_text_goes_to_the_log_alone_where_the_server_cannot_show_it(comfy, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "server", None)
    with caplog.at_level("INFO", logger="fluxcanvas"):
        ComfyHost().text("hello")
    assert comfy.texts == [] and "hello" in caplog.text


def test_comfyuis_interruption_passes_through(comfy):
    host = ComfyHost()
    host.check_interrupt()
    comfy.stop = True
    with pytest.raises(InterruptProcessingException) as caught:
        host.check_interrupt()
    assert host.interrupted(caught.value) and not host.interrupted(ValueError())


def test_device_and_memory_are_comfyuis(comfy):
    host = ComfyHost()
    assert host.device() == "cuda:3"
    host.free_memory(1000)
    assert comfy.freed == [(1000, "cuda:3")]


def test_models_are_found_in_all_of_comfyuis_folders(comfy):
    host = ComfyHost()
    assert host.folders("vae") == [comfy.models / "vae", comfy.extra]
    assert host.folders("tokenizers") == [comfy.models / "tokenizers"]
    assert host.files("vae") == ["a.safetensors", "sub/b.safetensors"]
    comfy.extra.mkdir()
    (comfy.extra / "a.safetensors").write_bytes(b"")
    assert host.resolve("vae", "a.safetensors") == comfy.extra / "a.safetensors"
    with pytest.raises(FluxError, match=r"'c.safetensors' is not in .*vae or .*extra"):
        host.resolve("vae", "c.safetensors")


def test_whole_models_are_listed_as_folders(comfy):
    inside = comfy.models / "diffusers" / "maker" / "model"
    inside.mkdir(parents=True)
    (inside / "model_index.json").write_text("{}")
    (inside.parent / "readme.safetensors").write_bytes(b"")
    assert ComfyHost().files("diffusers") == ["maker/model"]
    assert ComfyHost().resolve("diffusers", "maker/model") == inside


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "", "a/../../secret.safetensors"])
def test_a_name_cannot_lead_out_of_the_folders(tmp_path, name):
    (tmp_path / "vae").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    with pytest.raises(FluxError, match="is not in"):
        hosts.LocalHost(tmp_path).resolve("vae", name)
