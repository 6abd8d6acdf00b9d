"""A host that records what nodes tell it, and the demo model to run them on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

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
