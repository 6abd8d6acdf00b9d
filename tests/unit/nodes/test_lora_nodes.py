"""Load LoRA, LoRA Stack and Apply LoRA on the demo model, with small random LoRA files in the formats people have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.lora import apply, load
from fluxcanvas.flux_runtime.lora.stack import LoraStack
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS
from fluxcanvas.nodes import lora as nodes

LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear2")
CLIP = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch):
    """No LoRA is held from another test."""
    monkeypatch.setattr(nodes, "_read", {})
    monkeypatch.setattr(nodes, "_foreign_states", {})
    monkeypatch.setattr(nodes, "_foreign_changes", [])


def matrices(linear, seed: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """down (rank, in) and up (out, rank), large enough to be seen in a picture."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (rank, linear.in_features), (linear.out_features, rank)
    return tuple(torch.randn(size, generator=generator) * 0.1 for size in sizes)


@pytest.fixture
def write(tmp_path, demo):
    """`write(name, layers=..., seed=0, clip=False, **more)`: a kohya file in the loras folder, `more` tensors in it."""

    def save(name: str, layers=LAYERS, seed: int = 0, clip: bool = False, **more: torch.Tensor) -> Path:
        tensors = dict(more)
        places = [("lora_unet_", layer, demo.transformer) for layer in layers]
        places += [("lora_te_text_model_", CLIP, demo.text.clip)] if clip else []
        for number, (prefix, layer, module) in enumerate(places):
            down, up = matrices(getattr(*apply.linear_at(module, layer)), seed + number)
            base = prefix + layer.replace(".", "_")
            tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
            tensors[f"{base}.alpha"] = torch.tensor(float(len(down)))
        path = tmp_path / "models" / "loras" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        return path

    return save


@pytest.fixture
def with_lora(demo, run):
    """`with_lora(stack, **settings)`: the demo model with a FLUX_LORA on it."""

    def put(stack, **settings):
        return run("ApplyLora", model=demo.model, loras=stack, **settings)[0]

    return put


def contents(module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in module.state_dict().items()}


def test_a_lora_changes_the_picture_and_leaves_no_trace(write, demo, draw, run, with_lora, host):
    write("style.safetensors")
    before, plain = contents(demo.transformer), draw()["samples"]
    (stack,) = run("LoadLora", lora="style.safetensors", weight=0.8)
    changed = draw(model=with_lora(stack))["samples"]
    assert changed.isfinite().all() and (changed - plain).abs().mean() > 0.01
    assert contents(demo.transformer) == before
    assert not demo.model.loras and torch.equal(draw()["samples"], plain)
    assert "style (kohya): 3 transformer layers" in host.texts[-3]


def test_the_node_shows_format_layers_ranks_and_what_is_unused(write, host, run):
    write("odd.safetensors", clip=True, **{"lora_unet_double_blocks_0_img_attn_nothing.weight": torch.zeros(2)})
    run("LoadLora", lora="odd.safetensors")
    said = host.texts[-1]
    assert "kohya" in said and "rank 4" in said and "3 layers of the transformer" in said and "1 layer of CLIP" in said
    assert "unused: 1: lora_unet_double_blocks_0_img_attn_nothing.weight" in said


