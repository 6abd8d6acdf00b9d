"""Every spelling of a LoRA's names: a file written from known matrices changes the right rows of the right layers."""

import pytest
import torch

from fluxcanvas.flux_runtime.lora.patches import Instead

TOP = {  # diffusers' names, written down once more on purpose
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v", "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
HEIGHTS = {"linear1": (8, 8, 8, 32), "qkv": (8, 8, 8)}


def diffusers_names(layer):
    if layer in TOP:
        return [TOP[layer]]
    stack, number, end = layer.split(".", 2)
    table, foreign = (DOUBLE, "transformer_blocks") if stack[0] == "d" else (SINGLE, "single_transformer_blocks")
    return [f"{foreign}.{number}.{name}" for name in table[end].split()]


def random_pair(out, into, rank):
    return torch.randn(rank, into), torch.randn(out, rank)


def write(layers, size, spell, endings, alpha=None, rank=2):
    """A file in BFL's units and the change it stands for; `spell` makes a name of a layer."""
    torch.manual_seed(0)
    tensors, dense = {}, {}
    for layer in layers:
        out, into = size(layer)
        down, up = random_pair(out, into, rank)
        tensors[spell(layer) + endings[0]], tensors[spell(layer) + endings[1]] = down, up
        if alpha is not None:
            tensors[spell(layer) + ".alpha"] = torch.tensor(alpha)
        dense[layer] = (1 if alpha is None else alpha / rank) * up @ down
    return tensors, dense


def write_in_parts(layers, size, spell, endings, alpha=None, rank=2):
    """The same in diffusers' units: q, k, v and the MLP apart, the last modulation's halves the other way round."""
    torch.manual_seed(0)
    tensors, dense = {}, {}
    for layer in layers:
        names = diffusers_names(layer)
        heights = HEIGHTS.get(layer.rsplit(".", 1)[-1], (size(layer)[0],))
        parts = []
        for name, height in zip(names, heights, strict=True):
            down, up = random_pair(height, size(layer)[1], rank)
            tensors[spell(name) + endings[0]], tensors[spell(name) + endings[1]] = down, up
            if alpha is not None:
                tensors[spell(name) + ".alpha"] = torch.tensor(alpha)
            parts.append((1 if alpha is None else alpha / rank) * up @ down)
        dense[layer] = torch.cat(parts)
        if layer.endswith("adaLN_modulation.1"):
            scale, shift = dense[layer].chunk(2)
            dense[layer] = torch.cat([shift, scale])
    return tensors, dense


def underscored(prefix):
    return lambda name: prefix + name.replace(".", "_")


def prefixed(prefix):
    return lambda name: prefix + name


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
A_B = (".lora_A.weight", ".lora_B.weight")
BFL_FORMATS = {
    "kohya": (underscored("lora_unet_"), DOWN_UP, 4.0, "kohya"),
    "ai-toolkit": (prefixed("diffusion_model."), A_B, None, "AI-Toolkit"),
    "model prefix": (prefixed("model.diffusion_model."), A_B, 1.0, "AI-Toolkit"),
    "bare": (prefixed(""), A_B, None, "BFL"),
    "fal": (prefixed("base_model.model."), A_B, None, "fal Kontext"),
    "adapter name": (prefixed("base_model.model."), (".lora_A.default.weight", ".lora_B.default.weight"), None,
                     "fal Kontext"),
    "transformer prefix": (prefixed("transformer."), DOWN_UP, 3.0, "OneTrainer"),
}  # fmt: skip
DIFFUSERS_FORMATS = {
    "diffusers": (prefixed("transformer."), A_B, None, "diffusers"),
    "with alpha": (prefixed("transformer."), A_B, 8.0, "diffusers"),
    "lora.down": (prefixed("transformer."), (".lora.down.weight", ".lora.up.weight"), None, "diffusers"),
    "lora_down": (prefixed("transformer."), DOWN_UP, 1.0, "diffusers"),
    "bare": (prefixed(""), A_B, None, "diffusers"),
    "peft": (prefixed("base_model.model."), A_B, None, "PEFT"),
    "onetrainer": (underscored("lora_transformer_"), DOWN_UP, 1.0, "OneTrainer"),
    "onetrainer without alpha": (underscored("lora_transformer_"), DOWN_UP, None, "OneTrainer"),
    "lycoris": (underscored("lycoris_"), DOWN_UP, 1.0, "LyCORIS"),
}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, dense in expected.items():
        assert torch.allclose(found[name], dense, atol=1e-5), name


@pytest.mark.parametrize("case", BFL_FORMATS)
def test_formats_with_bfl_names(case, layers, size, read, deltas):
    spell, endings, alpha, told = BFL_FORMATS[case]
    tensors, dense = write(layers, size, spell, endings, alpha)
    lora = read(tensors)
    same(deltas(lora), dense)
    assert (lora.format, lora.unused, lora.ranks, lora.in_channels) == (told, (), (2,), 4)


@pytest.mark.parametrize("case", DIFFUSERS_FORMATS)
def test_formats_with_diffusers_names(case, layers, size, read, deltas):
    spell, endings, alpha, told = DIFFUSERS_FORMATS[case]
    tensors, dense = write_in_parts(layers, size, spell, endings, alpha)
    lora = read(tensors)
    same(deltas(lora), dense)
    assert (lora.format, lora.unused, lora.ranks, lora.in_channels) == (told, (), (2,), 4)


def test_xlabs(read, deltas):
    torch.manual_seed(0)
    places = {
        "double_blocks.1.processor.qkv_lora1": ("double_blocks.1.img_attn.qkv", 24, 8),
        "double_blocks.1.processor.qkv_lora2": ("double_blocks.1.txt_attn.qkv", 24, 8),
        "double_blocks.1.processor.proj_lora1": ("double_blocks.1.img_attn.proj", 8, 8),
        "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", 8, 8),
        "single_blocks.0.processor.qkv_lora": ("single_blocks.0.linear1", 24, 8),  # the first 24 of its 56 rows
        "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", 8, 40),
    }
    tensors, dense = {}, {}
    for name, (layer, out, into) in places.items():
        down, up = random_pair(out, into, 3)
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = down, up
        dense[layer] = up @ down
    for prefix in ("", "diffusion_model."):
        lora = read({prefix + name: tensor for name, tensor in tensors.items()})
        same(deltas(lora), dense)
        assert lora.format == "XLabs" and not lora.unused
    assert lora.layers["transformer"]["single_blocks.0.linear1"][0].rows == (0, 24)


