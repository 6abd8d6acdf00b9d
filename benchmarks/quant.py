"""Every way to quantise a transformer, or the demo's T5, beside the plain one: `python benchmarks/quant.py`.

All are asked in turn within one process on the same input, for several rounds; what counts is the median of the rounds'
ratios. On a CPU it is the process's CPU time that is compared, on a GPU the time between CUDA events. The error is that
of the velocity, averaged over the noise levels, or of T5's tokens: ||quantised - plain|| / ||plain||; both compute in
the same type.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable

import torch
from timing import name_of, read, seconds
from torch import Tensor, nn

from fluxcanvas.flux_runtime import Flux, FluxError, load_flux
from fluxcanvas.flux_runtime.layout import Layout
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.quant.schemes import SCHEMES
from fluxcanvas.flux_runtime.quant.swap import KEPT, Summary, quantise
from fluxcanvas.flux_runtime.variants import FluxParams

WIDTHS = {"wide": 12, "full": 24}  # heads of 128 channels
BLOCKS = {"wide": (2, 4), "full": (19, 38)}
SIDES = {"demo": 128, "wide": 512, "full": 1024}
MODELS = (*SIDES, "t5")
PROMPT = "a red circle above a blue square"
TEXT = 256
SIGMAS = (1.0, 0.75, 0.5, 0.25)


class Inputs:
    """One prompt (random for random weights), one noise, all noise levels."""

    def __init__(self, model: FluxTransformer, side: int, prompt: tuple[Tensor, Tensor] | None) -> None:
        generator = torch.Generator().manual_seed(1)
        params, device, dtype = model.params, model.device, model.dtype

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        tokens, pooled = prompt or (draw(1, TEXT, params.context_in_dim), draw(1, params.vec_in_dim))
        self.txt, self.pooled = tokens.to(device, dtype), pooled.to(device, dtype)
        layout = Layout((self.txt.shape[1],), side // 8, side // 8)
        self.img, self.ids = draw(1, layout.canvas_tokens, params.in_channels), layout.ids().to(device)
        self.sigmas, self.guidance = torch.tensor(SIGMAS, device=device), torch.tensor(3.5, device=device)

    def run(self, model: FluxTransformer) -> Tensor:
        """Velocities (noise levels, N, channels)."""
        context = model.prepare(self.txt, self.ids)
        modulation = model.modulate(model.embed(self.sigmas[:, None], self.guidance, self.pooled[None]))
        return torch.cat([model(self.img, context, modulation[index]) for index in range(len(SIGMAS))])


class Words:
    """What T5 makes of a prompt."""

    def __init__(self, flux: Flux) -> None:
        tokens = flux.text.t5_tokenizer(PROMPT, return_tensors="pt", padding="max_length", truncation=True)
        self.ids = tokens.input_ids.to(flux.text.t5.device)

    def run(self, model: nn.Module) -> Tensor:
        return model(self.ids).last_hidden_state


def build(name: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Inputs | Words]:
    if name == "t5":
        flux = load_flux("demo", device=device, dtype=dtype)
        return flux.text.t5, Words(flux)
    if name == "demo":
        flux = load_flux("demo", device=device, dtype=dtype)
        prompt = flux.text.encode(PROMPT)
        return flux.transformer, Inputs(flux.transformer, SIDES[name], (prompt.tokens, prompt.pooled))
    (double, single), heads = BLOCKS[name], WIDTHS[name]
    params = FluxParams(
        hidden_size=128 * heads, num_heads=heads, mlp_hidden=512 * heads, depth=double, depth_single=single
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer(params).to(dtype).eval().requires_grad_(False)
    return model, Inputs(model, SIDES[name], None)


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def error(got: Tensor, expected: Tensor) -> float:
    """Of each noise level's velocity, averaged."""
    off, size = ((t.float().flatten(1).norm(dim=1)) for t in (got - expected, expected))
    return (off / size).mean().item()


def make(model: nn.Module, scheme: str, keep: Iterable[str]) -> tuple[nn.Module, Summary, float] | str:
    """The quantised model, the account of it and how long it took; or why it cannot be had."""
    try:
        SCHEMES[scheme].require(model.device)  # imports the library, which is not to be counted
        SCHEMES[scheme].make(torch.ones(64, 64, device=model.device, dtype=model.dtype))
        start = time.perf_counter()
        quantised, summary = quantise(model, scheme, keep=keep)
        return quantised, summary, time.perf_counter() - start
    except FluxError as failure:
        return str(failure)


@torch.no_grad()
def rows(model: nn.Module, inputs: Inputs | Words, names: Iterable[str], keep: Iterable[str], rounds: int) -> list[str]:
    expected, size, device = inputs.run(model), weight_bytes(model), model.device
    lines = []
    for name in names:
        made = make(model, name, keep)
        if isinstance(made, str):
            lines.append(f"| {name} | {made} | | | | |")
            continue
        quantised, summary, took = made
        off = error(inputs.run(quantised), expected)
        pairs = [
            (seconds(lambda: inputs.run(model), device), seconds(lambda m=quantised: inputs.run(m), device))
            for _ in range(rounds)
        ]
        ratio = statistics.median(b / a for a, b in pairs)
        lines.append(
            f"| {name} | {off:.4f} | {summary.mean_error:.4f} | {weight_bytes(quantised) / size:.2f} "
            f"| {took:.1f} | {ratio:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="wide")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--all-layers", action="store_true", help="quantise the layers that are kept by default, too")
    options = read(parser, "bfloat16", rounds=3)
    model, inputs = build(options.model, options.dtype, options.device)
    size = f"{weight_bytes(model) / 1e6:.0f} MB plain"
    print(
        f"{options.model}, {options.dtype}, {name_of(options.device)}, torch {torch.__version__}, {size}\n\n"
        "| scheme | error of the output | of the weights | bytes | seconds to quantise | time of a step |\n"
        "|---|---|---|---|---|---|"
    )
    for name in options.schemes:
        print(*rows(model, inputs, [name], () if options.all_layers else KEPT, options.rounds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
