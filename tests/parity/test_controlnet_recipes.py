"""ControlNets of every kind in every recipe, against diffusers: same weights, same generators."""

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcanvas.flux_runtime import FluxError, recipes, sidenets
from fluxcanvas.flux_runtime.conditions import SideNetCondition
from fluxcanvas.flux_runtime.model import transformer as transformer_module

PROMPT, NEGATIVE = "a red house under a yellow moon", "blurry, dark"
EXACT = 1e-5  # relative, float32
SIZE = {"height": 64, "width": 96}
MODEL = {"depth": 5, "depth_single": 7}  # more blocks than any of the nets has
KINDS = {
    "InstantX": {},
    "union": {"num_mode": 4},
    "without single blocks": {"num_layers": 3, "num_single_layers": 0},
    "without guidance": {"guidance_embeds": False},
    "XLabs": {"num_single_layers": 0, "conditioning_embedding_channels": 16, "patch_size": 2},
}
CFG = {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int, width: int = 80, height: int = 56) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def ours(recipe, flux, *, steps=5, **options):
    options = {"guidance": 3.5, "max_sequence_length": 24, "generator": rng(), **SIZE, **options}
    return recipe(flux, PROMPT, steps=steps, output="latent", **options)


@pytest.fixture(scope="module")
def setting(pair, net_pair, shape_of):
    """`setting(kind, seed)` -> (pipe, flux, their net, our net)."""
    shape = shape_of(**MODEL)

    def get(kind: str = "InstantX", seed: int = 0):
        return *pair(shape), *net_pair(shape, seed, **KINDS[kind])

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["one", "batch of two", "true cfg"])
def test_controlnet(setting, oracle, relative, kind, case):
    pipe, flux, theirs, net = setting(kind)
    mode = 2 if kind == "union" else None
    extra = {"one": {}, "batch of two": {"num_images_per_prompt": 2}, "true cfg": CFG}[case]
    expected = oracle(
        pipe, "FluxControlNetPipeline", parts={"controlnet": theirs}, control_image=picture(2), control_mode=mode,
        controlnet_conditioning_scale=0.7, control_guidance_start=0.1, control_guidance_end=0.7, **SIZE, **extra,
    )  # fmt: skip
    mine = {"images_per_prompt": 2} if case == "batch of two" else extra
    options = {"control_image": picture(2), "control_mode": mode, "controlnet_scale": 0.7, **mine}
    got = ours(recipes.controlnet, flux, controlnet=net, controlnet_start=0.1, controlnet_end=0.7, **options)
    assert relative(got, expected) < EXACT
    assert relative(ours(recipes.text_to_image, flux, **mine), expected) > 0.01


@pytest.mark.parametrize("kind", ["InstantX", "union", "XLabs"])
@pytest.mark.parametrize("recipe", ["image_to_image", "inpaint"])
def test_from_a_picture(setting, oracle, relative, mask, kind, recipe):
    pipe, flux, theirs, net = setting(kind)
    names = {"image_to_image": "FluxControlNetImg2ImgPipeline", "inpaint": "FluxControlNetInpaintPipeline"}
    mode = 1 if kind == "union" else None
    options = {"image": picture(1), "control_image": picture(2), "strength": 0.7, "control_mode": mode}
    masked = ({"mask_image": mask}, {"mask": mask}) if recipe == "inpaint" else ({}, {})
    expected = oracle(
        pipe, names[recipe], parts={"controlnet": theirs}, controlnet_conditioning_scale=0.6, control_guidance_end=0.6,
        **SIZE, **options, **masked[0],
    )  # fmt: skip
    call = getattr(recipes, f"controlnet_{recipe}")
    got = ours(call, flux, controlnet=net, controlnet_scale=0.6, controlnet_end=0.6, **options, **masked[1])
    assert relative(got, expected) < EXACT