def test_onetrainer_with_bfl_names_keeps_the_parts_of_joined_layers_apart(layers, size, read, deltas):
    """The parts have numbers, the input layer a name of its own, and the last modulation stays in BFL's order."""
    spell, whole = prefixed("transformer."), [layer for layer in layers if not layer.endswith(tuple(HEIGHTS))]
    tensors, dense = write(whole, size, lambda name: spell("img_in.proj" if name == "img_in" else name), DOWN_UP, 1.0)
    for layer in set(layers) - set(whole):
        parts = []
        for number, height in enumerate(HEIGHTS[layer.rsplit(".", 1)[-1]]):
            down, up = random_pair(height, 8, 2)
            name = spell(f"{layer}.{number}")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.ones(())}
            parts.append(up @ down / 2)
        dense[layer] = torch.cat(parts)
    lora = read(tensors)
    same(deltas(lora), dense)
    assert (lora.format, lora.unused) == ("OneTrainer", ())


@pytest.mark.parametrize("spell", [prefixed("transformer."), underscored("lycoris_")])
def test_fused_projections_of_diffusers(spell, read, deltas):
    """q, k and v of a single block are the first rows of its joined layer."""
    heights = {"transformer_blocks.1.attn.to_qkv": "double_blocks.1.img_attn.qkv",
               "transformer_blocks.0.attn.to_added_qkv": "double_blocks.0.txt_attn.qkv",
               "single_transformer_blocks.1.attn.to_qkv": "single_blocks.1.linear1"}  # fmt: skip
    torch.manual_seed(0)
    pairs = {name: random_pair(24, 8, 2) for name in heights}
    tensors = {f"{spell(name)}.lora_A.weight": down for name, (down, _) in pairs.items()}
    tensors |= {f"{spell(name)}.lora_B.weight": up for name, (_, up) in pairs.items()}
    lora = read(tensors)
    same(deltas(lora), {heights[name]: up @ down for name, (down, up) in pairs.items()})
    assert lora.layers["transformer"]["single_blocks.1.linear1"][0].rows == (0, 24) and not lora.unused


