"""Loading ControlNets, IP-Adapters, Redux and image encoders: every published layout whole, everything else by name."""

import json
import logging

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxcanvas.flux_runtime import FluxError, load_adapter, load_controlnet, load_image_encoder, to_tensor
from fluxcanvas.flux_runtime.adapters import IPAdapter, Redux
from fluxcanvas.flux_runtime.weights import additions
from fluxcanvas.flux_runtime.weights.addition_names import NET_DIFFUSERS

# Published sizes -> small ones that keep every relation between them.
SMALL = {3072: 64, 4096: 48, 768: 40, 12288: 256, 9216: 192, 18432: 384, 15360: 320, 16384: 192, 65536: 768, 128: 32}


def randoms(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn([SMALL.get(n, n) for n in s], generator=generator) * 0.1 for name, s in shapes.items()}


@pytest.fixture
def published(shared):
    """`published(name)`: random tensors under the names of a published file, scaled down."""
    return lambda name: randoms(json.loads((shared / "keys" / f"{name}.json").read_text())["shapes"])


@pytest.fixture
def write(tmp_path):
    """`write(tensors, "folder/name.safetensors", config)` -> path."""

    def to(tensors, name="x.safetensors", config=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path)
        if config is not None:
            (path.parent / "config.json").write_text(json.dumps(config))
        return path

    return to


def net(source, **options):
    return load_controlnet(source, device="cpu", **options)


def adapter(source, **options):
    return load_adapter(source, device="cpu", **options)


def whole(loaded) -> bool:
    """Nothing of the file is left over, nothing lacks, and no weight is other than the file's."""
    part = loaded.report.parts[0]
    tensors = load_file(part.files[0])
    known = {t.data.contiguous().numpy().tobytes() for t in loaded.model.state_dict().values()}
    joined = ("to_q.", "to_k.", "to_v.", "add_", "proj_mlp.")
    kept = all(t.numpy().tobytes() in known for n, t in tensors.items() if not any(x in n for x in joined))
    return kept and not part.unused and not part.missing and part.used == len(tensors)


def same(a, b) -> bool:
    left, right = a.model.state_dict(), b.model.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def shakker_pro_2(union):
    """Six double blocks, no single ones, no modes."""
    kept = {n: t for n, t in union.items() if "single" not in n and "mode_embedder" not in n}
    sixth = {n.replace(".4.", ".5."): t for n, t in kept.items() if ".4." in n}
    return kept | sixth


def mistoline(xlabs):
    """XLabs' trunk, with activated output projections and a stem of ten convolutions."""
    tensors = {n: t for n, t in xlabs.items() if not n.startswith("input_hint_block.")}
    tensors = {n.replace("weight", "linear.weight").replace("bias", "linear.bias")
               if n.startswith("controlnet_blocks.") else n: t for n, t in tensors.items()}  # fmt: skip
    for i, (channels, kernel) in enumerate(zip([3] + [16] * 9, [3, 1, 3, 3, 3, 3, 3, 3, 1, 3], strict=True)):
        tensors[f"input_cond_block.encoder.{2 * i}.weight"] = torch.randn(16, channels, kernel, kernel) * 0.1
        tensors[f"input_cond_block.encoder.{2 * i}.bias"] = torch.randn(16) * 0.1
    return tensors