@pytest.mark.parametrize("kind", ["InstantX", "XLabs"])  # the oracle fails on a batch with a union net
@pytest.mark.parametrize("recipe", ["image_to_image", "inpaint"])
def test_a_batch_from_a_picture(setting, oracle, relative, mask, recipe, kind):
    pipe, flux, theirs, net = setting(kind)
    names = {"image_to_image": "FluxControlNetImg2ImgPipeline", "inpaint": "FluxControlNetInpaintPipeline"}
    options = {"image": picture(1), "control_image": picture(2), "strength": 0.7}
    masked = ({"mask_image": mask}, {"mask": mask}) if recipe == "inpaint" else ({}, {})
    parts = {"controlnet": theirs}
    expected = oracle(pipe, names[recipe], parts=parts, num_images_per_prompt=2, **SIZE, **options, **masked[0])
    call = getattr(recipes, f"controlnet_{recipe}")
    assert relative(ours(call, flux, controlnet=net, images_per_prompt=2, **options, **masked[1]), expected) < EXACT


@pytest.mark.parametrize("kind", ["InstantX", "XLabs"])
def test_a_control_image_for_each_of_two_prompts(setting, oracle, relative, kind):
    pipe, flux, theirs, net = setting(kind)
    images, prompts = [picture(2, 96, 64), picture(4, 96, 64)], [PROMPT, "a blue boat"]
    expected = oracle(pipe, "FluxControlNetPipeline", parts={"controlnet": theirs}, prompt=prompts,
                      control_image=images, num_images_per_prompt=2, **SIZE)  # fmt: skip
    batch = np.stack([np.asarray(image) for image in images])
    options = {"guidance": 3.5, "max_sequence_length": 24, "generator": rng(), "output": "latent", **SIZE}
    got = recipes.controlnet(
        flux, prompts, controlnet=net, control_image=batch, images_per_prompt=2, steps=5, **options
    )
    assert relative(got, expected) < EXACT


def multi(*nets):
    from diffusers.models.controlnets.controlnet_flux import FluxMultiControlNetModel

    return FluxMultiControlNetModel(list(nets))


@pytest.mark.parametrize("case", ["one", "true cfg"])
def test_several_nets(setting, oracle, relative, case):
    pipe, flux, first, one = setting()
    _, _, second, two = setting(seed=1)
    cfg = CFG if case == "true cfg" else {}
    images = [picture(2), picture(4)]
    expected = oracle(
        pipe, "FluxControlNetPipeline", parts={"controlnet": multi(first, second)}, control_image=images,
        controlnet_conditioning_scale=[0.7, 0.4], control_guidance_start=[0.0, 0.3], control_guidance_end=[0.5, 1.0],
        **SIZE, **cfg,
    )  # fmt: skip
    spans = {"controlnet_start": [0.0, 0.3], "controlnet_end": [0.5, 1.0], "controlnet_scale": [0.7, 0.4], **cfg}
    got = ours(recipes.controlnet, flux, controlnet=[one, two], control_image=images, **spans)
    assert relative(got, expected) < EXACT


def test_a_union_net_with_two_images(setting, oracle, relative):
    """Start and end as lists: diffusers forgets the second image otherwise."""
    pipe, flux, theirs, net = setting("union")
    images = [picture(2), picture(4)]
    expected = oracle(
        pipe, "FluxControlNetPipeline", parts={"controlnet": multi(theirs)}, control_image=images, control_mode=[0, 3],
        controlnet_conditioning_scale=[0.7, 0.4], control_guidance_start=[0.0, 0.0], control_guidance_end=[1.0, 0.5],
        **SIZE,
    )  # fmt: skip
    spans = {"controlnet_end": [1.0, 0.5], "controlnet_scale": [0.7, 0.4], "control_mode": [0, 3]}
    assert relative(ours(recipes.controlnet, flux, controlnet=net, control_image=images, **spans), expected) < EXACT


