"""Tiny models with random weights, and the ways to write them to files, for tests of loading."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


def _random(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(list(module.parameters())))
    return {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in module.state_dict().items()}


def _transformer(**changes) -> dict[str, torch.Tensor]:
    from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
    from fluxcanvas.flux_runtime.variants import FluxParams

    sizes = dict(vec_in_dim=32, context_in_dim=48, hidden_size=64, num_heads=2, mlp_hidden=128, depth=2, depth_single=3)
    return _random(FluxTransformer(FluxParams(**{**sizes, "axes_dim": (4, 14, 14), **changes})))


def _vae(**changes) -> dict[str, torch.Tensor]:
    from fluxcanvas.flux_runtime.model.vae import AutoEncoder, VaeParams

    return _random(AutoEncoder(VaeParams(**{"channels": (32, 32, 64), "num_res_blocks": 1, **changes})))


def _clip(hidden: int = 32) -> dict[str, torch.Tensor]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=40, num_hidden_layers=2, num_attention_heads=1
    )
    state = _random(CLIPTextModel(config))
    return {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _t5(width: int = 48) -> dict[str, torch.Tensor]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=2048, d_model=width, d_kv=8, d_ff=56, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    state = _random(T5EncoderModel(config))
    return {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}


MAKERS = {"transformer": _transformer, "vae": _vae, "clip": _clip, "t5": _t5}


@pytest.fixture(scope="session")
def tokenizers(checkout):
    """The demo's two tokenizers: small, and quick to load."""
    return checkout / "demo" / "weights"


@pytest.fixture(scope="session")
def weights():
    """`weights(kind, **sizes)`: random tensors of a tiny part under the original names, always the same ones."""
    return lambda kind, **sizes: MAKERS[kind](**sizes)


@pytest.fixture
def parts(tmp_path, weights):
    """The four parts in files as they are published: name of the part -> path."""
    names = {
        "transformer": "diffusion_models/flux1-tiny.safetensors",
        "vae": "vae/ae.safetensors",
        "clip": "text_encoders/clip_l.safetensors",
        "t5": "text_encoders/t5xxl_fp32.safetensors",
    }
    paths = {kind: tmp_path / name for kind, name in names.items()}
    for kind, path in paths.items():
        path.parent.mkdir(exist_ok=True)
        save_file(weights(kind), path)
    return paths


# Where the float16 scales of a GGUF block lie; random bytes there would often be infinite or no number.
GGUF_SCALES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def _gguf_bytes(kind: str, shape: tuple[int, int] = (12, 1024), scale: float | None = None, seed: int = 0):
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng([sorted(GGUF_SCALES).index(kind), seed])
    blocks = random.integers(0, 256, (shape[0] * shape[1] // numbers, size), dtype=np.uint8)
    for at in GGUF_SCALES[kind]:
        bits = random.integers(0, 0x7C00, len(blocks)) | (random.integers(0, 2, len(blocks)) << 15)
        bits[:2] = 0x8000, 1
        bits = bits.astype("<u2") if scale is None else np.full(len(blocks), scale, "<f2")
        blocks[:, at : at + 2] = bits.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


@pytest.fixture(scope="session")
def gguf_bytes():
    """`gguf_bytes(kind, shape, scale)`: a weight in blocks of a type. Any bytes, but its scales are finite: all the
    one that is named, or of both signs and all sizes, zero and denormal too."""
    return _gguf_bytes


@pytest.fixture
def raw_file(tmp_path):
    """`raw_file(header, data, name)`: a file with any header (a dict or bytes) and any data, true or not."""

    def write(header, data: bytes = b"", name: str = "model.safetensors", length: int | None = None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / name
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return write


def _rename(path: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path)


@pytest.fixture(scope="session")
def rename():
    """`rename(path, change)`: write a file again with the tensors that `change` makes of its own."""
    return _rename


def _to_diffusers(path: Path, out: Path) -> None:
    from fluxcanvas.flux_runtime.weights import keys
    from fluxcanvas.flux_runtime.weights.files import TensorFile

    lazy = TensorFile(path).tensors()
    table = keys.TRANSFORMER if "img_in.weight" in lazy else keys.VAE
    foreign = table.to_foreign(lazy, lazy["img_in.weight"].shape[0] if table is keys.TRANSFORMER else 0)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.read().clone() for name, t in foreign.items()}, out)


@pytest.fixture(scope="session")
def to_diffusers():
    """`to_diffusers(path, out)`: write a transformer or VAE file again under diffusers' names."""
    return _to_diffusers


@pytest.fixture
def folder(parts, tmp_path):
    """The same parts as a folder in diffusers layout."""
    root = tmp_path / "diffusers"
    _to_diffusers(parts["transformer"], root / "transformer" / "diffusion_pytorch_model.safetensors")
    _to_diffusers(parts["vae"], root / "vae" / "diffusion_pytorch_model.safetensors")
    for kind, name in (("clip", "text_encoder"), ("t5", "text_encoder_2")):
        (root / name).mkdir()
        shutil.copy(parts[kind], root / name / "model.safetensors")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return root


@pytest.fixture
def load(tokenizers):
    """`load_flux` on the CPU with the demo's tokenizers."""
    from fluxcanvas.flux_runtime import load_flux

    return lambda source, **options: load_flux(source, **{"device": "cpu", "tokenizers": tokenizers, **options})
