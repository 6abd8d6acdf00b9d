"""The drawing nodes at work on the demo model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.variants import VARIANTS
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS
from fluxcanvas.web.host.core_nodes import DISPLAY_NAMES

STEPS = 3
SIZE = 64


def test_a_prompt_becomes_a_picture(host, run):
    model, text, vae = run("LoadFlux", source="demo", dtype="float32")
    assert model.dtype == torch.float32 and "7.13 M parameters" in host.texts[-1]
    assert host.steps[0] == (0, 100) and host.texts[:2] == ["opening the files", "loading the transformer"]
    (positive,) = run("EncodePrompt", text=text, prompt="a red house at night")
    (canvas,) = run("EmptyCanvas", width=SIZE, height=2 * SIZE, batch_size=2)
    (latent,) = run("Sample", model=model, positive=positive, latent=canvas, seed=1, steps=STEPS)
    assert latent["samples"].shape == (2, 16, 2 * SIZE // 8, SIZE // 8) and latent["samples"].dtype == torch.float32
    (image,) = run("Decode", vae=vae, latent=latent)
    assert image.shape == (2, 2 * SIZE, SIZE, 3) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.05
    assert not torch.equal(image[0], image[1])


def test_each_step_shows_progress_and_a_small_preview(host, draw):
    draw()
    assert host.steps == [(0, 1), (1, STEPS), (2, STEPS), (3, STEPS)]
    assert len(host.previews) == STEPS and all(picture.mode == "RGB" for picture in host.previews)
    assert max(side for picture in host.previews for side in picture.size) <= 512
    assert host.previews[0].tobytes() != host.previews[-1].tobytes()
    assert host.texts == [f"{STEPS} steps, seed 5"]


def test_interruption_stops_within_one_step(host, draw):
    host.stop_at = 2  # once before the first step, then after it
    with pytest.raises(host.Stopped):
        draw(steps=50)
    assert host.steps == [(0, 1)]


def test_a_batch_is_decoded_in_parts_between_which_it_can_be_stopped(demo, run, host, monkeypatch):
    inputs = {"vae": demo.vae, "latent": {"samples": torch.randn(3, 16, SIZE // 8, SIZE // 8)}}
    (whole,) = run("Decode", **inputs)
    assert not host.steps
    monkeypatch.setattr("fluxcanvas.flux_runtime.model.vae.AT_ONCE", SIZE**2)
    torch.testing.assert_close(run("Decode", **inputs)[0], whole, rtol=0, atol=1e-5)
    assert host.steps == [(1, 3), (2, 3), (3, 3)]
    host.stop_at = host.asked + 2
    with pytest.raises(host.Stopped):
        run("Decode", **inputs)
    assert host.steps[3:] == [(1, 3)]


def test_a_seed_means_the_same_picture_and_another_seed_another(draw):
    first = draw()["samples"]
    assert torch.equal(first, draw()["samples"])
    assert not torch.allclose(first, draw(seed=6)["samples"], atol=0.1)


def test_largest_seed_and_a_dtype_of_its_own_draw(draw):
    latent = {"samples": torch.zeros(1, 16, 8, 8, dtype=torch.float16)}
    assert draw(seed=2**64 - 1, latent=latent)["samples"].isfinite().all()


def test_values_on_edges_are_not_changed(draw, demo, prompts, run):
    latent = {"samples": torch.randn(1, 16, 8, 8), "noise_mask": torch.ones(1, 1, 64, 64), "batch_index": [3]}
    kept = {key: value.clone() if torch.is_tensor(value) else list(value) for key, value in latent.items()}
    tokens, weight = prompts[0].prompts[0].tokens.clone(), demo.transformer.img_in.weight.clone()
    out = draw(latent=latent, negative=prompts[1], true_cfg_scale=2.0, start=0.4)
    run("Decode", vae=demo.vae, latent=latent)
    assert all(torch.equal(latent[k], v) if torch.is_tensor(v) else latent[k] == v for k, v in kept.items())
    assert torch.equal(prompts[0].prompts[0].tokens, tokens) and torch.equal(demo.transformer.img_in.weight, weight)
    assert out is not latent and out["batch_index"] == [3] and out["noise_mask"] is latent["noise_mask"]


def test_settings_of_zero_are_the_models_own(draw, demo, host):
    own = draw(steps=0, guidance=0.0)["samples"]
    assert host.steps[-1] == (demo.model.variant.steps, demo.model.variant.steps)
    named = draw(steps=demo.model.variant.steps, guidance=demo.model.variant.guidance)["samples"]
    assert torch.equal(own, named)


def test_guidance_of_the_prompt_holds_until_sample_overrides_it(draw, demo, run):
    (asking,) = run("EncodePrompt", text=demo.text, prompt="a red house at night", guidance=8.0)
    assert asking.guidance == 8.0
    assert torch.equal(draw(positive=asking)["samples"], draw(guidance=8.0)["samples"])
    assert torch.equal(draw(positive=asking, guidance=1.5)["samples"], draw(guidance=1.5)["samples"])
    assert not torch.equal(draw(guidance=8.0)["samples"], draw(guidance=1.5)["samples"])


def test_a_negative_prompt_counts_only_with_true_cfg_and_the_node_says_so(host, draw, prompts):
    plain = draw()["samples"]
    assert torch.equal(plain, draw(negative=prompts[1])["samples"])
    assert "has no effect until true_cfg_scale is above 1" in host.texts[-1]
    assert torch.equal(plain, draw(true_cfg_scale=3.0)["samples"])
    assert "true_cfg_scale needs a negative prompt" in host.texts[-1]
    assert not torch.equal(plain, draw(negative=prompts[1], true_cfg_scale=3.0)["samples"])
    assert host.texts[-1].endswith("true CFG 3")


def test_a_model_that_ignores_guidance_says_so_on_the_node(host, draw, demo, prompts):
    schnell = FluxTransformer(replace(demo.model.params, guidance_embed=False)).eval().requires_grad_(False)
    weights = {name: weight for name, weight in demo.transformer.state_dict().items() if "guidance_in" not in name}
    schnell.load_state_dict(weights)
    model = replace(demo.model, transformer=schnell, variant=VARIANTS["schnell"])
    draw(model=model, guidance=7.0)
    assert host.texts[-1].endswith("; schnell ignores the guidance of 7")
    draw(model=model, positive=replace(prompts[0], guidance=2.5))
    assert host.texts[-1].endswith("; schnell ignores the guidance of 2.5")
    draw(model=model)
    draw(guidance=7.0)
    assert "ignores" not in "".join(host.texts[-2:])


def test_a_later_start_keeps_more_of_the_picture(draw, demo, run):
    picture = torch.linspace(0, 1, SIZE)[None, :, None, None].expand(1, SIZE, SIZE, 3)
    (source,) = run("EncodeImage", vae=demo.vae, image=picture)
    distance = [
        (draw(latent=source, start=s, steps=10)["samples"] - source["samples"]).abs().mean() for s in (0.0, 0.5, 0.9)
    ]
    assert distance[0] > distance[1] > distance[2]


def test_a_masked_latent_is_redrawn_inside_its_mask_alone(draw):
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :, SIZE // 2 :] = 1
    source = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    out = draw(latent={"samples": source, "noise_mask": mask})["samples"]
    assert torch.allclose(out[..., :4], source[..., :4], atol=1e-4)
    assert not torch.allclose(out[..., 4:], source[..., 4:], atol=0.1)


@pytest.mark.parametrize("start, end", [(0.5, 0.5), (0.6, 0.4), (1.0, 1.0), (math.nan, 1.0), (0.0, 2.0), (-1.0, None)])
def test_a_backward_range_fails_validation(start, end):
    verdict = NODE_CLASS_MAPPINGS["FluxCanvas_Sample"].VALIDATE_INPUTS(start=start, end=end)
    assert isinstance(verdict, str) and ("must lie before" in verdict or "must be from 0 to 1" in verdict)


@pytest.mark.parametrize("start, end", [(0.0, 1.0), (0.3, None), (None, None), (0.0, 0.01)])
def test_a_forward_or_unknown_range_passes_validation(start, end):
    assert NODE_CLASS_MAPPINGS["FluxCanvas_Sample"].VALIDATE_INPUTS(start=start, end=end) is True


def test_the_prompt_node_takes_the_checkpoints_own_token_count(demo, run):
    def encode(**more):
        return run("EncodePrompt", text=demo.text, prompt="a house", **more)[0].prompts[0]

    assert encode().tokens.shape[1] == demo.text.default_tokens
    assert encode(max_tokens=12).tokens.shape[1] == 12
    assert not torch.equal(encode(prompt_2="a boat").tokens, encode().tokens)
    assert torch.equal(encode(prompt_2="a boat").pooled, encode().pooled)
    assert run("EncodePrompt", text=demo.text, prompt="")[0].prompts[0].tokens.isfinite().all()


def test_a_canvas_is_floored_to_sixteen_and_says_so(host, run):
    (canvas,) = run("EmptyCanvas", width=100, height=64)
    assert canvas["samples"].shape == (1, 16, 8, 12) and not canvas["samples"].any()
    assert host.texts == ["100x64 is not a multiple of 16: the picture will be 96x64"]


@pytest.mark.parametrize(
    ("name", "value"), [("width", 0), ("width", 15), ("width", math.nan), ("height", 100_000), ("batch_size", 0)]
)
def test_impossible_sizes_are_refused(name, value, run):
    with pytest.raises(FluxError, match=rf"Empty Canvas: the input '{name}' is {value}; it must be from"):
        run("EmptyCanvas", **{"width": 64, "height": 64} | {name: value})


@pytest.mark.parametrize(
    ("fit", "asked", "got"),
    [
        ("crop", {}, (80, 96)),
        ("pad", {}, (96, 112)),
        ("stretch", {}, (96, 96)),
        ("crop", {"width": 64, "height": 32}, (32, 64)),
        ("pad", {"width": 64}, (64, 64)),
        ("crop", {"height": 160}, (160, 176)),
    ],
)
def test_pictures_of_odd_sizes_are_fitted_and_it_is_told(host, demo, fit, asked, got, run):
    picture = torch.rand(2, 90, 101, 3, generator=torch.Generator().manual_seed(0))
    (latent,) = run("EncodeImage", vae=demo.vae, image=picture, fit=fit, **asked)
    assert latent["samples"].shape == (2, 16, got[0] // 8, got[1] // 8)
    assert host.texts == [f"101x90 became {got[1]}x{got[0]} ({fit})"]


def test_a_fitting_picture_is_encoded_as_it_is(host, demo, run):
    picture = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    (latent,) = run("EncodeImage", vae=demo.vae, image=picture)
    assert torch.equal(latent["samples"], demo.vae.encode(picture).float()) and host.texts == []
    with_alpha = torch.cat([picture, torch.zeros(1, 32, 48, 1)], dim=-1)
    assert torch.equal(run("EncodeImage", vae=demo.vae, image=with_alpha)[0]["samples"], latent["samples"])
    assert run("EncodeImage", vae=demo.vae, image=picture[..., :1])[0]["samples"].shape == latent["samples"].shape


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 32, 2), (0, 32, 32, 3), (1, 0, 32, 3)])
def test_what_is_no_picture_is_refused(demo, shape, run):
    with pytest.raises(FluxError, match="a picture has the shape"):
        run("EncodeImage", vae=demo.vae, image=torch.zeros(shape))


def test_an_empty_latent_of_another_model_is_adapted_and_it_is_told(host, draw):
    out = draw(latent={"samples": torch.zeros(1, 4, 8, 8)})
    assert torch.equal(out["samples"], draw()["samples"])
    assert host.texts[0].startswith("the empty latent has 4 channels")


@pytest.mark.parametrize(
    ("latent", "said"),
    [
        ({"samples": torch.ones(1, 4, 8, 8)}, "this latent has 4 channels, and FLUX.1 draws on 16"),
        ({"samples": torch.zeros(1, 16, 7, 8)}, "must be even"),
        ({"samples": torch.full((1, 16, 8, 8), math.nan)}, "not finite"),
        ({"samples": torch.zeros(1, 16, 0, 8)}, "holds no picture"),
        ({"samples": torch.zeros(16, 8, 8)}, "holds no picture"),
        ({}, "holds no picture"),
        (None, "Sample: the input 'latent' came empty"),
    ],
)
def test_a_latent_that_cannot_be_drawn_on_is_refused(draw, latent, said):
    with pytest.raises(FluxError, match=said):
        draw(latent=latent)


def test_a_loader_without_text_encoders_is_named_by_the_node_that_needs_them(run):
    with pytest.raises(FluxError, match=r"Encode Prompt: the input 'text' came empty.*Load FLUX Parts"):
        run("EncodePrompt", text=None, prompt="a house")
    with pytest.raises(FluxError, match="Decode: the input 'vae' got a FluxModelLike where a Vae belongs"):
        run("Decode", vae=type("FluxModelLike", (), {})(), latent={})


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(checkout):
    for id, made in NODE_CLASS_MAPPINGS.items():
        page = (checkout / "web" / "js" / "docs" / id / "en.md").read_text(encoding="utf-8")
        groups = made.INPUT_TYPES()
        for name in [*groups["required"], *groups.get("optional", {}), *made.RETURN_NAMES]:
            assert f"**{name}**" in page, f"{id}: the help page does not explain {name!r}"
    folders = {folder.name for folder in (checkout / "web" / "js" / "docs").iterdir()}
    assert folders == {*NODE_CLASS_MAPPINGS, *DISPLAY_NAMES}, "a help page belongs to no node"