def test_a_weight_of_zero_is_as_no_lora_and_minus_one_takes_it_back(write, draw, run, with_lora):
    write("style.safetensors")
    (zero,) = run("LoadLora", lora="style.safetensors", weight=0.0)
    assert torch.equal(draw(model=with_lora(zero))["samples"], draw()["samples"])
    (one,) = run("LoadLora", lora="style.safetensors", weight=1.0)
    (both,) = run("LoadLora", lora="style.safetensors", weight=-1.0, loras=one)
    torch.testing.assert_close(draw(model=with_lora(both))["samples"], draw()["samples"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("weight", "factor"), [(0.5, 1.0), (1.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_the_text_encoders_follow_the_weight_times_their_factor(write, demo, run, weight, factor):
    write("words.safetensors", clip=True)

    def pooled(*settings: float) -> torch.Tensor:
        (stack,) = run("LoadLora", lora="words.safetensors", weight=settings[0], text_factor=settings[1])
        _, text = run("ApplyLora", model=demo.model, loras=stack, text=demo.text)
        return run("EncodePrompt", text=text, prompt="a red house")[0].prompts[0].pooled

    told, half = pooled(weight, factor), pooled(0.5, 1.0)
    plain = demo.text.encode("a red house").pooled
    assert torch.equal(told, plain) == (weight * factor == 0)
    assert torch.equal(told, half) == (weight * factor == 0.5)


def test_factors_for_blocks_count_where_they_fit(write, draw, run, with_lora):
    write("all.safetensors")
    write("double.safetensors", LAYERS[:2])
    (factors,) = run("LoadLora", lora="all.safetensors", blocks="single_blocks: 0\ndouble_blocks.0-9: 0.5")
    (alone,) = run("LoadLora", lora="double.safetensors", weight=0.5)
    assert torch.equal(draw(model=with_lora(factors))["samples"], draw(model=with_lora(alone))["samples"])
    with pytest.raises(FluxError, match=r"'triple_blocks' fits no layer of the LoRA all"):
        run("LoadLora", lora="all.safetensors", blocks="triple_blocks: 2")
    with pytest.raises(FluxError, match="is no weight for a block"):
        run("LoadLora", lora="all.safetensors", blocks="double_blocks")


def test_another_weight_reads_nothing_anew_and_another_file_does(write, run, monkeypatch):
    path, reads = write("style.safetensors"), []
    read = load.read_lora
    monkeypatch.setattr(load, "read_lora", lambda *given, **named: reads.append(given) or read(*given, **named))
    first = run("LoadLora", lora="style.safetensors")[0]
    second = run("LoadLora", lora="style.safetensors", weight=0.3)[0]
    assert len(reads) == 1 and first.entries[0].lora is second.entries[0].lora
    assert (first.entries[0].weight, second.entries[0].weight) == (1.0, 0.3)
    write("style.safetensors", seed=9)
    os.utime(path, ns=(1, 1))
    third = run("LoadLora", lora="style.safetensors")[0]
    assert len(reads) == 2 and third.entries[0].lora is not first.entries[0].lora


def test_only_so_many_loras_are_held(write, run, monkeypatch):
    monkeypatch.setattr(nodes, "KEPT", 2)
    for name in "abc":
        write(f"{name}.safetensors")
        run("LoadLora", lora=f"{name}.safetensors")
    assert [Path(path).stem for path, _ in nodes._read] == ["b", "c"]


def test_the_fingerprint_follows_the_files_and_not_the_weights(write):
    path = write("style.safetensors")
    for node, name in (("LoadLora", "lora"), ("LoraStack", "lora_1")):
        changed = NODE_CLASS_MAPPINGS[f"FluxCanvas_{node}"].IS_CHANGED
        others = {} if node == "LoadLora" else dict.fromkeys(("lora_2", "lora_3", "lora_4"), "none")
        os.utime(path, ns=(1, 1))
        before = changed(**{name: "style.safetensors", "weight": 1.0}, **others)
        assert before == changed(**{name: "style.safetensors", "weight": 0.5}, **others)
        os.utime(path, ns=(2, 2))
        assert before != changed(**{name: "style.safetensors"}, **others)
        assert changed(**{name: nodes.PUBLISHED[0]}, **others) == f"{nodes.PUBLISHED[0]}|"


def test_the_lists_offer_files_then_published_names(write):
    write("sub/style.safetensors")
    inputs = NODE_CLASS_MAPPINGS["FluxCanvas_LoadLora"].INPUT_TYPES()["required"]
    assert inputs["lora"][0] == ["sub/style.safetensors", *nodes.PUBLISHED]
    slots = NODE_CLASS_MAPPINGS["FluxCanvas_LoraStack"].INPUT_TYPES()["required"]
    assert slots["lora_3"][0] == ["none", *inputs["lora"][0]] and slots["lora_3"][1]["default"] == "none"


def test_a_published_lora_is_fetched_once(write, run, monkeypatch, host):
    path, asked = write("published.safetensors"), []
    monkeypatch.setattr(load, "fetch_model", lambda *given: asked.append(given[:2]) or path)
    name = "ByteDance/Hyper-SD/Hyper-FLUX.1-dev-8steps-lora.safetensors"
    for weight in (0.125, 0.2):
        run("LoadLora", lora=name, weight=weight)
    assert asked == [("ByteDance/Hyper-SD", "Hyper-FLUX.1-dev-8steps-lora.safetensors")]


def test_a_stack_is_a_chain_in_one_node(write, draw, run, with_lora, host):
    write("a.safetensors")
    write("b.safetensors", LAYERS[1:], seed=7)
    (chain,) = run("LoadLora", lora="a.safetensors", weight=0.4)
    (chain,) = run("LoadLora", lora="b.safetensors", weight=-0.6, loras=chain)
    (stack,) = run("LoraStack", lora_2="a.safetensors", weight_2=0.4, lora_4="b.safetensors", weight_4=-0.6)
    assert "a: kohya" in host.texts[-1] and "b: kohya" in host.texts[-1]
    (mixed,) = run("LoraStack", lora_1="b.safetensors", weight_1=-0.6, loras=LoraStack(chain.entries[:1]))
    drawn = [draw(model=with_lora(one))["samples"] for one in (chain, stack, mixed)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_an_empty_stack_changes_nothing(demo, run, host):
    (stack,) = run("LoraStack")
    assert host.texts[-1] == "no LoRA is chosen"
    assert run("ApplyLora", model=demo.model, loras=stack, text=demo.text) == (demo.model, demo.text)
    assert "no LoRA is chosen" in host.texts[-1]


def test_the_stack_of_another_pack_is_read(write, demo, run):
    write("sub/a.safetensors", clip=True)
    write("b.safetensors")
    given = [("sub\\a.safetensors", 0.5, 0.25), ("None", 1.0, 1.0), ["b.safetensors", 1, 0]]
    (stack,) = run("LoraStack", lora_1="b.safetensors", weight_1=0.1, lora_stack=given)
    told = [(entry.lora.name, entry.weight, entry.text_weight) for entry in stack.entries]
    assert told == [("b", 0.1, 0.1), ("a", 0.5, 0.25), ("b", 1, 0)]
    assert run("ApplyLora", model=demo.model, loras=stack, text=demo.text)[0].loras == stack


def test_a_file_behind_another_packs_stack_that_changes_makes_the_stack_run_again(write, run):
    """A host asks before a run, when what is linked has no value yet; without a link nothing of this counts."""
    changed = NODE_CLASS_MAPPINGS["FluxCanvas_LoraStack"].IS_CHANGED
    empty = dict.fromkeys(("lora_1", "lora_2", "lora_3", "lora_4"), "none")

    def told() -> tuple[str, str]:
        return changed(**empty, lora_stack=None), changed(**empty)

    before, path = told(), write("a.safetensors")
    given = [("a.safetensors", 0.5, 0.5)]
    first = run("LoraStack", lora_stack=given)[0].entries[0].lora
    assert told() == before == told()
    write("a.safetensors", seed=9)
    os.utime(path, ns=(1, 1))
    after = told()
    assert after[0] != before[0] and after[1] == before[1] and told() == after
    second = run("LoraStack", lora_stack=given)[0].entries[0].lora
    assert second is not first and not torch.equal(second.patches[0].down, first.patches[0].down)
    path.unlink()
    assert told()[0] not in (before[0], after[0])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (("gone.safetensors", 1.0, 1.0), r"entry 2 of lora_stack: the model 'gone.safetensors' is not in .*loras"),
        (("../../etc/passwd", 1.0, 1.0), r"entry 2 of lora_stack: the model '../../etc/passwd' is not in"),
        (("a.safetensors", 1.0), r"entry 2 of lora_stack is \('a.safetensors', 1.0\); it must be a file name and two"),
        (("a.safetensors", 1.0, float("nan")), "entry 2 of lora_stack is .*nan"),
        (("a.safetensors", "1", 1.0), "entry 2 of lora_stack is"),
        ((None, 1.0, 1.0), "entry 2 of lora_stack is"),
        ("a.safetensors", "entry 2 of lora_stack is a.safetensors; it must be"),
        (("a.safetensors", 1.0, 99.0), "weights from -10 to 10"),
    ],
)
def test_a_bad_entry_of_another_packs_stack_is_named(write, run, entry, said):
    write("a.safetensors")
    with pytest.raises(FluxError, match=said):
        run("LoraStack", lora_stack=[("a.safetensors", 1.0, 1.0), entry])


def test_a_lora_for_another_model_is_refused_where_it_shows(write, demo, run):
    write("deep.safetensors", (), **_pair("lora_unet_double_blocks_18_img_attn_proj", 192, 192))
    (stack,) = run("LoadLora", lora="deep.safetensors")
    with pytest.raises(FluxError, match=r"the LoRA deep changes nothing of this model.*made for another model"):
        run("ApplyLora", model=demo.model, loras=stack)
    write("wide.safetensors", (), **_pair("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072))
    (stack,) = run("LoadLora", lora="wide.safetensors")
    with pytest.raises(FluxError, match=r"the LoRA wide is made for another model.*3072"):
        run("ApplyLora", model=demo.model, loras=stack)
    write("sdxl.safetensors", (), **_pair("lora_unet_down_blocks_1_attentions_0_proj_in", 640, 640))
    with pytest.raises(FluxError, match=r"sdxl.safetensors .*not"):
        run("LoadLora", lora="sdxl.safetensors")
    assert not demo.model.loras


def _pair(base: str, out: int, into: int) -> dict[str, torch.Tensor]:
    return {f"{base}.lora_down.weight": torch.ones(2, into), f"{base}.lora_up.weight": torch.ones(out, 2)}


def test_numbers_that_are_none_are_refused(write, demo, run):
    pair = _pair("lora_unet_double_blocks_0_img_attn_proj", 192, 192)
    next(iter(pair.values()))[0, 0] = torch.nan
    write("broken.safetensors", (), **pair)
    (stack,) = run("LoadLora", lora="broken.safetensors")
    with pytest.raises(FluxError, match=r"broken.safetensors: .*not numbers"):
        run("ApplyLora", model=demo.model, loras=stack)


def test_layers_that_the_model_lacks_and_parts_not_connected_are_told(write, demo, run, host):
    pair = _pair("lora_unet_single_blocks_30_linear2", 192, 192)
    write("partly.safetensors", clip=True, **pair)
    (stack,) = run("LoadLora", lora="partly.safetensors")
    model, text = run("ApplyLora", model=demo.model, loras=stack)
    assert "not in this model: 1: single_blocks.30.linear2" in host.texts[-1]
    assert "CLIP part is not applied: connect the text encoders" in host.texts[-1]
    assert text is None and len(model.loras.entries) == 1


@pytest.mark.parametrize("mode", nodes.MODES)
def test_every_mode_draws_the_same(write, draw, run, with_lora, mode):
    write("style.safetensors")
    (stack,) = run("LoadLora", lora="style.safetensors")
    expected, model = draw(model=with_lora(stack))["samples"], with_lora(stack, mode=mode)
    assert model.lora_mode == mode
    torch.testing.assert_close(draw(model=model)["samples"], expected, rtol=1e-3, atol=1e-3)


def test_another_mode_for_earlier_loras_is_told(write, run, with_lora, host):
    write("style.safetensors")
    (stack,) = run("LoadLora", lora="style.safetensors")
    model = with_lora(stack, mode="merged")
    assert "now holds" not in host.texts[-1]
    run("ApplyLora", model=model, loras=stack, mode="beside")
    assert host.texts[-1].endswith("the mode beside now holds for the earlier LoRAs too, which had merged")


def test_the_canvas_keeps_the_digits_of_a_usual_weight():
    """It rounds what is typed to as many as the step has."""
    step = nodes.WEIGHT.step
    assert round(0.125, len(f"{step:f}".rstrip("0").partition(".")[2])) == 0.125


def test_the_modes_are_the_runtimes(demo, run):
    assert nodes.MODES == apply.MODES
    with pytest.raises(FluxError, match="'mode' is 'melted'; choose one of auto, beside, merged"):
        run("ApplyLora", model=demo.model, loras=LoraStack(), mode="melted")


def test_a_control_lora_gives_the_control_image_a_place(write, demo, draw, prompts, picture, run, with_lora):
    wide = {"img_in.lora_A.weight": torch.randn(4, 128) * 0.1, "img_in.lora_B.weight": torch.randn(192, 4) * 0.1}
    write("canny.safetensors", (), **wide)
    (stack,) = run("LoadLora", lora="canny.safetensors")
    model = with_lora(stack)
    hints = [picture(64, 64, seed=seed) for seed in (1, 2)]
    led = [run("ControlImage", conditioning=prompts[0], image=hint, vae=demo.vae)[0] for hint in hints]
    one, other = (draw(model=model, positive=positive)["samples"] for positive in led)
    assert one.isfinite().all() and not torch.equal(one, other)
    assert demo.model.params.in_channels == demo.transformer.img_in.in_features == 64