class TestControlNets:
    def test_union(self, published, write):
        loaded = net(write(published("controlnet_instantx_union"), "InstantX/diffusion_pytorch_model.safetensors"))
        assert whole(loaded) and loaded.name == "InstantX" and loaded.model.reads_latents
        params = loaded.model.params
        assert (params.depth, params.depth_single, params.num_heads, params.mlp_hidden) == (5, 10, 2, 256)
        assert loaded.model.side.modes == 10 and params.guidance_embed and params.axes_dim == (4, 14, 14)
        row = load_file(loaded.report.parts[0].files[0])["single_transformer_blocks.3.attn.to_v.weight"]
        assert torch.equal(loaded.model.single_blocks[3].linear1.weight[128:192], row)

    def test_six_double_blocks_without_modes(self, published, write):
        loaded = net(write(shakker_pro_2(published("controlnet_instantx_union"))))
        assert whole(loaded) and (loaded.model.params.depth, loaded.model.params.depth_single) == (6, 0)
        assert loaded.model.side.modes == 0

    def test_xlabs_in_both_spellings(self, published, write):
        tensors = published("controlnet_xlabs_canny_v2")
        raw = net(write(tensors, "flux-canny-controlnet-v3.safetensors"))
        assert whole(raw) and not raw.model.reads_latents and raw.name == "flux-canny-controlnet-v3"
        lazy = additions.open_addition(raw.report.parts[0].files[0], ("ControlNet",)).component.tensors
        converted = {n: t.read() for n, t in NET_DIFFUSERS.to_foreign(lazy, 64).items()}
        assert {"input_hint_block.conv_in.weight", "input_hint_block.blocks.5.bias"} <= converted.keys()
        again = net(write(converted, "x/diffusion_pytorch_model.safetensors"))
        assert whole(again) and same(raw, again) and again.report.parts[0].layout == "diffusers"

    def test_mistoline(self, published, write):
        loaded = net(write(mistoline(published("controlnet_xlabs_canny_v2"))))
        assert whole(loaded) and loaded.model.side.hint == "mistoline"
        assert loaded.model.hint_tokens(torch.zeros(1, 3, 32, 48)).shape == (1, 6, 64)

    @pytest.mark.parametrize("prefix", ["controlnet.", "module.", "model.diffusion_model."])
    def test_prefixes(self, published, write, prefix):
        tensors = published("controlnet_xlabs_canny_v2")
        prefixed = net(write({prefix + n: t for n, t in tensors.items()}, "a.safetensors"))
        assert whole(prefixed) and same(prefixed, net(write(tensors, "b.safetensors")))

    def test_shards_in_a_pipelines_folder(self, published, write, tmp_path):
        tensors = published("controlnet_instantx_union")
        one = net(write(tensors, "one.safetensors"))
        names, files = sorted(tensors), {}
        for i in range(2):
            file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
            write({n: tensors[n] for n in names[i::2]}, f"pipe/controlnet/{file}")
            files |= dict.fromkeys(names[i::2], file)
        index = {"weight_map": files}
        (tmp_path / "pipe/controlnet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        assert same(one, net(tmp_path / "pipe")) and same(one, net(tmp_path / "pipe" / "controlnet"))

    def test_a_config_wins_over_shapes(self, published, write, caplog):
        config = {"num_mode": None, "axes_dims_rope": [8, 12, 12], "guidance_embeds": False}
        path = write(published("controlnet_instantx_union"), "c/diffusion_pytorch_model.safetensors", config)
        with caplog.at_level(logging.WARNING, "fluxcanvas"):
            loaded = net(path)
        assert loaded.model.params.axes_dim == (8, 12, 12) and loaded.model.side.modes == 0
        assert loaded.model.guidance_in is None and len(loaded.report.parts[0].unused) == 5
        assert "controlnet_mode_embedder.weight" in caplog.text

    def test_progress_and_dtype(self, published, write):
        told = []
        loaded = net(write(published("controlnet_xlabs_canny_v2")), dtype="bf16", progress=lambda *a: told.append(a))
        assert told[-1] == ("loading the ControlNet", 1.0) and loaded.model.dtype == torch.bfloat16

    def test_damage_is_named(self, published, write, tmp_path):
        tensors = published("controlnet_instantx_union")
        missing = dict(tensors)
        del missing["transformer_blocks.2.attn.to_k.weight"]
        with pytest.raises(FluxError, match=r"lacks 1: transformer_blocks\.2\.attn\.to_k\.weight"):
            net(write(missing))
        with pytest.raises(FluxError, match=r"double_blocks\.2"):
            net(write({n: t for n, t in tensors.items() if "blocks.2." not in n}))
        with pytest.raises(FluxError, match=r"wrong shape.*controlnet_blocks.1.bias \[9\]"):
            net(write(tensors | {"controlnet_blocks.1.bias": torch.zeros(9)}))
        with pytest.raises(FluxError, match=r"68 channels.*inpainting"):
            net(write(tensors | {"controlnet_x_embedder.weight": torch.zeros(64, 68)}))
        with pytest.raises(FluxError, match=r"safetensors: x_embedder.weight has a scale"):
            net(write(tensors | {"x_embedder.scale_weight": torch.ones(())}))
        path = write(tensors)
        (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
        with pytest.raises(FluxError, match=r"cut\.safetensors"):
            net(tmp_path / "cut.safetensors")


class TestAdapters:
    @pytest.mark.parametrize(("name", "tokens"), [("ip_adapter_xlabs", 4), ("ip_adapter_xlabs_v2", 16)])
    def test_ip_adapters_in_both_spellings(self, published, write, name, tokens):
        tensors = published(name)
        loaded = adapter(write(tensors, "ip_adapter.safetensors"))
        assert isinstance(loaded, IPAdapter) and whole(loaded)
        params = loaded.model.params
        assert (params.tokens, params.blocks, params.embed_dim, params.context_dim) == (tokens, 19, 40, 48)

        def diffusers(key):
            if key.startswith("ip_adapter_proj_model."):
                return "image_proj." + key.split(".", 1)[1]
            _, block, _, linear, ending = key.split(".")
            return f"ip_adapter.{block}.to_{linear.split('_')[-2]}_ip.{ending}"

        assert same(loaded, adapter(write({diffusers(n): t for n, t in tensors.items()}, "d.safetensors")))

    def test_redux_alone_and_in_its_folder(self, write, tmp_path):
        tensors = randoms({"redux_up.weight": [12288, 32], "redux_up.bias": [12288], "redux_down.weight": [4096, 12288],
                           "redux_down.bias": [4096]})  # fmt: skip
        bare = adapter(write(tensors, "flux1-redux-dev.safetensors"))
        assert isinstance(bare, Redux) and whole(bare) and bare.encoder is None
        with pytest.raises(FluxError, match="no image encoder"):
            bare.tokens(torch.zeros(1, 8, 8, 3))
        write(tensors, "redux/image_embedder/diffusion_pytorch_model.safetensors")
        siglip().save_pretrained(tmp_path / "redux" / "image_encoder")
        folder = adapter(tmp_path / "redux")
        assert same(bare, folder) and folder.tokens(torch.rand(2, 20, 30, 3)).shape == (2, 9, 48)
        assert [part.name for part in folder.report.parts] == ["Redux adapter", "image encoder"]

    def test_the_published_encoder_is_fetched_when_a_picture_is_shown(self, published, write, tmp_path, monkeypatch):
        tensors = published("ip_adapter_xlabs")
        tensors["ip_adapter_proj_model.proj.weight"] = torch.zeros(192, 768)
        asked = []
        clip(projection_dim=768).save_pretrained(tmp_path / "clip")
        monkeypatch.setattr(additions, "fetch_model", lambda repo, *_: asked.append(repo) or tmp_path / "clip")
        loaded = adapter(write(tensors, "adapters/v1.safetensors"))
        assert loaded.encoder.name == "openai/clip-vit-large-patch14" and not asked
        assert loaded.embed(torch.rand(2, 30, 40, 3)).shape == (1, 2, 768)
        loaded.embed(torch.rand(1, 30, 40, 3))
        assert asked == ["openai/clip-vit-large-patch14"]

    def test_encoders_in_model_folders_are_found_by_their_size(self, published, write, tmp_path):
        path = write(published("ip_adapter_xlabs"), "ipadapter/v1.safetensors")
        for width in (36, 40):
            save_bare(clip(projection_dim=width), tmp_path / "clip_vision" / f"l{width}.safetensors")
        save_bare(siglip(), tmp_path / "clip_vision" / "a.safetensors")
        found = adapter(path, search=[tmp_path / "clip_vision"])
        assert found.encoder.name == "l40" and found.embed(torch.rand(1, 9, 9, 3)).shape == (1, 1, 40)
        for wrong, words in (("a", "SigLIP of width 32"), ("l36", "CLIP of width 36")):
            with pytest.raises(FluxError, match=f"CLIP image encoder of width 40.*{words}"):
                adapter(path, encoder=tmp_path / "clip_vision" / f"{wrong}.safetensors")


def clip(**changes):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    config = dict(hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=1, image_size=28,
                  patch_size=14, projection_dim=40, hidden_act="quick_gelu")  # fmt: skip
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config | changes)).eval()


def siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(4)
    config = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=42)
    return SiglipVisionModel(SiglipVisionConfig(**config, patch_size=14)).eval()


def save_bare(model, path) -> None:
    """A file alone, under the names that published ones have."""
    path.parent.mkdir(exist_ok=True)
    names = {"vision_model." + n.removeprefix("vision_model."): t for n, t in model.state_dict().items()}
    save_file({n.replace("vision_model.visual_pro", "visual_pro"): t.clone() for n, t in names.items()}, path)


class TestImageEncoders:
    @pytest.mark.parametrize("layout", ["folder", "bare file", "with its text half"])
    def test_clip(self, tmp_path, layout):
        model, path = clip(), tmp_path / "m" / "model.safetensors"
        if layout == "folder":
            model.save_pretrained(path.parent)
        else:
            save_bare(model, path)
        if layout == "with its text half":
            extra = {"text_model.encoder.x.weight": torch.ones(2), "logit_scale": torch.ones(())}
            save_file(load_file(path) | extra, path)
        encoder = load_image_encoder(path, device="cpu")
        assert not encoder.report.parts[0].unused and encoder.width == 40
        pixels = torch.rand(1, 3, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(encoder.model(pixels).image_embeds, model(pixels).image_embeds)

    def test_pictures_are_prepared_as_published(self, tmp_path):
        from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

        picture = Image.effect_noise((50, 34), 90).convert("RGB")
        for model, kind in ((clip(), CLIPImageProcessorPil), (siglip(), SiglipImageProcessorPil)):
            save_bare(model, tmp_path / "x.safetensors")
            encoder = load_image_encoder(tmp_path / "x.safetensors", device="cpu")
            side = model.config.image_size
            sizes = {"size": side, "crop_size": side} if kind is CLIPImageProcessorPil else {
                "size": {"height": side, "width": side}}  # fmt: skip
            expected = kind(**sizes)(images=picture, return_tensors="pt").pixel_values
            assert torch.equal(encoder._pixels(to_tensor(picture)), expected)
