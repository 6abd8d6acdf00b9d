"""A file in the wrong loader: a sentence says what it is, and which loader reads it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError, inspect, load_adapter, load_controlnet, load_flux, load_image_encoder
from fluxcanvas.flux_runtime.weights import hub

# A few names that tell each kind; the sizes do not matter, for a file is refused by its names.
NAMES = {
    "controlnet": ["controlnet_x_embedder.weight", "controlnet_blocks.0.weight"],
    "xlabs controlnet": ["pos_embed_input.weight", "input_hint_block.0.weight", "double_blocks.0.img_attn.qkv.weight"],
    "sdxl controlnet": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.attentions.0.proj_in.weight"],
    "sd15 controlnet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "sd3 controlnet": ["controlnet_blocks.0.weight", "pos_embed_input.proj.weight", "context_embedder.weight"],
    "ip-adapter": [
        "ip_adapter_proj_model.proj.weight",
        "double_blocks.0.processor.ip_adapter_double_stream_k_proj.bias",
    ],
    "sdxl ip-adapter": ["image_proj.latents", "ip_adapter.1.to_k_ip.weight"],
    "redux": ["redux_up.weight", "redux_down.weight"],
    "lora": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "transformer": ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"],
    "vae": ["decoder.up.0.block.0.conv1.weight"],
    "clip": ["text_model.embeddings.token_embedding.weight"],
    "image encoder": ["vision_model.embeddings.patch_embedding.weight"],
    "sd model": ["model.diffusion_model.input_blocks.1.0.weight"],
    "nothing known": ["some.tensor"],
}
NET, ADAPTER = r"LoadControlNet \(load_controlnet\)", r"LoadAdapter \(load_adapter\)"
WRONG = [
    (load_flux, "controlnet", f"is a ControlNet.*{NET}"),
    (load_flux, "xlabs controlnet", f"is a ControlNet.*{NET}"),
    (load_flux, "ip-adapter", f"is an IP-Adapter.*{ADAPTER}"),
    (load_flux, "redux", f"is a Redux adapter.*{ADAPTER}"),
    (load_flux, "image encoder", f"is an image encoder.*{ADAPTER}"),
    (load_flux, "lora", "is a LoRA"),
    (load_controlnet, "transformer", r"no ControlNet: it holds a transformer; load it with LoadFlux \(load_flux\)"),
    (load_controlnet, "ip-adapter", f"is an IP-Adapter.*{ADAPTER}"),
    (load_controlnet, "redux", f"is a Redux adapter.*{ADAPTER}"),
    (load_controlnet, "lora", "is a LoRA"),
    (load_controlnet, "vae", "it holds a VAE"),
    (load_controlnet, "sd model", "is a Stable Diffusion model: another family"),
    (load_controlnet, "sdxl controlnet", "ControlNet of another family"),
    (load_controlnet, "sd15 controlnet", "ControlNet of another family"),
    (load_controlnet, "sd3 controlnet", "ControlNet of another family"),
    (load_controlnet, "nothing known", "some.tensor.*no kind known"),
    (load_adapter, "controlnet", f"is a ControlNet.*{NET}"),
    (load_adapter, "transformer", r"LoadFlux \(load_flux\)"),
    (load_adapter, "lora", "is a LoRA"),
    (load_adapter, "sdxl ip-adapter", "IP-Adapter of another family"),
    (load_adapter, "image encoder", f"is an image encoder.*{ADAPTER}"),
    (load_image_encoder, "clip", "no image encoder: it holds a CLIP text encoder"),
    (load_image_encoder, "redux", f"is a Redux adapter.*{ADAPTER}"),
]


@pytest.fixture
def file(tmp_path):
    def write(kind):
        path = tmp_path / f"{kind}.safetensors".replace(" ", "-")
        save_file({name: torch.zeros(4, 4) for name in NAMES[kind]}, path)
        return path

    return write


@pytest.mark.parametrize(("load", "kind", "words"), WRONG, ids=lambda x: getattr(x, "__name__", None))
def test_a_file_of_another_kind(file, load, kind, words):
    path = file(kind)
    with pytest.raises(FluxError, match=words) as error:
        load(path, device="cpu")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("load", [load_controlnet, load_adapter, load_image_encoder])
def test_sources_that_are_none(load, tmp_path):
    for source, words in [
        ("", "no .* is named"),
        (tmp_path / "none.safetensors", "no file or folder"),
        ("not a repository", "no file or folder"),
        (tmp_path, "weights and has none"),
    ]:
        with pytest.raises(FluxError, match=words):
            load(source)
    torch.save({}, tmp_path / "x.pth")
    with pytest.raises(FluxError, match="pickle"):
        load(tmp_path / "x.pth")


def test_info_names_the_loader(file):
    assert "LoadControlNet" in inspect(file("controlnet")).text()


def test_the_files_of_a_repository_that_are_read():
    top = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "a.png"]
    assert hub.choose(top) == ["config.json", "diffusion_pytorch_model.safetensors"]
    encoder = ["config.json", "model.safetensors", "preprocessor_config.json", "pytorch_model.bin", "tokenizer.json"]
    assert hub.choose(encoder) == ["config.json", "preprocessor_config.json", "model.safetensors"]
    redux = ["model_index.json", "image_embedder/config.json", "image_embedder/diffusion_pytorch_model.safetensors",
             "image_encoder/model.safetensors", "feature_extractor/preprocessor_config.json",
             "flux1-redux-dev.safetensors"]  # fmt: skip
    assert set(hub.choose(redux, ("image_embedder", "image_encoder"))) == set(redux[:-1])
    assert hub.choose(["flux-canny-controlnet-v3.safetensors", "README.md"]) == []


def test_a_component_repository_is_described_without_a_download(monkeypatch, tmp_path, weights):
    """`info owner/name` of a ControlNet, a VAE ... whose files lie at the top of the repository."""
    (tmp_path / "config.json").write_text(json.dumps({}))
    save_file(weights("vae"), tmp_path / "model.safetensors")
    sizes = {"config.json": 2, "diffusion_pytorch_model.safetensors": 9}
    from fluxcanvas.flux_runtime.weights.files import open_tensors

    monkeypatch.setattr(hub, "list_repo", lambda repo, file: hub.Listing(repo, sizes))
    monkeypatch.setattr(hub, "remote_tensors", lambda repo, name: open_tensors([tmp_path / "model.safetensors"]))
    monkeypatch.setattr(hub, "remote_json", lambda repo, name: tmp_path / name)
    (part,) = inspect("me/vae").parts
    assert part.name == "vae" and not part.missing
