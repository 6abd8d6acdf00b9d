"""Trains the demo model's LoRA: its scenes as old prints in sepia.

    python -m fluxcanvas.demo.train_lora --work runs/sepia

It goes the usual way of LoRAs for FLUX.1 dev: low-rank changes of the blocks' matrices, trained on pictures of the new
style with guidance 1, so that any guidance works with them. WORK/sepia.safetensors is in the format of kohya's
scripts. A run that was killed goes on where it was.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..flux_runtime.weights.load import load_flux
from .drawing import render
from .scenes import Scene
from .train_flow import Diet, Kitchen, Larder, Meal, Question, flow_error
from .train_latents import Latents, write_shards
from .train_text import text_of
from .train_tools import Course, Muon, Plan, moved
from .train_vae import encoder_of

NAME = "sepia"
DARK, MIDDLE, LIGHT = (56, 30, 20), (188, 122, 84), (250, 236, 208)
DIET = Diet(size_weights=(3, 1), batches=(24, 8), long_share=0.0, empty=0.05, adam_rate=2e-3)
SHARDS = {128: 12, 256: 2}
CHANGED = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "linear1", "linear2")


def sepia(scene: Scene, size: int) -> Image.Image:
    """The scene as an old print, `size` x `size` pixels: as dark and light as it is, in browns."""
    return ImageOps.colorize(ImageOps.grayscale(render(scene, size)), DARK, LIGHT, MIDDLE)


class LowRank(nn.Module):
    """A weight with up @ down added to it; nothing at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def attach(model: nn.Module, rank: int, seed: int) -> dict[str, LowRank]:
    """Freeze the model but for low-rank changes of its blocks' matrices; they are returned by the layers' names."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if name.endswith(CHANGED)}
    changes = {name: LowRank(layer.weight, rank) for name, layer in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", changes[name])
    return changes


def train_lora(model: nn.Module, kitchen: Kitchen, plan: Plan, folder: Path, until: int | None = None) -> nn.Module:
    """Teach what `attach` has left free to draw the kitchen's pictures."""

    def loss_of(batch: tuple[Meal, Question]) -> Tensor:
        return flow_error(model, kitchen, *moved(batch, kitchen.device), guidance=1.0)

    free = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimiser = Muon(free, kitchen.diet.rate, kitchen.diet.adam_rate, lambda _: False)
    return Course(plan, model, optimiser, folder, decay=0.98).run(kitchen.larder.flow, loss_of, until=until)


def save_lora(path: Path, changes: dict[str, LowRank]) -> None:
    """Write the changes in bfloat16 under the names that kohya's scripts give them."""
    tensors = {}
    for name, change in changes.items():
        prefix = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{prefix}.lora_down.weight"] = change.down.detach().cpu().bfloat16()
        tensors[f"{prefix}.lora_up.weight"] = change.up.detach().cpu().bfloat16()
        tensors[f"{prefix}.alpha"] = torch.tensor(float(len(change.down)))
    about = {
        "modelspec.title": NAME,
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.description": "Old prints in sepia, for the demo model of fluxcanvas",
        "modelspec.license": "Apache-2.0",
    }
    save_file(tensors, path, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("demo-sepia"), help="folder of the run")
    parser.add_argument("--base", default="demo", help="the FLUX folder that the LoRA is for")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    flux = load_flux(args.base, device="cpu", dtype=torch.float32)
    encode, folder = encoder_of(flux.vae.model, device), args.work / "latents"
    for size, count in SHARDS.items():
        write_shards(encode, folder, args.seed, size, count, sepia)
    latents = {size: Latents(folder, args.seed, size, count) for size, count in SHARDS.items()}
    kitchen = Kitchen(Larder(latents, DIET), text_of(flux).to(device).eval().requires_grad_(False), device)
    model = flux.transformer.to(device)
    changes = attach(model, args.rank, args.seed)
    train_lora(model, kitchen, Plan(NAME, args.steps, args.seed, warmup=20), args.work)
    path = args.work / f"{NAME}.safetensors"
    save_lora(path, changes)
    print(f"{NAME}: {path}", flush=True)


if __name__ == "__main__":
    main()
