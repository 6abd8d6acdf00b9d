"""Quantize, the loaders' own quantisation and devices, and Save Model: on the demo model, through the nodes."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fluxcanvas.flux_runtime import weights
from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.lora.stack import LoraStack
from fluxcanvas.flux_runtime.quant.packed import Packed, PackedLinear
from fluxcanvas.flux_runtime.quant.schemes import SCHEMES
from fluxcanvas.flux_runtime.schedule import Schedule
from fluxcanvas.flux_runtime.variants import VARIANTS
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS
from fluxcanvas.nodes import host as hosts

FILE = "model.safetensors"


def schemes_of(module) -> set[str]:
    return {pack.scheme for pack in module.modules() if isinstance(pack, Packed)}


def contents(module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in module.state_dict().items()}


def choices(node: str, name: str) -> list[str]:
    types = NODE_CLASS_MAPPINGS[f"FluxCanvas_{node}"].INPUT_TYPES()
    return {**types["required"], **types.get("optional", {})}[name][0]


@pytest.fixture
def partners(tmp_path, checkout) -> dict[str, str]:
    """The demo's text encoders, VAE and tokenizers in the model folders: what Load FLUX Parts takes beside a model."""
    demo, models = checkout / "demo" / "weights", tmp_path / "models"
    folders = {
        "text_encoders/clip": "text_encoder", "text_encoders/t5": "text_encoder_2", "vae/vae": "vae",
        "tokenizers/demo/tokenizer": "tokenizer", "tokenizers/demo/tokenizer_2": "tokenizer_2",
    }  # fmt: skip
    for name, part in folders.items():
        shutil.copytree(demo / part, models / name, copy_function=os.symlink)
    return {
        "clip": f"clip/{FILE}", "t5": f"t5/{FILE}", "vae": "vae/diffusion_pytorch_model.safetensors",
        "tokenizers": "demo",
    }  # fmt: skip


def test_a_quantised_model_draws_and_the_plain_one_stays(demo, draw, run, host):
    before, plain = contents(demo.transformer), draw(steps=1)["samples"]
    small, text = run("Quantize", scheme="fp8", model=demo.model)
    assert schemes_of(small.transformer) == {"fp8"} and text is None
    drawn = draw(model=small, steps=1)["samples"]
    error = (drawn - plain).norm() / plain.norm()
    assert 0 < error < 0.2
    assert contents(demo.transformer) == before and torch.equal(draw(steps=1)["samples"], plain)
    assert (small.variant, small.vae, small.schedule) == (demo.model.variant, demo.vae, demo.schedule)
    said = host.texts[2]
    assert "transformer: 32 linear layers as fp8" in said and "weight error 0.02" in said
    assert "as they were: 10: img_in" in said


def test_t5_is_quantised_by_a_scheme_of_its_own(demo, run, host):
    model, text = run("Quantize", scheme="none", t5_scheme="fp8", model=demo.model, text=demo.text)
    assert model is demo.model and schemes_of(text.t5) == {"fp8"} and text.clip is demo.text.clip
    assert not schemes_of(demo.text.t5) and host.texts[-1].startswith("T5: 21 linear layers as fp8")
    tokens, plain = text.encode("a red house").tokens, demo.text.encode("a red house").tokens
    assert 0 < (tokens - plain).norm() / plain.norm() < 0.2


def test_layers_named_in_keep_stay_plain(demo, run):
    small, _ = run("Quantize", scheme="fp8", keep="double_blocks.0, *.img_mod.lin\n", model=demo.model)
    packed = {name for name, module in small.transformer.named_modules() if isinstance(module, PackedLinear)}
    assert packed and not [
        name for name in packed if name.startswith("double_blocks.0.") or name.endswith("img_mod.lin")
    ]
    assert "double_blocks.1.img_attn.qkv" in packed
    with pytest.raises(FluxError, match=r"'triple_blocks' in keep fits no layer"):
        run("Quantize", scheme="fp8", keep="triple_blocks", model=demo.model)


