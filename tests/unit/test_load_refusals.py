"""What cannot be loaded says which file, what is amiss and what to do; nothing is misread or built from lies."""

from math import nan

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError, load_parts
from fluxcanvas.flux_runtime.weights.files import TensorFile


class TestRefusals:
    def refused(self, load, source, *words, **options):
        with pytest.raises(FluxError) as error:
            load(source, **options)
        assert all(word in str(error.value) for word in words), str(error.value)

    def test_missing_parts_are_named(self, load, parts):
        self.refused(load, parts["transformer"], "T5 text encoder", "VAE", "LoadFluxParts")
        self.refused(load, parts["transformer"], "missing: VAE", search=[parts["t5"].parent])

    def test_parts_of_another_size_are_not_taken(self, load, parts, weights):
        save_file(weights("t5", width=40), parts["t5"])
        self.refused(load, parts["transformer"], "missing: T5", search=[parts["transformer"].parents[1]])
        with pytest.raises(FluxError, match="does not go with the transformer"):
            load_parts(**parts, device="cpu")

    def test_plain_weights_are_preferred(self, load, parts):
        """An fp8 file that comes first by name is left alone."""
        tensors = {n: t.read().to(torch.float8_e4m3fn) for n, t in TensorFile(parts["t5"]).tensors().items()}
        save_file(tensors, parts["t5"].with_name("a_fp8.safetensors"))
        flux = load(parts["transformer"], search=[parts["transformer"].parents[1]])
        assert flux.report.part("t5").files == (str(parts["t5"]),)

    def test_missing_tensors_with_count_and_names(self, load, folder, rename):
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        rename(
            file,
            lambda t: {
                n: v for n, v in t.items() if n not in ("transformer_blocks.1.attn.to_k.weight", "proj_out.bias")
            },
        )
        self.refused(load, folder, str(file), "2: ", "proj_out.bias", "transformer_blocks.1.attn.to_k.weight")

    def test_a_tensor_that_sizes_are_read_from_has_the_name_of_the_file_too(self, load, folder, rename):
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        rename(file, lambda tensors: {n: t for n, t in tensors.items() if n != "x_embedder.weight"})
        self.refused(load, folder, str(file), "the transformer lacks the tensor 'x_embedder.weight'")

    def test_missing_block(self, load, parts, rename):
        rename(parts["transformer"], lambda t: {n: v for n, v in t.items() if not n.startswith("single_blocks.1.")})
        self.refused(load, parts["transformer"], "single_blocks.1", search=[parts["transformer"].parents[1]])

    def test_absurd_block_number_builds_nothing(self, load, parts, rename):
        rename(parts["transformer"], lambda t: t | {"double_blocks.999999.img_mod.lin.bias": torch.zeros(1)})
        self.refused(load, parts["transformer"], "double_blocks.2", search=[parts["transformer"].parents[1]])

    @pytest.mark.parametrize("kind", ["transformer", "clip", "t5", "vae"])
    def test_any_lost_tensor_is_named(self, parts, kind):
        """Whichever tensor a file lacks, the error names the file and what is missing."""
        names = list(TensorFile(parts[kind]).tensors())
        for name in names[:: max(len(names) // 6, 1)]:
            tensors = {n: t.read().clone() for n, t in TensorFile(parts[kind]).tensors().items()}
            broken = parts[kind].with_name("broken.safetensors")
            save_file({n: t for n, t in tensors.items() if n != name}, broken)
            with pytest.raises(FluxError) as error:
                load_parts(**{**parts, kind: broken}, device="cpu")
            assert "broken.safetensors" in str(error.value), name

    @pytest.mark.parametrize(
        "tensors",
        [
            {"img_in.weight": (0, 64), "double_blocks.0.img_attn.qkv.weight": (1, 1)},
            {"img_in.weight": (4,), "double_blocks.0.img_attn.qkv.weight": (1,)},
            {"img_in.weight": (2**40, 0), "double_blocks.0.img_attn.qkv.weight": ()},
            {"single_transformer_blocks.0.attn.to_q.weight": (3, 3), "norm_out.linear.weight": (3, 1)},
            {
                f"single_transformer_blocks.0.{n}.weight": ()
                for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            },
        ],
        ids=["no width", "one dimension", "vast and empty", "odd halves", "scalars"],
    )
    def test_absurd_shapes(self, load, tmp_path, tensors):
        file = tmp_path / "absurd.safetensors"
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
        self.refused(load, file, "absurd.safetensors")

    def test_head_size_that_no_rope_fits(self, parts, rename):
        rename(parts["transformer"], lambda t: {n: v[:4].clone() if "_norm.scale" in n else v for n, v in t.items()})
        with pytest.raises(FluxError, match=r"flux1-tiny.*head size of 4"):
            load_parts(**parts, device="cpu")

    def test_wrong_shape(self, parts, rename):
        rename(parts["transformer"], lambda t: t | {"single_blocks.1.linear2.bias": torch.zeros(3)})
        with pytest.raises(FluxError, match=r"single_blocks.1.linear2.bias \[3\] instead of \[64\]"):
            load_parts(**parts, device="cpu")

    @pytest.mark.parametrize(
        ("extra", "words"),
        [
            ({"img_in.scale_weight": torch.ones(())}, "img_in.weight has a scale .* but is"),
            ({"img_in.comfy_quant": torch.ones(3, dtype=torch.uint8)}, "img_in.comfy_quant is not JSON"),
            ({"img_in.weight.absmax": torch.ones(3)}, "img_in.weight is packed by bitsandbytes but its quant_state"),
            ({"img_in.SCB": torch.ones(3)}, r"img_in.SCB \[3\] does not fit"),
            ({"img_in.weight_scale_2": torch.ones(3)}, "stored as nvfp4, which is not read here"),
            ({"img_in.weight": torch.ones(64, 64, dtype=torch.int8)}, "stored as packed I8 numbers"),
        ],
    )
    def test_packed_weights_are_not_misread(self, parts, extra, words, rename):
        rename(parts["transformer"], lambda t: {f"diffusion_model.{n}": v for n, v in (t | extra).items()})
        with pytest.raises(FluxError, match=words):
            load_parts(**parts, device="cpu")

    def test_a_weight_that_cannot_be_unpacked_is_named_with_its_file(self, parts, rename):
        """What only the reader of a packing sees, after names and sizes agree."""
        packed = {"img_in.weight": torch.ones(64, 64).to(torch.float8_e4m3fn), "img_in.scale_weight": torch.tensor(nan)}
        rename(parts["transformer"], lambda tensors: tensors | packed)
        with pytest.raises(FluxError) as error:
            load_parts(transformer=parts["transformer"], clip=None, t5=None, vae=None, device="cpu")
        assert str(error.value) == (
            f"{parts['transformer']}: img_in.weight: scale_weight holds NaN or infinity; download the file again"
        )

    def test_the_wrong_file_for_a_part(self, parts):
        with pytest.raises(FluxError, match=r"holds no VAE: it holds a CLIP text encoder"):
            load_parts(**{**parts, "vae": parts["clip"]}, device="cpu")
        with pytest.raises(FluxError, match="does not exist"):
            load_parts(**{**parts, "vae": parts["vae"].with_name("none.safetensors")}, device="cpu")
        with pytest.raises(FluxError, match="both, or for neither"):
            load_parts(**{**parts, "t5": None}, device="cpu")

    def test_things_that_are_no_model(self, load, parts, tmp_path):
        save_file(
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 4)}, tmp_path / "l.safetensors"
        )
        self.refused(load, tmp_path / "l.safetensors", "is a LoRA")
        save_file({"some.weight": torch.ones(4, 4)}, tmp_path / "s.safetensors")
        self.refused(load, tmp_path / "s.safetensors", "of no kind known", "some.weight")
        self.refused(load, parts["vae"], "no FLUX.1 model", "a VAE")
        (tmp_path / "empty").mkdir()
        self.refused(load, tmp_path / "empty", "is no model")
        (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
        (tmp_path / "empty" / "transformer").mkdir()
        self.refused(load, tmp_path / "empty", "StableDiffusionXLPipeline")
        self.refused(load, tmp_path / "nowhere" / "x.safetensors", "no file or folder")
        for text in ("", " ", "\0", "no such thing", "../x"):
            self.refused(load, text, "Hugging Face repository (owner/name)")
