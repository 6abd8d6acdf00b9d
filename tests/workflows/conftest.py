"""A runner with stand-ins for the published models: small ones of the demo's family, in the published layouts.

Their new weights are random and small, so that a picture still shows its prompt and changes with its conditions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxcanvas.flux_runtime import load_flux
from fluxcanvas.flux_runtime.integrity import IntegrityChecker
from fluxcanvas.flux_runtime.model.adapters import IPAdapterNet, IPAdapterParams, ReduxEncoder
from fluxcanvas.flux_runtime.variants import CONTROL_CHANNELS, FILL_CHANNELS
from fluxcanvas.flux_runtime.weights.files import open_tensors
from fluxcanvas.flux_runtime.weights.gguf_names import T5
from fluxcanvas.flux_runtime.weights.sources import DEMO
from fluxcanvas.web.host.convert import convert
from fluxcanvas.web.host.examples import WORKFLOWS, provide_inputs
from fluxcanvas.web.host.folders import Folders
from fluxcanvas.web.host.node_info import object_info
from fluxcanvas.web.host.run import Prepared, Runner, RunResult
from fluxcanvas.web.host.workflow_file import read_workflow, recognise

SIDE = 128  # of every picture here, in pixels
STEPS = 8
MODELS = {
    "black-forest-labs/FLUX.1-dev": 64,
    "black-forest-labs/FLUX.1-Kontext-dev": 64,
    "black-forest-labs/FLUX.1-Fill-dev": FILL_CHANNELS,
    "black-forest-labs/FLUX.1-Canny-dev": CONTROL_CHANNELS,
    "black-forest-labs/FLUX.1-Depth-dev": CONTROL_CHANNELS,
}
SCHNELL = "black-forest-labs/FLUX.1-schnell"
CONTROLNETS = {  # and how many modes a union net has
    "InstantX/FLUX.1-dev-Controlnet-Canny": None,
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro": 10,
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0": None,
}
DEPTH = "LiheYoung/depth-anything-large-hf"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONTROL_LORAS = ("black-forest-labs/FLUX.1-Canny-dev-lora", "black-forest-labs/FLUX.1-Depth-dev-lora")
TURBO = "ByteDance/Hyper-SD/Hyper-FLUX.1-dev-8steps-lora.safetensors"
XLABS_LORAS = (
    "XLabs-AI/flux-RealismLora",
    "XLabs-AI/flux-lora-collection/art_lora.safetensors",
    "XLabs-AI/flux-lora-collection/scenery_lora.safetensors",
)
FP8, GGUF, GGUF_T5 = "flux1-dev-fp8.safetensors", "flux1-dev-Q4_K_S.gguf", "t5-v1_1-xxl-encoder-Q5_K_M.gguf"


def lora_file(name: str) -> str:
    """Where the stand-in of a published LoRA lies, below loras."""
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


# What a chosen model is called in the stand-ins' folders; those loaded as whole folders have their own names.
RENAMED = {
    **{name: f"{name}/{WEIGHTS}" for name in CONTROLNETS},
    **{name: lora_file(name) for name in (*CONTROL_LORAS, *XLABS_LORAS)},
    "black-forest-labs/FLUX.1-Redux-dev": "redux.safetensors",
    "XLabs-AI/flux-ip-adapter": "ip_adapter.safetensors",
    "clip_l.safetensors": "clip/model.safetensors",
    "t5xxl_fp16.safetensors": "t5/model.safetensors",
    "ae.safetensors": f"vae/{WEIGHTS}",
}
CHOICES = ("source", "lora", "lora_1", "lora_2", "clip", "t5", "vae")  # the inputs that name models
LOADERS = ("FluxCanvas_LoadFlux", "FluxCanvas_LoadFluxParts")
# The settings that make a published workflow small, by node: size and steps of the demo, and its guidance.
SMALL = {
    "FluxCanvas_EmptyCanvas": {"width": SIDE, "height": SIDE},
    "FluxCanvas_EncodeImage": {"width": SIDE, "height": SIDE},
    "FluxCanvas_KontextCanvas": {"size": "exact", "width": SIDE, "height": SIDE},
    "FluxCanvas_KontextCondition": {"size": "canvas"},
    "FluxCanvas_PadForOutpaint": {"left": 32, "right": 32, "feather": 8},
    "FluxCanvas_EncodePrompt": {"max_tokens": 0},
    "FluxCanvas_Sample": {"steps": STEPS, "guidance": 3.5},
}


@dataclass
class Bench:
    """A runner and the definitions of its nodes."""

    runner: Runner
    definitions: dict
    _drawn: dict = field(default_factory=dict)

    def run(self, name: str, settings: Sequence[str] = ()) -> RunResult:
        """Run a shipped workflow as it is, but for these settings and the stand-ins."""
        return self.runner.execute(self.prepared(name, settings))

    def prepared(self, name: str, settings: Sequence[str] = ()) -> Prepared:
        source = read_workflow(WORKFLOWS / f"{name}.json")
        prompt = convert(source.workflow, self.definitions)
        return self.runner.prepare(source, [*stand_in(prompt), *settings])

    def pictures(self, name: str, *settings: str) -> dict[str, list[Image.Image]]:
        """What a workflow saves, by the prefix of the names; the same run is made once."""
        key = name, *settings
        if key not in self._drawn:
            self._drawn[key] = saved_pictures(self.run(name, settings).pictures)
        return self._drawn[key]

    def rewired(self, name: str, swap: tuple[str, str]) -> Image.Image:
        """What a workflow draws with two nodes of its chain of conditionings in each other's places."""
        prompt = self.prepared(name).prompt
        swap_in_chain(prompt, *(find_titled(prompt, title) for title in swap))
        ((found,),) = saved_pictures(self.runner.execute(self.runner.prepare(recognise(prompt))).pictures).values()
        return found

    def picture(self, name: str, *settings: str) -> Image.Image:
        """The one picture that a workflow saves."""
        ((found,),) = self.pictures(name, *settings).values()
        return found


