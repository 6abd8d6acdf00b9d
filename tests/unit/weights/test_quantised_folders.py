"""diffusers folders with a quantization_config, saved by diffusers, transformers and the libraries behind them.

Each draws what the same folder draws with the numbers that the library itself unpacks.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import inspect
from fluxcanvas.flux_runtime.quant.bnb import Bnb8
from fluxcanvas.flux_runtime.quant.packed import PackedLinear
from fluxcanvas.flux_runtime.quant.swap import quantise

DTYPE = torch.float32
NAMES = {"transformer": "transformer", "t5": "text_encoder_2"}


@pytest.fixture(scope="module", autouse=True)
def _diffusers_packs_on_a_cpu():
    """diffusers refuses to use bitsandbytes without a GPU, though the library itself works without one."""
    pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
            quantizer = getattr(bnb_quantizer, name)
            patch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
            patch.setattr(quantizer, "update_device_map", lambda *_: {"": torch.device("cpu")})
        yield


@pytest.fixture(scope="module", autouse=True)
def _quanto_unpacks_without_compiling():
    """Its own unpacking of 4 bits compiles C++ for a minute when it is first used; this is what that does."""
    packed = pytest.importorskip("optimum.quanto.tensor.packed").PackedTensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "unpack", lambda t: torch.cat([t._data & 15, t._data >> 4])[: t.shape[0]])
        yield


def config(scheme, library):
    """The quantization_config of a scheme for diffusers or for transformers, which have one each."""
    kind, _, bits = scheme.partition("-")
    if kind == "bnb":
        if bits == "int8":
            return library.BitsAndBytesConfig(load_in_8bit=True)
        return library.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=bits, bnb_4bit_compute_dtype=DTYPE,
            bnb_4bit_use_double_quant=bits == "nf4",
        )  # fmt: skip
    if kind == "quanto":
        return library.QuantoConfig(weights_dtype=bits)
    ao = pytest.importorskip("torchao.quantization")
    return library.TorchAoConfig({"int8": ao.Int8WeightOnlyConfig, "float8": ao.Float8WeightOnlyConfig}[bits]())


def saved(kind, scheme, folder, source):
    """Quantise a part as its library does, and save it in its place; the library's own model."""
    import diffusers
    import transformers

    if (kind, scheme.partition("-")[0]) == ("t5", "quanto"):
        return saved_by_quanto(scheme, folder)
    path = folder / NAMES[kind]
    shutil.rmtree(path)
    if kind == "transformer":
        wish = config(scheme, diffusers)
        model = diffusers.FluxTransformer2DModel.from_pretrained(
            source / NAMES[kind], quantization_config=wish, torch_dtype=DTYPE
        )
    else:
        wish = config(scheme, transformers)
        model = transformers.T5EncoderModel.from_pretrained(source / NAMES[kind], quantization_config=wish, dtype=DTYPE)
    model.save_pretrained(path)
    assert "quantization_config" in json.loads((path / "config.json").read_text())
    return model


def saved_by_quanto(scheme, folder):
    """transformers does not save T5 with these; the library's own state dict is what people have."""
    import transformers

    quanto = pytest.importorskip("optimum.quanto")
    model = transformers.T5EncoderModel.from_pretrained(folder / NAMES["t5"])
    bits = scheme.removeprefix("quanto-").replace("float8", "float8_e4m3fn")
    quanto.quantize(model, weights=quanto.qtypes[f"q{bits}"])
    quanto.freeze(model)
    replace(folder, "t5", model.state_dict())
    return model


def unpacked(model):
    """A model's numbers as its library unpacks them."""
    bnb = pytest.importorskip("bitsandbytes")
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            found[name] = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        elif isinstance(parameter, bnb.nn.Int8Params):
            scale = parameter.SCB if parameter.SCB is not None else model.get_submodule(name[:-7]).state.SCB
            found[name] = parameter.data.float() * scale[:, None] / 127
        elif type(parameter.data) is torch.Tensor:
            found[name] = parameter.data
        else:
            found[name] = parameter.dequantize()
    return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}


def replace(folder, kind, tensors):
    """A part's weights in a folder that links to another's."""
    file = next((folder / NAMES[kind]).glob("*.safetensors"))
    file.unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items() if "embed_tokens" not in name}, file)


