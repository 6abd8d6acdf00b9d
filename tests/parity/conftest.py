"""The oracle: small diffusers pipelines with random weights, and the same weights loaded by our own loader."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

warnings.filterwarnings("ignore", category=FutureWarning)


@dataclass(frozen=True)
class Shape:
    """What varies between the pipelines under test; everything else is fixed and tiny."""

    depth: int = 2
    depth_single: int = 3
    heads: int = 4
    head_dim: int = 32
    axes: tuple[int, ...] = (4, 14, 14)
    guidance: bool = True
    in_channels: int = 64
    dynamic: bool = True
    shift: float = 3.0
    vae: tuple[int, ...] = field(default=(8, 16, 16, 16))


TEXT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}


def _randomise(module: torch.nn.Module, std: float) -> None:
    """Weights large enough that every path matters: zero-initialised ones would hide errors."""
    for name, parameter in module.named_parameters():
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=std)


def build_transformer(shape: Shape) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=shape.in_channels,
        out_channels=64,
        num_layers=shape.depth,
        num_single_layers=shape.depth_single,
        attention_head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=shape.axes,
        guidance_embeds=shape.guidance,
    )
    _randomise(model, 0.06)
    return model.eval()


def build_vae(shape: Shape) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    levels = len(shape.vae)
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=shape.vae,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()


def _text_encoders(shared: Path) -> dict:
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextModel(CLIPTextConfig(**TEXT, vocab_size=49408, max_position_embeddings=77, projection_dim=32))
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )
    return {
        "text_encoder": clip.eval(),
        "text_encoder_2": t5.eval(),
        "tokenizer": AutoTokenizer.from_pretrained(shared / "tokenizers" / "clip", model_max_length=77),
        "tokenizer_2": AutoTokenizer.from_pretrained(shared / "tokenizers" / "t5"),
    }


def build_pipeline(shape: Shape, shared: Path):
    """A whole `FluxPipeline` in float32, always with the same weights for the same shape."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shape.dynamic, shift=shape.shift)
    parts = _text_encoders(shared)
    pipe = FluxPipeline(scheduler=scheduler, vae=build_vae(shape), transformer=build_transformer(shape), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pair(shared, tmp_path_factory):
    """`pair(shape, dtype)` -> (diffusers pipeline, our Flux) with the same weights, ours through a saved folder."""
    from fluxcanvas.flux_runtime import load_flux

    made: dict = {}

    def get(shape: Shape = Shape(), dtype: torch.dtype = torch.float32):
        if shape not in made:
            folder = tmp_path_factory.mktemp("oracle") / "model"
            build_pipeline(shape, shared).save_pretrained(folder)
            made[shape] = folder
        if (shape, dtype) not in made:
            made[shape, dtype] = _load_oracle(made[shape], dtype), load_flux(made[shape], dtype=dtype, device="cpu")
        return made[shape, dtype]

    return get


def _load_oracle(folder: Path, dtype: torch.dtype):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def shape_of():
    """The `Shape` class, for tests that vary it."""
    return Shape


def _relative(ours, theirs) -> float:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="session")
def relative():
    """Relative difference of two tensors or arrays in the 2-norm; differing shapes fail."""
    return _relative


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """White in the middle, of the size of the pictures."""
    array = np.zeros((56, 80), dtype=np.uint8)
    array[10:41, 20:61] = 255
    return Image.fromarray(array)


@pytest.fixture(scope="session")
def oracle():
    """`oracle(pipe, "FluxFillPipeline", ...)` -> latents of that pipeline with the parts of `pipe`, or with others."""
    import diffusers

    def call(pipe, name, *, parts=(), steps=5, output_type="latent", **options):
        own = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
        other = getattr(diffusers, name)(**own | dict(parts))
        other.set_progress_bar_config(disable=True)
        defaults = {"prompt": "a red house under a yellow moon", "guidance_scale": 3.5, "max_sequence_length": 24}
        options = {**defaults, "generator": torch.Generator().manual_seed(3), **options}
        return other(num_inference_steps=steps, output_type=output_type, **options).images

    return call


def build_controlnet(shape: Shape, **config) -> torch.nn.Module:
    """A ControlNet for the models of this shape; `config` says what kind."""
    from diffusers import FluxControlNetModel

    sizes = {"in_channels": 64, "num_layers": 2, "num_single_layers": 3, "patch_size": 1, "guidance_embeds": True}
    model = FluxControlNetModel(
        attention_head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=list(shape.axes),
        **sizes | config,
    )
    _randomise(model, 0.06)
    return model.eval()


@pytest.fixture(scope="session")
def net_pair(tmp_path_factory):
    """`net_pair(shape, seed=0, **config)` -> (diffusers' ControlNet, ours) with the same weights."""
    from fluxcanvas.flux_runtime import load_controlnet

    made: dict = {}

    def get(shape: Shape, seed: int = 0, **config):
        key = (shape, seed, *sorted(config.items()))
        if key not in made:
            torch.manual_seed(seed)
            theirs = build_controlnet(shape, **config)
            folder = tmp_path_factory.mktemp("net")
            theirs.save_pretrained(folder)
            made[key] = theirs, load_controlnet(folder, device="cpu", dtype="fp32")
        return made[key]

    return get
