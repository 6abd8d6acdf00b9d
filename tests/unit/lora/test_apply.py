"""LoRAs on a model: every flavour equals the weight written out, on every kind of weight, and leaves no trace."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.lora.apply import applied, applied_to_encoder
from fluxcanvas.flux_runtime.lora.fit import fit
from fluxcanvas.flux_runtime.lora.formats import Lora
from fluxcanvas.flux_runtime.lora.patches import Full, Hadamard, Instead, Kronecker, LowRank, Magnitude, NormChange
from fluxcanvas.flux_runtime.lora.stack import LoraStack, parse_factors
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.quant.packed import PackedLinear, weight_of
from fluxcanvas.flux_runtime.quant.swap import sharing_copy

QUERY, KEY = "double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.1.norm.key_norm.scale"
KINDS = ("float32", "bfloat16", "fp8", "gguf", "bnb-int8", "bnb-nf4")


def numbers(seed: int):
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng) * 0.2


def flavours(seed: int = 1) -> dict:
    """A change of every kind, on layers of every kind."""
    r = numbers(seed)
    return {
        "double_blocks.0.img_attn.qkv": (
            LowRank((64, 128), down=r(4, 64), up=r(64, 4), alpha=2.0),
            LowRank(down=r(3, 64), up=r(192, 3), bias=r(192)),
        ),
        "single_blocks.0.linear1": (Kronecker(w1=(r(8, 4),), w2=(r(56, 2), r(2, 16)), alpha=1.0),),
        "double_blocks.1.img_mlp.0": (Hadamard(w1=(r(256, 3), r(3, 64)), w2=(r(256, 3), r(3, 64)), alpha=3.0),),
        "double_blocks.1.txt_mlp.2": (Full(diff=r(64, 256), bias=r(64)),),
        "single_blocks.1.linear2": (
            Magnitude(change=LowRank(down=r(2, 320), up=r(64, 2)), lengths=r(64, 1).abs()),
            LowRank(down=r(2, 320), up=r(64, 2)),
        ),
        "double_blocks.0.img_mlp.2": (Magnitude(change=LowRank(down=r(2, 256), up=r(64, 2)), lengths=r(1, 256).abs()),),
        "double_blocks.1.img_attn.qkv": (
            Magnitude((0, 64), change=LowRank(down=r(2, 64), up=r(64, 2)), lengths=r(1, 64).abs()),
            Magnitude((128, 192), change=Kronecker(w1=(r(8, 8),), w2=(r(8, 8),)), lengths=r(64, 1).abs()),
        ),
        "double_blocks.0.txt_mlp.0": (
            Magnitude(change=Hadamard(w1=(r(256, 3), r(3, 64)), w2=(r(256, 3), r(3, 64))), lengths=r(256, 1).abs()),
            Full(diff=r(256, 64)),
        ),
        "double_blocks.0.img_mod.lin": (LowRank(down=r(2, 64), up=r(384, 2)),),
        "final_layer.adaLN_modulation.1": (LowRank(down=r(2, 64), up=r(128, 2)),),
    }


def lora(layers: dict | None = None, part: str = "transformer", **more) -> Lora:
    return Lora("test", Path("test.safetensors"), "test", {part: flavours() if layers is None else layers}, **more)


def velocity(model: FluxTransformer) -> torch.Tensor:
    r, dtype = numbers(7), model.dtype
    txt, img, pooled = r(1, 5, 32).to(dtype) * 5, r(1, 6, model.params.in_channels).to(dtype) * 5, r(1, 32).to(dtype)
    context = model.prepare(txt, torch.zeros(11, 3))
    return model(img, context, model.modulate(model.embed(torch.tensor([0.5]), torch.tensor([3.5]), pooled))).float()


def written_out(model: FluxTransformer, stack: LoraStack) -> FluxTransformer:
    """The model with plain weights into which the changes are written, by their definition."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, PackedLinear))}
    dense = {}
    for name, layer in layers.items():
        weight = weight_of(layer, torch.float32)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = weight.clone(), layer.bias.float().clone()
        for patch, strength in stack.patches("transformer").get(name, ()):
            start, stop = patch.rows or (0, len(weight))
            linear.weight.data[start:stop].add_(patch.delta(weight[start:stop]), alpha=strength)
            if patch.bias is not None:
                linear.bias.data[start:stop] += strength * patch.bias.float()
        dense[name] = linear.to(model.dtype)
    return sharing_copy(model, dense)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {n: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()}


