"""Quantised single files as people publish them, through the loader: each draws what its unpacked weights draw."""

import json
import re
from functools import partial
from itertools import cycle

import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from fluxcanvas.flux_runtime import FluxError, inspect, load_parts
from fluxcanvas.flux_runtime.quant.gguf_blocks import FORMATS
from fluxcanvas.flux_runtime.quant.packed import PackedLinear

E4M3 = torch.float8_e4m3fn
KINDS = ("transformer", "clip", "t5", "vae")
COMFY = ("model.diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "vae.")
ALL_IN_ONE = dict(zip(KINDS, COMFY, strict=True))


def is_matrix(name, tensor):
    return name.endswith(".weight") and tensor.ndim == 2 and "relative_attention_bias" not in name


def is_linear(name, tensor):
    return is_matrix(name, tensor) and "embed" not in name and name != "shared.weight"


def write_parts(folder, wide, **tensors):
    """The four parts in files of their own, those not given plain; their paths."""
    folder.mkdir()
    for kind in KINDS:
        save_file(tensors.get(kind) or wide(kind), folder / f"{kind}.safetensors")
    return {kind: folder / f"{kind}.safetensors" for kind in KINDS}


@pytest.fixture
def files(tmp_path, wide):
    """`files(name, transformer=..., t5=...)`: `write_parts` in a folder of that name."""
    return lambda name, **tensors: write_parts(tmp_path / name, wide, **tensors)


@pytest.fixture
def one_file(tmp_path, wide):
    """`one_file(name, prefixes, metadata, transformer=..., ...)`: all parts in one file; those not given are plain."""

    def write(name, prefixes=ALL_IN_ONE, metadata=None, **tensors):
        merged = {}
        for kind in KINDS:
            merged |= {prefixes[kind] + n: t.clone() for n, t in (tensors.get(kind) or wide(kind)).items()}
        save_file(merged, tmp_path / name, metadata)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def load_files(tokenizers):
    return lambda paths: load_parts(**paths, tokenizers=tokenizers, device="cpu", dtype="fp32")


@pytest.fixture
def unpacked_drawing(files, load_files, draw):
    """`unpacked_drawing(transformer=..., t5=...)`: what plain numbers draw."""
    return lambda **tensors: draw(load_files(files("unpacked", **tensors)))


@pytest.fixture(scope="module")
def plain_drawing(wide, load_files, draw, tmp_path_factory):
    """What the model draws before anything of it is packed."""
    return draw(load_files(write_parts(tmp_path_factory.mktemp("plain") / "parts", wide)))


@pytest.fixture
def draws_as(draw, apart, plain_drawing, all_used):
    """`draws_as(flux, expected)`: fails unless it draws that, which is not what the model drew before it was packed."""

    def check(flux, expected):
        drawing = draw(flux)
        assert apart(drawing, expected) < 1e-5
        assert apart(drawing, plain_drawing) > 1e-3
        all_used(flux.report)

    return check


class TestNf4UnderOriginalNames:
    """lllyasviel's files: bitsandbytes' tensors under BFL's names in an all-in-one, with T5 in plain fp8."""

    def packed(self, tensors, double):
        """As the library stores them, and as it unpacks them."""
        functional = pytest.importorskip("bitsandbytes").functional
        stored, unpacked = dict(tensors), dict(tensors)
        for name, tensor in tensors.items():
            if is_matrix(name, tensor):
                data, state = functional.quantize_4bit(
                    tensor.half(), blocksize=64, compress_statistics=double, quant_type="nf4"
                )
                stored |= {name: data} | {f"{name}.{n}": t for n, t in state.as_dict(packed=True).items()}
                state.dtype = torch.float32  # what the model computes in here
                unpacked[name] = functional.dequantize_4bit(data, state)
        return stored, unpacked

    @pytest.mark.parametrize("double", [True, False], ids=["first version", "second version"])
    def test_all_in_one(self, double, wide, one_file, load, unpacked_drawing, draws_as, schemes):
        stored, unpacked = self.packed(wide("transformer"), double)
        t5 = {name: t.to(E4M3) if is_matrix(name, t) else t for name, t in wide("t5").items()}
        flux = load(one_file("flux1-dev-bnb-nf4.safetensors", transformer=stored, t5=t5), dtype="fp32")
        assert schemes(flux.transformer) == {"bnb-nf4"} and schemes(flux.text.t5) == {"fp8"}
        assert type(flux.transformer.double_blocks[0].img_attn.qkv) is PackedLinear
        assert len(flux.transformer.double_blocks[0].img_attn.qkv.packs) == 1
        draws_as(flux, unpacked_drawing(transformer=unpacked, t5={n: t.float() for n, t in t5.items()}))


class TestGguf:
    """city96's files: every type that is read, for the transformer under BFL's names and T5 under llama.cpp's."""

    @pytest.fixture
    def write(self, gguf_bytes):
        """`write(path, tensors, arch, rename, packs)`: a file by the gguf package; the numbers that it stands for."""
        return partial(self._write, gguf_bytes)

    def _write(self, gguf_bytes, path, tensors, arch, rename=lambda name: name, packs=is_linear):
        writer, kinds, meant = GGUFWriter(str(path), arch), cycle(FORMATS), dict(tensors)

        def numbers(raw, kind):
            return dequantize(raw, GGMLQuantizationType[kind])

        for seed, (name, tensor) in enumerate(tensors.items()):
            if packs(name, tensor) and tensor.shape[1] % 256 == 0:
                kind = next(kinds)
                size = numbers(gguf_bytes(kind, tensor.shape, 1, seed), kind).std()
                raw = gguf_bytes(kind, tensor.shape, 0.1 / size, seed)
                meant[name] = torch.from_numpy(numbers(raw, kind))
                writer.add_tensor(rename(name), raw, raw_dtype=GGMLQuantizationType[kind])
            else:
                half = tensor.half() if tensor.ndim == 2 else tensor
                meant[name] = half.float()
                writer.add_tensor(rename(name), half.numpy())
        self._finish(writer)
        return meant

    def _finish(self, writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @pytest.fixture
    def t5_name(self):
        table = get_tensor_name_map(MODEL_ARCH.T5ENCODER, 2)
        return lambda name: table.get_name(name.removesuffix(".weight")) + ".weight"

    def test_transformer_and_t5(self, files, wide, load_files, unpacked_drawing, draws_as, schemes, t5_name, write):
        paths = files("packed")
        for kind in ("transformer", "t5"):
            paths[kind].unlink()
            paths[kind] = paths[kind].with_suffix(".gguf")
        meant = {
            "transformer": write(paths["transformer"], wide("transformer"), "flux"),
            "t5": write(paths["t5"], wide("t5"), "t5encoder", t5_name, is_matrix),
        }
        flux = load_files(paths)
        assert schemes(flux.transformer) == {f"GGUF {kind}" for kind in FORMATS}
        assert len(schemes(flux.text.t5)) > 5
        draws_as(flux, unpacked_drawing(**meant))

    def test_a_bare_transformer_finds_a_t5_that_is_gguf_too(self, files, wide, load, t5_name, draw, schemes, write):
        paths = files("packed")
        for kind, arch, rename in (("transformer", "flux", str), ("t5", "t5encoder", t5_name)):
            paths[kind].unlink()
            write(paths[kind].with_suffix(".gguf"), wide(kind), arch, rename)
        flux = load(paths["transformer"].with_suffix(".gguf"), search=[paths["vae"].parent])
        assert flux.report.part("t5").files == (str(paths["t5"].with_suffix(".gguf")),)
        assert schemes(flux.text.t5) and draw(flux).isfinite().all()

    def test_a_type_that_is_not_read_is_told_before_anything_is(self, tmp_path, wide, load_files):
        writer, odd = GGUFWriter(str(tmp_path / "x.gguf"), "flux"), GGMLQuantizationType.IQ2_XS
        for name, tensor in wide("transformer").items():
            if name.endswith("qkv.weight"):
                bytes_of_a_row = tensor.shape[1] // 256 * 74
                raw = torch.zeros(len(tensor), bytes_of_a_row, dtype=torch.uint8).numpy()
                writer.add_tensor(name, raw, raw_dtype=odd)
            else:
                writer.add_tensor(name, tensor.numpy())
        self._finish(writer)
        told = "stored as GGUF IQ2_XS (of GGUF, Q8_0, Q4_0"
        assert told in inspect(tmp_path / "x.gguf").text()
        with pytest.raises(FluxError, match=re.escape(told)):
            load_files({"transformer": tmp_path / "x.gguf", "clip": None, "t5": None, "vae": None})


def test_plain_fp8(files, wide, load_files, unpacked_drawing, draws_as, schemes):
    """Kijai's files: every tensor in fp8, biases and norms too, and no scales."""
    small = {name: tensor.to(E4M3) for name, tensor in wide("transformer").items()}
    flux = load_files(files("packed", transformer=small))
    assert schemes(flux.transformer) == {"fp8"}
    assert not [name for name, m in flux.transformer.named_modules() if type(m) is torch.nn.Linear]
    draws_as(flux, unpacked_drawing(transformer={name: tensor.float() for name, tensor in small.items()}))


class TestScaledFp8:
    """ComfyUI's files: both spellings of the scales, and both places where the packing is described."""

    SPELLINGS = ("marker", "marker and inputs", "described beside", "described in the header")

    def packed(self, tensors, spelling, prefix=""):
        """A part's tensors, what the header says of them, and the numbers that they stand for."""
        stored, said, meant = dict(tensors), {}, dict(tensors)
        for name, tensor in tensors.items():
            if not is_linear(name, tensor):
                continue
            layer = name.removesuffix(".weight")
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(E4M3)
            meant[name] = stored[name].float() * scale
            stored[f"{layer}.{'scale_weight' if 'marker' in spelling else 'weight_scale'}"] = scale
            if spelling == "marker and inputs":
                stored[f"{layer}.scale_input"] = torch.tensor(0.7)
            description = {"format": "float8_e4m3fn"}
            if spelling == "described beside":
                text = json.dumps(description | {"full_precision_matrix_mult": True}).encode()
                stored[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
            if spelling == "described in the header":
                stored[f"{layer}.input_scale"] = torch.tensor(0.7)
                said[prefix + layer] = description
        if "marker" in spelling:
            stored["scaled_fp8"] = torch.zeros(2, dtype=E4M3)
        if "shared.weight" in tensors:  # looked up, not multiplied by: it has no scale
            stored["shared.weight"] = tensors["shared.weight"].to(E4M3)
            meant["shared.weight"] = stored["shared.weight"].float()
        return stored, said, meant

    def header(self, said):
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": said})} if said else None

    @pytest.mark.parametrize("spelling", SPELLINGS)
    @pytest.mark.parametrize("kind", ["transformer", "t5"])
    def test_a_file_for_a_part(self, kind, spelling, files, wide, load_files, unpacked_drawing, draws_as, schemes):
        stored, said, meant = self.packed(wide(kind), spelling)
        paths = files("packed")
        save_file(stored, paths[kind], self.header(said))
        flux = load_files(paths)
        assert schemes(flux.transformer if kind == "transformer" else flux.text.t5) == {"fp8"}
        draws_as(flux, unpacked_drawing(**{kind: meant}))

    @pytest.mark.parametrize(
        ("spelling", "whole"), [*[(spelling, True) for spelling in SPELLINGS], ("described in the header", False)]
    )
    def test_all_in_one(self, spelling, whole, one_file, wide, load, unpacked_drawing, draws_as, schemes):
        """A header may name the layers whole or without their prefix."""
        stored, said, meant = {}, {}, {}
        for kind in ("transformer", "t5"):
            prefix = ALL_IN_ONE[kind] if whole else ""
            stored[kind], more, meant[kind] = self.packed(wide(kind), spelling, prefix)
            said |= more
        flux = load(one_file("all.safetensors", metadata=self.header(said), **stored), dtype="fp32")
        assert schemes(flux.transformer) == schemes(flux.text.t5) == {"fp8"}
        draws_as(flux, unpacked_drawing(**meant))


class TestPrefixes:
    """Parts in one file under the prefixes that are in use."""

    @pytest.mark.parametrize(
        "prefixes",
        [
            COMFY,
            ("model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.transformer.",
             "first_stage_model."),
            ("transformer.", "text_encoder.", "text_encoder_2.", "vae."),
            ("diffusion_model.", "text_encoder.", "text_encoder_2.", "first_stage_model."),
            ("", "text_encoder.", "text_encoder_2.", "vae."),
        ],
    )  # fmt: skip
    def test_original_names(self, prefixes, one_file, load, draw, apart, all_used, plain_drawing):
        flux = load(one_file("all.safetensors", dict(zip(KINDS, prefixes, strict=True))), dtype="fp32")
        assert apart(draw(flux), plain_drawing) < 1e-5
        all_used(flux.report)

    def test_diffusers_names(self, one_file, files, load, draw, apart, all_used, plain_drawing, to_diffusers, tmp_path):
        paths, renamed = files("own"), {}
        for kind in ("transformer", "vae"):
            to_diffusers(paths[kind], tmp_path / f"{kind}.safetensors")
            renamed[kind] = load_file(tmp_path / f"{kind}.safetensors")
        prefixes = dict(zip(KINDS, ("transformer.", "text_encoder.", "text_encoder_2.", "vae."), strict=True))
        flux = load(one_file("all.safetensors", prefixes, **renamed), dtype="fp32")
        assert apart(draw(flux), plain_drawing) < 1e-5
        all_used(flux.report)