def test_bfl_control_lora(layers, size, read, deltas, biases):
    """Wider input, biases, norms that are set; the last modulation stays as it is, the file being in BFL's order."""
    tensors, dense = write(layers, size, prefixed(""), A_B)
    tensors["img_in.lora_A.weight"] = torch.randn(2, 8)
    dense["img_in"] = tensors["img_in.lora_B.weight"] @ tensors["img_in.lora_A.weight"]
    for layer in layers:
        tensors[f"{layer}.lora_B.bias"] = torch.randn(size(layer)[0])
    scales = [f"double_blocks.0.{s}_attn.norm.{n}_norm.scale" for s in ("img", "txt") for n in ("query", "key")]
    scales += [f"single_blocks.1.norm.{n}_norm.scale" for n in ("query", "key")]
    tensors |= {name: torch.rand(4) for name in scales}
    lora = read(tensors)
    same(deltas(lora), dense)
    same(biases(lora), {layer: tensors[f"{layer}.lora_B.bias"] for layer in layers})
    same(whole_norms(lora), {name: tensors[name] for name in scales})
    assert (lora.format, lora.in_channels, lora.unused) == ("BFL control", 8, ())
    assert "6 tensors of norms set whole" in lora.summary() and "8 channels of input" in lora.summary()


def test_control_lora_as_other_programs_save_it(read, biases):
    """ComfyUI's spelling of biases, norms and the widened input; diffusers' spelling of norms."""
    tensors = {
        "diffusion_model.img_in.lora_down.weight": torch.randn(2, 8),
        "diffusion_model.img_in.lora_up.weight": torch.randn(8, 2),
        "diffusion_model.img_in.diff_b": torch.randn(8),
        "diffusion_model.img_in.reshape_weight": torch.tensor([8, 8]),
        "diffusion_model.single_blocks.0.norm.key_norm.scale.set_weight": torch.rand(4),
        "diffusion_model.txt_in.set_weight": torch.randn(8, 6),
        "lora_unet_single_blocks_0_norm_query_norm_scale.set_weight": torch.rand(4),
    }
    lora = read(tensors)
    assert not lora.unused and lora.in_channels == 8 and set(biases(lora)) == {"img_in"}
    scales = {f"single_blocks.0.norm.{name}_norm.scale" for name in ("key", "query")}
    assert set(whole_norms(lora)) == scales
    (whole,) = lora.layers["transformer"]["txt_in"]
    assert isinstance(whole, Instead) and torch.equal(whole.diff, tensors["diffusion_model.txt_in.set_weight"])
    size_alone = "diffusion_model.final_layer.linear.reshape_weight"
    assert read({**tensors, size_alone: torch.tensor([8, 9])}).unused == (size_alone,)
    theirs = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 8),
        "transformer.x_embedder.lora_B.weight": torch.randn(8, 2),
        "transformer.transformer_blocks.0.attn.norm_added_k.weight": torch.rand(4),
    }
    lora = read(theirs)
    assert set(whole_norms(lora)) == {"double_blocks.0.txt_attn.norm.key_norm.scale"} and not lora.unused


def whole_norms(lora):
    return {name: change.whole for name, change in lora.norms["transformer"].items() if change.whole is not None}


NORM = "double_blocks.0.img_attn.norm.query_norm"