def stand_in(prompt: dict) -> list[str]:
    """The settings that replace published models and make their workflows small; none for those of the demo."""
    nodes = [(key, node["class_type"], node["inputs"]) for key, node in prompt.items()]
    if not any(node in LOADERS and inputs.get("source") != "demo" for _, node, inputs in nodes):
        return []
    chosen = [(key, name, i[name]) for key, _, i in nodes for name in CHOICES if isinstance(i.get(name), str)]
    renamed = [f"{key}.{name}={RENAMED[value]}" for key, name, value in chosen if value in RENAMED]
    renamed += [f"{key}.image={small(i['image'])}" for key, kind, i in nodes if kind.startswith("LoadImage")]
    return renamed + [f"{key}.{name}={value}" for key, kind, _ in nodes for name, value in SMALL.get(kind, {}).items()]


def small(name: str) -> str:
    """The small copy of an input picture."""
    return f"small-{name}"


def find_titled(prompt: dict, title: str) -> str:
    """The id of a node."""
    return next(key for key, node in prompt.items() if node["_meta"]["title"] == title)


def swap_in_chain(prompt: dict, one: str, other: str) -> None:
    """Who read the one now reads the other, and each reads what the other read."""
    place = {one: other, other: one}
    chain = [
        (n["inputs"], name) for n in prompt.values() for name in ("conditioning", "positive") if name in n["inputs"]
    ]
    for inputs, name in chain:
        key, slot = inputs[name]
        inputs[name] = [place.get(key, key), slot]
    mine, theirs = prompt[one]["inputs"], prompt[other]["inputs"]
    mine["conditioning"], theirs["conditioning"] = theirs["conditioning"], mine["conditioning"]


def saved_pictures(paths: Sequence[Path]) -> dict[str, list[Image.Image]]:
    """Previews, which have other names, are left out."""
    found: dict[str, list[Image.Image]] = {}
    for path in paths:
        if path.name.startswith("fluxcanvas"):
            with Image.open(path) as picture:
                found.setdefault(path.name.partition("_")[0], []).append(picture.convert("RGB"))
    return found


