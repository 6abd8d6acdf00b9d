"""Saving: what was loaded or quantised comes back to the same bytes, or nothing is written and the error says why."""

import errno
import json
from functools import partial

import pytest
import torch
from safetensors import safe_open

from fluxcanvas.flux_runtime import FluxError, inspect, load_parts
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.quant import write
from fluxcanvas.flux_runtime.quant.fp8 import Fp8
from fluxcanvas.flux_runtime.quant.gguf import Gguf
from fluxcanvas.flux_runtime.quant.packed import PackedLinear
from fluxcanvas.flux_runtime.quant.save import HEADER, MARKER, packings_from, save_module
from fluxcanvas.flux_runtime.quant.schemes import SCHEMES
from fluxcanvas.flux_runtime.quant.swap import quantise
from fluxcanvas.flux_runtime.variants import FluxParams
from fluxcanvas.flux_runtime.weights import build
from fluxcanvas.flux_runtime.weights.contents import sort_out
from fluxcanvas.flux_runtime.weights.files import TensorFile

NAMES = [name for name in SCHEMES if name != "fp8-matmul"]  # which is stored as fp8 is
SIZES = dict(vec_in_dim=32, context_in_dim=48, hidden_size=64, num_heads=2, mlp_hidden=128, depth=1, depth_single=1)
QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return FluxTransformer(FluxParams(**SIZES, axes_dim=(4, 14, 14))).bfloat16().eval().requires_grad_(False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flux1-tiny.safetensors"


def gguf(rows, columns=64, seed=0):
    """A Q8_0 weight of random integers; every block's scale is 1/64."""
    blocks = torch.randint(-128, 128, (rows, columns // 32, 34), generator=torch.Generator().manual_seed(seed))
    data = blocks.to(torch.int8).view(torch.uint8)
    data[..., :2] = torch.tensor([1 / 64]).half().view(torch.uint8)
    return Gguf(data.view(rows, -1), "Q8_0", (rows, columns))


def read(path, dtype=torch.bfloat16):
    """The transformer of a file, through the steps of the loader."""
    file = TensorFile(path)
    contents = sort_out(packings_from(file.tensors(), file.header.metadata), (str(path),))
    component = contents.components["transformer"]
    assert not contents.leftover and not component.unknown
    module = build.skeleton(component)
    build.refuse_unfit(component, build.compare(component, module))
    return build.fill(component, module, torch.device("cpu"), dtype)


class TestThereAndBack:
    def test_plain(self, transformer, path, same):
        size = save_module(transformer, path)
        assert path.stat().st_size == size
        same(read(path), transformer)

    @pytest.mark.parametrize("name", NAMES)
    def test_every_scheme(self, name, transformer, path, same):
        made, _ = quantise(transformer, name)
        save_module(made, path)
        same(read(path), made)
        titles = {"fp8": "scaled fp8", "bnb-int8": "bnb-8bit", "bnb-nf4": "bnb-4bit nf4", "bnb-fp4": "bnb-4bit fp4"}
        title = titles.get(name, name.replace("-", " "))
        assert inspect(path).part("transformer").note == f"13 tensors as {title}"

    def test_again_after_reading(self, transformer, path, tmp_path):
        made, _ = quantise(transformer, "bnb-nf4")
        save_module(made, path)
        save_module(read(path), tmp_path / "again.safetensors")
        assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()

    def test_gguf_and_layers_of_several_pieces(self, transformer, path, same):
        block = transformer.double_blocks[0]
        block.img_attn.qkv = PackedLinear([gguf(64, seed=i) for i in range(3)], block.img_attn.qkv.bias)
        ones = [torch.ones(rows, 64).to(torch.float8_e4m3fn) for rows in (100, 92)]
        halves = [Fp8(weight, torch.tensor([[1 / len(weight)]])) for weight in ones]
        block.txt_attn.qkv = PackedLinear(halves, block.txt_attn.qkv.bias)
        block.txt_attn.proj = PackedLinear([gguf(64)], block.txt_attn.proj.bias)
        save_module(transformer, path)
        same(read(path), transformer)
        assert f"{QKV}.packs.2.weight" in TensorFile(path).header.entries

    def test_through_the_loader(self, transformer, path, same):
        made, _ = quantise(transformer, "fp8")
        save_module(made, path)
        same(load_parts(transformer=path, clip=None, t5=None, vae=None, dtype="bfloat16").transformer, made)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_text_encoder(self, name, parts, path, tokenizers, same):
        load = partial(load_parts, tokenizers=tokenizers, device="cpu", dtype="float32")
        made, _ = quantise(load(**parts).text.t5, name)
        save_module(made, path)
        assert "encoder.embed_tokens.weight" not in TensorFile(path).header.entries
        flux = load(**{**parts, "t5": path})
        same(flux.text.t5, made)
        assert not flux.report.part("t5").unused
        ids = torch.tensor([[5, 6, 7, 1]])
        assert torch.equal(flux.text.t5(ids).last_hidden_state, made(ids).last_hidden_state)

    def test_over_the_file_it_is_mapped_from(self, transformer, path, same):
        save_module(transformer, path)
        loaded = read(path)
        save_module(loaded, path, overwrite=True)
        same(loaded, transformer)
        same(read(path), transformer)


class TestForOtherPrograms:
    def test_the_library_reads_the_file(self, transformer, path):
        save_module(transformer, path, metadata={"title": "tiny"})
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "title": "tiny"}
            assert set(file.keys()) == set(transformer.state_dict())
            assert torch.equal(file.get_tensor("img_in.weight"), transformer.img_in.weight)

    def test_tensors_lie_at_multiples_of_their_element_size(self, transformer, path):
        made, _ = quantise(transformer, "fp8")
        save_module(made, path)
        wide = {"F32": 4, "BF16": 2}
        assert all(entry.start % wide.get(entry.dtype, 1) == 0 for entry in TensorFile(path).header.entries.values())

    def test_fp8_has_comfyuis_names(self, transformer, path):
        made, _ = quantise(transformer, "fp8")
        save_module(made, path)
        entries = TensorFile(path).header.entries
        assert entries[f"{QKV}.weight"].dtype == "F8_E4M3" and entries[f"{QKV}.scale_weight"].shape == ()
        assert (entries[MARKER].dtype, entries[MARKER].shape) == ("F8_E4M3", (2,))

    def test_fp8_that_may_be_multiplied_says_so(self, transformer, path):
        linear = transformer.single_blocks[0].linear2
        pack = Fp8.quantise(linear.weight, matmul=True)
        transformer.single_blocks[0].linear2 = PackedLinear([pack], linear.bias)
        save_module(transformer, path)
        assert TensorFile(path).header.entries[MARKER].shape == (0,)

    def test_fp8_without_scales_has_no_marker(self, transformer, path):
        linear = transformer.single_blocks[0].linear2
        transformer.single_blocks[0].linear2 = PackedLinear([Fp8(linear.weight.to(torch.float8_e5m2))], linear.bias)
        save_module(transformer, path)
        assert MARKER not in TensorFile(path).header.entries

    @pytest.mark.parametrize("name", ["fp8", "bnb-int8", "bnb-nf4"])
    def test_files_are_read_without_our_header_too(self, name, transformer, path, same):
        made, _ = quantise(transformer, name)
        save_module(made, path)
        component = sort_out(TensorFile(path).tensors(), (str(path),)).components["transformer"]
        again = build.fill(component, build.skeleton(component), torch.device("cpu"), torch.bfloat16)
        same(again, made)


class TestRefusals:
    def test_a_file_that_exists(self, transformer, path):
        path.write_text("precious")
        with pytest.raises(FluxError, match="exists; choose another name"):
            save_module(transformer, path)
        assert path.read_text() == "precious"

    @pytest.mark.parametrize("name", ["missing/model.safetensors", "model.bin", "model"])
    def test_names(self, name, transformer, tmp_path):
        with pytest.raises(FluxError, match=r"create it|must end in \.safetensors"):
            save_module(transformer, tmp_path / name)

    def test_a_folder_in_its_place(self, transformer, path):
        path.mkdir()
        with pytest.raises(FluxError, match="exists"):
            save_module(transformer, path, overwrite=True)

    def test_too_little_room(self, transformer, path, monkeypatch):
        monkeypatch.setattr(write.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(FluxError, match=r"has 1 kB left and .*safetensors takes .* kB; make room"):
            save_module(transformer, path)
        assert not list(path.parent.iterdir())

    @pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_a_failure_halfway_leaves_what_was_there(self, failure, transformer, path, monkeypatch):
        path.write_text("precious")

        def fail(fraction):
            if fraction > 0.5:
                raise failure

        expected = FluxError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            save_module(transformer, path, overwrite=True, progress=fail)
        assert [p.name for p in path.parent.iterdir()] == [path.name] and path.read_text() == "precious"

    def test_progress(self, transformer, path):
        told = []
        save_module(transformer, path, progress=told.append)
        assert told == sorted(told) and told[-1] == 1


class TestLyingHeaders:
    @pytest.fixture
    def saved(self, transformer, path):
        linear = transformer.single_blocks[0].linear2
        transformer.single_blocks[0].linear2 = PackedLinear([gguf(64, 192)], linear.bias)
        save_module(transformer, path)
        file = TensorFile(path)
        return file.tensors(), json.loads(file.header.metadata[HEADER])

    def test_files_without_the_header_pass_untouched(self, saved):
        tensors, _ = saved
        assert packings_from(tensors, {"format": "pt"}) == tensors

    @pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": 1}', '{"a": []}', '{"a": [3]}', "null"])
    def test_not_a_table(self, saved, text):
        with pytest.raises(FluxError, match="list of packed layers"):
            packings_from(saved[0], {HEADER: text})

    @pytest.mark.parametrize(
        "change",
        [
            {"scheme": "other"}, {"scheme": 4}, {"shape": [64]}, {"shape": [64, -1]}, {"shape": [64, "192"]},
            {"shape": [64, True]}, {"shape": [2**40, 2**40]}, {"facts": []}, {"facts": {"type": []}}, {"tensors": []},
            {"tensors": "weight"}, {"tensors": ["nothing"]}, {"tensors": ["weight", "weight"]},
            {"tensors": ["packs.1"]}, {"tensors": [None]},
        ],
    )  # fmt: skip
    def test_pieces_that_make_no_sense(self, saved, change):
        tensors, table = saved
        table["single_blocks.0.linear2"][0] |= change
        with pytest.raises(FluxError, match="list of packed layers"):
            packings_from(tensors, {HEADER: json.dumps(table)})

    @pytest.mark.parametrize("change", [{"shape": [64, 224]}, {"scheme": "fp8"}, {"scheme": "bnb-4bit"}, {"facts": {}}])
    def test_descriptions_that_do_not_fit_the_bytes(self, saved, change):
        tensors, table = saved
        table["single_blocks.0.linear2"][0] |= change
        found = packings_from(tensors, {HEADER: json.dumps(table)})
        with pytest.raises(FluxError):
            found["single_blocks.0.linear2.weight"].read()
