"""LoKr, LoHa, DoRA, whole differences and every stored type, in each layout: patches equal the change written out."""

import pytest
import torch

from fluxcanvas.flux_runtime.lora.patches import Full, Kronecker, Magnitude

# The file's name of a layer -> where it goes: native layer, rows, (out, in) in the file, halves exchanged.
PLACES = {
    "lora_unet_double_blocks_0_img_attn_qkv": ("double_blocks.0.img_attn.qkv", None, (24, 8), False),
    "diffusion_model.single_blocks.1.linear2": ("single_blocks.1.linear2", None, (8, 40), False),
    "transformer.single_transformer_blocks.1.proj_mlp": ("single_blocks.1.linear1", (24, 56), (32, 8), False),
    "lycoris_transformer_blocks_0_attn_add_k_proj": ("double_blocks.0.txt_attn.qkv", (8, 16), (8, 8), False),
    "transformer.norm_out.linear": ("final_layer.adaLN_modulation.1", None, (16, 8), True),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("encoder.layers.0.mlp.fc1", None, (32, 8), False),
}


def only_patch(lora, layer):
    (patches,) = [layers[layer] for layers in lora.layers.values()]
    assert len(lora.layers) == 1 and len(patches) == 1 and not lora.unused
    return patches[0]


def native(dense, swap):
    return torch.cat(dense.chunk(2)[::-1]) if swap else dense


def check(read, place, tensors, dense, flavour, weight=None):
    layer, rows, _, swap = PLACES[place]
    lora = read({f"{place}.{ending}": tensor for ending, tensor in tensors.items()})
    patch = only_patch(lora, layer)
    assert patch.rows == rows and patch.shape == tuple(dense.shape) and lora.flavours == (flavour,)
    weight = torch.zeros_like(dense) if weight is None else native(weight, swap)
    assert torch.allclose(patch.delta(weight), native(dense, swap), atol=1e-5)
    return patch


