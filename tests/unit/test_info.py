"""`inspect`: what a file, a folder or a repository is, from headers alone."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError, inspect, load_flux, load_parts
from fluxcanvas.flux_runtime.weights import hub
from fluxcanvas.flux_runtime.weights.files import TensorFile


@pytest.fixture
def no_reading(monkeypatch):
    """Reading tensor data fails the test."""
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("tensor data was read"))


def sizes_of_flux_dev() -> dict[str, list[int]]:
    from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
    from fluxcanvas.flux_runtime.variants import FluxParams

    with torch.device("meta"):
        return {name: list(t.shape) for name, t in FluxTransformer(FluxParams()).state_dict().items()}


def write_hollow(path, shapes, dtype="BF16", size=2, prefix=""):
    """A file of true size whose data are one hole: it takes no space on the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * size
        header[prefix + name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def test_real_size_from_the_header(tmp_path, no_reading):
    """FLUX.1-dev in fp8 has its published number of parameters; 12 GB are described without being read."""
    path = tmp_path / "flux1-krea-dev-fp8.safetensors"
    write_hollow(path, sizes_of_flux_dev(), "F8_E4M3", 1, "model.diffusion_model.")
    report = inspect(path)
    assert report.variant == "krea"
    part = report.part("transformer")
    assert (part.parameters, part.bytes, part.layout) == (11_901_408_320, 11_901_408_320, "BFL")
    assert not part.missing and not part.unused
    assert "11.9 G parameters, 11.9 GB" in report.text() and "F8_E4M3" in report.text()
    assert "not in it: CLIP text encoder, T5 text encoder, VAE" in report.text()


def test_demo_and_folder(no_reading, checkout):
    report = inspect("demo")
    assert {part.name for part in report.parts} == {"transformer", "clip", "t5", "vae"}
    assert report.variant == "dev" and not any(part.missing or part.unused for part in report.parts)
    assert inspect(checkout / "demo" / "weights").parameters == report.parameters


@pytest.mark.parametrize("kind", ["transformer", "clip", "t5", "vae"])
def test_single_parts(parts, kind, no_reading):
    report = inspect(parts[kind])
    assert [part.name for part in report.parts] == [kind] and not report.parts[0].missing


def test_damage_is_described_not_raised(weights, tmp_path):
    tensors = weights("transformer")
    del tensors["double_blocks.0.img_attn.proj.bias"]
    tensors["stray"] = torch.ones(1)
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors")
    assert report.part("transformer").missing == ("double_blocks.0.img_attn.proj.bias",)
    assert "missing: 1: double_blocks.0.img_attn.proj.bias" in report.text() and "unused: 1: stray" in report.text()
    del tensors["img_in.weight"]
    save_file(tensors, tmp_path / "b.safetensors")
    assert "img_in.weight" in inspect(tmp_path / "b.safetensors").text()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("lora_kohya", "LoRA"),
        ("lora_xlabs", "LoRA"),
        ("lora_diffusers", "LoRA"),
        ("lora_aitoolkit", "LoRA"),
        ("lora_peft_base_model", "LoRA"),
        ("lora_bfl_control_depth", "LoRA"),
        ("lora_onetrainer_dora", "LoRA"),
        ("lokr_bfl", "LoRA"),
        ("ip_adapter_xlabs", "IP-Adapter"),
        ("ip_adapter_xlabs_v2", "IP-Adapter"),
        ("controlnet_instantx_union", "ControlNet"),
        ("controlnet_xlabs_canny_v2", "ControlNet"),
    ],
)
def test_real_files_of_other_kinds_are_named(shared, tmp_path, file, expected):
    """By the key lists of published files."""
    shapes = json.loads((shared / "keys" / f"{file}.json").read_text())["shapes"]
    write_hollow(tmp_path / "x.safetensors", shapes)
    (part,) = inspect(tmp_path / "x.safetensors").parts
    assert (
        expected in part.name and part.bytes == 2 * part.parameters > 0 and f"{len(shapes)} tensors" in part.lines()[0]
    )