# An exact weight in float32; LLM.int8 rounds its inputs too, and bfloat16 every layer's result.
TOLERANCE = {"float32": 1e-6, "fp8": 1e-6, "gguf": 1e-6, "bnb-nf4": 1e-5, "bfloat16": 0.03, "bnb-int8": 0.05}


@pytest.mark.parametrize("mode", ["auto", "beside", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_flavour_equals_the_weight_written_out_and_leaves_no_trace(model_of, kind, mode):
    model = model_of(kind)
    stack = LoraStack().plus(lora(), 0.7).plus(lora(flavours(2)), -0.3)
    before, modules, base = bytes_of(model), dict(model.named_modules()), velocity(model)
    expected = velocity(written_out(model, stack))
    with applied(model, stack, mode):
        got = velocity(model)
    assert relative(got, expected) < TOLERANCE[kind] < 0.1 < relative(base, expected)
    assert bytes_of(model) == before
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(velocity(model), base)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_inside_leaves_no_trace_either(model_of, kind):
    model = model_of(kind)
    before = bytes_of(model)
    with pytest.raises(KeyboardInterrupt), applied(model, LoraStack().plus(lora())):
        raise KeyboardInterrupt
    assert bytes_of(model) == before and list(before) == list(model.state_dict())


def test_small_gains_and_weights_are_not_rounded_away_in_bfloat16(model_of):
    """1.003 is 1 there, but three thousandths are not 0."""
    model, name = model_of("bfloat16"), "double_blocks.0.img_mlp.0"
    weight = model.get_submodule(name).weight.float()
    nothing = LowRank(down=torch.zeros(1, 64), up=torch.zeros(256, 1))
    longer = Magnitude(change=nothing, lengths=1.003 * weight.norm(dim=1, keepdim=True))
    wider = Magnitude(change=nothing, lengths=1.003 * weight.norm(dim=0, keepdim=True))
    x = numbers(8)(500, 64).bfloat16()
    base = model.get_submodule(name)(x).float()
    for patch in (longer, wider):
        with applied(model, LoraStack().plus(lora({name: (patch,)})), "beside"):
            grown = model.get_submodule(name)(x).float()
        assert 1.001 < (grown * base).sum() / base.square().sum() < 1.005
    results = []
    for strength in (1.0, 1.003):
        with applied(model, LoraStack().plus(lora(), strength), "beside"):
            results.append(model.get_submodule("double_blocks.0.img_mod.lin")(x))
    assert not torch.equal(*results)


@pytest.mark.parametrize("kind", ["float32", "bnb-nf4"])
def test_norms_are_taken_once_and_again_only_for_another_weight(model_of, kind, monkeypatch):
    taken, factor = [], Magnitude.factor
    monkeypatch.setattr(Magnitude, "factor", lambda *given: taken.append(1) or factor(*given))
    model, stack = model_of(kind), LoraStack().plus(lora())
    magnitudes = sum(isinstance(patch, Magnitude) for patch in stack.entries[0].lora.patches)
    for mode in ("auto", "beside", "merged"):
        with applied(model, stack, mode):
            first = velocity(model)
    assert len(taken) == magnitudes
    layer = model.get_submodule("double_blocks.0.img_mlp.2")
    tensor = layer.packs[0].absmax if kind == "bnb-nf4" else layer.weight
    tensor.mul_(2)
    with applied(model, stack, mode):
        assert relative(velocity(model), first) > 1e-3
    assert len(taken) == magnitudes + 1
    with applied(model_of(kind), stack):
        pass
    assert len(taken) == 2 * magnitudes + 1


def test_numbers_stored_as_float8(model_of):
    r = numbers(3)
    patch = LowRank(down=r(2, 64), up=r(64, 2), bias=r(64))
    small = LowRank(**{k: getattr(patch, k).to(torch.float8_e4m3fn) for k in ("down", "up", "bias")})
    model, stack = model_of("float32"), LoraStack().plus(lora({"double_blocks.0.img_attn.proj": (small,)}), 0.7)
    expected = velocity(written_out(model, stack))
    for mode in ("beside", "merged"):
        with applied(model, stack, mode):
            assert relative(velocity(model), expected) < 1e-6


def test_merging_a_bfloat16_weight_rounds_once(model_of):
    model, stack = model_of("bfloat16"), LoraStack().plus(lora(), 0.7)
    expected = written_out(model, stack)
    with applied(model, stack, "merged"):
        for name in stack.patches("transformer"):
            assert torch.equal(model.get_submodule(name).weight, expected.get_submodule(name).weight), name


class TestControl:
    """A LoRA that reads 128 channels and sets norms."""

    @pytest.fixture
    def control(self) -> Lora:
        r = numbers(3)
        layers = flavours() | {"img_in": (LowRank(down=r(4, 128), up=r(64, 4), bias=r(64)),)}
        norms = {QUERY: NormChange(1 + r(32)), KEY: NormChange(r(32))}
        return lora(layers, norms={"transformer": norms})

    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "gguf"])
    def test_it_widens_and_restores(self, model_of, control, kind):
        model = model_of(kind)
        before, base, params = bytes_of(model), velocity(model), model.params
        narrow = weight_of(model.img_in, torch.float32)
        with applied(model, LoraStack().plus(control, 0.85)):
            assert model.params.in_channels == 128 and velocity(model).shape == base.shape
            wide = model.img_in.base
            assert torch.equal(wide.weight[:, :64].float(), narrow.to(model.dtype).float())
            assert not wide.weight[:, 64:].any()
            norm = model.double_blocks[0].img_attn.norm.query_norm.scale
            assert torch.equal(norm, control.norms["transformer"][QUERY].whole.to(model.dtype))
        assert model.params is params and bytes_of(model) == before and torch.equal(velocity(model), base)

    def test_its_weight_does_not_scale_the_norms_and_nothing_is_set_at_zero(self, model_of, control):
        model, theirs = model_of("float32"), control.norms["transformer"][KEY].whole
        with applied(model, LoraStack().plus(control, 0.5)):
            assert torch.equal(model.get_parameter(KEY), theirs)
        with applied(model, LoraStack().plus(control, 0.0)):
            assert model.params.in_channels == 64 and not torch.equal(model.get_parameter(KEY), theirs)

    def test_the_control_columns_matter(self, model_of, control):
        model = model_of("float32")
        with applied(model, LoraStack().plus(control)):
            r, x = numbers(9), torch.ones(1, 6, 128)
            changed = x.clone()
            changed[..., 64:] = r(1, 6, 64)
            assert relative(model.img_in(changed), model.img_in(x)) > 0.1

    def test_a_narrow_lora_beside_it_sees_the_canvas_alone(self, model_of, control):
        model, r = model_of("float32"), numbers(5)
        turbo = lora({"img_in": (LowRank(down=r(4, 64), up=r(64, 4)),)})
        x = torch.cat([torch.zeros(1, 6, 64), r(1, 6, 64)], dim=-1)
        with applied(model, LoraStack().plus(control)):
            alone = model.img_in(x)
        with applied(model, LoraStack().plus(control).plus(turbo)):
            assert torch.allclose(model.img_in(x), alone)

    @pytest.mark.parametrize("mode", ["auto", "beside", "merged"])
    def test_narrow_changes_of_every_flavour_go_with_it(self, model_of, control, mode):
        model, r = model_of("float32"), numbers(6)
        low = LowRank(down=r(2, 64), up=r(64, 2))
        narrow = lora({"img_in": (
            Kronecker(w1=(r(8, 8),), w2=(r(8, 8),)), Hadamard(w1=(r(64, 2), r(2, 64)), w2=(r(64, 2), r(2, 64))),
            Magnitude(change=low, lengths=r(64, 1).abs()), Magnitude(change=low, lengths=r(1, 64).abs()),
        )})  # fmt: skip
        weight = model.img_in.weight
        total = sum(patch.delta(weight) for patch in narrow.patches)
        x = r(1, 6, 128)
        with applied(model, LoraStack().plus(control), mode):
            expected = model.img_in(x) + x[..., :64] @ total.T
        with applied(model, LoraStack().plus(control).plus(narrow), mode):
            assert relative(model.img_in(x), expected) < 1e-6

    def test_a_fill_model_cannot_be_widened(self, model_of, control):
        fill = FluxTransformer(replace(model_of("float32").params, in_channels=96))
        with (
            pytest.raises(FluxError, match="cannot widen a model that reads 96"),
            applied(fill, LoraStack().plus(control)),
        ):
            pass


