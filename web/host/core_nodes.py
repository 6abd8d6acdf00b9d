"""LoadImage, LoadImageMask, SaveImage and PreviewImage under ComfyUI's ids, so that workflow files travel both ways.

Registered by the embedded host alone: inside ComfyUI its own nodes of these names are there.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...flux_runtime.errors import FluxError
from ...flux_runtime.image import rgb
from .files import PathError, Taken
from .folders import Folders
from .pictures import (
    SUFFIXES,
    channel_mask,
    frames,
    hole_mask,
    next_name,
    open_picture,
    png_info,
    save_png,
    to_picture,
)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _FromInput:
    """What the two loaders share: the list of input pictures, and checks of the chosen one."""

    folders: ClassVar[Folders]
    RELATIVE_PYTHON_MODULE = "nodes"

    @classmethod
    def _choices(cls) -> tuple[list[str], dict[str, Any]]:
        root = cls.folders.input
        names = sorted(path.name for path in root.iterdir() if path.suffix.lower() in SUFFIXES) if root.is_dir() else []
        return names, {"image_upload": True}

    @classmethod
    def _path(cls, image: str) -> Path:
        path = cls.folders.annotated(image)
        if not path.is_file():
            raise FluxError(f"The picture {image!r} is not in the input folder; upload it or choose another.")
        return path

    @classmethod
    def IS_CHANGED(cls, image: str, **_: Any) -> str:
        return file_hash(cls._path(image))

    @classmethod
    def VALIDATE_INPUTS(cls, image: str | None) -> bool | str:
        if image is None:  # linked: judged when it is known
            return True
        try:
            cls._path(image)
        except FluxError as error:
            return str(error)
        return True


class LoadImage(_FromInput):
    """An input picture as IMAGE, and as MASK where it is transparent."""

    DESCRIPTION = "Loads a picture from the input folder. The mask is white where the picture is transparent."
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    SEARCH_ALIASES = ["open image", "import image", "upload", "photo"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": cls._choices()}}

    def load_image(self, image: str) -> tuple[Tensor, Tensor]:
        pictures = frames(open_picture(self._path(image), image))
        return torch.stack([rgb(one) for one in pictures]), torch.stack([hole_mask(one) for one in pictures])


class LoadImageMask(_FromInput):
    """One channel of an input picture as MASK."""

    DESCRIPTION = "Loads one channel of a picture as a mask; from the alpha channel, transparent becomes white."
    CATEGORY = "mask"
    RETURN_TYPES = ("MASK",)
    FUNCTION = "load_image"
    CHANNELS = ["alpha", "red", "green", "blue"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": cls._choices(), "channel": (cls.CHANNELS,)}}

    def load_image(self, image: str, channel: str) -> tuple[Tensor]:
        picture = frames(open_picture(self._path(image), image))[0]
        mask = hole_mask(picture) if channel == "alpha" else channel_mask(picture, channel[0].upper())
        return (mask.unsqueeze(0),)


class SaveImage:
    """Saves pictures as PNG in the output folder, with the prompt and the workflow in them."""

    folders: ClassVar[Folders]
    RELATIVE_PYTHON_MODULE = "nodes"
    DESCRIPTION = (
        "Saves the pictures in the output folder. Drag a saved picture onto the canvas to get its workflow back."
    )
    CATEGORY = "image"
    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["save", "export image", "output", "write image"]
    kind: ClassVar[str] = "output"
    compress_level: ClassVar[int] = 4

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = {
            "default": "ComfyUI",
            "tooltip": "How file names begin; may name a sub-folder (cats/tom) and hold "
            "%width%, %height%, %year%, %month%, %day% and %batch_num%.",
        }
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The pictures to save."}),
                "filename_prefix": ("STRING", prefix),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(
        self,
        images: Tensor,
        filename_prefix: str = "ComfyUI",
        prompt: Any = None,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        if images.ndim != 4 or 0 in images.shape:
            raise FluxError(f"Images of shape {tuple(images.shape)} cannot be saved; (batch, height, width, 3) can.")
        try:
            folder, below, stem, number = next_name(
                self.folders.directory(self.kind), filename_prefix, images.shape[2], images.shape[1]
            )
        except PathError as error:
            raise FluxError(f"The filename_prefix {filename_prefix[:80]!r} cannot be used. {error}") from error
        info = png_info(prompt, extra_pnginfo)
        saved = []
        for index, image in enumerate(images):
            name, number = self._save(to_picture(image), folder, stem.replace("%batch_num%", str(index)), number, info)
            saved.append({"filename": name, "subfolder": below, "type": self.kind})
        return {"ui": {"images": saved}}

    def _save(self, picture: Image.Image, folder: Path, stem: str, number: int, info: PngInfo) -> tuple[str, int]:
        """Save under the first free number from `number` on: another program may save to the same folder."""
        while True:
            name, number = f"{stem}_{number:05}_.png", number + 1
            try:
                save_png(picture, folder / name, info, self.compress_level)
                return name, number
            except Taken:
                continue


class PreviewImage(SaveImage):
    """Shows pictures on the node; they are kept only while the server runs."""

    DESCRIPTION = "Shows the pictures on the node without keeping them."
    FUNCTION = "preview_images"
    SEARCH_ALIASES = ["show image", "view", "display image"]
    kind = "temp"
    compress_level = 1

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}, "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}}

    def preview_images(
        self, images: Tensor, prompt: Any = None, extra_pnginfo: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        # A random prefix: a browser that kept the picture of an earlier server must not show it for this one's.
        return self.save_images(images, f"preview_{secrets.token_hex(4)}", prompt, extra_pnginfo)


DISPLAY_NAMES = {
    "LoadImage": "Load Image",
    "LoadImageMask": "Load Image (as Mask)",
    "SaveImage": "Save Image",
    "PreviewImage": "Preview Image",
}


def core_nodes(folders: Folders) -> dict[str, type]:
    """The four node classes bound to these folders, by their ids."""
    return {
        cls.__name__: type(cls.__name__, (cls,), {"folders": folders})
        for cls in (LoadImage, LoadImageMask, SaveImage, PreviewImage)
    }
