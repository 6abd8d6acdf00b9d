"""Whatever a file holds: a `FluxError` that names it, or a LoRA that accounts for every tensor and can be applied."""

from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.lora.formats import read_lora

FAMILIES = {  # endings that make up a change, with sizes for a layer (out, in) and rank 2
    "kohya": {"lora_down.weight": (2, "in"), "lora_up.weight": ("out", 2), "alpha": ()},
    "peft": {"lora_A.weight": (2, "in"), "lora_B.weight": ("out", 2), "lora_B.bias": ("out",)},
    "dora": {"lora_A.x.weight": (2, "in"), "lora_B.x.weight": ("out", 2), "dora_scale": ("out", 1)},
    "columns": {"lora_down.weight": (2, "in"), "lora_up.weight": ("out", 2), "dora_scale": (1, "in"), "alpha": ()},
    "xlabs": {"down.weight": (2, "in"), "up.weight": ("out", 2)},
    "diff": {"diff": ("out", "in"), "diff_b": ("out",)},
    "lokr": {"lokr_w1": (1, 1), "lokr_w2": ("out", "in"), "alpha": ()},
    "factors": {"lokr_w1": (1, 1), "lokr_w2_a": ("out", 2), "lokr_w2_b": (2, "in")},
    "loha": {"hada_w1_a": ("out", 2), "hada_w1_b": (2, "in"), "hada_w2_a": ("out", 2), "hada_w2_b": (2, "in")},
    "whole": {"set_weight": ("out", "in"), "reshape_weight": (2,)},
    "saved": {"modules_to_save.default.weight": ("out", "in"), "bias": ("out",)},
    "norm": {"w_norm": ("in",), "b_norm": ("in",)},
    "model": {"weight": ("out", "in"), "scale": ("in",), "bias": ("out",)},
}
BASES = {
    "lora_unet_double_blocks_0_img_attn_qkv": (24, 8),
    "lora_unet_img_in": (8, 4),
    "diffusion_model.single_blocks.0.linear1": (56, 8),
    "transformer.norm_out.linear": (16, 8),
    "lora_transformer_norm_out_linear": (16, 8),
    "transformer.single_transformer_blocks.0.attn.to_v": (8, 8),
    "lycoris_single_transformer_blocks_0_proj_mlp": (32, 8),
    "double_blocks.0.processor.qkv_lora1": (24, 8),
    "base_model.model.proj_out": (4, 8),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (32, 8),
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.o": (8, 8),
    "double_blocks.0.img_attn.norm.query_norm": (4, 4),
    "transformer.transformer_blocks.0.attn.norm_q": (4, 4),
    "text_encoder.text_model.final_layer_norm": (8, 8),
    "lora_te2_x": (8, 8),
}
TYPES = (torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.uint8, torch.bfloat16, torch.float64)
SIZES = ((), (1,), (8,), (2, 8), (8, 2), (8, 8), (1, 8), (8, 1), (0, 8), (8, 0), (2, 8, 1, 1), (8, 2, 3))
SETTINGS = ('{"transformer.lora_alpha": 2}', '{"lora_alpha": 2, "use_rslora": true}', "{}", '{"lora_alpha": -1}')
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
RARE = dict(max_examples=400, deadline=None, derandomize=True,
            suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


@st.composite
def files(draw):
    """Whole changes of some layers, and then up to three things done to them."""
    tensors = {}
    for base in draw(st.lists(st.sampled_from(sorted(BASES)), min_size=1, max_size=4, unique=True)):
        size = dict(zip(("out", "in"), BASES[base], strict=True))
        for ending, shape in FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))].items():
            tensors[f"{base}.{ending}"] = torch.ones([size.get(side, side) for side in shape])
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        _spoil(draw, tensors, name)
        if not tensors:
            break
    return tensors


def _spoil(draw, tensors, name):
    what = draw(st.sampled_from(("drop", "type", "size", "turn", "value", "base", "ending", "name", "add")))
    if what == "drop":
        del tensors[name]
    elif what == "type":
        tensors[name] = tensors[name].to(draw(st.sampled_from(TYPES)))
    elif what == "size":
        tensors[name] = torch.ones(draw(st.sampled_from(SIZES)))
    elif what == "turn":
        tensors[name] = tensors[name].movedim(0, -1).contiguous() if tensors[name].dim() else tensors[name]
    elif what == "value":
        tensors[name] = torch.full(tensors[name].shape, draw(st.sampled_from((0, 1, -1, float("nan"), 1e-30))))
    elif what == "add":
        tensors[draw(TEXT)] = torch.ones(2)
    else:
        base, _, ending = name.partition(".")
        other = draw(st.sampled_from(sorted(BASES)))
        endings = sorted({end for family in FAMILIES.values() for end in family} | {"lokr_t2", "lora_mid.weight"})
        new = {"base": f"{other}.{ending}", "ending": f"{base}.{draw(st.sampled_from(endings))}", "name": draw(TEXT)}
        tensors[new[what]] = tensors.pop(name)


def test_any_file_is_read_or_refused(tmp_path):
    """Half of the files are read, so that neither way is left out."""
    path, seen = tmp_path / "x.safetensors", Counter()

    @settings(**RARE)
    @given(tensors=files(), metadata=st.none() | st.sampled_from(SETTINGS))
    def check(tensors, metadata):
        save_file(tensors, path, metadata={"lora_adapter_metadata": metadata} if metadata else None)
        try:
            lora = read_lora(path)
        except FluxError as error:
            assert str(error).count(str(path)) == 1
            seen["refused"] += 1
            return
        seen["read"] += 1
        used, unused = set(lora.tensors), set(lora.unused)
        assert used | unused == set(tensors) and not used & unused
        sound(lora)

    check()
    assert min(seen["read"], seen["refused"]) > 60, seen


def sound(lora):
    """What applying relies on."""
    assert lora.summary() and lora.format and lora.flavours and lora.differs
    for patch in lora.patches:
        rows, columns = patch.shape
        assert patch.rows is None or patch.rows[1] - patch.rows[0] == rows
        assert patch.bias is None or patch.bias.shape == (rows,)
        assert patch.delta(torch.ones(rows, columns)).shape == (rows, columns)
    try:
        lora.check_numbers()
    except FluxError as error:
        assert any(tensor.float().isnan().any() for tensor in lora.tensors.values()), error


def test_any_names_are_read_or_refused(tmp_path):
    """Names that nobody wrote, alone and after a prefix that means something."""
    path = tmp_path / "x.safetensors"
    prefixes = st.sampled_from(["", "lora_unet_", "transformer.", "diffusion_model.", "lora_te1_", "lycoris_"])
    names = st.lists(st.tuples(prefixes, TEXT, st.sampled_from(["", ".alpha", ".diff"])).map("".join), max_size=5)

    @settings(**RARE)
    @given(names=names)
    def check(names):
        save_file({name: torch.ones(2, 2) for name in names}, path)
        try:
            lora = read_lora(path)
        except FluxError as error:
            assert str(error).count(str(path)) == 1
        else:
            assert lora.differs

    check()
