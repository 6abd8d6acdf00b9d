"""The two layouts' names: round trips, diffusers' own lists of names, and its converter for files in BFL layout."""

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.weights import keys
from fluxcanvas.flux_runtime.weights.files import TensorFile

SIZES = [
    {"mlp_hidden": 256},
    {"depth": 1, "depth_single": 1, "hidden_size": 48, "num_heads": 3, "mlp_hidden": 192, "axes_dim": (4, 6, 6)},
    {"depth": 12, "depth_single": 0, "mlp_hidden": 256, "guidance_embed": False, "in_channels": 384},
]


@pytest.fixture
def stored(tmp_path):
    """Tensors written to a file and opened again: name -> lazy tensor."""

    def write(tensors):
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
        return TensorFile(tmp_path / "x.safetensors").tensors()

    return write


def read(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_transformer_there_and_back(weights, stored, sizes):
    native = weights("transformer", **sizes)
    hidden = native["img_in.weight"].shape[0]
    foreign = read(keys.TRANSFORMER.to_foreign(stored(native), hidden))
    assert not foreign.keys() & {name for name in native if not name.startswith("proj_out")}
    back = keys.TRANSFORMER.to_native(stored(foreign))
    assert not back.unknown and not back.incomplete
    same(read(back.tensors), native)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_transformer_names_and_shapes_are_those_of_diffusers(weights, stored, sizes):
    from diffusers import FluxTransformer2DModel

    native = weights("transformer", **sizes)
    head_dim = native["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=native["img_in.weight"].shape[1],
            out_channels=64,
            num_layers=sizes.get("depth", 2),
            num_single_layers=sizes.get("depth_single", 3),
            attention_head_dim=head_dim,
            num_attention_heads=native["img_in.weight"].shape[0] // head_dim,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=sizes.get("guidance_embed", True),
        )
    ours = keys.TRANSFORMER.to_foreign(stored(native), native["img_in.weight"].shape[0])
    theirs = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.items()} == theirs


def test_transformer_agrees_with_diffusers_converter(weights, stored):
    """The converter knows only the published width, so every tensor keeps its rows and is one column wide."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    rows = {"hidden": 3072, "mlp": 12288}
    native = weights("transformer", depth=1, depth_single=1)
    scale = {64: rows["hidden"], 192: 3 * rows["hidden"], 384: 6 * rows["hidden"], 128: 2 * rows["hidden"]}
    real = {}
    for name, tensor in native.items():
        count = rows["mlp"] if "mlp.0" in name else 3 * rows["hidden"] + rows["mlp"] if "linear1" in name else None
        count = count or scale.get(tensor.shape[0], tensor.shape[0])
        real[name] = torch.randn(count, *([1] * (tensor.ndim - 1)))
    lazy = stored(real)
    ours = read(keys.TRANSFORMER.to_foreign(lazy, rows["hidden"]))
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(real))
    same(ours, theirs)


@pytest.mark.parametrize("sizes", [{}, {"channels": (32, 64, 64, 96, 96), "num_res_blocks": 2}], ids=str)
def test_vae_there_and_back(weights, stored, sizes):
    native = weights("vae", **sizes)
    foreign = read(keys.VAE.to_foreign(stored(native)))
    back = keys.VAE.to_native(stored(foreign))
    assert not back.unknown and not back.incomplete
    same(read(back.tensors), native)


def test_vae_agrees_with_diffusers(weights, stored):
    """Names, shapes and order of the levels, by diffusers' model and by its converter."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    channels = (32, 64, 64, 96)
    native = weights("vae", channels=channels, num_res_blocks=2)
    levels = len(channels)
    model = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=16,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    ours = read(keys.VAE.to_foreign(stored(native)))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}
    theirs = convert_ldm_vae_checkpoint(dict(native), model.config)
    theirs = {n: t.reshape(ours[n].shape) if n in ours else t for n, t in theirs.items()}
    same(ours, theirs)


def test_what_is_missing_and_unknown_is_named(weights, stored):
    native = weights("transformer")
    foreign = read(keys.TRANSFORMER.to_foreign(stored(native), 64))
    del foreign["transformer_blocks.1.attn.to_k.weight"]
    foreign["transformer_blocks.1.attn.extra.weight"] = torch.zeros(1)
    back = keys.TRANSFORMER.to_native(stored(foreign))
    assert back.incomplete == {"double_blocks.1.img_attn.qkv.weight": ["transformer_blocks.1.attn.to_k.weight"]}
    assert back.unknown == ["transformer_blocks.1.attn.extra.weight"]
    assert keys.TRANSFORMER.foreign_names("double_blocks.1.img_attn.qkv.bias") == [
        f"transformer_blocks.1.attn.to_{x}.bias" for x in "qkv"
    ]
    with pytest.raises(FluxError, match="nonsense"):
        keys.TRANSFORMER.to_foreign(stored({"nonsense": torch.zeros(1)}))


def test_only_the_final_modulation_changes_its_order(weights, stored):
    """Its halves are shift and scale in one layout, scale and shift in the other."""
    native = weights("transformer")
    foreign = read(keys.TRANSFORMER.to_foreign(stored(native), 64))
    ours, theirs = native["final_layer.adaLN_modulation.1.weight"], foreign["norm_out.linear.weight"]
    assert torch.equal(ours, theirs.roll(64, 0)) and not torch.equal(ours, theirs)
    assert torch.equal(native["final_layer.linear.weight"], foreign["proj_out.weight"])