def test_nets_of_different_kinds_together(setting, relative):
    """diffusers asks the first net what all of them read; here a latent and a pixel net go together."""
    _, flux, _, one = setting()
    _, _, _, two = setting("XLabs")
    images = [picture(2), picture(4)]
    both = ours(recipes.controlnet, flux, controlnet=[one, two], control_image=images)
    turned = ours(recipes.controlnet, flux, controlnet=[two, one], control_image=images[::-1])
    assert relative(turned, both) < EXACT
    alone = [ours(recipes.controlnet, flux, controlnet=net, control_image=i) for net, i in zip([one, two], images)]  # noqa: B905
    assert min(relative(both, a) for a in alone) > 0.01


def by_hand(pipe, net, negative: str, weights=(1.0,) * 5, cfg: float = 2.5):
    """True CFG written out on diffusers' own models; `weights` scales the net in each step."""
    from diffusers import FluxControlNetPipeline as Pipeline

    generator, scheduler = rng(), pipe.scheduler
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(picture(2), **SIZE)
        raw = pipe.vae.encode(pixels).latent_dist.sample(generator)
        hint = (raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        noise = torch.randn(1, 16, 8, 12, generator=generator)
        hint, x = (Pipeline._pack_latents(t, 1, 16, 8, 12) for t in (hint, noise))
        ids = Pipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
        prompts = [pipe.encode_prompt(p, None, max_sequence_length=24) for p in (PROMPT, NEGATIVE)]
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5), mu=0.5 + (24 - 256) * 0.65 / 3840)
        for step, weight in enumerate(weights):
            sigma, after = scheduler.sigmas[step], scheduler.sigmas[step + 1]
            now = {"hidden_states": x, "timestep": sigma[None], "guidance": torch.tensor([3.5]), "img_ids": ids}
            common = [
                dict(**now, encoder_hidden_states=e, pooled_projections=p, txt_ids=i, return_dict=False)
                for e, p, i in prompts
            ]
            said = [net(controlnet_cond=hint, conditioning_scale=weight, **c) for c in common]
            said[1] = {"reuse": said[0], "none": (None, None), "again": said[1]}[negative]
            good, bad = (
                pipe.transformer(controlnet_block_samples=d, controlnet_single_block_samples=s, **c)[0]
                for c, (d, s) in zip(common, said, strict=True)
            )
            x = x + (after - sigma) * (bad + cfg * (good - bad))
    return x


@pytest.mark.parametrize("negative", ["reuse", "none", "again"])
def test_what_the_net_does_in_the_negative_pass(setting, relative, negative):
    pipe, flux, theirs, net = setting()
    options = {"controlnet": net, "control_image": picture(2), **CFG}
    got = ours(recipes.controlnet, flux, controlnet_negative=negative, **options)
    assert relative(got, by_hand(pipe, theirs, negative)) < EXACT
    if negative != "reuse":
        assert relative(got, ours(recipes.controlnet, flux, **options)) > 0.001


def test_a_weight_curve(setting, relative):
    pipe, flux, theirs, net = setting()
    expected = by_hand(pipe, theirs, "reuse", weights=(0.8, 0.4, 0.0, 0.2, 0.4))
    curve = {"controlnet_curve": (1.0, 0.0, 0.5), "controlnet_scale": 0.8, **CFG}
    assert relative(ours(recipes.controlnet, flux, controlnet=net, control_image=picture(2), **curve), expected) < EXACT


