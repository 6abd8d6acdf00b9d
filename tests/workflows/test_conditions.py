"""What a shipped workflow is for shows in its picture: masks keep, conditions lead, halves of a run make a whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fluxcanvas.demo import judge
from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.integrity import IntegrityChecker
from fluxcanvas.web.host.examples import WORKFLOWS
from fluxcanvas.web.host.run import RunError

BALLOON, CAR, HOUSE = ("small-fluxcanvas-balloon.png", "small-fluxcanvas-car.png", "small-fluxcanvas-house.png")
LEFT_HALF, HOUSE_MASK = "small-fluxcanvas-left-half.png", "small-fluxcanvas-house-mask.png"
# Settings that change one condition of a workflow; each makes another picture.
CHANGES = {
    "inpaint": [f"Mask.image={LEFT_HALF}", f"Picture to change.image={BALLOON}", "Mask Edit.invert=true"],
    "fill": [f"Mask.image={LEFT_HALF}", f"Picture.image={BALLOON}"],
    "outpaint": [f"Picture.image={BALLOON}", "Pad for Outpaint.feather=0"],
    "control-canny": [f"Picture with the shapes.image={BALLOON}"],
    "control-depth": [f"Picture with the space.image={BALLOON}", "Depth Map.invert=true"],
    "control-image-to-image": [f"Picture to change.image={BALLOON}", "Depth Map.invert=true"],
    "control-inpaint": [f"Mask.image={LEFT_HALF}", "Depth Map.invert=true"],
    "controlnet": [f"Edges.image={HOUSE}", "ControlNet.scale=0", "ControlNet.end=0.5", "ControlNet.curve=1, 0"],
    "controlnet-image-to-image": ["Canny Map.high=2000", "ControlNet.scale=0"],
    "controlnet-inpaint": ["ControlNet.scale=0", f"Mask.image={LEFT_HALF}"],
    "redux": [f"Picture to vary.image={CAR}", "Redux Prior.image_strength=0.5", "Redux Prior.downsample=3"],
    "ip-adapter": [f"Picture to follow.image={CAR}", "IP-Adapter.scale=0", "Sample.true_cfg_scale=1"],
    "kontext": [f"Picture to edit.image={BALLOON}", "Kontext Condition.strength=0.3"],
    "kontext-inpaint": [f"Picture to edit.image={BALLOON}", f"Mask.image={LEFT_HALF}"],
    "kontext-inpaint-reference": [f"Reference.image={BALLOON}"],
    "kontext-references": [
        f"First picture.image={CAR}", f"Second picture.image={CAR}", "Second reference.method=offset",
        "Second reference.strength=0",
    ],
    "kontext-controlnet": ["ControlNet.scale=0", f"Picture to edit.image={BALLOON}"],
    "control-inpaint-true-cfg": ["Sample.true_cfg_scale=1", "Negative prompt.prompt=a sun", "Depth Map.invert=true"],
    "fill-controlnet-redux-ip-adapter": [
        "ControlNet.scale=0", "Redux Prior.image_strength=0", "IP-Adapter.scale=0", f"Mask.image={LEFT_HALF}",
        f"Picture to follow.image={CAR}",
    ],
    "regional-reference": [f"Reference.image={BALLOON}", f"Left half.image={HOUSE_MASK}"],
    "soft-inpaint": ["Inpaint Mask.mode=hard", "Soften the mask.blur=0"],
    "lora": ["Load LoRA.weight=0", "Load LoRA.blocks=single_blocks: 0"],
    "lora-stack": ["LoRA Stack.weight_1=0", "LoRA Stack.lora_2=none", "One more, for some blocks.blocks="],
    "lora-control-canny": [f"Picture with the shapes.image={BALLOON}", "Load LoRA.weight=0.5"],
    "lora-control-depth": [f"Picture with the space.image={BALLOON}", "Depth Map.invert=true"],
    "turbo-control": ["Turbo LoRA.weight=0", "Depth LoRA.weight=0.3", "Depth Map.invert=true"],
    "turbo-fill": ["Load LoRA.weight=0", f"Mask.image={LEFT_HALF}"],
    "turbo-redux": ["Load LoRA.weight=0", f"Picture to vary.image={CAR}"],
    "eight-bits": ["Load FLUX.quantize=none", "Load FLUX.quantize_t5=bnb-nf4"],
    "quanto-float8": ["Load FLUX Parts.quantize=none", "Load FLUX Parts.quantize_t5=none"],
    "gguf": ["Load FLUX Parts.transformer=flux1-dev-fp8.safetensors", "Load FLUX Parts.t5=t5/model.safetensors"],
    "quantize": ["Quantize.scheme=bnb-nf4", "Quantize.scheme=none", "Quantize.t5_scheme=bnb-nf4"],
}  # fmt: skip
# Those that draw within a mask, with the mask's node and the picture's.
MASKED = ["inpaint", "control-inpaint", "controlnet-inpaint", "kontext-inpaint", "kontext-inpaint-reference"]
LEAST = 0.1  # mean difference, in 8-bit levels, of a picture whose condition changed
REACH = 20  # pixels around a mask in which the VAE mixes what is in it with what is around it


@pytest.mark.parametrize(
    "name, setting", [(name, setting) for name, settings in CHANGES.items() for setting in settings]
)
def test_another_condition_makes_another_picture(bench, distance, name, setting):
    assert distance(bench.picture(name), bench.picture(name, setting)) > LEAST


@pytest.mark.parametrize("name", MASKED)
def test_outside_the_mask_the_picture_stays(bench, levels, demo, name):
    """As well as the VAE can: what is compared is its own copy of the source."""
    drawn, inside = levels(bench.picture(name)), mask_of("house-mask", 128)
    source = levels(opened("house", 128))
    copy = demo.vae.decode(demo.vae.encode(source[None] / 255))[0].clamp(0, 1) * 255
    changed = (drawn - copy).abs().mean(-1)
    assert changed[~grown(inside, REACH)].mean() < 2.5 and changed[~grown(inside, REACH)].max() < 16
    assert changed[inside].mean() > 12


def test_what_is_stitched_back_leaves_the_rest_as_it_was(bench, levels):
    drawn, source = levels(bench.picture("soft-inpaint")), levels(opened("village", 256))
    marked = mask_of("village-mask", 256)
    blurred, blended = 3 * 8, 16  # how far the workflow's Mask Edit and Crop for Inpaint reach
    outside = ~grown(marked, blurred + blended)
    assert torch.equal(drawn[outside], source[outside]) and 0.3 < outside.float().mean() < 0.9
    assert (drawn - source)[marked].abs().mean() > 10
    red, _, blue = drawn[150:210, 150:210].mean((0, 1))
    assert blue > red, "the car is blue"


def test_two_halves_of_a_run_are_a_run(bench, distance):
    """One prompt in both, and the second adds no noise: the picture of one Sample, but for rounding on the way."""
    prompt = "a red house on a green meadow"
    seed, steps = "Sample.seed=1", "Sample.steps=16"
    whole = bench.picture("text-to-image", seed, steps, f"Prompt.prompt={prompt}")
    assert distance(whole, bench.picture("draw-twice", f"Second prompt.prompt={prompt}")) < 0.05
    assert distance(whole, bench.picture("draw-twice")) > 5
    noisy = bench.picture("draw-twice", f"Second prompt.prompt={prompt}", "Go on.add_noise=true")
    assert distance(whole, noisy) > 1


def test_each_region_has_its_own_prompt(bench, levels):
    day, night = "a white house at sunset", "a white house at night under a yellow moon"
    drawn = bench.picture("regional-prompts")
    swapped = bench.picture("regional-prompts", f"On the left.prompt={night}", f"On the right.prompt={day}")
    for picture, bright, dark in ((drawn, slice(0, 56), slice(72, 128)), (swapped, slice(72, 128), slice(0, 56))):
        sky = levels(picture)[:40]
        assert sky[:, bright].mean() > sky[:, dark].mean() + 40
    seen = judge.look([drawn])[0]
    assert seen.things["house"].color == "white" and seen.things["moon"].x > 0.5


def test_the_demo_lora_keeps_what_the_picture_shows(bench):
    pictures = bench.pictures("lora-demo")
    seen = judge.look([image for name in ("fluxcanvas-plain", "fluxcanvas-sepia") for image in pictures[name]])
    assert [set(one.things) for one in seen] == [{"house", "balloon"}] * 2


def test_a_picture_that_does_not_pass_the_check_is_not_saved(bench, monkeypatch):
    def refuse(self, images):
        raise FluxError("picture 1 of 1 shows a brand")

    monkeypatch.setattr(type(IntegrityChecker.load()), "pass_on", refuse)
    before = set(bench.runner.folders.output.iterdir())
    with pytest.raises(RunError, match=r"Integrity Check.*shows a brand"):
        bench.run("kontext-integrity-check", ["Save Image.filename_prefix=never"])
    assert set(bench.runner.folders.output.iterdir()) == before


def test_the_order_of_the_wishes_does_not_matter(bench):
    """The ControlNet of the largest combination, moved behind the IP-Adapter."""
    name = "fill-controlnet-redux-ip-adapter"
    assert bench.rewired(name, swap=("ControlNet", "IP-Adapter")).tobytes() == bench.picture(name).tobytes()


def opened(name: str, side: int) -> Image.Image:
    """An input picture at the size that the runs see it."""
    with Image.open(WORKFLOWS / "inputs" / f"fluxcanvas-{name}.png") as picture:
        return picture.convert("RGB").resize((side, side), Image.Resampling.BOX)


def mask_of(name: str, side: int) -> torch.Tensor:
    """(side, side) bool, of an input mask."""
    return torch.tensor(list(opened(name, side).convert("L").tobytes())).reshape(side, side) > 0


def grown(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    return F.max_pool2d(mask[None].float(), 2 * pixels + 1, 1, pixels)[0] > 0