@pytest.mark.parametrize("mode", ["auto", "beside", "merged"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bnb-nf4"])
def test_a_whole_weight_takes_the_place_of_a_plain_or_packed_one(model_of, kind, mode):
    """At any weight but 0; the last of two counts, and the changes of other LoRAs are of the new weight."""
    model, r = model_of(kind), numbers(2)
    name, rows = "double_blocks.0.img_attn.qkv", slice(64, 128)
    low = LowRank(down=r(2, 64), up=r(192, 2))
    lost, first, last = lora({name: (Instead((64, 128), r(64), r(64, 64)),)}), r(192, 64), r(64, 64)
    stack = LoraStack().plus(lost).plus(lora({name: (Instead(diff=first),)}), 0.3)
    stack = stack.plus(lora({name: (low, Instead((64, 128), diff=last))}), 0.5)
    before, layer, x = bytes_of(model), model.get_submodule(name), r(5, 64).to(model.dtype)
    weight, bias = first.clone(), layer.bias.float().clone()
    weight[rows], bias[rows] = last, lost.patches[0].bias
    expected = torch.nn.functional.linear(x.float(), weight + 0.5 * low.up @ low.down, bias)
    assert fit(lost, {"transformer": model}).matched == {"transformer": 1}
    with applied(model, stack, mode):
        assert relative(model.get_submodule(name)(x).float(), expected) < (0.01 if kind == "bfloat16" else 1e-6)
    assert model.get_submodule(name) is layer and bytes_of(model) == before
    with applied(model, LoraStack().plus(lost, 0.0), mode):
        assert bytes_of(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_differences_of_norms_add_up_and_leave_no_trace(model_of, kind):
    """On a whole tensor too, wherever in the stack it stands; factors for blocks count."""
    model, r = model_of(kind), numbers(2)
    a, b, c, whole = r(32), r(32), r(32), 1 + r(32)
    stack = LoraStack().plus(lora({}, norms={"transformer": {QUERY: NormChange(diff=a), KEY: NormChange(diff=b)}}), 0.5)
    stack = stack.plus(lora({}, norms={"transformer": {QUERY: NormChange(whole=whole)}}), 0.7)
    second = lora({}, norms={"transformer": {QUERY: NormChange(diff=c), KEY: NormChange(diff=c)}})
    stack = stack.plus(second, -0.3, factors=parse_factors("single_blocks: 0"))
    before, old = bytes_of(model), model.get_parameter(KEY).float()
    base = velocity(model)
    with applied(model, stack):
        assert torch.equal(model.get_parameter(QUERY), (whole + 0.5 * a - 0.3 * c).to(model.dtype))
        assert torch.equal(model.get_parameter(KEY), (old + 0.5 * b).to(model.dtype))
        assert relative(velocity(model), base) > 1e-3
    assert bytes_of(model) == before and torch.equal(velocity(model), base)


@pytest.fixture
def encoders():
    """CLIP and T5 with one layer each."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    clip = CLIPTextModel(CLIPTextConfig(**sizes)).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=2)).eval()
    return {"clip": clip.requires_grad_(False), "t5": t5.requires_grad_(False)}


def test_text_encoders_too(encoders):
    r, ids = numbers(4), torch.arange(7)[None]
    cases = {
        "clip": (encoders["clip"], "encoder.layers.0.mlp.fc1", (40, 32)),
        "t5": (encoders["t5"], "encoder.block.0.layer.1.DenseReluDense.wo", (32, 40)),
    }
    for part, (encoder, name, (out, into)) in cases.items():
        change = lora({name: (LowRank(down=r(2, into), up=r(out, 2)), Full(diff=r(out, into), bias=r(out)))}, part)
        with torch.no_grad():
            base = encoder(ids).last_hidden_state
            with applied_to_encoder(encoder, part, LoraStack().plus(change)):
                got = encoder(ids).last_hidden_state
            dense = copy.deepcopy(encoder)
            layer = next(m for n, m in dense.named_modules() if n.endswith(name))
            layer.weight += sum(patch.delta(layer.weight) for patch in change.patches)
            layer.bias = torch.nn.Parameter((0 if layer.bias is None else layer.bias) + change.patches[1].bias)
            assert relative(got, dense(ids).last_hidden_state) < 1e-6 < 1e-3 < relative(base, got)
            assert torch.equal(encoder(ids).last_hidden_state, base)


def test_norms_of_text_encoders(encoders):
    """With the weight of the text part."""
    r, ids = numbers(4), torch.arange(7)[None]
    cases = {
        "clip": ("encoder.layers.0.layer_norm1.weight", "encoder.layers.0.layer_norm2.bias", "final_layer_norm.weight"),
        "t5": ("encoder.block.0.layer.1.layer_norm.weight", "encoder.final_layer_norm.weight"),
    }
    for part, names in cases.items():
        encoder, diffs = encoders[part], {name: r(32) for name in names}
        change = lora({}, norms={part: {name: NormChange(diff=diff) for name, diff in diffs.items()}})
        before, base = bytes_of(encoder), encoder(ids).last_hidden_state
        assert fit(change, {part: encoder}).norms == len(names)
        with applied_to_encoder(encoder, part, LoraStack().plus(change, 9.0, 0.5)):
            got, changed = encoder(ids).last_hidden_state, dict(encoder.named_parameters())
        assert bytes_of(encoder) == before and torch.equal(encoder(ids).last_hidden_state, base)
        dense = copy.deepcopy(encoder)
        for name, diff in diffs.items():
            own = next(n for n in changed if n.endswith(name))
            dense.get_parameter(own).add_(0.5 * diff)
            assert torch.equal(changed[own], dense.get_parameter(own))
        assert torch.equal(got, dense(ids).last_hidden_state) and relative(got, base) > 1e-3


def test_another_weight_or_another_lora_of_the_same_rank_compiles_nothing_anew(model_of):
    from torch._dynamo.utils import counters

    model = model_of("float32")
    torch._dynamo.reset()
    counters.clear()
    for block in [*model.double_blocks, *model.single_blocks]:
        block.compile(backend="eager", fullgraph=True)
    first = None
    for seed, weight in [(1, 0.7), (1, 0.2), (2, -1.3), (3, 1.0)]:
        with applied(model, LoraStack().plus(lora(flavours(seed)), weight), "beside"):
            velocity(model)
        first = first or counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == first
    torch._dynamo.reset()
