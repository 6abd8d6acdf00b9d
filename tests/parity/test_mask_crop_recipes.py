"""The part around the mask alone, in the recipes for which the oracle has no such thing, or never pastes it back."""

import numpy as np
import pytest
from PIL import Image

from fluxcanvas.flux_runtime import recipes

SIZE = {"height": 48, "width": 64}


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((120, 90), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def drawn(pair, net_pair, shape_of):
    """`drawn(name, mask, padding)` -> the picture after that recipe."""

    def draw(name: str, mask: Image.Image, padding: int) -> Image.Image:
        shape = shape_of(in_channels={"control_inpaint": 128, "fill": 384}.get(name, 64))
        own = {
            "control_inpaint": {"control_image": picture(2), **SIZE},
            "controlnet_inpaint": {"control_image": picture(2), "controlnet": net_pair(shape)[1], **SIZE},
            "kontext_inpaint": {"size": "exact", **SIZE},
            "fill": SIZE,
        }[name]
        options = {"steps": 2, "guidance": 3.5, "max_sequence_length": 16, "seed": 1, "strength": 1.0}
        call = getattr(recipes, name)
        image = picture(1)
        return call(pair(shape)[1], "a", image=image, mask=mask, padding_mask_crop=padding, **options, **own)[0]

    return draw


@pytest.mark.parametrize("name", ["control_inpaint", "controlnet_inpaint", "kontext_inpaint", "fill"])
def test_what_is_not_masked_stays_to_the_byte(drawn, name):
    marks = np.zeros((90, 120), dtype=np.uint8)
    marks[30:55, 40:80] = 255
    mask = Image.fromarray(marks)
    source, result = np.asarray(picture(1)), np.asarray(drawn(name, mask, 8))
    assert result.shape == source.shape
    assert np.array_equal(result[marks == 0], source[marks == 0])
    assert np.abs(result[marks > 0].astype(int) - source[marks > 0]).mean() > 5
    assert not np.array_equal(result, np.asarray(drawn(name, mask, 30))), "another padding is another part"
