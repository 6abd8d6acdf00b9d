"""On a GPU, nothing lies on the wrong device and no step waits for a number: the `meta` device stands in for one.

What lies there holds no numbers. An operation on it and on a CPU tensor fails, as on a GPU; so does reading a number,
which would make the CPU wait. Only its copies on the CPU, for the picture, can be read: they are all zeros.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fluxcanvas.flux_runtime import weights
from fluxcanvas.web.host.run import Runner

LOADERS = ("load_flux", "load_parts", "load_controlnet", "load_adapter")
PARTS = ("model", "transformer", "clip", "t5", "encoder")
NAMES = (
    "text-to-image", "negative-prompt", "batch", "subgraph", "control-inpaint-true-cfg", "controlnet-inpaint",
    "fill-controlnet-redux-ip-adapter", "regional-reference", "kontext-references", "kontext-inpaint-reference",
    "soft-inpaint", "lora-control-depth", "lora-stack", "turbo-redux", "gguf",
)  # fmt: skip


def moved(loaded: Any) -> Any:
    """A loaded model, ControlNet or adapter with all its weights on `meta`."""
    text, vae = getattr(loaded, "text", None), getattr(loaded, "vae", None)
    owners = (loaded, text, vae, getattr(loaded, "model", None))
    parts = [getattr(owner, name, None) for owner in owners for name in PARTS]
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    assert modules
    for module in modules:
        module.to("meta")
    return loaded


@pytest.fixture(scope="module")
def elsewhere(bench):
    """A runner of its own, whose models lie on `meta`, and how many tensors have come back from there."""
    come_back = [0]
    copied, converted = torch.Tensor.cpu, torch.Tensor.to

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        come_back[0] += tensor.is_meta
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else copied(tensor)

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        places = [*args, *options.values()]
        home = any(isinstance(place, (str, torch.device)) and str(place) == "cpu" for place in places)
        return converted(cpu(tensor) if tensor.is_meta and home else tensor, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in LOADERS:
            load = getattr(weights, name)
            patch.setattr(weights, name, lambda *args, load=load, **options: moved(load(*args, **options)))
        for user in ("generate", "vae"):
            patch.setattr(f"fluxcanvas.flux_runtime.{user}.check_finite", lambda result, what: None)
        patch.setattr(torch.Tensor, "cpu", cpu)
        patch.setattr(torch.Tensor, "to", to)
        yield Runner(bench.runner.folders, device="cpu"), come_back


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_mixed_and_no_step_waits(bench, elsewhere, name):
    runner, come_back = elsewhere
    before = come_back[0]
    prepared = bench.prepared(name)
    assert runner.execute(prepared).pictures and come_back[0] > before