def matrices(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("factored", ["", "1", "2", "12"])
def test_lokr(read, place, rows, factored):
    out, into = PLACES[place][2]
    one, two = matrices((rows, 4), (out // rows, into // 4))
    left1, right1, left2, right2 = matrices((rows, 3), (3, 4), (out // rows, 2), (2, into // 4))
    tensors = {"alpha": torch.tensor(6.0)}
    scale = 1.0
    if "1" in factored:
        one, scale = left1 @ right1, 6 / 3
        tensors |= {"lokr_w1_a": left1, "lokr_w1_b": right1}
    else:
        tensors |= {"lokr_w1": one}
    if "2" in factored:
        two, scale = left2 @ right2, 6 / 2
        tensors |= {"lokr_w2_a": left2, "lokr_w2_b": right2}
    else:
        tensors |= {"lokr_w2": two}
    check(read, place, tensors, scale * torch.kron(one, two), "LoKr")


def test_lokr_whose_blocks_straddle_the_halves(read):
    """Three blocks of rows cannot be exchanged as halves: the change is written out."""
    one, two = matrices((3, 2), (4, 4))
    lora = read({"transformer.norm_out.linear.lokr_w1": one, "transformer.norm_out.linear.lokr_w2": two})
    patch = only_patch(lora, "final_layer.adaLN_modulation.1")
    assert isinstance(patch, Full) and not isinstance(patch, Kronecker)
    assert torch.allclose(patch.delta(torch.zeros(12, 8)), native(torch.kron(one, two), True))


@pytest.mark.parametrize("place", PLACES)
def test_loha(read, place):
    out, into = PLACES[place][2]
    a, b, c, d = matrices((out, 2), (2, into), (out, 2), (2, into))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {**dict(zip(names, (a, b, c, d), strict=True)), "alpha": torch.tensor(1.0)}
    check(read, place, tensors, 0.5 * (a @ b) * (c @ d), "LoHa")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ending", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("axis", ["rows", "columns", "plain"])
def test_dora(read, place, ending, axis):
    """The changed weight's rows (PEFT, LyCORIS) or columns (OneTrainer) get the lengths of the file."""
    out, into = PLACES[place][2]
    down, up, weight = matrices((2, into), (out, 2), (out, into))
    lengths = torch.rand({"rows": (out, 1), "columns": (1, into), "plain": (out,)}[axis]) + 0.5
    changed = weight + 2.0 * up @ down
    norm = changed.norm(dim=0, keepdim=True) if axis == "columns" else changed.norm(dim=1, keepdim=True)
    dense = changed / norm * (lengths[:, None] if axis == "plain" else lengths) - weight
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(4.0), ending: lengths}
    patch = check(read, place, tensors, dense, "DoRA", weight)
    assert isinstance(patch, Magnitude)


def test_dora_of_a_lokr(read):
    one, two, weight = matrices((2, 2), (4, 4), (8, 8))
    changed = weight + torch.kron(one, two)
    dense = changed / changed.norm(dim=1, keepdim=True) * 3 - weight
    tensors = {"lokr_w1": one, "lokr_w2": two, "dora_scale": torch.full((8, 1), 3.0)}
    check(read, "lycoris_transformer_blocks_0_attn_add_k_proj", tensors, dense, "LoKr with DoRA", weight)


@pytest.mark.parametrize("place", PLACES)
def test_whole_differences(read, place):
    out, into = PLACES[place][2]
    diff, bias = matrices((out, into), (out,))
    patch = check(read, place, {"diff": diff, "diff_b": bias}, diff, "full difference")
    assert torch.equal(patch.bias, native(bias, PLACES[place][3]))


def test_bias_alone(read):
    bias = torch.randn(8)
    patch = only_patch(read({"lora_unet_txt_in.diff_b": bias}), "txt_in")
    assert torch.equal(patch.bias, bias) and patch.shape == (8, 0)
    key = only_patch(read({"transformer.transformer_blocks.0.attn.to_k.diff_b": bias}), "double_blocks.0.img_attn.qkv")
    assert key.rows == (8, 16)


def test_bias_alone_where_its_rows_are_unknown(read):
    """The MLP's rows begin below q, k and v, whose height the bias does not tell."""
    name = "transformer.single_transformer_blocks.0.proj_mlp.diff_b"
    lora = read({name: torch.randn(32), "lora_unet_txt_in.diff_b": torch.randn(8)})
    assert lora.unused == (name,)


@pytest.mark.parametrize("place", PLACES)
def test_bias_of_the_up_matrix_is_scaled_with_it(read, place):
    out, into = PLACES[place][2]
    down, up, bias, more = matrices((2, into), (out, 2), (out,), (out,))
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias, "alpha": torch.tensor(6.0)}
    patch = check(read, place, tensors, 3 * up @ down, "LoRA")
    assert torch.allclose(patch.bias, native(3 * bias, PLACES[place][3]))
    patch = check(read, place, {**tensors, "diff_b": more}, 3 * up @ down, "LoRA")
    assert torch.allclose(patch.bias, native(3 * bias + more, PLACES[place][3]))


def test_low_rank_and_difference_of_one_layer_add_up(read, deltas):
    down, up, diff = matrices((2, 6), (8, 2), (8, 6))
    name = "lora_unet_txt_in"
    lora = read({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.diff": diff})
    assert torch.allclose(deltas(lora)["txt_in"], up @ down + diff, atol=1e-6)
    assert lora.flavours == ("LoRA", "full difference") and not lora.unused


@pytest.mark.parametrize("core", ["lokr_t2", "hada_t1"])
def test_cores_of_convolutions_are_told_unused(read, core):
    strange = {
        f"lora_unet_img_in.{core}": torch.randn(2, 2, 3, 3),
        "lora_unet_img_in.lokr_w1": torch.randn(2, 2),
        "lora_unet_img_in.alpha": torch.tensor(1.0),
    }
    lora = read({**strange, "lora_unet_txt_in.diff": torch.randn(8, 6)})
    assert set(lora.unused) == set(strange) and lora.counts == {"transformer": 1}


def test_one_by_one_convolutions_are_matrices(read):
    down, up = matrices((2, 6), (8, 2))
    tensors = {"lora_down.weight": down[..., None, None], "lora_up.weight": up[..., None, None]}
    patch = only_patch(read({f"lora_unet_txt_in.{k}": v for k, v in tensors.items()}), "txt_in")
    assert torch.equal(patch.down, down) and torch.equal(patch.up, up)


TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES)
def test_stored_types_are_kept(read, dtype):
    """The halves of the last modulation are exchanged in any type."""
    down, up, bias = (m.to(dtype) for m in matrices((2, 8), (16, 2), (16,)))
    for base, layer, swap in (
        ("norm_out.linear", "final_layer.adaLN_modulation.1", True),
        ("x_embedder", "img_in", False),
    ):
        tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias, "alpha": torch.tensor(2).to(dtype)}
        patch = only_patch(read({f"transformer.{base}.{k}": v for k, v in tensors.items()}), layer)
        assert (patch.down.dtype, patch.up.dtype, patch.bias.dtype, patch.alpha) == (dtype, dtype, dtype, 2.0)
        assert torch.equal(patch.up.float(), native(up.float(), swap)) and torch.equal(patch.down.float(), down.float())
        assert torch.equal(patch.bias.float(), native(bias.float(), swap))
