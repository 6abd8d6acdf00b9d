"""The demo model: a tiny FLUX trained from nothing on storybook scenes, its renderer, its judge and its training."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
