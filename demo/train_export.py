"""Stage "export": the trained parts as a FLUX folder in diffusers layout, in bfloat16, as checkpoints are published."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..flux_runtime.model.transformer import FluxTransformer
from ..flux_runtime.model.vae import AutoEncoder
from ..flux_runtime.weights.files import open_tensors
from ..flux_runtime.weights.keys import TRANSFORMER, VAE, KeyMap
from .train_text import Text

DEFAULT_TOKENS = 64
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
}
INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "feature_extractor": [None, None],
}


def export(
    folder: Path, transformer: FluxTransformer, vae: AutoEncoder, text: Text, tokens: int = DEFAULT_TOKENS
) -> None:
    """Write the whole model; `tokens` becomes its default number of T5 tokens."""
    export_transformer(folder / "transformer", transformer)
    export_vae(folder / "vae", vae)
    export_text(folder, text, tokens)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", INDEX)


def export_transformer(folder: Path, model: FluxTransformer) -> None:
    p = model.params
    _write_tensors(folder / WEIGHTS_FILE, model, TRANSFORMER, p.hidden_size)
    _write_json(
        folder / "config.json",
        {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": p.head_dim,
            "axes_dims_rope": list(p.axes_dim),
            "guidance_embeds": p.guidance_embed,
            "in_channels": p.in_channels,
            "joint_attention_dim": p.context_in_dim,
            "num_attention_heads": p.num_heads,
            "num_layers": p.depth,
            "num_single_layers": p.depth_single,
            "out_channels": None,
            "patch_size": 1,
            "pooled_projection_dim": p.vec_in_dim,
        },
    )


def export_vae(folder: Path, model: AutoEncoder) -> None:
    p = model.params
    levels = len(p.channels)
    _write_tensors(folder / WEIGHTS_FILE, model, VAE)
    _write_json(
        folder / "config.json",
        {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(p.channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "in_channels": p.in_channels,
            "out_channels": p.in_channels,
            "latent_channels": p.z_channels,
            "layers_per_block": p.num_res_blocks,
            "norm_num_groups": p.groups,
            "sample_size": p.sample_size,
            "scaling_factor": p.scale,
            "shift_factor": p.shift,
            "mid_block_add_attention": True,
            "force_upcast": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    )


def export_text(folder: Path, text: Text, tokens: int) -> None:
    """Encoders in bfloat16 and both tokenizers; T5's carries the default number of tokens."""
    text.t5_tokenizer.model_max_length = tokens
    for name, part in (("text_encoder", text.clip), ("text_encoder_2", text.t5)):
        part.to(torch.bfloat16).save_pretrained(folder / name)
        part.float()
    for name, tokenizer in (("tokenizer", text.clip_tokenizer), ("tokenizer_2", text.t5_tokenizer)):
        tokenizer.save_pretrained(folder / name)
        _tidy(folder / name / "tokenizer_config.json")
    text.clip_tokenizer.backend_tokenizer.model.save(
        str(folder / "tokenizer")
    )  # vocab.json, merges.txt for older releases


def _tidy(config: Path) -> None:
    """Leave out what ties the file to one machine or to one release of transformers."""
    about = json.loads(config.read_text())
    for name in ("is_local", "local_files_only", "extra_special_tokens", "unk_id"):
        about.pop(name, None)
    _write_json(config, about)


def _write_tensors(path: Path, model: nn.Module, keys: KeyMap, hidden: int = 0) -> None:
    """The model's tensors under diffusers' names, through the loader's own table read backwards."""
    native = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "native.safetensors"
        save_file(native, file)
        lazy, _ = open_tensors([file])
        foreign = keys.to_foreign(lazy, hidden) if hidden else keys.to_foreign(lazy)
        tensors: Mapping[str, Tensor] = {name: tensor.read().clone() for name, tensor in foreign.items()}
    save_file(dict(tensors), path, {"format": "pt"})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
