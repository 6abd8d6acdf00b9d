"""A host that records what nodes tell it, the demo model to run them on, and random models of the other kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fluxcanvas.flux_runtime.adapters import IPAdapter, Redux
from fluxcanvas.flux_runtime.model.adapters import IPAdapterNet, IPAdapterParams, ReduxEncoder
from fluxcanvas.flux_runtime.model.sidenet import SideNet, SideNetParams
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.sidenets import ControlNet
from fluxcanvas.flux_runtime.variants import VARIANTS
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS
from fluxcanvas.nodes import host as hosts


class Recorder(hosts.LocalHost):
    """A host on the CPU that keeps what it is told, and stops when asked for the `stop_at`-th time."""

    class Stopped(Exception):
        """Its interruption."""

    def __init__(self, models: Path | None = None) -> None:
        super().__init__(models)
        self.texts: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.previews: list[Image.Image] = []
        self.stop_at: int | None = None
        self.asked = 0

    def progress(self, value, total, preview=None):
        self.steps.append((value, total))
        self.previews += [preview] if preview else []

    def text(self, text):
        self.texts.append(text)

    def check_interrupt(self):
        self.asked += 1
        if self.asked == self.stop_at:
            raise self.Stopped

    def device(self):
        return torch.device("cpu")


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
    """The host of the test's nodes; models lie in `tmp_path / "models"`."""
    recorder = Recorder(tmp_path / "models")
    monkeypatch.setattr(hosts, "_registered", [recorder])
    return recorder


@pytest.fixture(scope="session")
def run():
    """`run("Sample", **inputs)` runs a node as a host does: the class made anew, all inputs by name."""

    def call(name: str, **inputs):
        made = NODE_CLASS_MAPPINGS[f"FluxCanvas_{name}"]
        return getattr(made(), made.FUNCTION)(**inputs)

    return call


@pytest.fixture(scope="session")
def prompts(demo, run):
    """A positive and a negative conditioning."""
    return [run("EncodePrompt", text=demo.text, prompt=words)[0] for words in ("a red house at night", "a tree")]


@pytest.fixture
def draw(demo, prompts, run):
    """Sample with these settings: 3 steps on an empty canvas of 64x64 unless told otherwise."""

    def sample(**settings):
        given = {"model": demo.model, "positive": prompts[0], "latent": {"samples": torch.zeros(1, 16, 8, 8)}}
        return run("Sample", **given | {"seed": 5, "steps": 3} | settings)[0]

    return sample


@pytest.fixture(scope="session")
def randoms():
    """Fills a module with random weights that are large enough for every path to matter, always the same ones."""

    def fill(module):
        generator = torch.Generator().manual_seed(7)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08
        return module.eval().requires_grad_(False)

    return fill


@pytest.fixture(scope="session")
def models(demo, randoms):
    """Models like the demo's, one for each kind of input: "dev" (the demo itself), "canny" and "fill"."""
    made = {"dev": demo.model}
    for name in ("canny", "fill"):
        params = replace(demo.model.params, in_channels=VARIANTS[name].in_channels)
        made[name] = replace(demo.model, transformer=randoms(FluxTransformer(params)), variant=VARIANTS[name])
    return made


@pytest.fixture(scope="session")
def nets(demo, randoms):
    """ControlNets for the demo's width: one that reads latents, a union, and one that reads pixels (XLabs)."""
    trunk = replace(demo.model.params, depth=1, depth_single=1)
    kinds = {
        "latents": SideNetParams(trunk),
        "union": SideNetParams(trunk, modes=5),
        "xlabs": SideNetParams(replace(trunk, depth_single=0), "xlabs"),
    }
    return {name: ControlNet(randoms(SideNet(params)), f"tiny {name}") for name, params in kinds.items()}


class Eyes:
    """An image encoder that sees the mean colours of 3x3 fields."""

    name = "eyes"

    def hidden(self, images):
        return F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2), 3).flatten(2).transpose(1, 2)

    def pooled(self, images):
        return self.hidden(images).flatten(1)


@pytest.fixture(scope="session")
def adapters(demo, randoms):
    """An IP-Adapter and Redux for the demo, which see little of the pictures."""
    p = demo.model.params
    sizes = IPAdapterParams(2, p.depth, 27, p.context_in_dim, p.hidden_size)
    return {
        "ip": IPAdapter(randoms(IPAdapterNet(sizes)), Eyes(), "tiny ip"),
        "redux": Redux(randoms(ReduxEncoder(3, p.context_in_dim, 16)), Eyes(), "tiny redux"),
    }


@pytest.fixture(scope="session")
def picture():
    """`picture(height, width, count=1, seed=0)`: soft random colours, (B, H, W, 3)."""

    def make(height: int, width: int, count: int = 1, seed: int = 0):
        grid = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        return F.interpolate(grid, size=(height, width), mode="bilinear").permute(0, 2, 3, 1)

    return make


@pytest.fixture(scope="session")
def half():
    """`half(height, width, count=1)`: a mask (B, H, W) that is white on the right."""

    def make(height: int, width: int, count: int = 1):
        mask = torch.zeros(count, height, width)
        mask[:, :, width // 2 :] = 1
        return mask

    return make
