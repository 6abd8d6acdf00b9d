"""LoadImage, LoadImageMask, SaveImage and PreviewImage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.web.host.core_nodes import core_nodes
from fluxcanvas.web.host.folders import Folders
from fluxcanvas.web.host.node_info import node_info


@pytest.fixture
def folders(tmp_path):
    made = Folders(tmp_path / "base")
    made.create()
    yield made
    made.close()


@pytest.fixture
def nodes(folders):
    return core_nodes(folders)


def load(nodes, name: str):
    return nodes["LoadImage"]().load_image(name)


def test_their_definitions_are_comfyuis(nodes, folders):
    for name in ("b.png", "a.jpg", "notes.txt"):
        (folders.input / name).write_bytes(b"x")
    info = {name: node_info(name, cls) for name, cls in nodes.items()}
    assert info["LoadImage"]["input"] == {"required": {"image": [["a.jpg", "b.png"], {"image_upload": True}]}}
    assert info["LoadImage"]["output"] == ["IMAGE", "MASK"]
    assert list(info["LoadImageMask"]["input"]["required"]) == ["image", "channel"]
    assert info["LoadImageMask"]["input"]["required"]["channel"][0] == ["alpha", "red", "green", "blue"]
    assert list(info["SaveImage"]["input"]["required"]) == ["images", "filename_prefix"]
    assert info["SaveImage"]["input"]["hidden"] == {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    assert info["SaveImage"]["output_node"] and info["PreviewImage"]["output_node"]
    assert list(info["PreviewImage"]["input"]["required"]) == ["images"]


def test_an_rgb_picture(nodes, folders):
    Image.new("RGB", (6, 4), (255, 0, 51)).save(folders.input / "a.png")
    image, mask = load(nodes, "a.png")
    assert image.shape == (1, 4, 6, 3) and image.dtype == torch.float32
    assert torch.allclose(image[0, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert mask.shape == (1, 4, 6) and not mask.any()


def test_transparency_becomes_the_mask_and_keeps_its_colour(nodes, folders):
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 255, 0, 51))
    picture.save(folders.input / "a.png")
    image, mask = load(nodes, "a.png")
    assert image[0, 0, 1].tolist() == [0.0, 1.0, 0.0]
    assert torch.allclose(mask[0, 0], torch.tensor([0.0, 0.8]))


def test_a_turned_photo_is_upright(nodes, folders):
    picture = Image.new("RGB", (4, 2), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to view
    picture.save(folders.input / "a.png", exif=exif)
    image, mask = load(nodes, "a.png")
    assert image.shape == (1, 4, 2, 3) and mask.shape == (1, 4, 2)
    assert image[0, 0, 1].tolist() == [1.0, 1.0, 1.0]


def test_sixteen_bits(nodes, folders):
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(folders.input / "a.png")
    image, mask = load(nodes, "a.png")
    assert torch.allclose(image[0, 0, :, 0], torch.tensor([0.0, 32768 / 65535, 1.0]))
    assert torch.equal(image[..., 0], image[..., 2]) and not mask.any()
    (mask,) = nodes["LoadImageMask"]().load_image("a.png", "red")
    assert torch.allclose(mask[0, 0], torch.tensor([0.0, 32768 / 65535, 1.0]))


def test_grey_palette_and_one_bit_pictures(nodes, folders):
    Image.new("L", (2, 2), 51).save(folders.input / "grey.png")
    assert torch.allclose(load(nodes, "grey.png")[0], torch.full((1, 2, 2, 3), 0.2))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(folders.input / "palette.png", transparency=1)
    image, mask = load(nodes, "palette.png")
    assert image[0, 0].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]] and mask[0, 0].tolist() == [0.0, 1.0]
    Image.new("1", (2, 2), 1).save(folders.input / "bits.png")
    assert load(nodes, "bits.png")[0].min() == 1
    Image.new("LA", (2, 2), (255, 0)).save(folders.input / "la.png")
    assert load(nodes, "la.png")[1].min() == 1
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(folders.input / "cmyk.jpg")
    assert load(nodes, "cmyk.jpg")[0].min() == 1
    Image.fromarray(np.array([[0.25, np.nan]], dtype=np.float32)).save(folders.input / "float.tiff")
    assert load(nodes, "float.tiff")[0][0, 0, :, 0].tolist() == [0.25, 0.0]


def test_the_frames_of_a_moving_picture_are_a_batch(nodes, folders):
    frames = [Image.new("RGB", (3, 3), color) for color in ("red", "lime", "blue")]
    frames[0].save(folders.input / "a.webp", save_all=True, append_images=frames[1:], lossless=True, duration=10)
    image, mask = load(nodes, "a.webp")
    assert image.shape == (3, 3, 3, 3) and mask.shape == (3, 3, 3)
    assert image[1, 0, 0].tolist() == [0.0, 1.0, 0.0]


def test_channels_as_masks(nodes, folders):
    Image.new("RGBA", (2, 2), (255, 51, 0, 204)).save(folders.input / "a.png")
    mask = {
        channel: nodes["LoadImageMask"]().load_image("a.png", channel)[0]
        for channel in ("alpha", "red", "green", "blue")
    }
    assert mask["red"].shape == (1, 2, 2) and mask["red"].min() == 1 and mask["blue"].max() == 0
    assert torch.allclose(mask["green"], torch.tensor(0.2)) and torch.allclose(mask["alpha"], torch.tensor(0.2))
    Image.new("RGB", (2, 2), "white").save(folders.input / "opaque.png")
    assert nodes["LoadImageMask"]().load_image("opaque.png", "alpha")[0].max() == 0


def test_a_picture_changes_with_its_content_alone(nodes, folders):
    path = folders.input / "a.png"
    Image.new("RGB", (2, 2), "red").save(path)
    before, data = nodes["LoadImage"].IS_CHANGED(image="a.png"), path.read_bytes()
    path.write_bytes(data)
    assert nodes["LoadImage"].IS_CHANGED(image="a.png") == before
    Image.new("RGB", (2, 2), "blue").save(path)
    assert nodes["LoadImage"].IS_CHANGED(image="a.png") != before
    assert nodes["LoadImageMask"].IS_CHANGED(image="a.png", channel="red") == nodes["LoadImage"].IS_CHANGED(
        image="a.png"
    )


@pytest.mark.parametrize("name", ["gone.png", "../x.png", "/etc/passwd", "a\\b.png", "x\0", "", "sub"])
def test_a_name_that_is_no_picture_is_refused(nodes, folders, name):
    (folders.input / "sub").mkdir()
    (folders.base / "x.png").write_bytes(b"x")
    said = nodes["LoadImage"].VALIDATE_INPUTS(name)
    assert isinstance(said, str) and said.endswith(".")


def test_a_name_in_another_folder_is_found(nodes, folders):
    Image.new("RGB", (2, 2), "red").save(folders.output / "a.png")
    assert nodes["LoadImage"].VALIDATE_INPUTS("a.png [output]") is True
    assert load(nodes, "a.png [output]")[0].shape == (1, 2, 2, 3)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"%!PS-Adobe", b"<svg/>"])
def test_a_file_that_is_no_picture_is_named(nodes, folders, content):
    (folders.input / "bad.png").write_bytes(content)
    with pytest.raises(FluxError, match=r"bad\.png"):
        load(nodes, "bad.png")


def test_saved_pictures_carry_prompt_and_workflow(nodes, folders):
    image = torch.rand(2, 4, 6, 3)
    prompt, workflow = {"1": {"class_type": "X", "inputs": {"text": "für ☃"}}}, {"nodes": [1]}
    told = nodes["SaveImage"]().save_images(image, "cats/tom", prompt, {"workflow": workflow})
    names = told["ui"]["images"]
    assert names == [{"filename": f"tom_0000{n}_.png", "subfolder": "cats", "type": "output"} for n in (1, 2)]
    picture = Image.open(folders.output / "cats" / "tom_00001_.png")
    assert json.loads(picture.text["prompt"]) == prompt and json.loads(picture.text["workflow"]) == workflow
    pixels = torch.from_numpy(np.asarray(picture).copy()).float() / 255
    assert (pixels - image[0]).abs().max() <= 0.5 / 255 + 1e-6
    again = nodes["SaveImage"]().save_images(image, "cats/tom")
    assert again["ui"]["images"][0]["filename"] == "tom_00003_.png"


def test_what_png_cannot_name_is_left_out_with_a_word(nodes, folders, caplog):
    extra = {"\u6f22": 1, "\ud83e": 1, "": 1, "x" * 80: 1, "a\0b": 1, "workflow": 2}
    nodes["SaveImage"]().save_images(torch.rand(1, 2, 2, 3), "a", {}, extra)
    with Image.open(folders.output / "a_00001_.png") as picture:
        assert picture.text == {"prompt": "{}", "workflow": "2"}
    assert caplog.text.count("is left out of the picture") == 5


def test_a_prefix_that_leaves_no_room_for_the_number_is_told(nodes):
    with pytest.raises(FluxError, match="Choose a shorter name"):
        nodes["SaveImage"]().save_images(torch.rand(1, 2, 2, 3), "x" * 250)


def test_no_saved_picture_is_ever_overwritten(nodes, folders):
    for _ in range(2):
        nodes["SaveImage"]().save_images(torch.rand(2, 2, 2, 3), "n%batch_num%_%width%x%height%")
    assert sorted(path.name for path in folders.output.iterdir()) == [
        "n0_2x2_00001_.png",
        "n0_2x2_00003_.png",
        "n1_2x2_00002_.png",
        "n1_2x2_00004_.png",
    ]


def test_a_name_that_another_program_took_meanwhile_is_skipped(nodes, folders, monkeypatch):
    from fluxcanvas.web.host import core_nodes as module

    monkeypatch.setattr(module, "next_name", lambda root, *_: (root, "", "a", 1))  # as if seen before the other saved
    for _ in range(2):
        told = nodes["SaveImage"]().save_images(torch.rand(2, 2, 2, 3), "a")["ui"]["images"]
    assert [image["filename"] for image in told] == ["a_00003_.png", "a_00004_.png"]


@pytest.mark.parametrize("prefix", ["../out", "/tmp/out", "a\\b", "C:x", "a\0b", "x" * 300])
def test_a_prefix_cannot_lead_out(nodes, folders, prefix):
    with pytest.raises(FluxError, match="filename_prefix"):
        nodes["SaveImage"]().save_images(torch.rand(1, 2, 2, 3), prefix)
    assert not list(folders.output.iterdir())


def test_an_empty_prefix_gets_a_name(nodes, folders):
    assert (
        nodes["SaveImage"]().save_images(torch.rand(1, 2, 2, 3), "")["ui"]["images"][0]["filename"]
        == "image_00001_.png"
    )


@pytest.mark.parametrize("shape, mode", [((1, 2, 2, 4), "RGBA"), ((1, 2, 2, 1), "L")])
def test_other_channel_counts(nodes, folders, shape, mode):
    name = nodes["SaveImage"]().save_images(torch.full(shape, float("nan")), "a")["ui"]["images"][0]["filename"]
    assert Image.open(folders.output / name).mode == mode


@pytest.mark.parametrize("shape", [(2, 2, 3), (1, 2, 2, 2), (0, 2, 2, 3), (1, 0, 2, 3)])
def test_what_is_no_image_is_told(nodes, shape):
    with pytest.raises(FluxError, match="cannot be saved"):
        nodes["SaveImage"]().save_images(torch.zeros(shape), "a")


def test_previews_are_temporary(nodes, folders):
    (image,) = nodes["PreviewImage"]().preview_images(torch.rand(1, 2, 2, 3), {"p": 1})["ui"]["images"]
    assert image["type"] == "temp" and (folders.temp / image["filename"]).is_file()
    assert not list(folders.output.iterdir())


def test_a_full_disk_while_saving(nodes, monkeypatch):
    import errno

    from fluxcanvas.web.host import files

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FluxError, match="No space is left"):
        nodes["SaveImage"]().save_images(torch.rand(1, 2, 2, 3), "a")
