"""One denoise step, side by side with diffusers on the same random weights: `python benchmarks/step.py --size cpu`.

Both models are asked in turn within one process, for several rounds; what counts is the median of the rounds' ratios.
On a CPU it is the process's CPU time that is compared, on a GPU the time between CUDA events.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from timing import name_of, read, seconds
from torch import Tensor

from fluxcanvas.flux_runtime.layout import Layout
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.weights import load_parts

SIZES = {  # heads, double blocks, single blocks, picture side in pixels, text tokens
    "tiny": (2, 1, 2, 128, 64),
    "cpu": (12, 1, 2, 512, 512),
    "full": (24, 19, 38, 1024, 512),
}
STEPS = 4


def oracle(heads: int, double: int, single: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=heads, guidance_embeds=True
        )
    return model.to(dtype).eval()


def ours(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> FluxTransformer:
    """The same weights through our own loader."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="100GB")
        flux = load_parts(transformer=Path(folder), clip=None, t5=None, vae=None, dtype=dtype, device=device)
    return flux.transformer


class Inputs:
    """Random text, canvas and noise levels, the same for both."""

    def __init__(self, side: int, text: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.layout = Layout((text,), side // 8, side // 8)
        self.img, self.txt, self.pooled = draw(1, self.layout.canvas_tokens, 64), draw(1, text, 4096), draw(1, 768)
        self.sigmas = torch.linspace(1.0, 0.25, STEPS, device=device)
        self.guidance = torch.tensor([3.5], device=device)
        self.ids = self.layout.ids().to(device)

    def run_oracle(self, model: torch.nn.Module) -> Tensor:
        split = self.layout.text_tokens
        for sigma in self.sigmas:
            timestep = (sigma * 1000).to(self.img.dtype).reshape(1) / 1000
            velocity = model(
                hidden_states=self.img, timestep=timestep, guidance=self.guidance, pooled_projections=self.pooled,
                encoder_hidden_states=self.txt, txt_ids=self.ids[:split], img_ids=self.ids[split:], return_dict=False,
            )[0]  # fmt: skip
        return velocity

    def run_ours(self, model: FluxTransformer) -> Tensor:
        context = model.prepare(self.txt, self.ids)
        modulation = model.modulate(model.embed(self.sigmas[:, None], self.guidance[0], self.pooled[None]))
        for index in range(STEPS):
            velocity = model(self.img, context, modulation[index])
        return velocity


@torch.no_grad()
def measure(size: str, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, object]:
    heads, double, single, side, text = SIZES[size]
    theirs = oracle(heads, double, single, dtype, device)
    mine, inputs = ours(theirs, dtype, device), Inputs(side, text, dtype, device)
    expected, got = inputs.run_oracle(theirs), inputs.run_ours(mine)  # warm-up, and the check
    pairs = [
        (seconds(lambda: inputs.run_oracle(theirs), device), seconds(lambda: inputs.run_ours(mine), device))
        for _ in range(rounds)
    ]
    return {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers s/step": round(statistics.median(a for a, _ in pairs) / STEPS, 4),
        "fluxcanvas s/step": round(statistics.median(b for _, b in pairs) / STEPS, 4),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        "max difference": (expected - got).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    options = read(parser, "bfloat16", rounds=5)
    result = measure(options.size, options.dtype, options.device, options.rounds)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
