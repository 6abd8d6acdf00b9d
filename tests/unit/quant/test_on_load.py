"""Quantising while loading: the same bytes as afterwards, for every scheme and both parts, and never twice."""

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError, load_parts
from fluxcanvas.flux_runtime.quant.fp8 import Fp8
from fluxcanvas.flux_runtime.quant.packed import PackedLinear, weight_of
from fluxcanvas.flux_runtime.quant.save import save_module
from fluxcanvas.flux_runtime.quant.schemes import SCHEMES
from fluxcanvas.flux_runtime.quant.swap import KEPT, quantise
from fluxcanvas.flux_runtime.weights.files import TensorFile

NAMES = [name for name in SCHEMES if name != "fp8-matmul"]  # which needs a GPU


@pytest.mark.parametrize("name", NAMES)
def test_every_scheme_gives_what_quantising_afterwards_gives(name, load, demo, same):
    flux = load("demo", quantize=name)
    for part, plain, made in (
        ("transformer", demo.transformer, flux.transformer), ("t5", demo.text.t5, flux.text.t5)
    ):  # fmt: skip
        expected, summary = quantise(plain, name)
        same(made, expected)
        assert f", {summary.layers} layers as {name}" in flux.report.part(part).note
    assert not any(isinstance(module, PackedLinear) for module in flux.text.clip.modules())


def test_a_scheme_for_each_part(load):
    flux = load("demo", quantize={"t5": "bnb-int8", "clip": "fp8"})
    notes = {part.name: part.note for part in flux.report.parts}
    assert "bnb-int8" in notes["t5"] and "as fp8" in notes["clip"] and "layers as" not in notes["transformer"]
    with pytest.raises(FluxError, match="'unet' is no part of a model"):
        load("demo", quantize={"unet": "fp8"})
    with pytest.raises(FluxError, match="there is no quantisation 'int3'; use one of fp8"):
        load("demo", quantize="int3")


def test_float8_of_quanto_from_a_plain_fp8_file(parts, rename, load):
    """As on diffusers' page: one file in plain fp8, quantised to quanto's float8; what stays plain stays fp8."""
    rename(parts["transformer"], lambda tensors: {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()})
    flux = load(parts["transformer"], dtype="bf16", quantize="quanto-float8", search=[parts["t5"].parents[1]])
    stored = TensorFile(parts["transformer"])
    for name, layer in flux.transformer.named_modules():
        if isinstance(layer, PackedLinear):
            kept = name.startswith(tuple(KEPT))
            (pack,) = layer.packs
            assert pack.scheme == ("fp8" if kept else "quanto-float8"), name
            weight = stored.read(f"{name}.weight").float()
            error = (weight_of(layer, torch.float32) - weight).norm() / weight.norm()
            assert error == 0 if isinstance(pack, Fp8) else 0 < error < 0.04, name
    assert "quanto-float8" in flux.report.part("t5").note


def test_weights_that_are_packed_otherwise_are_refused(demo, tmp_path):
    path = tmp_path / "flux1-nf4.safetensors"
    save_module(quantise(demo.transformer, "bnb-nf4")[0], path)
    said = r"the transformer is already stored as bnb-nf4 \(.*\.lin\); load its bf16 file to quantise it to torchao"
    with pytest.raises(FluxError, match=said):
        load_parts(transformer=path, clip=None, t5=None, vae=None, device="cpu", quantize="torchao-int8")


def test_a_packed_t5_is_left_as_it_is_unless_it_is_named(parts, tokenizers, tmp_path, demo):
    plain = {"tokenizers": tokenizers, "device": "cpu", "dtype": "bf16"}
    packed = quantise(load_parts(**parts, **plain).text.t5, "bnb-nf4")[0]
    given = {**parts, **plain, "t5": tmp_path / "t5-nf4.safetensors"}
    save_module(packed, given["t5"])
    report = load_parts(**given, quantize="fp8").report
    assert "as fp8" in report.part("transformer").note and "as fp8" not in report.part("t5").note
    assert "the T5 text encoder stays bnb-4bit nf4, as its file has it, and not fp8" in report.text()
    assert "stays" not in load_parts(**{**given, "t5": parts["t5"]}, quantize="fp8").report.text()
    with pytest.raises(FluxError, match=r"the T5 text encoder is already stored as bnb-nf4.*choose none for the T5"):
        load_parts(**given, quantize={"t5": "fp8"})
