"""Pictures as prompts, against diffusers: XLabs' IP-Adapter (v1, v2) in every recipe that has it, and Redux."""

import copy
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError, load_adapter, recipes
from fluxcanvas.flux_runtime.adapters import ImageAttention
from fluxcanvas.flux_runtime.conditions import ImagePromptCondition
from fluxcanvas.flux_runtime.layout import canvas_ids
from fluxcanvas.flux_runtime.model.adapters import ImageProjection, IPAdapterNet
from fluxcanvas.flux_runtime.model.attention import rope, rotate

PROMPT, NEGATIVE = "a red house under a yellow moon", "blurry, dark"
EXACT = 1e-5  # relative, float32
SIZE = {"height": 64, "width": 96}
CFG = {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}
HIDDEN, CONTEXT, EMBED, DEPTH = 128, 32, 40, 2  # of the models of `pair`, and of the tiny CLIP
TOKENS = {"v1": 4, "v2": 16}


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int, width: int = 80, height: int = 56) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def ours(recipe, flux, prompt=PROMPT, *, steps=4, **options):
    options = {"guidance": 3.5, "max_sequence_length": 24, "generator": rng(), **options}
    return recipe(flux, prompt, steps=steps, output="latent", **options)


def ip_weights(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """An IP-Adapter under the names that XLabs publishes, strong enough to be seen."""
    draw = rng(seed)
    shapes = {"ip_adapter_proj_model.proj": (tokens * CONTEXT, EMBED)} | {
        f"double_blocks.{i}.processor.ip_adapter_double_stream_{x}_proj": (HIDDEN, CONTEXT)
        for i in range(DEPTH) for x in "kv"
    }  # fmt: skip
    weights = {f"{n}.weight": torch.randn(s, generator=draw) * 0.3 for n, s in shapes.items()}
    weights |= {f"{n}.bias": torch.randn(s[0], generator=draw) * 0.1 for n, s in shapes.items()}
    norm = {
        "weight": 1 + torch.randn(CONTEXT, generator=draw) * 0.1,
        "bias": torch.randn(CONTEXT, generator=draw) * 0.1,
    }
    return weights | {f"ip_adapter_proj_model.norm.{n}": t for n, t in norm.items()}


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """A tiny CLIP in its folder, with the processor's settings."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(5)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                              image_size=28, patch_size=14, projection_dim=EMBED)  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    processor = CLIPImageProcessorPil(size=28, crop_size=28)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, {"image_encoder": model, "feature_extractor": processor}


@pytest.fixture(scope="module")
def adapters(eyes, tmp_path_factory):
    """`adapters(("v1", seed), ...)` -> (weights of each, our adapters)."""
    folder = tmp_path_factory.mktemp("ip")

    def get(*wanted):
        made = [ip_weights(TOKENS[version], seed) for version, seed in wanted]
        paths = [folder / f"{version}-{seed}.safetensors" for version, seed in wanted]
        for path, weights in zip(paths, made, strict=True):
            if not path.exists():
                save_file(weights, path)
        return made, [load_adapter(path, encoder=eyes[0], device="cpu", dtype="fp32") for path in paths]

    return get


def in_diffusers_words(weights: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """The projection and the blocks' linears, named as its loader names them on reading the file."""
    projection = {n.split(".", 1)[1]: t for n, t in weights.items() if n.startswith("ip_adapter_proj_model.")}
    attention = {}
    for name, tensor in weights.items():
        if name.startswith("double_blocks."):
            _, block, _, linear, ending = name.split(".")
            attention[f"{block}.to_{linear.split('_')[-2]}_ip.{ending}"] = tensor
    return projection, attention


def with_adapters(pipe, made, scales):
    """A copy of the oracle's transformer that reads these adapters; `scales` are one a block for each."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model, states, projections = copy.deepcopy(pipe.transformer), [], []
    for weights in made:
        projection, attention = in_diffusers_words(weights)
        tokens = len(projection["proj.bias"]) // CONTEXT
        # the loader takes every projection of other than 65536 rows for v1's
        module = ImageProjection(EMBED, CONTEXT, num_image_text_embeds=tokens)
        module.load_state_dict({n.replace("proj", "image_embeds"): t for n, t in projection.items()})
        projections.append(module)
        as_v1 = {n: t[: 4 * CONTEXT] if n.startswith("proj") else t for n, t in projection.items()}
        states.append({"image_proj": as_v1, "ip_adapter": attention})
    model._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    model.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    for block, processor in enumerate(list(model.attn_processors.values())[:DEPTH]):
        processor.scale = [scale[block] for scale in scales]
    return model


@dataclass(frozen=True)
class Case:
    """A recipe's counterpart, and the options of both, of the oracle alone and of ours alone."""

    pipeline: str
    both: dict = field(default_factory=dict)
    theirs: dict = field(default_factory=dict)
    mine: dict = field(default_factory=dict)
    masked: bool = False


SOURCE = {"reference_size": "source"}
CASES = {
    "text_to_image": Case("FluxPipeline", SIZE),
    "image_to_image": Case("FluxImg2ImgPipeline", {"image": picture(1), "strength": 0.7, **SIZE}),
    "inpaint": Case("FluxInpaintPipeline", {"image": picture(1), "strength": 0.7, **SIZE}, masked=True),
    "kontext": Case(
        "FluxKontextPipeline", {"image": picture(1), **SIZE}, {"max_area": 64 * 96, "_auto_resize": False}, SOURCE
    ),
    "kontext_inpaint": Case(
        "FluxKontextInpaintPipeline", {"image": picture(1), "strength": 0.8}, {"_auto_resize": False},
        {**SOURCE, "size": "source"}, masked=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def compare(pair, eyes, adapters, oracle, relative, mask):
    """`compare(recipe, versions, ...)` -> relative difference of ours from the oracle's; pictures are numbers."""

    def run(recipe, wanted=(("v1", 1),), images=(7,), scales=((0.8,) * DEPTH,), negative=(), rows=1, cfg=False):
        (pipe, flux), (made, own), case = pair(), adapters(*wanted), CASES[recipe]
        shown = [[picture(i, 8 * i) for i in each] if isinstance(each, tuple) else picture(each) for each in images]
        theirs = {**case.both, **case.theirs, "ip_adapter_image": shown, "num_images_per_prompt": rows}
        mine = {**case.both, **case.mine, "adapter": own, "adapter_image": shown, "adapter_scale": scales}
        if len(own) == 1:  # one need not be a list
            mine |= {"adapter": own[0], "adapter_image": shown[0], "adapter_scale": scales[0]}
        if negative:
            theirs["negative_ip_adapter_image"] = mine["negative_adapter_image"] = [picture(i) for i in negative]
        if case.masked:
            theirs["mask_image"] = mine["mask"] = mask
        both = CFG if cfg else {}
        parts = {"transformer": with_adapters(pipe, made, scales), **eyes[1]}
        expected = oracle(pipe, case.pipeline, parts=parts, steps=4, **theirs, **both)
        return relative(ours(getattr(recipes, recipe), flux, images_per_prompt=rows, **mine, **both), expected)

    return run


@pytest.mark.parametrize("version", TOKENS)
@pytest.mark.parametrize("recipe", CASES)
def test_in_every_recipe(compare, recipe, version):
    assert compare(recipe, ((version, 1),)) < EXACT


@pytest.mark.parametrize("recipe", CASES)
def test_true_cfg_with_a_negative_image(compare, recipe):
    assert compare(recipe, cfg=True, negative=(9,)) < EXACT


def test_true_cfg_without_one_sees_black(compare):
    assert compare("text_to_image", cfg=True) < EXACT


def test_several_images_are_one_prompt(compare):
    assert compare("text_to_image", images=((7, 8, 9),)) < EXACT


def test_a_batch(compare):
    assert compare("image_to_image", rows=2) < EXACT


def test_a_scale_for_each_block(compare):
    assert compare("text_to_image", scales=((0.2, 1.4),)) < EXACT


@pytest.mark.parametrize("recipe", ["text_to_image", "inpaint"])
def test_two_adapters(compare, recipe):
    wanted, scales = (("v1", 1), ("v2", 2)), ((0.8, 0.8), (0.0, 1.1))
    assert compare(recipe, wanted, (7, (8, 9)), scales, negative=(10, 11), cfg=True) < EXACT


def test_the_oracles_own_loader_reads_the_same_file(pair, adapters, eyes, relative, tmp_path):
    """Through `load_ip_adapter`, from the file and the encoder's folder."""
    pipe, flux = pair()
    made, (own,) = adapters(("v1", 1))
    save_file(made[0], tmp_path / "ip_adapter.safetensors")
    plain = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    other = type(pipe)(**plain | {"transformer": copy.deepcopy(pipe.transformer)})
    other.set_progress_bar_config(disable=True)
    other.load_ip_adapter(
        str(tmp_path),
        weight_name="ip_adapter.safetensors",
        image_encoder_pretrained_model_name_or_path=str(eyes[0]),
        image_encoder_subfolder="",
        image_encoder_dtype=torch.float32,
    )
    other.set_ip_adapter_scale(0.6)
    options = {"num_inference_steps": 4, "max_sequence_length": 24, "output_type": "latent", **SIZE}
    expected = other(PROMPT, ip_adapter_image=picture(7), generator=rng(), **options).images
    got = ours(recipes.text_to_image, flux, adapter=own, adapter_image=picture(7), adapter_scale=0.6, **SIZE)
    assert relative(got, expected) < EXACT
    assert relative(ours(recipes.text_to_image, flux, **SIZE), expected) > 0.01


def test_start_and_end(pair, adapters):
    _, flux = pair()
    _, (own,) = adapters(("v1", 1))
    show = {"adapter": own, "adapter_image": picture(7), **SIZE}
    plain = ours(recipes.text_to_image, flux, **SIZE)
    assert torch.equal(ours(recipes.text_to_image, flux, **show, adapter_scale=0.0), plain)
    early = ours(recipes.text_to_image, flux, **show, adapter_end=0.5)
    late = ours(recipes.text_to_image, flux, **show, adapter_start=0.5)
    assert not torch.equal(early, plain) and not torch.equal(late, plain) and not torch.equal(early, late)


see = ImageAttention.__call__
TURNS = rope(canvas_ids(8, 12), (4, 14, 14), 10_000)
PLANTED = {
    "the next block's keys": (ImageAttention, "__call__", lambda self, i, query: see(self, (i + 1) % DEPTH, query)),
    "one block too late": (ImageAttention, "__call__", lambda self, i, query: see(self, i - 1, query) if i else None),
    "a rotated query": (ImageAttention, "__call__", lambda self, i, query: see(self, i, rotate(query, TURNS))),
    "no scale": (ImagePromptCondition, "scales", lambda self, blocks: (1.0,) * blocks),
    "no norm": (
        ImageProjection,
        "forward",
        lambda self, x: self.proj(x).unflatten(-1, (self.tokens, -1)).flatten(1, 2),
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_noticed(compare, monkeypatch, error):
    monkeypatch.setattr(*PLANTED[error])
    assert compare("text_to_image") > 100 * EXACT


def test_bfloat16_is_no_further_from_float32_than_the_oracle(pair, eyes, adapters, oracle, relative, tmp_path):
    made, (own,) = adapters(("v1", 1))
    exact = ours(recipes.text_to_image, pair()[1], adapter=own, adapter_image=picture(7), **SIZE)
    pipe, flux = pair(dtype=torch.bfloat16)
    half = with_adapters(pipe, made, ((1.0,) * DEPTH,)).to(torch.bfloat16)
    encoder = copy.deepcopy(eyes[1]["image_encoder"]).to(torch.bfloat16)
    parts = {**eyes[1], "transformer": half, "image_encoder": encoder}
    expected = oracle(pipe, "FluxPipeline", parts=parts, steps=4, ip_adapter_image=picture(7), **SIZE).float()
    save_file(made[0], tmp_path / "v1.safetensors")
    adapter = load_adapter(tmp_path / "v1.safetensors", encoder=eyes[0], device="cpu", dtype="bf16")
    got = ours(recipes.text_to_image, flux, adapter=adapter, adapter_image=picture(7), **SIZE).float()
    assert relative(got, exact) <= 1.05 * relative(expected, exact)


def test_refusals(pair, adapters):
    _, flux = pair()
    _, (one,) = adapters(("v1", 1))
    larger = replace(one, model=IPAdapterNet(replace(one.model.params, blocks=3)))
    with pytest.raises(FluxError, match="made for 3 double blocks of width 128, and the model has 2 of 128"):
        ours(recipes.text_to_image, flux, adapter=larger, adapter_image=picture(7), **SIZE)
    with pytest.raises(FluxError, match="3 scales were given for the 2 double blocks"):
        ours(recipes.text_to_image, flux, adapter=one, adapter_image=picture(7), adapter_scale=[1, 2, 3], **SIZE)
    with pytest.raises(FluxError, match="0 adapter images were given for 1"):
        ours(recipes.text_to_image, flux, adapter=one, **SIZE)
    two = {"adapter": [one, one], "adapter_image": [picture(7), picture(8)], **SIZE}
    with pytest.raises(FluxError, match="3 adapter scales were given for 2"):
        ours(recipes.text_to_image, flux, adapter_scale=[1, 2, 3], **two)
    with pytest.raises(FluxError, match="1 adapter negative images were given for 2"):
        ours(recipes.text_to_image, flux, negative_adapter_image=[picture(9)], **two)