SCHEMES = [
    "bnb-nf4",
    "bnb-fp4",
    "bnb-int8",
    "quanto-float8",
    "quanto-int8",
    "quanto-int4",
    "torchao-int8",
    "torchao-float8",
]
FOLDERS = [*[("transformer", s) for s in SCHEMES], *[("t5", s) for s in SCHEMES]]


@pytest.mark.parametrize(("kind", "scheme"), FOLDERS)
def test_a_folder_draws_what_its_unpacked_weights_draw(
    kind, scheme, copy_of, plain_folder, plain_drawing, load, draw, apart, schemes, all_used
):
    packed, plain = copy_of("packed"), copy_of("plain")
    library = saved(kind, scheme, packed, plain_folder)
    replace(plain, kind, unpacked(library))
    flux, expected = load(packed, dtype="fp32"), load(plain, dtype="fp32")
    assert schemes(flux.transformer if kind == "transformer" else flux.text.t5) == {scheme}
    all_used(flux.report)
    assert scheme.rpartition("-")[2] in inspect(packed / NAMES[kind]).part(kind).note.lower() or scheme == "bnb-int8"
    drawing = draw(flux)
    assert apart(drawing, draw(expected)) < 1e-5
    assert apart(drawing, plain_drawing) > 1e-4


class TestInt8InEveryLayer:
    """LLM.int8 as diffusers has it, which leaves no layer plain: `keep=()`."""

    TOKENS, TEXT = 24, 8

    @pytest.fixture
    def theirs(self, copy_of, plain_folder):
        return saved("transformer", "bnb-int8", copy_of("packed"), plain_folder)

    @pytest.fixture
    def plain(self, plain_folder, load):
        return load(plain_folder, dtype="fp32").transformer

    @pytest.fixture
    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        shapes = {"img": (self.TOKENS, 64), "txt": (self.TEXT, 256), "pooled": (32,)}
        ids = torch.zeros(self.TEXT + self.TOKENS, 3)
        ids[self.TEXT :, 1:] = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0))
        random = {name: torch.randn(1, *shape, generator=generator) for name, shape in shapes.items()}
        return random | {"ids": ids, "sigma": torch.tensor([0.7]), "guidance": torch.tensor([3.5])}

    def by_diffusers(self, model, inputs):
        ids = {"txt_ids": inputs["ids"][: self.TEXT], "img_ids": inputs["ids"][self.TEXT :]}
        with torch.no_grad():
            return model(
                inputs["img"], inputs["txt"], inputs["pooled"], inputs["sigma"], guidance=inputs["guidance"], **ids
            ).sample

    def by_us(self, model, inputs):
        context = model.prepare(inputs["txt"], inputs["ids"])
        modulation = model.modulate(model.embed(inputs["sigma"], inputs["guidance"], inputs["pooled"]))
        return model(inputs["img"], context, modulation)

    def test_the_weights_are_those_of_diffusers(self, theirs, plain):
        ours = quantise(plain, "bnb-int8", keep=())[0]
        block, other = ours.double_blocks[0].img_attn.qkv.packs[0], theirs.transformer_blocks[0].attn
        names = ("to_q", "to_k", "to_v")
        assert torch.equal(block.weight, torch.cat([getattr(other, name).weight.data for name in names]))
        assert type(ours.final_layer.linear) is type(ours.double_blocks[0].img_mod.lin) is PackedLinear

    def test_its_product_gives_the_velocity_of_diffusers(self, theirs, plain, inputs, apart, monkeypatch):
        ours = quantise(plain, "bnb-int8", keep=())[0]
        monkeypatch.setattr(Bnb8, "linear", Bnb8.multiply)
        assert apart(self.by_us(ours, inputs), self.by_diffusers(theirs, inputs)) < 1e-5

    def test_on_a_cpu_inputs_are_not_rounded_which_is_nearer_to_the_truth(self, theirs, plain, inputs, apart):
        ours = quantise(plain, "bnb-int8", keep=())[0]
        truth = self.by_us(plain, inputs)
        assert apart(self.by_us(ours, inputs), truth) < apart(self.by_diffusers(theirs, inputs), truth)
