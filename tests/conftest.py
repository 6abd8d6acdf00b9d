"""What several tests share. Everything else a test needs stands in its own file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported anywhere: one thread each, so that results do not depend on the machine's cores and the
# workers of pytest-xdist do not fight for them. Servers that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

CHECKOUT = Path(__file__).resolve().parents[1]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def in_ci() -> bool:
    """CI must run every test: what is missing there is a failure, not a reason to skip."""
    return os.environ.get("CI", "").lower() in ("1", "true")


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the repository."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: real tokenizers, key lists and pictures."""
    folder = CHECKOUT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder.name} beside the checkout")
    return folder


@pytest.fixture(scope="session")
def demo():
    """The demo model on the CPU in its own precision; shared, so never change it."""
    from fluxcanvas.flux_runtime import load_flux

    return load_flux("demo", device="cpu")


@pytest.fixture(scope="session")
def save_depth_model() -> Callable[..., None]:
    """`save_depth_model(folder, **processor)` writes a tiny Depth Anything with random weights."""

    def save(folder: Path, **processor: object) -> None:
        import transformers

        backbone = transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2,
            out_features=["stage1", "stage2"], reshape_hidden_states=False, apply_layernorm=True,
        )  # fmt: skip
        config = transformers.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=32, patch_size=14, fusion_hidden_size=8,
            head_hidden_size=8, neck_hidden_sizes=[8, 16], reassemble_factors=[2, 1],
        )  # fmt: skip
        transformers.DepthAnythingForDepthEstimation(config).save_pretrained(folder)
        kind = getattr(transformers, "DPTImageProcessorPil", None) or transformers.DPTImageProcessor
        size = {"height": 56, "width": 56}
        kind(size=size, ensure_multiple_of=14, **processor).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium for the browser tests."""
    found = next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)
    if found is None:
        message = "no chromium on PATH: install it (Debian: apt install chromium)"
        pytest.fail(message) if in_ci() else pytest.skip(message)
    return found
