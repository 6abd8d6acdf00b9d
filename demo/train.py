"""Trains the demo model, from nothing or from an earlier one, in six stages.

    python -m fluxcanvas.demo.train --work runs/demo --scale cpu --device cpu

Stages: vae, text, latents, flow, distil, export. Each saves its state again and again, so that the same command goes
on where it was killed; what is done is not done again. Steps are counted, not minutes: the same seed gives the same
weights on a CPU. The finished model is a FLUX folder in diffusers layout at WORK/model, sample grids are WORK/*.png.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..flux_runtime.flux import Flux
from ..flux_runtime.model.transformer import FluxTransformer
from ..flux_runtime.model.vae import AutoEncoder
from ..flux_runtime.variants import FluxParams
from ..flux_runtime.weights.load import load_flux
from . import train_flow, train_text, train_vae
from .train_export import DEFAULT_TOKENS, export
from .train_flow import Diet, Kitchen, Larder
from .train_latents import Latents, write_shards
from .train_look import looker
from .train_text import Text
from .train_tools import Plan

STAGES = ("vae", "text", "latents", "flow", "distil", "export")


@dataclass(frozen=True)
class Scale:
    """How much is trained: steps of the stages, shards of 256 scenes per picture size, the transformer and its diet
    (another one where it goes on from an earlier model), how many pictures are drawn to look at,
    and from how many captions the tokenizers are made."""

    steps: dict[str, int]
    shards: dict[int, int]
    params: FluxParams
    diet: Diet
    continued: Diet
    looks: int = 32
    captions: int = 20000


CPU = Scale(
    steps={"vae": 4400, "text": 1200, "flow": 3200, "distil": 260},
    shards={128: 84, 256: 36},
    params=train_flow.TINY,
    diet=Diet(),
    continued=Diet(rate=0.010, adam_rate=1e-3, size_weights=(2, 1)),
)
GPU = Scale(
    steps={"vae": 30000, "text": 6000, "flow": 24000, "distil": 3000},
    shards={128: 400, 256: 200},
    params=replace(train_flow.TINY, hidden_size=256, num_heads=8, mlp_hidden=1024),
    diet=Diet(batches=(384, 128), rate=0.012),
    continued=Diet(batches=(384, 128), rate=0.008, adam_rate=8e-4),
)
TRY = Scale(
    steps={"vae": 8, "text": 4, "flow": 4, "distil": 4},
    shards={32: 1, 64: 1},
    params=replace(train_flow.TINY, hidden_size=32, num_heads=1, mlp_hidden=64, depth=1, depth_single=1),
    diet=Diet(sizes=(32, 64), batches=(4, 2)),
    continued=Diet(sizes=(32, 64), batches=(4, 2)),
    looks=2,
    captions=400,
)
SCALES = {"cpu": CPU, "gpu": GPU, "try": TRY}


class Training:
    """One run in one folder; a stage reads what the stages before it have left there."""

    def __init__(
        self,
        work: Path,
        scale: Scale,
        seed: int,
        device: torch.device,
        start: Path | None = None,
        distilled: Path | None = None,
        tokens: int = DEFAULT_TOKENS,
        workers: int = 0,
        anew: bool = False,
    ) -> None:
        self.work, self.scale, self.seed, self.device, self.workers = work, scale, seed, device, workers
        self.start_folder, self.distilled_folder, self.tokens = start, distilled, tokens
        self.goes_on = start is not None and not anew  # with the transformer too, not only its VAE and text encoders
        work.mkdir(parents=True, exist_ok=True)

    def run(self, stages: tuple[str, ...] = STAGES) -> None:
        """The stages in their order, each unless it is done."""
        for stage in stages:
            print(f"{stage}: begins", flush=True)
            getattr(self, f"_{stage}")()

    @cached_property
    def start(self) -> Flux | None:
        """The model to go on from."""
        return self._load(self.start_folder) if self.start_folder else None

    def _load(self, folder: Path) -> Flux:
        return load_flux(folder, device="cpu", dtype=torch.float32)

    def _plan(self, stage: str) -> Plan:
        steps = self.scale.steps[stage]
        return Plan(stage, steps, self.seed, look_every=max(8, steps // 8), workers=self.workers)

    # ------------------------------------------------------------ stages
    def _vae(self) -> None:
        path = self.work / "vae.safetensors"
        if path.exists():
            return
        if self.start:
            model = self.start.vae.model
        else:
            model = train_vae.new_vae(train_vae.TINY, self.seed)
            train_vae.train_vae(model, self._plan("vae"), self.work, self.device)
        store(model, path, {"scale": model.params.scale, "shift": model.params.shift})

    def _text(self) -> None:
        done = self.work / "text.safetensors"
        if done.exists():
            return
        text = self._untrained_text().to(self.device).train().requires_grad_(True)
        train_text.train_text(text, self.work, self._plan("text"), bool(self.start))
        store(text, done)

    def _latents(self) -> None:
        encode = train_vae.encoder_of(self.vae(), self.device)
        for size, count in self.scale.shards.items():
            write_shards(encode, self.work / "latents", self.seed, size, count, workers=self.workers)

    def _flow(self) -> None:
        path = self.work / "flow.safetensors"
        if path.exists():
            return
        model = self._new_transformer()
        if self.goes_on:
            model.load_state_dict(self.start.transformer.state_dict())
        plan = self._plan("flow")
        train_flow.train_flow(model, self._kitchen(), plan, self.work, self._looker("flow", cfg=3.0))
        store(model, path)

    def _distil(self) -> None:
        path = self.work / "distilled.safetensors"
        if path.exists():
            return
        teacher, student = (restore(self._new_transformer(), self.work / "flow.safetensors") for _ in range(2))
        if self.distilled_folder:
            head_start(student, self.start.transformer, self._load(self.distilled_folder).transformer)
        else:
            nn.init.zeros_(student.guidance_in.out_layer.weight)
            nn.init.zeros_(student.guidance_in.out_layer.bias)
        plan = replace(self._plan("distil"), warmup=30, decay_from=0.0)
        look = self._looker("distil", guidance=3.5)
        train_flow.train_distil(teacher, student, self._kitchen(), plan, self.work, look)
        store(student, path)

    def _export(self) -> None:
        model = restore(self._new_transformer(), self.work / "distilled.safetensors")
        export(self.work / "model", model, self.vae(), self.text(), self.tokens)
        print(f"export: {self.work / 'model'}", flush=True)

    # ------------------------------------------------------------ parts
    def vae(self) -> AutoEncoder:
        path = self.work / "vae.safetensors"
        with safe_open(path, "pt") as file:
            about = file.metadata()
        params = self.start.vae.params if self.start else train_vae.TINY
        return restore(
            AutoEncoder(replace(params, scale=float(about["scale"]), shift=float(about["shift"]))), path
        ).eval()

    def text(self) -> Text:
        return (
            restore(self._untrained_text(), self.work / "text.safetensors").to(self.device).eval().requires_grad_(False)
        )

    def _untrained_text(self) -> Text:
        if self.start:
            return train_text.text_of(self.start)
        return train_text.new_text(self.seed, captions=self.scale.captions)

    def _new_transformer(self) -> FluxTransformer:
        params = self.start.model.params if self.goes_on else self.scale.params
        return train_flow.new_transformer(params, self.seed)

    def _kitchen(self) -> Kitchen:
        folder = self.work / "latents"
        latents = {size: Latents(folder, self.seed, size, count) for size, count in self.scale.shards.items()}
        diet = self.scale.continued if self.goes_on else self.scale.diet
        return Kitchen(Larder(latents, diet), self.text(), self.device)

    def _looker(self, stage: str, **settings: float) -> Callable[[nn.Module, int], str]:
        vae, sizes = self.vae().to(self.device), tuple(self.scale.shards)
        return looker(self.work / stage, vae, self.text(), sizes, self.scale.looks, **settings)


@torch.no_grad()
def head_start(student: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Add to the student what an earlier distillation changed in the model that it goes on from."""
    changes = zip(student.parameters(), before.parameters(), after.parameters(), strict=True)
    for parameter, old, new in changes:
        parameter.add_(new - old)