class Lenient:
    """In place of Pixtral, which no small model can stand in for: nothing speaks against any picture."""

    def pass_on(self, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.fixture(autouse=True)
def lenient(monkeypatch):
    """For each of these tests alone: others check the real thing in the same process."""
    monkeypatch.setattr(IntegrityChecker, "load", lambda *sources, **options: Lenient())


@pytest.fixture(scope="session")
def bench(tmp_path_factory, save_depth_model):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folders = Folders(tmp_path_factory.mktemp("base"))
    build_stand_ins(folders.base / "models", save_depth_model)
    for path in provide_inputs(folders.input):
        with Image.open(path) as picture:
            picture.resize((SIDE, SIDE), Image.Resampling.BOX).save(path.with_name(small(path.name)))
    runner = Runner(folders, device="cpu")
    yield Bench(runner, object_info(runner.packs.nodes, runner.packs.display_names))
    folders.close()
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- stand-ins
def build_stand_ins(models: Path, save_depth_model: Callable[..., None]) -> None:
    """All of them, below this folder of models."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, channels in MODELS.items():
            build_model(models / "diffusers" / name, lambda tensors, config, c=channels: widen(tensors, config, c))
        build_model(models / "diffusers" / SCHNELL, forget_guidance)
        for name, modes in CONTROLNETS.items():
            build_controlnet(models / "controlnet" / name, modes)
        build_adapters(models)
        build_loras(models / "loras")
        build_parts(models)
        save_depth_model(models / "depth" / DEPTH)


Change = Callable[[dict, dict], None]


def build_model(folder: Path, change: Change) -> None:
    """The demo with a changed transformer: `change` edits its tensors and its config in place."""
    folder.mkdir(parents=True)
    for part in DEMO.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    (folder / "transformer").mkdir()
    tensors, config = load_file(DEMO / "transformer" / WEIGHTS), demo_config()
    change(tensors, config)
    save_file(tensors, folder / "transformer" / WEIGHTS)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))


def demo_config() -> dict:
    """Of the demo's transformer."""
    return json.loads((DEMO / "transformer" / "config.json").read_text())


def widen(tensors: dict, config: dict, channels: int) -> None:
    """Room for more channels beside the canvas's, with a small say."""
    weight = tensors["x_embedder.weight"]
    added = 0.3 * weight.float().std() * torch.randn(len(weight), channels - weight.shape[1])
    tensors["x_embedder.weight"] = torch.cat([weight, added.to(weight.dtype)], dim=1).contiguous()
    config |= {"in_channels": channels, "out_channels": weight.shape[1]}


def forget_guidance(tensors: dict, config: dict) -> None:
    """schnell has no guidance embedding."""
    for name in [name for name in tensors if "guidance_embedder" in name]:
        del tensors[name]
    config["guidance_embeds"] = False


def build_controlnet(folder: Path, modes: int | None) -> None:
    """As diffusers saves one; its last layers, which training starts at zero, are small."""
    from diffusers import FluxControlNetModel

    config = demo_config()
    sizes = {name: value for name, value in config.items() if not name.startswith("_") and name != "out_channels"}
    net = FluxControlNetModel(**sizes | {"num_layers": 1, "num_single_layers": 1}, num_mode=modes)
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet_blocks", "controlnet_single_blocks")):
            torch.nn.init.normal_(parameter, std=0.006)
        elif name.startswith("controlnet_x_embedder"):
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(folder)


def build_adapters(models: Path) -> None:
    """An IP-Adapter of XLabs with a CLIP, and a Redux with a SigLIP, which are told apart by what they are."""
    import transformers

    config = demo_config()
    width, context = config["num_attention_heads"] * config["attention_head_dim"], config["joint_attention_dim"]
    adapter = IPAdapterNet(IPAdapterParams(4, config["num_layers"], 24, context, width))
    save(adapter, models / "ipadapter" / "ip_adapter.safetensors")
    save(ReduxEncoder(32, context, 2 * context), models / "style_models" / "redux.safetensors")
    tiny = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 32}
    clip = transformers.CLIPVisionConfig(**tiny, image_size=32, patch_size=8, projection_dim=24)
    siglip = transformers.SiglipVisionConfig(**tiny, image_size=42, patch_size=14)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(models / "clip_vision" / "clip")
    transformers.SiglipVisionModel(siglip).save_pretrained(models / "clip_vision" / "siglip")


