"""The same files through diffusers, for the formats it reads right: the same change of every layer."""

import json

import pytest
import torch

from fluxcanvas.flux_runtime import FluxParams
from fluxcanvas.flux_runtime.lora.apply import applied
from fluxcanvas.flux_runtime.lora.fit import fit
from fluxcanvas.flux_runtime.lora.formats import read_lora
from fluxcanvas.flux_runtime.lora.patches import LowRank
from fluxcanvas.flux_runtime.lora.stack import LoraStack
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.weights.keys import TRANSFORMER

DOUBLE, SINGLE, RANK, NARROW = 19, 38, 2, 4  # diffusers asks for all blocks and for 3072 rows; columns may be few
HEIGHTS = {
    "attn.qkv": 9216, "attn.proj": 3072, "mlp.0": 12288, "mlp.2": 3072, "_mod.lin": 18432, "linear1": 21504,
    "linear2": 3072, "modulation.lin": 9216, "final_layer.linear": 64, "adaLN_modulation.1": 6144,
}  # fmt: skip
HEAD = (
    "img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer",
    "guidance_in.in_layer", "guidance_in.out_layer", "final_layer.linear", "final_layer.adaLN_modulation.1",
)  # fmt: skip


def blocks():
    ends = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
    doubles = [f"double_blocks.{i}.{s}_{end}" for i in range(DOUBLE) for s in ("img", "txt") for end in ends]
    return doubles + [f"single_blocks.{i}.{e}" for i in range(SINGLE) for e in ("linear1", "linear2", "modulation.lin")]


def pair(layer):
    height = next((height for end, height in HEIGHTS.items() if layer.endswith(end)), 3072)
    return torch.randn(RANK, NARROW), torch.randn(height, RANK)


def theirs(tensors):
    """diffusers' reading of a file: the change of each of its layers, and the tensors it made."""
    from diffusers.loaders import FluxLoraLoaderMixin

    converted, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(tensors), return_alphas=True)
    assert not alphas
    dense = {}
    for name, down in converted.items():
        if name.endswith(".lora_A.weight"):
            up = converted[name.replace("lora_A", "lora_B")]
            dense[name.removeprefix("transformer.").removesuffix(".lora_A.weight")] = up @ down
    return dense, converted


def native(dense, layer):
    return torch.cat([dense[name.removesuffix(".weight")] for name in TRANSFORMER.foreign_names(f"{layer}.weight")])


def agree(lora, tensors, deltas, skip=()):
    dense, _ = theirs(tensors)
    mine = deltas(lora)
    assert set(lora.tensors) == set(tensors)
    for layer, delta in mine.items():
        if layer not in skip:
            assert torch.allclose(delta, native(dense, layer), atol=1e-5), layer
    return mine


def test_kohya(read, deltas):
    """Alphas below and above the rank; every block, fused and not, and a sparse split."""
    torch.manual_seed(0)
    tensors = {}
    for number, layer in enumerate(blocks()):
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = pair(layer)
        tensors[f"{name}.alpha"] = torch.tensor((0.5, 2.0, 16.0)[number % 3])
    sparse = "lora_unet_double_blocks_3_img_attn_qkv"
    tensors[f"{sparse}.lora_down.weight"] = torch.randn(3, NARROW)
    tensors[f"{sparse}.lora_up.weight"] = torch.block_diag(*(torch.randn(3072, 1) for _ in range(3)))
    assert len(agree(read(tensors), tensors, deltas)) == 304


def test_kohya_clip(read, deltas):
    from diffusers.loaders import FluxLoraLoaderMixin

    torch.manual_seed(0)
    names = {
        "self_attn.q_proj": "self_attn.to_q_lora", "self_attn.out_proj": "self_attn.to_out_lora",
        "mlp.fc1": "mlp.fc1.lora_linear_layer",
    }  # fmt: skip
    tensors = {}
    for name in names:
        base = f"lora_te1_text_model_encoder_layers_4_{name.replace('.', '_')}"
        tensors[f"{base}.lora_down.weight"], tensors[f"{base}.lora_up.weight"] = torch.randn(2, 8), torch.randn(8, 2)
        tensors[f"{base}.alpha"] = torch.tensor(1.0)
    mine = deltas(read(tensors), "clip")  # first, for diffusers scales the tensors that it is given
    converted = FluxLoraLoaderMixin.lora_state_dict(tensors)
    assert set(mine) == {f"encoder.layers.4.{name}" for name in names}
    for name, foreign in names.items():
        base = f"text_encoder.text_model.encoder.layers.4.{foreign}"
        dense = converted[f"{base}.up.weight"] @ converted[f"{base}.down.weight"]
        assert torch.allclose(mine[f"encoder.layers.4.{name}"], dense, atol=1e-5)


