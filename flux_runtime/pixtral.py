"""A picture between two texts, as Pixtral reads it.

transformers' own PixtralProcessor does the same, but it needs torchvision, which is no dependency here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .errors import FluxError
from .pretrained import load_processor, without_torchvision

IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
TURN = "[INST]", "[/INST]"


@dataclass(frozen=True)
class PixtralInputs:
    """Tokenizer and image processor of a Pixtral checkpoint; `patch` is the side of the squares it sees, in pixels."""

    tokenizer: Any
    images: Any
    patch: int

    @classmethod
    def load(cls, source: str | Path, what: str, patch: int) -> PixtralInputs:
        """From a folder or repository; FluxError where the tokenizer lacks what marks turns and pictures."""
        import transformers

        tokenizer = load_processor(transformers.AutoTokenizer, source, what)
        images = load_processor(without_torchvision("PixtralImageProcessor"), source, what)
        unknown = [mark for mark in (IMAGE, BREAK, END, *TURN) if mark not in tokenizer.get_vocab()]
        if unknown or not tokenizer.bos_token:
            raise FluxError(
                f"the tokenizer of {source} does not know {', '.join(unknown or ['how a text begins'])}; name {what}"
            )
        return cls(tokenizer, images, patch)

    def __call__(self, before: str, picture: Image.Image, after: str) -> dict[str, Tensor]:
        """What the model takes, to answer one turn of text, picture (RGB) and text."""
        square = {"height": self.patch, "width": self.patch}
        seen = self.images(images=[picture], patch_size=square, return_tensors="pt")
        height, width = torch.as_tensor(seen["image_sizes"]).flatten().tolist()
        text = f"{self.tokenizer.bos_token}{TURN[0]}{before}{self._marks(height, width)}{after}{TURN[1]}"
        tokens = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "pixel_values": torch.as_tensor(seen["pixel_values"]),
            "image_sizes": torch.tensor([[height, width]]),
        }

    def _marks(self, height: int, width: int) -> str:
        """A mark for each square of the picture, row by row."""
        row = IMAGE * (width // self.patch)
        return BREAK.join([row] * (height // self.patch)) + END

    def word(self, word: str) -> int:
        """The one token of a word."""
        tokens = self.tokenizer.encode(word, add_special_tokens=False)
        if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
            raise FluxError(f"the tokenizer has no single token for {word!r}, so the answer cannot be read")
        return tokens[0]