def build_loras(folder: Path) -> None:
    """Each in the layout that its makers publish; random changes, small beside the weights."""
    native = demo_tensors()
    layers = {name.removesuffix(".weight"): tensor.shape for name, tensor in native.items() if tensor.ndim == 2}
    for name in CONTROL_LORAS:
        sizes = layers | {"img_in": (layers["img_in"][0], CONTROL_CHANNELS)}
        norms = {key: tensor.float() for key, tensor in native.items() if key.endswith("_norm.scale")}
        biases = {f"{layer}.lora_B.bias": torch.zeros(size[0]) for layer, size in sizes.items()}
        save(low_rank(sizes, "lora_A", "lora_B") | biases | norms, folder / lora_file(name))
    theirs = load_file(DEMO / "transformer" / WEIGHTS)
    blocks = {f"transformer.{key.removesuffix('.weight')}": t.shape for key, t in theirs.items() if "blocks." in key}
    blocks = {layer: size for layer, size in blocks.items() if len(size) == 2}
    save(low_rank(blocks, "lora_A", "lora_B", share=0.16), folder / TURBO)  # used at an eighth of its strength
    for name in XLABS_LORAS:
        save(low_rank(xlabs_layers(layers), "down", "up"), folder / lora_file(name))


def xlabs_layers(layers: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The layers that XLabs change, under their names: attention's, in double blocks 1 of pictures and 2 of texts."""
    width, found = layers["img_in"][0], {}
    for layer, size in layers.items():
        block, _, end = layer.rpartition(".")
        if end == "linear1":
            found[f"{block}.processor.qkv_lora"] = (3 * width, width)
        elif end == "linear2":
            found[f"{block}.processor.proj_lora"] = size
        elif end in ("qkv", "proj"):
            block, _, stream = block.rpartition(".")
            found[f"{block}.processor.{end}_lora{1 if stream == 'img_attn' else 2}"] = size
    return found


def low_rank(
    layers: Mapping[str, Sequence[int]], down: str, up: str, rank: int = 4, share: float = 0.08
) -> dict[str, torch.Tensor]:
    """Both matrices of each layer, whose size is (rows, columns); their product is such a share of usual weights."""
    return {
        f"{layer}.{name}.weight": tensor
        for layer, (rows, columns) in layers.items()
        for name, tensor in (
            (down, torch.randn(rank, columns) / columns**0.5),
            (up, share * torch.randn(rows, rank) / rank**0.5),
        )
    }


def build_parts(models: Path) -> None:
    """Transformers and T5 as single files in fewer bits, and the other parts each in a folder with its config.

    The GGUF files hold other types than their names say: K-quants want rows of 256 numbers, which the demo has not.
    """
    native = demo_tensors()
    save({name: tensor.to(torch.float8_e4m3fn) for name, tensor in native.items()}, models / "diffusion_models" / FP8)
    write_gguf(native, models / "diffusion_models" / GGUF, "Q5_0")
    t5, _ = open_tensors([DEMO / "text_encoder_2" / "model.safetensors"])
    theirs = {name: tensor.read() for name, tensor in T5.to_foreign(t5).items()}
    write_gguf(theirs, models / "text_encoders" / GGUF_T5, "Q5_1")
    for name, part in (
        ("text_encoders/clip", "text_encoder"), ("text_encoders/t5", "text_encoder_2"), ("vae/vae", "vae"),
        ("tokenizers/tokenizer", "tokenizer"), ("tokenizers/tokenizer_2", "tokenizer_2"),
    ):  # fmt: skip
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).symlink_to(DEMO / part)


def write_gguf(tensors: Mapping[str, torch.Tensor], path: Path, kind: str) -> None:
    """The matrices in this type, the rest in float32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    path.parent.mkdir(exist_ok=True)
    writer = GGUFWriter(str(path), "flux")
    for name, tensor in tensors.items():
        stored = GGMLQuantizationType[kind if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(name, quantize(tensor.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def demo_tensors() -> dict[str, torch.Tensor]:
    """The demo's transformer under its native names."""
    return load_flux("demo", device="cpu", dtype=torch.bfloat16).transformer.state_dict()


def save(tensors: Mapping[str, torch.Tensor] | torch.nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = tensors.state_dict() if isinstance(tensors, torch.nn.Module) else tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="session")
def levels():
    """`levels(picture)`: its 8-bit levels, (H, W, 3)."""
    return lambda picture: torch.tensor(list(picture.tobytes()), dtype=torch.float32).reshape(*picture.size[::-1], -1)


@pytest.fixture(scope="session")
def distance(levels):
    """`distance(one, other)`: the mean difference of two pictures, in 8-bit levels."""
    return lambda one, other: (levels(one) - levels(other)).abs().mean().item()