@pytest.mark.parametrize("recipe", ["controlnet", "controlnet_image_to_image", "controlnet_inpaint"])
def test_bfloat16_is_no_further_from_float32_than_the_oracle(
    pair, net_pair, shape_of, oracle, relative, mask, tmp_path, recipe
):
    from diffusers import FluxControlNetModel

    from fluxcanvas.flux_runtime import load_controlnet

    names = {"controlnet": "", "controlnet_image_to_image": "Img2Img", "controlnet_inpaint": "Inpaint"}
    name = f"FluxControlNet{names[recipe]}Pipeline"
    source = {} if recipe == "controlnet" else {"image": picture(1), "strength": 0.8}
    masks = ({"mask_image": mask}, {"mask": mask}) if recipe == "controlnet_inpaint" else ({}, {})
    shape = shape_of(**MODEL)
    theirs, _ = net_pair(shape)
    theirs.save_pretrained(tmp_path)
    call = {"control_image": picture(2), **source, **masks[0], **SIZE}
    exact = oracle(pair(shape)[0], name, parts={"controlnet": theirs}, **call)
    pipe, flux = pair(shape, torch.bfloat16)
    half = FluxControlNetModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    allowed = relative(oracle(pipe, name, parts={"controlnet": half}, **call).float(), exact)
    net = load_controlnet(tmp_path, device="cpu", dtype="bf16")
    mine = {"controlnet": net, "control_image": picture(2), **source, **masks[1]}
    assert relative(ours(getattr(recipes, recipe), flux, **mine).float(), exact) <= 1.05 * allowed


spread, plus = sidenets.spread, transformer_module._plus
PLANTED = {
    "taking turns instead of serving runs": (sidenets, "spread", lambda *args: spread(*args[:-1], not args[-1])),
    "no scale": (SideNetCondition, "weight", lambda self, step: 1.0),
    "added to the text": (transformer_module, "_plus", lambda x, residuals, index, start: plus(x, residuals, index, 0)),
    "one block too late": (transformer_module, "_plus", lambda x, r, index, start: plus(x, r, index + 1, start)),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_noticed(setting, oracle, relative, monkeypatch, error):
    pipe, flux, theirs, net = setting()
    scale = {"controlnet_conditioning_scale": 0.7}
    parts = {"controlnet": theirs}
    expected = oracle(pipe, "FluxControlNetPipeline", parts=parts, control_image=picture(2), **scale, **SIZE)
    monkeypatch.setattr(*PLANTED[error])
    got = ours(recipes.controlnet, flux, controlnet=net, control_image=picture(2), controlnet_scale=0.7)
    assert relative(got, expected) > 100 * EXACT


def test_refusals(setting, net_pair, shape_of):
    _, flux, _, union = setting("union")
    for mode in (None, 4, -1):
        with pytest.raises(FluxError, match="mode from 0 to 3"):
            ours(recipes.controlnet, flux, controlnet=union, control_image=picture(2), control_mode=mode)
    with pytest.raises(FluxError, match="2 control images were given for 3 ControlNets"):
        ours(recipes.controlnet, flux, controlnet=[union] * 3, control_image=[picture(2)] * 2, control_mode=0)
    _, other = net_pair(shape_of(heads=2))
    with pytest.raises(FluxError, match="its width is 64, and the model's 128"):
        ours(recipes.controlnet, flux, controlnet=other, control_image=picture(2))


@pytest.mark.parametrize(("model", "own"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_net_of_another_dtype_than_the_model(pair, net_pair, shape_of, relative, tmp_path, model, own):
    """Works, and is no less exact than if both were bfloat16."""
    from fluxcanvas.flux_runtime import load_controlnet

    shape = shape_of(**MODEL)
    theirs, exact_net = net_pair(shape)
    theirs.save_pretrained(tmp_path)

    def drawn(dtype, net):
        flux = pair(shape, getattr(torch, dtype))[1]
        return ours(recipes.controlnet, flux, controlnet=net, control_image=picture(2))

    net, half = (load_controlnet(tmp_path, device="cpu", dtype=dtype) for dtype in (own, "bfloat16"))
    exact, got = drawn("float32", exact_net), drawn(model, net)
    assert got.dtype == getattr(torch, model)
    assert 0 < relative(got.float(), exact) <= 1.1 * relative(drawn("bfloat16", half).float(), exact)
