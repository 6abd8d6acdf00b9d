"""Pictures of any mode become the same tensors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.image import as_images, drawable, to_pil


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((60, 40), Image.Resampling.NEAREST)


def levels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_the_same_in_every_mode(picture, mode):
    converted = (
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64) if mode == "P" else picture.convert(mode)
    )
    assert torch.equal(as_images(converted), levels(picture))


def test_sixteen_bits_are_not_clipped():
    ramp = np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16)
    images = as_images(Image.fromarray(ramp))
    assert images.shape == (1, 40, 60, 3)
    assert (images[0, ..., 0] - torch.from_numpy(ramp.astype(np.float32) / 65535)).abs().max() < 0.003


def test_a_picture_is_turned_upright(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    assert torch.equal(as_images(Image.open(file)), levels(picture.transpose(Image.Transpose.ROTATE_270)))


def test_arrays_and_tensors_in_either_order(picture):
    images = levels(picture)
    assert torch.equal(as_images(images.permute(0, 3, 1, 2)), images)
    assert torch.equal(as_images(images[0].numpy()), images)
    assert torch.equal(as_images(np.asarray(picture)), images)
    with pytest.raises(FluxError, match="is none"):
        as_images(torch.zeros(2, 5, 6, 7))


def test_resizing_is_lanczos(picture):
    expected = levels(picture.resize((32, 48), Image.Resampling.LANCZOS))
    assert torch.equal(as_images(picture, 32, 48), expected)
    assert to_pil(expected)[0].size == (32, 48)


@pytest.mark.parametrize("size", [(0, 64), (64, 15), (100000, 64)])
def test_sizes_beyond_reason_are_refused(size):
    with pytest.raises(FluxError, match="cannot be drawn"):
        drawable(*size, 16)
