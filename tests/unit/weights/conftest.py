"""A model of layers wide enough for every packing, what it draws, and how two drawings compare."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

SIZES = {"hidden_size": 256, "mlp_hidden": 512, "vec_in_dim": 32, "context_in_dim": 256, "depth": 1, "depth_single": 1}
HEADS = 8
AXES = (4, 14, 14)


@pytest.fixture(scope="session")
def wide(weights):
    """`wide(kind)`: tensors of a part whose matrices divide into blocks of 256 numbers, under the original names."""

    def make(kind):
        if kind == "transformer":
            return weights("transformer", num_heads=HEADS, axes_dim=AXES, **SIZES)
        return weights("t5", width=SIZES["context_in_dim"]) if kind == "t5" else weights(kind)

    return make


@pytest.fixture(scope="session")
def plain_folder(wide, tmp_path_factory):
    """The model as diffusers and transformers save it, in float32; only ever copied."""
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("wide") / "model"
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=SIZES["hidden_size"] // HEADS, num_attention_heads=HEADS,
        joint_attention_dim=SIZES["context_in_dim"], pooled_projection_dim=SIZES["vec_in_dim"], axes_dims_rope=AXES,
        guidance_embeds=True,
    )  # fmt: skip
    config = T5Config(
        vocab_size=2048, d_model=SIZES["context_in_dim"], d_kv=32, d_ff=512, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    for module, name in ((transformer, "transformer"), (T5EncoderModel(config), "text_encoder_2")):
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.06, generator=generator)
        module.save_pretrained(root / name)
    for kind, name in (("clip", "text_encoder/model"), ("vae", "vae/diffusion_pytorch_model")):
        (root / name).parent.mkdir()
        save_file(wide(kind), root / f"{name}.safetensors")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return root


@pytest.fixture
def copy_of(plain_folder, tmp_path):
    """`copy_of(name)`: the model in a folder of its own, whose parts may be replaced."""

    def copy(name):
        shutil.copytree(plain_folder, tmp_path / name, copy_function=os.symlink)
        return tmp_path / name

    return copy


def _draw(flux):
    from fluxcanvas.flux_runtime.recipes import text_to_image

    options = dict(height=64, width=64, steps=2, guidance=3.5, seed=1, max_sequence_length=32, output="latent")
    return text_to_image(flux, "a red house by the sea", **options)


@pytest.fixture(scope="session")
def draw():
    """`draw(flux)`: what the whole pipeline draws, as latents."""
    return _draw


@pytest.fixture(scope="session")
def plain_drawing(plain_folder, tokenizers):
    """What the model draws in float32."""
    from fluxcanvas.flux_runtime import load_flux

    return _draw(load_flux(plain_folder, device="cpu", dtype="fp32", tokenizers=tokenizers))


@pytest.fixture(scope="session")
def apart():
    """`apart(a, b)`: the difference of two tensors, relative to the second."""
    return lambda a, b: ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="session")
def schemes():
    """`schemes(module)`: the names of the schemes that its layers are packed by."""
    from fluxcanvas.flux_runtime.quant.packed import Packed

    return lambda module: {pack.scheme for pack in module.modules() if isinstance(pack, Packed)}


@pytest.fixture(scope="session")
def all_used():
    """`all_used(report)`: fails unless every tensor of every file was used."""

    def check(report):
        for part in report.parts:
            assert part.used and not (part.unused or part.missing), part.lines()
        assert "unused" not in report.text() and "missing" not in report.text()

    return check
