"""The judge's eye: a small convolutional network that says which things a 128 px picture shows, where and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .scenes import BACKGROUNDS, COLOR_NAMES, KINDS

SIDE, GRID = 128, 16
WIDTHS = (32, 64, 112, 112)
EYE = Path(__file__).resolve().parent / "judge.safetensors"


@dataclass(frozen=True)
class Answers:
    """Raw answers for B pictures: background (B, 6), paper (B, 9), per kind there (B, 12), doubled (B, 12),
    color (B, 12, 9), scale (B, 12) and place (B, 12, 2) as x, y in fractions of the picture."""

    background: Tensor
    paper: Tensor
    there: Tensor
    doubled: Tensor
    color: Tensor
    scale: Tensor
    place: Tensor


class Eye(nn.Module):
    """Convolutions down to 16 x 16 cells, one attention map per kind, and linear questions to what it attends to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(3, WIDTHS[0], 8, 4, 2),
            *_layer(WIDTHS[0], WIDTHS[1], 4, 2, 1),
            *_layer(WIDTHS[1], WIDTHS[2], 3, 1, 1),
            *_layer(WIDTHS[2], WIDTHS[3], 3, 1, 1),
        )
        width = WIDTHS[-1]
        self.maps = nn.Conv2d(width, len(KINDS), 3, padding=1)
        self.scene = nn.Linear(width, len(BACKGROUNDS) + len(COLOR_NAMES))
        self.ask = nn.Parameter(torch.randn(len(KINDS), width, len(COLOR_NAMES) + 2) * 0.05)
        self.bias = nn.Parameter(torch.zeros(len(KINDS), len(COLOR_NAMES) + 2))
        self.counter = Counter()
        ticks = (torch.arange(GRID) + 0.5) / GRID
        self.register_buffer("cells", torch.cartesian_prod(ticks, ticks).flip(1), persistent=False)

    def forward(self, pictures: Tensor) -> Answers:
        """pictures: (B, 3, 128, 128) in -1..1."""
        features = self.body(pictures).float()
        maps = self.maps(features).float().flatten(2)
        attention = maps.softmax(-1)
        seen = torch.einsum("bkn,bcn->bkc", attention, features.flatten(2))
        answers = torch.einsum("bkc,kca->bka", seen, self.ask) + self.bias
        place = attention @ self.cells
        scene = self.scene(features.mean((2, 3))).float()
        colors = len(COLOR_NAMES)
        return Answers(
            background=scene[:, : len(BACKGROUNDS)],
            paper=scene[:, len(BACKGROUNDS) :],
            there=0.2 * maps.logsumexp(-1) + answers[..., colors],
            doubled=self.counter(maps, self.cells),
            color=answers[..., :colors],
            scale=answers[..., colors + 1],
            place=place,
        )


class Counter(nn.Module):
    """One thing or two of a kind? By how much of the picture its map marks, and how widely that is spread."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.threshold = nn.Parameter(torch.ones(len(KINDS))), nn.Parameter(torch.zeros(len(KINDS)))
        self.weight, self.bias = nn.Parameter(torch.zeros(len(KINDS), 3)), nn.Parameter(torch.zeros(len(KINDS)))

    def forward(self, maps: Tensor, cells: Tensor) -> Tensor:
        """maps (B, K, N) and the cells' places (N, 2) -> logits (B, K)."""
        marked = (self.gain[:, None] * (maps - self.threshold[:, None])).sigmoid()
        area = marked.sum(-1, keepdim=True) + 1e-3
        middle = marked @ cells / area
        spread = marked @ cells.square() / area - middle.square()
        return (torch.cat([20 * spread, area / 10], -1) * self.weight).sum(-1) + self.bias


def _layer(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> tuple[nn.Module, ...]:
    return (nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def to_eye(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size as (B, 3, 128, 128) in -1..1."""
    small = [
        image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        if image.size != (SIDE, SIDE)
        else image.convert("RGB")
        for image in images
    ]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_eye(eye: Eye, path: Path = EYE) -> None:
    """Store the weights in float16 (batch counters, which only training needs, are left out)."""
    kept = {name: tensor.half().contiguous() for name, tensor in eye.state_dict().items() if tensor.is_floating_point()}
    save_file(kept, path)


def load_eye(path: Path = EYE) -> Eye:
    """The trained eye, in float32, ready to look."""
    eye = Eye()
    missing, unexpected = eye.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    wrong = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected
    if wrong:
        raise ValueError(f"{path} is not the judge's file: {', '.join(wrong)}")
    return eye.eval()