def test_what_cannot_be_done_is_said(demo, run):
    with pytest.raises(FluxError, match="Quantize has nothing to do: connect a model"):
        run("Quantize")
    with pytest.raises(FluxError, match="Quantize has nothing to do"):
        run("Quantize", scheme="none", model=demo.model, text=demo.text)
    with pytest.raises(FluxError, match=r"Quantize: the input 'scheme' is 'fp9'; choose one of none, fp8"):
        run("Quantize", scheme="fp9", model=demo.model)
    with pytest.raises(FluxError, match=r"fp8-matmul needs a GPU.*use fp8"):
        run("Quantize", scheme="fp8-matmul", model=demo.model)
    small, _ = run("Quantize", scheme="bnb-nf4", model=demo.model)
    with pytest.raises(FluxError, match=r"the transformer is already stored as bnb-nf4.*choose none for the transf"):
        run("Quantize", scheme="fp8", model=small)


@pytest.mark.parametrize(
    ("scheme", "module", "extra"),
    [
        ("bnb-nf4", "bitsandbytes", "bitsandbytes"),
        ("quanto-int8", "optimum.quanto", "quanto"),
        ("torchao-int8", "torchao", "torchao"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(demo, run, monkeypatch, scheme, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FluxError, match=rf"quantising to {scheme} needs {module} .*fluxcanvas\[{extra}\]"):
        run("Quantize", scheme=scheme, model=demo.model)
    with pytest.raises(FluxError, match=rf"fluxcanvas\[{extra}\]"):
        run("LoadFlux", source="demo", quantize=scheme)


def test_quantising_can_be_stopped(demo, run, host):
    host.stop_at = 3
    with pytest.raises(host.Stopped):
        run("Quantize", scheme="fp8", model=demo.model)
    assert len(host.steps) == 2 and not schemes_of(demo.transformer)


def test_a_loader_quantises_as_the_node_does(draw, demo, run, host):
    model, text, _ = run("LoadFlux", source="demo", quantize="fp8", quantize_t5="fp8")
    small, small_text = run("Quantize", scheme="fp8", t5_scheme="fp8", model=demo.model, text=demo.text)
    assert schemes_of(model.transformer) == schemes_of(text.t5) == {"fp8"} and not schemes_of(text.clip)
    assert torch.equal(draw(model=model)["samples"], draw(model=small)["samples"])
    assert torch.equal(text.encode("a tree").tokens, small_text.encode("a tree").tokens)
    assert not schemes_of(run("LoadFlux", source="demo")[0].transformer)


@pytest.mark.parametrize("scheme", ["none", "fp8"])
def test_a_saved_model_loads_from_its_parts_and_draws_the_same(demo, partners, draw, run, host, scheme):
    model = demo.model if scheme == "none" else run("Quantize", scheme=scheme, model=demo.model)[0]
    (path,) = run("SaveModel", model=model, filename_prefix="mine/house")
    assert Path(path).is_relative_to(host.models / "diffusion_models") and f"saved {path}" in host.texts[-1]
    assert choices("LoadFluxParts", "transformer") == ["mine/house_00001.safetensors"]
    loaded, *_ = run("LoadFluxParts", transformer="mine/house_00001.safetensors", **partners)
    assert schemes_of(loaded.transformer) == ({scheme} - {"none"})
    assert contents(loaded.transformer) == contents(model.transformer) and loaded.params == model.params
    drawn, expected = (draw(model=one)["samples"] for one in (loaded, model))
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)  # mapped weights lie at other addresses


def test_nothing_is_overwritten(demo, run):
    first, second = (run("SaveModel", model=demo.model)[0] for _ in range(2))
    assert [Path(path).name for path in (first, second)] == ["flux1_00001.safetensors", "flux1_00002.safetensors"]
    assert load_file(first).keys() == load_file(second).keys()


@pytest.mark.parametrize("name", ["dev", "krea", "kontext"])
def test_the_file_knows_its_variant_and_schedule_whatever_it_is_called(demo, partners, checkout, run, host, name):
    """Nothing in the shapes tells these three apart, and the file is called after none, or another, of them."""
    own = replace(VARIANTS[name], dynamic_shift=False)
    model = replace(demo.model, variant=own, schedule=Schedule(dynamic=True, shift=2.5, max_shift=1.3, max_tokens=99))
    (path,) = run("SaveModel", model=model, filename_prefix="not-kontext")
    by_parts, *_ = run("LoadFluxParts", transformer=Path(path).name, **partners)
    bare = weights.load_flux(path, search=[host.models], tokenizers=checkout / "demo" / "weights", device="cpu").model
    for loaded in (by_parts, bare):
        assert loaded.variant.name == name and loaded.schedule == model.schedule
        assert loaded.params.axes_dim == demo.model.params.axes_dim
    assert run("LoadFluxParts", transformer=Path(path).name, **partners, variant="dev")[0].variant.name == "dev"
    assert weights.inspect(path).variant == name


def test_loras_are_not_in_the_file_and_the_node_says_so(demo, run, host):
    class Tiny:
        name, layers, in_channels, norms = "tiny", {}, 0, {}

    (path,) = run("SaveModel", model=replace(demo.model, loras=LoraStack().plus(Tiny())))
    assert "without the LoRAs, which stay files of their own: tiny" in host.texts[-1]
    assert load_file(path).keys() == set(demo.transformer.state_dict())


@pytest.mark.parametrize(
    "name", ["", "../out", "/etc/flux", "a//b", "..", "a/../b", "what?", "C:\\x", "a\0b", "mine/."]
)
def test_a_name_that_leads_elsewhere_is_refused(demo, run, host, name):
    with pytest.raises(FluxError, match="is no name for a file"):
        run("SaveModel", model=demo.model, filename_prefix=name)
    assert not host.models.exists()


def test_a_folder_that_cannot_be_written_is_named(demo, run, host, monkeypatch):
    (host.models).mkdir()
    (host.models / "diffusion_models").write_bytes(b"")
    with pytest.raises(FluxError, match=r"the folder .*diffusion_models cannot be made"):
        run("SaveModel", model=demo.model)
    monkeypatch.setattr(hosts, "_registered", [hosts.LocalHost()])
    with pytest.raises(FluxError, match="there is no folder for diffusion_models"):
        run("SaveModel", model=demo.model)


def test_of_several_folders_the_one_of_the_name_is_written_to(demo, run, host, tmp_path, monkeypatch):
    folders = [tmp_path / "unet", tmp_path / "diffusion_models"]
    monkeypatch.setattr(host, "folders", lambda category: folders, raising=False)
    assert Path(run("SaveModel", model=demo.model)[0]).parent == folders[1]


def test_saving_can_be_stopped_and_leaves_nothing(demo, run, host):
    host.stop_at = 3
    with pytest.raises(host.Stopped):
        run("SaveModel", model=demo.model)
    assert not list((host.models / "diffusion_models").iterdir())


def test_the_loaders_offer_schemes_and_devices(monkeypatch, host):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for node in ("LoadFlux", "LoadFluxParts"):
        assert choices(node, "quantize") == choices(node, "quantize_t5") == ["none", *SCHEMES]
        assert choices(node, "device") == ["auto", "balanced", "cpu", "cuda:0", "cuda:1"]
        assert choices(node, "text_device") == ["auto", "cpu", "cuda:0", "cuda:1"]
    assert choices("Quantize", "scheme") == ["none", *SCHEMES]


@pytest.fixture
def asked(monkeypatch, demo) -> list[dict]:
    """What the runtime's loaders are asked for; they answer with the demo."""
    calls: list[dict] = []
    for name in ("load_flux", "load_parts"):
        monkeypatch.setattr(weights, name, lambda *given, **wishes: calls.append(wishes) or demo)
    return calls


@pytest.mark.parametrize(
    ("device", "text_device", "wanted"),
    [
        ("auto", "auto", {"transformer": "cpu", "clip": "cpu", "t5": "cpu", "vae": "cpu"}),
        ("cuda:1", "auto", {"transformer": "cuda:1", "clip": "cuda:1", "t5": "cuda:1", "vae": "cuda:1"}),
        ("cuda:1", "cpu", {"transformer": "cuda:1", "clip": "cpu", "t5": "cpu", "vae": "cuda:1"}),
        ("auto", "cuda:0", {"transformer": "cpu", "clip": "cuda:0", "t5": "cuda:0", "vae": "cpu"}),
        ("balanced", "auto", "balanced"),
    ],
)
def test_devices_reach_the_loader_part_by_part(asked, partners, host, run, tmp_path, device, text_device, wanted):
    where = {"device": device, "text_device": text_device}
    run("LoadFlux", source="demo", **where, quantize="bnb-nf4")
    (tmp_path / "models" / "diffusion_models").mkdir()
    shutil.copy(tmp_path / "models" / "vae" / "vae" / "diffusion_pytorch_model.safetensors",
                tmp_path / "models" / "diffusion_models" / "x.safetensors")  # fmt: skip
    run("LoadFluxParts", transformer="x.safetensors", **partners, **where, quantize_t5="quanto-int8")
    for wishes in asked:
        given = wishes["device"]
        assert (given if isinstance(given, str) else {part: str(place) for part, place in given.items()}) == wanted
    assert [wishes["quantize"] for wishes in asked] == [{"transformer": "bnb-nf4"}, {"t5": "quanto-int8"}]


def test_balanced_and_a_device_for_the_text_contradict_each_other(run):
    with pytest.raises(FluxError, match="balanced places the text encoders too: set text_device to auto"):
        run("LoadFlux", source="demo", device="balanced", text_device="cpu")


def test_a_device_that_is_not_there_is_said(run):
    with pytest.raises(FluxError, match="'warp' is no device; use cpu"):
        run("LoadFlux", source="demo", device="warp")


@pytest.fixture
def freed(monkeypatch, host) -> list[int]:
    """What the host is asked to free."""
    wanted: list[int] = []
    monkeypatch.setattr(host, "free_memory", wanted.append, raising=False)
    return wanted


def test_memory_is_asked_for_as_the_loaded_parts_need_it(run, freed, demo):
    held = [demo.transformer, demo.text.clip, demo.text.t5, demo.vae.model]
    numbers = [sum(parameter.numel() for parameter in module.parameters()) for module in held]
    run("LoadFlux", source="demo", dtype="float32")
    run("LoadFlux", source="demo", dtype="bfloat16")
    run("LoadFlux", source="demo", dtype="float32", quantize="fp8")
    full, half, small = freed
    assert full == 2 * half == 4 * sum(numbers) and full - small == 3 * numbers[0]
    run("Quantize", scheme="fp8", model=demo.model)
    assert 0 < freed[-1] < 6_000_000


@pytest.mark.parametrize(
    ("device", "text_device", "wanted"),
    [
        ("auto", "auto", [1111]), ("auto", "cpu", [1001]), ("cuda:0", "auto", [1111]), ("cpu", "auto", []),
        ("cpu", "cuda:0", [110]), ("balanced", "auto", [1111]),
    ],
)  # fmt: skip
def test_memory_is_asked_for_what_goes_to_the_hosts_device(
    asked, freed, partners, run, host, monkeypatch, tmp_path, device, text_device, wanted
):
    monkeypatch.setattr(host, "device", lambda: torch.device("cuda"))
    (tmp_path / "models" / "diffusion_models").mkdir()
    (tmp_path / "models" / "diffusion_models" / "x.safetensors").touch()
    where = {"device": device, "text_device": text_device}
    run("LoadFlux", source="demo", **where)
    run("LoadFluxParts", transformer="x.safetensors", **partners, **where)
    for wishes in asked:
        freed.clear()
        wishes["make_room"]({"transformer": 1000, "clip": 10, "t5": 100, "vae": 1})
        assert freed == wanted


@pytest.mark.parametrize("category", ["diffusion_models", "text_encoders"])
def test_gguf_files_are_offered(tmp_path, category):
    folder = tmp_path / "models" / category
    folder.mkdir(parents=True)
    (folder / "small-Q4_K_S.gguf").write_bytes(b"GGUF")
    name = {"diffusion_models": "transformer", "text_encoders": "t5"}[category]
    assert choices("LoadFluxParts", name) == ["small-Q4_K_S.gguf"]