def store(model: nn.Module, path: Path, about: dict[str, float] | None = None) -> None:
    """Write a part under its own names; it is there whole or not at all."""
    unfinished = path.with_suffix(".part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, unfinished, {name: repr(value) for name, value in (about or {}).items()})
    unfinished.replace(path)


def restore(model: nn.Module, path: Path) -> nn.Module:
    """Read back what `store` wrote."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="folder of the run")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="cpu",
        help="cpu: hours of a core; gpu: far more pictures; try: seconds, to see that it runs",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--start", type=Path, help="FLUX folder to go on from (undistilled); without it, from nothing")
    parser.add_argument("--distilled", type=Path, help="distilled sister of --start: a head start for the distillation")
    parser.add_argument(
        "--new-transformer", action="store_true", help="take only the VAE and the text encoders from --start"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that prepare batches ahead, for a GPU not to wait"
    )
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="default T5 tokens of the exported model")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--steps", nargs="*", default=[], metavar="STAGE=N", help="other numbers of steps than the scale's"
    )
    args = parser.parse_args()
    if args.new_transformer and (args.distilled or not args.start):
        parser.error("--new-transformer needs --start, and --distilled goes with a transformer that goes on")
    torch.set_num_threads(args.threads)
    scale = SCALES[args.scale]
    own = {stage: int(count) for stage, count in (item.split("=") for item in args.steps)}
    scale = replace(scale, steps=scale.steps | own)
    device = torch.device(args.device)
    run = Training(
        args.work, scale, args.seed, device, args.start, args.distilled, args.tokens, args.workers, args.new_transformer
    )
    run.run(tuple(stage for stage in STAGES if stage in args.stages))


if __name__ == "__main__":
    main()