def test_xlabs(read, deltas):
    torch.manual_seed(0)
    tensors = {}
    for name, height in (("qkv_lora1", 9216), ("proj_lora1", 3072), ("qkv_lora2", 9216), ("proj_lora2", 3072)):
        base = f"double_blocks.5.processor.{name}"
        tensors[f"{base}.down.weight"], tensors[f"{base}.up.weight"] = torch.randn(2, 4), torch.randn(height, 2)
    assert len(agree(read(tensors), tensors, deltas)) == 4
    for name, height in (("qkv_lora", 9216), ("proj_lora", 3072)):
        base = f"single_blocks.7.processor.{name}"
        tensors[f"{base}.down.weight"], tensors[f"{base}.up.weight"] = torch.randn(2, 4), torch.randn(height, 2)
    mine = deltas(read(tensors))
    dense, _ = theirs(tensors)
    parts = [dense[f"single_transformer_blocks.7.attn.to_{x}"] for x in "qkv"]
    assert torch.allclose(mine["single_blocks.7.linear1"], torch.cat(parts), atol=1e-5)
    assert torch.allclose(mine["single_blocks.7.linear2"], dense["single_transformer_blocks.7.proj_out"], atol=1e-5)


def test_bfl_control(read, deltas, biases):
    """All but the last modulation, where diffusers exchanges halves of the wrong matrix too."""
    torch.manual_seed(0)
    tensors = {}
    for layer in (*HEAD, *blocks()):
        down, up = pair(layer)
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        tensors[f"{layer}.lora_B.bias"] = torch.randn(len(up))
    for stack, count, norms in (("double", DOUBLE, ("img_attn.norm", "txt_attn.norm")), ("single", SINGLE, ("norm",))):
        for name in (f"{stack}_blocks.{i}.{norm}.{x}_norm.scale" for i in range(count) for norm in norms for x in
                     ("query", "key")):  # fmt: skip
            tensors[name] = torch.rand(4)
    lora = read(tensors)
    last = "final_layer.adaLN_modulation.1"
    mine = agree(lora, tensors, deltas, skip=(last,))
    assert len(mine) == 314
    assert torch.allclose(mine[last], tensors[f"{last}.lora_B.weight"] @ tensors[f"{last}.lora_A.weight"])
    _, converted = theirs(tensors)
    for layer, bias in biases(lora).items():
        names = [name.replace(".weight", ".lora_B.bias") for name in TRANSFORMER.foreign_names(f"{layer}.weight")]
        parts = [converted.get(name, converted.get(f"transformer.{name}")) for name in names]
        if layer != last:
            assert torch.equal(bias, torch.cat(parts)), layer
    for name, change in lora.norms["transformer"].items():
        (foreign,) = TRANSFORMER.foreign_names(name)
        assert torch.equal(change.whole, converted[f"transformer.{foreign}"])


def test_what_peft_trains_whole_is_whole(read):
    """`modules_to_save` beside LoRA and trained biases: every tensor is what PEFT merges.

    What is whole is the same at another weight, which in PEFT scales the low-rank changes alone.
    """
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2}
    model = FluxTransformer2DModel(
        **sizes, in_channels=64, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 14, 14),
        guidance_embeds=True,
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = ["x_embedder", "norm_out.linear", "to_k", "proj_mlp", "norm_q", "norm_added_k", "ff.net.2"]
    config = LoraConfig(r=2, lora_alpha=2, bias="lora_only", target_modules=["to_v", "proj_out"], modules_to_save=saved)
    tuned = get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    file = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(tuned).items()}
    lora = read(file)
    after = tuned.merge_and_unload().state_dict()
    width = {"vec_in_dim": 32, "context_in_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_hidden": 256}
    ours = FluxTransformer(FluxParams(**width, depth=1, depth_single=1, axes_dim=(4, 14, 14)))
    ours.load_state_dict({name: joined(before, name) for name in ours.state_dict()})
    assert set(lora.tensors) == set(file) and not lora.unused
    assert not fit(lora, {"transformer": ours}).absent
    layers = lora.layers["transformer"]
    low = {f"{layer}.weight" for layer in layers if any(isinstance(patch, LowRank) for patch in layers[layer])}
    for weight in (1.0, 0.3):
        with applied(ours, LoraStack().plus(lora, weight), "merged"):
            for name, tensor in ours.state_dict().items():
                if weight == 1 or name not in low:
                    torch.testing.assert_close(tensor, joined(after, name), rtol=1e-5, atol=1e-6, msg=name)
    assert all(torch.equal(tensor, joined(before, name)) for name, tensor in ours.state_dict().items())


def joined(tensors, name):
    """One of our tensors, of diffusers' parts."""
    whole = torch.cat([tensors[part] for part in TRANSFORMER.foreign_names(name)])
    return torch.cat(whole.chunk(2)[::-1]) if "adaLN" in name else whole