@pytest.mark.parametrize(
    ("name", "part", "native"),
    [
        (f"diffusion_model.{NORM}.diff", "transformer", f"{NORM}.scale"),
        (f"diffusion_model.{NORM}.scale.diff", "transformer", f"{NORM}.scale"),
        ("lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm", "transformer", f"{NORM}.scale"),
        ("lora_unet_double_blocks_0_img_attn_norm_query_norm_scale.diff", "transformer", f"{NORM}.scale"),
        ("lycoris_transformer_blocks_0_attn_norm_q.w_norm", "transformer", f"{NORM}.scale"),
        ("transformer.transformer_blocks.0.attn.norm_q.diff", "transformer", f"{NORM}.scale"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.3.layer_norm1.diff", "clip",
         "encoder.layers.3.layer_norm1.weight"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.3.layer_norm2.diff_b", "clip",
         "encoder.layers.3.layer_norm2.bias"),
        ("lora_te1_text_model_final_layer_norm.b_norm", "clip", "final_layer_norm.bias"),
        ("text_encoders.t5xxl.transformer.encoder.block.3.layer.1.layer_norm.diff", "t5",
         "encoder.block.3.layer.1.layer_norm.weight"),
        ("lora_te3_encoder_final_layer_norm.w_norm", "t5", "encoder.final_layer_norm.weight"),
    ],
)  # fmt: skip
def test_differences_of_norms(name, part, native, read):
    """As ComfyUI's extraction and LyCORIS write them; such a file may hold nothing else."""
    diff = torch.randn(8)
    lora = read({name: diff})
    ((found, change),) = lora.norms[part].items()
    assert found == native and change.whole is None and torch.equal(change.diff, diff)
    assert not lora.unused and "1 tensor of norms changed by a difference" in lora.summary()


def test_one_norm_has_one_difference(read):
    """The second spelling of the same is told as unused."""
    lora = read({f"diffusion_model.{NORM}.diff": torch.ones(8), f"diffusion_model.{NORM}.scale.diff": torch.ones(8)})
    assert len(lora.norm_changes) == len(lora.unused) == 1


def test_whole_weights_count_where_peft_writes_them(read):
    """Under the names of its own state dict too; a weight beside another program's LoRA is not taken for one."""
    weight, bias = torch.randn(8, 4), torch.randn(8)
    lows, _ = write(["img_in"], lambda _: (8, 4), prefixed("diffusion_model."), A_B)
    for spelling in ("", "modules_to_save.default.", "modules_to_save."):
        name = f"base_model.model.x_embedder.{spelling}"
        lora = read({f"{name}weight": weight, f"{name}bias": bias, **pair_of("base_model.model.proj_out")})
        (patch,) = lora.layers["transformer"]["img_in"]
        assert isinstance(patch, Instead) and torch.equal(patch.diff, weight) and torch.equal(patch.bias, bias)
        assert not lora.unused and "what is whole counts fully at every weight but 0" in lora.summary()
    others = {"diffusion_model.txt_in.weight": torch.ones(8, 6), "base_model.model.x_embedder.scale": torch.ones(8)}
    assert set(read({**lows, **others}).unused) == set(others)


def pair_of(name):
    return {f"{name}.lora_A.weight": torch.randn(2, 8), f"{name}.lora_B.weight": torch.randn(4, 2)}


CLIP_LAYERS = [f"encoder.layers.0.self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["encoder.layers.11.mlp.fc2"]
T5_LAYERS = [f"encoder.block.3.layer.0.SelfAttention.{x}" for x in "qkvo"] + [
    f"encoder.block.23.layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")
]


@pytest.mark.parametrize(
    ("clip", "t5", "endings"),
    [
        (underscored("lora_te_text_model_"), underscored("lora_te3_"), DOWN_UP),
        (underscored("lora_te1_text_model_"), underscored("lora_te2_"), DOWN_UP),
        (underscored("lora_te1_"), underscored("lora_te3_"), DOWN_UP),
        (prefixed("text_encoder.text_model."), prefixed("text_encoder_2."), A_B),
        (prefixed("text_encoder."), prefixed("text_encoder_2."), (".lora_linear_layer.down.weight",
                                                                  ".lora_linear_layer.up.weight")),
        (prefixed("text_encoders.clip_l.transformer.text_model."), prefixed("text_encoders.t5xxl.transformer."),
         DOWN_UP),
        (prefixed("clip_l.text_model."), prefixed("t5."), DOWN_UP),
    ],
)  # fmt: skip
def test_text_encoders(clip, t5, endings, read, deltas):
    def square(layer):
        return 8, 8

    ours, clip_dense = write(CLIP_LAYERS, square, clip, endings, 4.0)
    theirs, t5_dense = write(T5_LAYERS, square, t5, endings, 1.0)
    lora = read({**ours, **theirs})
    same(deltas(lora, "clip"), clip_dense)
    same(deltas(lora, "t5"), t5_dense)
    assert lora.counts == {"clip": 5, "t5": 7} and not lora.unused


