"""Loading: every layout of the same weights gives the same model, without copies; what cannot be loaded says why."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError, load_flux, load_parts
from fluxcanvas.flux_runtime.quant.packed import PackedLinear, weight_of
from fluxcanvas.flux_runtime.variants import VARIANTS
from fluxcanvas.flux_runtime.weights import build
from fluxcanvas.flux_runtime.weights.devices import choose_dtype
from fluxcanvas.flux_runtime.weights.files import TensorFile
from fluxcanvas.flux_runtime.weights.identity import choose_schedule

ALL_IN_ONE = {
    "transformer": "model.diffusion_model.",
    "clip": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
    "vae": "vae.",
}


def state(flux):
    modules = {"transformer": flux.transformer, "vae": flux.vae.model, "clip": flux.text.clip, "t5": flux.text.t5}
    return {
        f"{kind}/{name.removeprefix('text_model.')}": tensor
        for kind, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def same_models(a, b):
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def all_in_one(parts, tmp_path):
    path = tmp_path / "flux1-tiny-all.safetensors"
    tensors = {"text_encoders.clip_l.logit_scale": torch.ones(())}
    for kind, prefix in ALL_IN_ONE.items():
        tensors |= {prefix + n: t.read().clone() for n, t in TensorFile(parts[kind]).tensors().items()}
    save_file(tensors, path)
    return path


class TestLayouts:
    def test_every_layout_gives_the_same_model(self, load, parts, folder, all_in_one, tokenizers):
        separate = load_parts(**parts, tokenizers=tokenizers, device="cpu")
        same_models(separate, load(folder))
        same_models(separate, load(all_in_one))
        same_models(separate, load(parts["transformer"], search=[parts["transformer"].parents[1]]))

    def test_demo(self, demo):
        assert demo.report.source == "demo" and not any(p.unused or p.missing for p in demo.report.parts)
        assert demo.transformer.params.axes_dim == (4, 14, 14)
        assert demo.vae.params.groups == 1 and demo.vae.latent_format.scale == pytest.approx(0.92936, abs=1e-4)
        assert demo.schedule.dynamic is False and demo.schedule.shift == 1.0
        assert demo.text.clip.config.num_attention_heads == 4

    @pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
    def test_prefixes_of_bare_transformers(self, load, parts, prefix, rename):
        plain = load(parts["transformer"], search=[parts["transformer"].parents[1]])
        rename(parts["transformer"], lambda tensors: {prefix + n: t for n, t in tensors.items()})
        prefixed = load(parts["transformer"], search=[parts["transformer"].parents[1]])
        same_models(plain, prefixed)
        assert not prefixed.report.part("transformer").unused

    @pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
    def test_prefixes_of_vaes(self, parts, tokenizers, prefix, rename):
        rename(parts["vae"], lambda tensors: {prefix + n: t for n, t in tensors.items()})
        flux = load_parts(**parts, tokenizers=tokenizers, device="cpu")
        assert flux.report.part("vae").used == len(TensorFile(parts["vae"]).tensors())

    def test_bare_transformer_under_diffusers_names(self, load, parts, to_diffusers, tmp_path):
        plain = load(parts["transformer"], search=[tmp_path])
        (tmp_path / "other").mkdir()
        to_diffusers(parts["transformer"], tmp_path / "other" / "flux.safetensors")
        again = load(tmp_path / "other" / "flux.safetensors", search=[tmp_path])
        same_models(plain, again)
        assert again.report.part("transformer").layout == "diffusers"

    def test_parts_from_diffusers_folders(self, folder, parts, tokenizers):
        mixed = {
            kind: folder / name
            for kind, name in (("transformer", "transformer"), ("vae", "vae"), ("clip", "text_encoder"))
        }
        flux = load_parts(**mixed, t5=parts["t5"], tokenizers=tokenizers, device="cpu")
        same_models(flux, load_parts(**parts, tokenizers=tokenizers, device="cpu"))

    def test_shards_and_variants(self, load, folder, rename):
        expected = load(folder)
        whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = {n: t.read().clone() for n, t in TensorFile(whole).tensors().items()}
        whole.unlink()
        names = sorted(tensors)
        shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
        for shard, own in shards.items():
            save_file({n: tensors[n] for n in own}, whole.parent / shard)
        index = {"weight_map": {n: shard for shard, own in shards.items() for n in own}}
        (whole.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
        vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
        again = load(folder)
        same_models(expected, again)
        assert len(again.report.part("transformer").files) == 3

    def test_text_encoder_spellings(self, parts, tokenizers, rename):
        expected = load_parts(**parts, tokenizers=tokenizers, device="cpu")
        rename(
            parts["clip"],
            lambda tensors: (
                {n.removeprefix("text_model."): t for n, t in tensors.items()}
                | {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2)}
            ),
        )
        rename(
            parts["t5"],
            lambda tensors: (
                {n.replace("shared.", "encoder.embed_tokens."): t for n, t in tensors.items()}
                | {"decoder.final_layer_norm.weight": torch.ones(2)}
            ),
        )
        again = load_parts(**parts, tokenizers=tokenizers, device="cpu")
        same_models(expected, again)
        assert set(again.report.part("clip").spare) == {"logit_scale", "text_projection.weight"}
        assert not again.report.part("clip").unused and not again.report.part("t5").unused

    def test_without_text_encoders_or_vae(self, parts, folder):
        flux = load_parts(transformer=parts["transformer"], clip=None, t5=None, vae=None, device="cpu")
        assert flux.text is None and flux.vae is None and flux.model.latent.channels == 16
        index = {"_class_name": "FluxPipeline", "text_encoder": [None, None], "text_encoder_2": [None, None]}
        (folder / "model_index.json").write_text(json.dumps(index))
        assert load_flux(folder, device="cpu").text is None


class TestMemory:
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
    def test_bfl_files_are_not_copied(self, parts, tokenizers):
        """Every parameter is the mapped file itself: no byte of it is held twice."""
        flux = load_parts(**parts, tokenizers=tokenizers, device="cpu", dtype=torch.float32)
        spans = _mapped_spans()
        modules = {"transformer": flux.transformer, "vae": flux.vae.model, "clip": flux.text.clip, "t5": flux.text.t5}
        for kind, module in modules.items():
            own = spans[os.fspath(parts[kind])]
            for name, parameter in module.named_parameters():
                address = parameter.data_ptr()
                assert any(start <= address < end for start, end in own), f"{kind} {name} was copied"

    def test_t5_embedding_is_held_once(self, parts, tokenizers):
        t5 = load_parts(**parts, tokenizers=tokenizers, device="cpu").text.t5
        assert t5.encoder.embed_tokens.weight is t5.shared.weight

    def test_loading_never_changes_the_file(self, parts, tokenizers):
        before = parts["transformer"].read_bytes()
        flux = load_parts(**parts, tokenizers=tokenizers, device="cpu", dtype="fp32")
        with torch.no_grad():
            flux.transformer.img_in.weight.zero_()
        assert parts["transformer"].read_bytes() == before


def _mapped_spans() -> dict[str, list[tuple[int, int]]]:
    spans: dict[str, list[tuple[int, int]]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            spans.setdefault(fields[5], []).append((start, end))
    return spans


class TestTypes:
    def test_default_on_the_cpu_is_float32(self, load, parts, rename):
        rename(parts["transformer"], lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
        flux = load(parts["transformer"], search=[parts["transformer"].parents[1]])
        assert flux.model.dtype == flux.text.dtype == flux.vae.dtype == torch.float32

    def test_a_model_larger_than_memory_stays_bfloat16(self, caplog):
        cpu = torch.device("cpu")
        assert choose_dtype(None, cpu, 1000) == torch.float32
        assert choose_dtype(None, cpu, 10**13) == torch.bfloat16
        assert "do not fit" in caplog.text

    @pytest.mark.parametrize("name", ["bf16", "bfloat16", torch.bfloat16])
    def test_named_types(self, load, folder, name):
        flux = load(folder, dtype=name)
        assert {t.dtype for t in state(flux).values()} == {torch.bfloat16}

    def test_plain_fp8_stays_as_small_as_it_is(self, load, parts, rename):
        rename(parts["transformer"], lambda tensors: {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()})
        flux = load(parts["transformer"], dtype="bf16", search=[parts["transformer"].parents[1]])
        stored = TensorFile(parts["transformer"]).read("img_in.weight")
        assert weight_of(flux.transformer.img_in, torch.bfloat16).equal(stored.to(torch.bfloat16))
        assert flux.transformer.img_in.packs[0].nbytes < 1.1 * stored.nbytes
        assert flux.transformer.img_in.bias.dtype == flux.model.dtype == torch.bfloat16
        assert "F8_E4M3" in flux.report.part("transformer").dtypes

    def test_fp16_keeps_the_matrices_of_t5_that_overflow(self, load, folder):
        flux = load(folder, dtype="fp16")
        wide = {name for name, t in flux.text.t5.named_parameters() if t.dtype == torch.float32}
        assert wide == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}
        assert torch.isfinite(flux.text.encode("a cat").tokens).all()

    def test_fp16_keeps_them_from_an_fp8_file_too(self, parts, rename, tokenizers):
        linear = (".q.weight", ".wi_0.weight", ".wo.weight")
        rename(parts["t5"], lambda t: {n: v.to(torch.float8_e4m3fn) if n.endswith(linear) else v for n, v in t.items()})
        flux = load_parts(**parts, device="cpu", dtype="fp16", tokenizers=tokenizers)
        feed_forward = flux.text.t5.encoder.block[0].layer[1].DenseReluDense
        assert feed_forward.wo.weight.dtype == torch.float32 and isinstance(feed_forward.wi_0, PackedLinear)
        assert torch.isfinite(flux.text.encode("a cat").tokens).all()

    @pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"dtype": torch.float8_e4m3fn}, {"device": "toaster"}])
    def test_absurd_choices(self, load, folder, wrong):
        with pytest.raises(FluxError, match="use"):
            load(folder, **wrong)


class TestVariants:
    @pytest.mark.parametrize(
        ("sizes", "name", "expected"),
        [
            ({}, "flux1-dev", "dev"),
            ({}, "flux1-krea-dev_fp8", "krea"),
            ({}, "flux1-dev-kontext_fp8_scaled", "kontext"),
            ({"guidance_embed": False}, "anything", "schnell"),
            ({"in_channels": 384}, "anything", "fill"),
            ({"in_channels": 128}, "flux1-depth-dev", "depth"),
            ({"in_channels": 128}, "anything", "canny"),
        ],
    )
    def test_recognised(self, weights, tmp_path, sizes, name, expected):
        path = tmp_path / f"{name}.safetensors"
        save_file(weights("transformer", **sizes), path)
        flux = load_parts(transformer=path, clip=None, t5=None, vae=None, device="cpu")
        assert flux.model.variant.name == flux.report.variant == expected
        assert flux.schedule.dynamic == (expected != "schnell")

    def test_named_variant_must_fit(self, parts):
        bare = {"transformer": parts["transformer"], "clip": None, "t5": None, "vae": None, "device": "cpu"}
        assert load_parts(**bare, variant="kontext").model.variant.name == "kontext"
        with pytest.raises(FluxError, match=r"is not FLUX\.1 fill"):
            load_parts(**bare, variant="fill")
        with pytest.raises(FluxError, match="schnell, dev"):
            load_parts(**bare, variant="sdxl")

    def test_schedule(self):
        assert choose_schedule(VARIANTS["schnell"], None).shift == 1.0
        for nonsense in (float("nan"), -1, 10**400, "3", None):
            config = {
                "use_dynamic_shifting": True, "base_shift": 0.4, "max_image_seq_len": 8192, "shift": nonsense
            }  # fmt: skip
            schedule = choose_schedule(VARIANTS["dev"], config)
            assert (schedule.base_shift, schedule.max_tokens, schedule.shift) == (0.4, 8192, 3.0) and schedule.dynamic

    def test_a_schedule_that_cannot_be_is_told_before_anything_is_read(self, folder, load, monkeypatch):
        file = folder / "scheduler" / "scheduler_config.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"base_image_seq_len": 4096, "max_image_seq_len": 4096}))
        monkeypatch.setattr(build, "fill", lambda *_: pytest.fail("read something"))
        with pytest.raises(FluxError, match="are both 4096"):
            load(folder)


class TestReport:
    def test_unused_tensors_are_told_once(self, load, all_in_one, caplog, rename):
        rename(all_in_one, lambda t: t | {"model.diffusion_model.extra": torch.ones(1), "stray": torch.ones(1)})
        with caplog.at_level(logging.WARNING, logger="fluxcanvas"):
            flux = load(all_in_one)
        warnings = [r.getMessage() for r in caplog.records if "no part of FLUX.1 uses" in r.getMessage()]
        assert len(warnings) == 1 and "extra" in warnings[0] and "stray" in warnings[0]
        assert flux.report.part("transformer").unused == ("model.diffusion_model.extra",)
        assert "text_encoders.clip_l.logit_scale" in flux.report.part("clip").spare

    def test_counts(self, load, folder):
        part = load(folder).report.part("transformer")
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = TensorFile(file).tensors()
        assert part.used == len(tensors) and part.bytes == sum(
            e.nbytes for e in TensorFile(file).header.entries.values()
        )
        assert part.parameters == sum(t.read().numel() for t in tensors.values())
        assert "loaded as float32 on cpu" in load(folder).report.text()

    def test_progress_rises_to_one(self, load, folder):
        seen = []
        load(folder, progress=lambda what, part: seen.append((what, part)))
        fractions = [part for _, part in seen]
        assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == pytest.approx(1)
        assert {"loading the transformer", "loading the VAE"} <= {what for what, _ in seen}

    def test_an_interruption_passes(self, load, folder):
        class Stop(Exception):
            pass

        def stop(what, part):
            raise Stop

        with pytest.raises(Stop):
            load(folder, progress=stop)