def test_fal_kontext(read, deltas):
    torch.manual_seed(0)
    tensors = {}
    for layer in ("final_layer.linear", *blocks()):
        base = f"base_model.model.{layer}"
        tensors[f"{base}.lora_A.weight"], tensors[f"{base}.lora_B.weight"] = pair(layer)
    assert len(agree(read(tensors), tensors, deltas)) == 305


TARGETS = [
    "x_embedder", "context_embedder", "norm_out.linear", "proj_out", "proj_mlp", "norm.linear", "norm1.linear",
    "norm1_context.linear", "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0",
    "to_add_out", "net.0.proj", "net.2", "linear_1", "linear_2",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    """A tiny transformer of diffusers'."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    return model


SETTINGS = {
    "plain": {},
    "alpha": {"lora_alpha": 3},
    "root": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"x_embedder": 5, "transformer_blocks.0.attn.to_q": 2}, "rank_pattern": {"to_k": 2}},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_saved_by_diffusers_with_peft(case, tiny, tmp_path):
    """save_lora_weights with its metadata; what PEFT would merge into each layer is what our patches add to it."""
    import copy

    from diffusers import FluxPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(1)
    model = copy.deepcopy(tiny)
    before = native_weights(model)
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": TARGETS}
                                 | SETTINGS[case]))  # fmt: skip
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "lora_B.default.bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    layers = {name.replace(".default", ""): t for name, t in get_peft_model_state_dict(model).items()}
    FluxPipeline.save_lora_weights(tmp_path, layers, **_collate_lora_metadata({"transformer": model}))
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.format == "diffusers" and not lora.unused
    for module in model.modules():
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            module.merge()
    after = native_weights(model, ".base_layer")
    assert len(lora.layers["transformer"]) == sum(name.endswith(".weight") for name in before)
    for layer, patches in lora.layers["transformer"].items():
        weight, bias = before[f"{layer}.weight"].clone(), before[f"{layer}.bias"].clone()
        for patch in patches:
            rows = slice(*patch.rows) if patch.rows else slice(None)
            weight[rows] += patch.delta(before[f"{layer}.weight"][rows])
            if patch.bias is not None:
                bias[rows] += patch.bias
        assert torch.allclose(weight, after[f"{layer}.weight"], atol=1e-5), layer
        assert torch.allclose(bias, after[f"{layer}.bias"], atol=1e-5), layer


@pytest.mark.parametrize("rank", [3, 40], ids=["factored", "whole"])
@pytest.mark.parametrize("kind", ["LoKrConfig", "LoHaConfig"])
def test_lokr_and_loha_saved_by_peft(kind, rank, tiny, tmp_path):
    """PEFT scales by alpha / r, which its settings tell, even where LoKr keeps both matrices whole."""
    import copy

    import peft

    torch.manual_seed(1)
    model, before = copy.deepcopy(tiny), native_weights(tiny)
    config = getattr(peft, kind)(r=rank, alpha=6, target_modules=TARGETS, alpha_pattern={"x_embedder": 5},
                                 rank_pattern={"context_embedder": 2})  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lokr" in name or "hada" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    assert lora.format == "PEFT" and not lora.unused
    after = native_weights(wrapped.merge_and_unload())
    for layer, patches in lora.layers["transformer"].items():
        weight = before[f"{layer}.weight"].clone()
        for patch in patches:
            rows = slice(*patch.rows) if patch.rows else slice(None)
            weight[rows] += patch.delta(weight[rows])
        assert torch.allclose(weight, after[f"{layer}.weight"], atol=1e-4, rtol=1e-4), layer


def native_weights(model, extra=""):
    state = {name.replace(extra, "") if extra else name: tensor for name, tensor in model.state_dict().items()}
    found = {}
    for row in (*TRANSFORMER.direct, *TRANSFORMER.fused, *TRANSFORMER.swapped):
        for kind in ("weight", "bias") if row.endswith("*") else ():
            name = row.replace("{}", "0").replace("*", kind)
            parts = [state[part] for part in TRANSFORMER.foreign_names(name)]
            if row in TRANSFORMER.swapped:
                parts = parts[0].chunk(2)[::-1]
            found[name] = torch.cat([part.detach().clone() for part in parts])
    return found


def test_metadata_is_where_diffusers_puts_it(tiny, tmp_path):
    """A guard on the test above: without its metadata the file would be read with other scales."""
    from diffusers import FluxPipeline
    from safetensors import safe_open

    tensors = {"x_embedder.lora_A.weight": torch.randn(2, 4), "x_embedder.lora_B.weight": torch.randn(8, 2)}
    FluxPipeline.save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata={"lora_alpha": 6, "r": 2})
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 6
    (patch,) = read_lora(path).layers["transformer"]["img_in"]
    assert isinstance(patch, LowRank) and patch.alpha == 6.0 and patch.scale == 3.0