def test_sparse_split_is_the_same_matrix(read, deltas):
    """sd-scripts trains q, k and v apart and saves them as one, its up matrix full of zeros: nothing special."""
    torch.manual_seed(0)
    pairs = [random_pair(8, 8, 2) for _ in "qkv"]
    down, up = torch.cat([d for d, _ in pairs]), torch.block_diag(*(u for _, u in pairs))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    lora = read({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(6.0)})
    same(deltas(lora), {"double_blocks.0.img_attn.qkv": torch.cat([u @ d for d, u in pairs])})


def test_unknown_names_are_told(layers, size, read):
    tensors, _ = write(layers, size, underscored("lora_unet_"), DOWN_UP, 1.0)
    strange = {
        "bundle_emb.token.clip_l": torch.randn(2, 8),
        "lora_unet_double_blocks_0_img_attn_nothing.lora_down.weight": torch.randn(2, 8),
        "lora_unet_single_blocks_0_linear3.alpha": torch.tensor(1.0),
        "lora_unet_single_blocks_0_linear1.alfa": torch.tensor(1.0),
        "lora_te1_text_model_embeddings_token_embedding.diff": torch.randn(2, 8),
        "lora_unet_double_blocks_00_img_mlp_0.diff": torch.randn(32, 8),
    }
    lora = read({**tensors, **strange})
    assert set(lora.unused) == set(strange) and set(lora.tensors) == set(tensors)
    assert "unused: 6: " in lora.summary() and "bundle_emb.token.clip_l" in lora.summary()


def test_alpha_alone_changes_nothing_and_is_told(read):
    tensors, _ = write(["txt_in"], lambda _: (8, 6), underscored("lora_unet_"), DOWN_UP, 1.0)
    lora = read({**tensors, "lora_unet_img_in.alpha": torch.tensor(1.0)})
    assert lora.unused == ("lora_unet_img_in.alpha",)


def test_a_lora_told_twice_acts_once(layers, size, read, deltas):
    """Published files exist that hold the same LoRA under diffusers' and under kohya's names."""
    full, dense = write_in_parts(layers, size, prefixed("transformer."), A_B)
    again, _ = write(layers[:12], size, underscored("lora_unet_"), DOWN_UP)
    lora = read({**again, **full})
    same(deltas(lora), dense)
    assert set(lora.unused) == set(again) and "12 layers in the file under the names of two" in lora.summary()


def test_different_ranks_and_missing_alphas(read):
    one, _ = write(["txt_in"], lambda _: (8, 6), underscored("lora_unet_"), DOWN_UP, 1.0, rank=3)
    two, _ = write(["img_in"], lambda _: (8, 4), underscored("lora_unet_"), DOWN_UP, None, rank=1)
    lora = read({**one, **two})
    assert lora.ranks == (1, 3) and lora.layers["transformer"]["img_in"][0].scale == 1.0
    assert "rank 1, 3" in lora.summary() and "1 of 2 changes have no alpha" in lora.summary()


@pytest.mark.parametrize("case", ["kohya", "transformer prefix"])
def test_an_alpha_below_zero_turns_the_change_round(case, layers, size, read, deltas):
    spell, endings, _, _ = BFL_FORMATS[case]
    tensors, dense = write(layers, size, spell, endings, -4.0)
    same(deltas(read(tensors)), dense)
    assert read(tensors).layers["transformer"]["img_in"][0].scale == -2.0
