"""Where the parts of a model go, and how much of a device each is taken to need."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.weights import load as loading
from fluxcanvas.flux_runtime.weights.devices import main_device, place
from fluxcanvas.flux_runtime.weights.sources import open_component

GB = 10**9
SIZES = {"transformer": 12 * GB, "clip": GB // 4, "t5": 5 * GB, "vae": GB // 6}


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(free, ...)`: CUDA devices with so much free memory."""

    def have(*free):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], free[index]))

    return have


def names(places):
    return {part: str(device) for part, device in places.items()}


def test_the_largest_parts_go_where_there_is_most_room(gpus):
    gpus(16 * GB, 20 * GB)
    assert names(place(SIZES, "balanced")) == {
        "transformer": "cuda:1", "t5": "cuda:0", "clip": "cuda:0", "vae": "cuda:0"
    }  # fmt: skip


def test_what_fits_nowhere_stays_on_the_cpu_and_is_told(gpus, caplog):
    gpus(8 * GB)
    with caplog.at_level(logging.WARNING, "fluxcanvas"):
        places = names(place(SIZES, "balanced"))
    assert places == {"transformer": "cpu", "t5": "cuda:0", "clip": "cuda:0", "vae": "cuda:0"}
    assert "the transformer (12 GB) fits on no CUDA device" in caplog.text


def test_without_a_gpu_all_go_to_one_device(gpus, caplog, monkeypatch):
    gpus()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert set(names(place(SIZES, "balanced")).values()) == {"cpu"}
    assert "no CUDA device to balance" in caplog.text


def test_one_device_and_a_table_of_parts(gpus):
    gpus(GB, GB)
    assert set(names(place(SIZES, "cuda:1")).values()) == {"cuda:1"}
    table = {"transformer": "cuda:1", "t5": "cpu", "clip": None}
    assert names(place(SIZES, table)) == {"transformer": "cuda:1", "clip": "cuda:1", "t5": "cpu", "vae": "cuda:1"}
    with pytest.raises(FluxError, match="'unet' is no part of a model"):
        place(SIZES, {"unet": "cpu"})
    assert [str(main_device(wish)) for wish in (table, "cpu", "balanced")] == ["cuda:1", "cpu", "cuda"]


@pytest.mark.parametrize("wish", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "bf16", "quantize": "fp8"}])
def test_parts_are_placed_by_what_they_take_once_loaded(monkeypatch, load, wish):
    """Not by their files: a bf16 file that is quantised to 8 bits needs half its size."""
    asked = {}
    monkeypatch.setattr(loading, "place", lambda sizes, device: asked.update(sizes) or place(sizes, device))
    flux = load("demo", **wish)
    modules = {"transformer": flux.transformer, "t5": flux.text.t5, "clip": flux.text.clip, "vae": flux.vae.model}
    for part, module in modules.items():
        held = sum(t.nbytes for t in [*dict(module.named_parameters()).values(), *module.buffers()])
        assert asked[part] == pytest.approx(held, rel=0.25 if "quantize" in wish else 0.01), part


def test_a_file_that_is_packed_anew_is_placed_by_what_it_then_takes(tmp_path, demo):
    """An fp8 file of 8 bits a number as nf4."""
    path = tmp_path / "fp8.safetensors"
    matrices = demo.transformer.state_dict()
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in matrices.items()}, path)
    component = open_component(path, "transformer")
    plain, packed = (loading._held_bytes(component, scheme, torch.bfloat16) for scheme in (None, "bnb-nf4"))
    numbers = sum(tensor.numel() for tensor in matrices.values())
    assert plain >= numbers and packed == pytest.approx(numbers * 4.5 / 8, rel=0.01)


def test_a_transformer_that_no_gpu_has_room_for_has_the_type_of_the_cpu(gpus, monkeypatch, load):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    flux = load("demo", device="balanced")
    assert (flux.transformer.device.type, flux.transformer.dtype) == ("cpu", torch.float32)