def test_packed_files_are_described(weights, tmp_path):
    plain = weights("transformer")
    packed = {n: t.to(torch.float8_e4m3fn) if n.endswith("qkv.weight") else t for n, t in plain.items()}
    save_file(packed | {"img_in.weight_scale_2": torch.ones(())}, tmp_path / "n.safetensors")
    assert "stored as nvfp4, which is not read here" in inspect(tmp_path / "n.safetensors").text()
    count = sum(n.endswith("qkv.weight") for n in plain)
    scales = {n.replace(".weight", ".scale_weight"): torch.ones(()) for n in plain if n.endswith("qkv.weight")}
    save_file(packed | scales, tmp_path / "s.safetensors")
    assert f"{count} tensors as scaled fp8" in inspect(tmp_path / "s.safetensors").text()
    (tmp_path / "q.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(FluxError, match="GGUF"):
        inspect(tmp_path / "q.gguf")


def test_a_fault_of_one_part_is_told_with_all_the_rest(weights, tmp_path):
    """The loader refuses what info describes: here a scale of T5 is lost, and the transformer is as it should be."""
    encoder = "text_encoders.{}.transformer.".format
    prefixes = {"transformer": "model.diffusion_model.", "clip": encoder("clip_l"), "t5": encoder("t5xxl")}
    tensors = {}
    for kind, prefix in prefixes.items():
        for name, tensor in weights(kind).items():
            linear = name.endswith(("_attn.qkv.weight", "SelfAttention.q.weight"))
            tensors[prefix + name] = tensor.to(torch.float8_e4m3fn) if linear else tensor
            if linear:
                tensors[prefix + name.replace(".weight", ".scale_weight")] = torch.ones(())
    lost = "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q"
    del tensors[f"{lost}.scale_weight"]
    path = tmp_path / "all.safetensors"
    save_file(tensors, path)
    report = inspect(path)
    assert report.variant == "dev" and "4 tensors as scaled fp8" in report.part("transformer").note
    assert report.part("t5").note.startswith(f"{path}: 1 fp8 weights lack the scale")
    assert lost in report.text() and report.part("t5").parameters > 10_000
    faulty = next(line for line in report.text().splitlines() if line.startswith("  t5"))
    count = sum(name.startswith(prefixes["t5"]) for name in tensors)
    assert (
        faulty.endswith(f", {count} tensors") and not report.part("t5").unused
    )  # none of them can be called used, or not
    with pytest.raises(FluxError, match="1 fp8 weights lack the scale"):
        load_parts(transformer=path, clip=path, t5=path, vae=None)


def test_a_fault_of_the_only_part_is_told_and_not_loaded(weights, tmp_path):
    path = tmp_path / "flux1-schnell.safetensors"
    save_file(weights("transformer", guidance_embed=False) | {"img_in.SCB": torch.ones(3)}, path)
    report = inspect(path)
    assert report.variant == "schnell" and "img_in.SCB [3] does not fit img_in.weight" in report.parts[0].note
    for load in (load_flux, lambda source: load_parts(transformer=source, clip=None, t5=None, vae=None)):
        with pytest.raises(FluxError, match=r"flux1-schnell.safetensors: img_in.SCB \[3\] does not fit"):
            load(path)


def test_a_fault_of_a_file_in_the_model_folders_is_no_obstacle(parts, tokenizers):
    """It is passed over like any file there that cannot be read."""
    tensors = {name: tensor.read().clone() for name, tensor in TensorFile(parts["t5"]).tensors().items()}
    save_file(tensors | {"shared.SCB": torch.ones(3)}, parts["t5"].with_name("a-broken-t5.safetensors"))
    folders = [parts["transformer"].parents[1]]
    flux = load_flux(parts["transformer"], search=folders, tokenizers=tokenizers, device="cpu")
    assert flux.report.part("t5").files == (str(parts["t5"]),)


def test_refusals(tmp_path):
    for source, words in [
        (tmp_path / "none.safetensors", "no file or folder"),
        ("", "no file or folder"),
        (tmp_path, "is no model"),
    ]:
        with pytest.raises(FluxError, match=words):
            inspect(source)
    torch.save({}, tmp_path / "x.ckpt")
    with pytest.raises(FluxError, match="pickle"):
        inspect(tmp_path / "x.ckpt")


FILES = [
    "model_index.json", "flux1-dev.safetensors", "ae.safetensors", "README.md", "dev_grid.jpg",
    "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json",
    "tokenizer_2/spiece.model", "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/openvino_model.xml",
    "text_encoder_2/config.json", "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors.index.json",
    "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
    "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.int8.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "onnx/model.onnx",
]  # fmt: skip


class TestRepositories:
    def test_only_what_is_read_is_downloaded(self):
        chosen = set(hub.choose(FILES))
        left = {
            "flux1-dev.safetensors", "ae.safetensors", "README.md", "dev_grid.jpg",
            "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin",
            "text_encoder/openvino_model.xml", "onnx/model.onnx",
            "transformer/diffusion_pytorch_model.int8.safetensors",
        }  # fmt: skip
        assert set(FILES) - chosen == left
        assert len(hub.choose(FILES)) == len(chosen), "no file twice"
        assert hub.choose(["flux1-dev-fp8.safetensors"]) == []

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("black-forest-labs/FLUX.1-dev", ("black-forest-labs/FLUX.1-dev", "")),
            ("Comfy-Org/flux1-dev/flux1-dev-fp8.safetensors", ("Comfy-Org/flux1-dev", "flux1-dev-fp8.safetensors")),
            ("a/b/c", None),
            ("a/b/../x.safetensors", None),
            ("../b", None),
            ("models/x.safetensors", None),
            ("plain", None),
            ("/a/b", None),
            ("a b/c", None),
        ],
    )
    def test_what_is_a_repository(self, text, expected):
        assert hub.split_source(text) == expected
