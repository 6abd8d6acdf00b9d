"""What a LoRA costs a step, side by side with diffusers and PEFT on the same weights: `python benchmarks/lora.py`.

Each way is asked in turn within one process, for several rounds, beside the same model without a LoRA; what counts is
the median of the rounds' ratios. The LoRA changes every layer of the blocks. Putting it on is counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from step import SIZES, STEPS, Inputs, oracle, ours
from timing import name_of, read, seconds
from torch import Tensor, nn

from fluxcanvas.flux_runtime.lora.apply import applied
from fluxcanvas.flux_runtime.lora.load import load_lora
from fluxcanvas.flux_runtime.lora.stack import LoraStack
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer


def write_lora(model: nn.Module, rank: int, path: Path) -> None:
    """Of diffusers' model, in its layout."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "blocks." in name:
            rows, columns = layer.weight.shape
            down, up = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
            tensors[f"transformer.{name}.lora_A.weight"] = down / columns**0.5
            tensors[f"transformer.{name}.lora_B.weight"] = 0.05 * up / rank**0.5
    save_file(tensors, path)


@contextlib.contextmanager
def peft(model: nn.Module, path: Path, fused: bool) -> Iterator[None]:
    """As diffusers' load_lora_weights does it, and fuse_lora."""
    model.load_lora_adapter(load_file(path), prefix="transformer")
    if fused:
        model.fuse_lora()
    yield
    if fused:
        model.unfuse_lora()
    model.unload_lora()


Way = tuple[str, nn.Module, AbstractContextManager]


def ways(theirs: nn.Module, mine: FluxTransformer, path: Path) -> list[Way]:
    stack = LoraStack().plus(load_lora(path))
    return [
        ("diffusers, PEFT", theirs, peft(theirs, path, fused=False)),
        ("fluxcanvas, beside", mine, applied(mine, stack, "beside")),
        ("diffusers, fused", theirs, peft(theirs, path, fused=True)),
        ("fluxcanvas, merged", mine, applied(mine, stack, "merged")),
    ]


@torch.no_grad()
def measure(size: str, rank: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[str]:
    heads, double, single, side, text = SIZES[size]
    theirs = oracle(heads, double, single, dtype, device)
    mine, inputs, lines = ours(theirs, dtype, device), Inputs(side, text, dtype, device), []

    def run(model: nn.Module) -> Tensor:
        return inputs.run_ours(model) if model is mine else inputs.run_oracle(model)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        write_lora(theirs, rank, path)
        expected = None
        for name, model, putting_on in ways(theirs, mine, path):
            plain = [seconds(lambda m=model: run(m), device) for _ in range(rounds)]
            began = time.perf_counter()
            with putting_on:
                took, got = time.perf_counter() - began, run(model)
                changed = [seconds(lambda m=model: run(m), device) for _ in range(rounds)]
            expected = got if expected is None else expected
            off = ((got - expected).norm() / expected.norm()).item()
            ratio = statistics.median(changed) / statistics.median(plain)
            lines.append(f"| {name} | {statistics.median(plain) / STEPS:.3f} | {ratio:.3f} | {took:.2f} | {off:.1e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    options = read(parser, "float32", rounds=3)
    about = (options.size, f"rank {options.rank}", options.dtype, name_of(options.device), f"torch {torch.__version__}")
    print(
        ", ".join(map(str, about)) + "\n\n"
        "| way | s a step without | with ÷ without | s to put on | difference to PEFT |\n|---|---|---|---|---|"
    )
    print(*measure(options.size, options.rank, options.dtype, options.device, options.rounds), sep="\n")


if __name__ == "__main__":
    main()
