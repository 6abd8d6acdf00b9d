"""Control images: Canny is OpenCV's own; depth is image_gen_aux's recipe, with it and without it."""

from __future__ import annotations

import builtins
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.preprocess.canny import canny
from fluxcanvas.flux_runtime.preprocess.depth import DepthEstimator


def pictures(batch: int, height: int, width: int) -> torch.Tensor:
    """Soft blobs of colour on 8-bit levels: they have edges and a depth."""
    grid = torch.rand(batch, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(grid, size=(height, width), mode="bicubic").clamp(0, 1)
    return ((smooth * 255).round() / 255).permute(0, 2, 3, 1)


def without(monkeypatch, name: str) -> None:
    """Let the import of a module fail."""
    real = builtins.__import__

    def refuse(module, *rest, **options):
        if module.split(".")[0] == name:
            raise ImportError(f"No module named {name!r}")
        return real(module, *rest, **options)

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize("thresholds", [(50, 200), (10, 20), (0, 0)])
def test_canny_is_opencvs(thresholds):
    import cv2

    images = pictures(2, 40, 56)
    edges = canny(images, *thresholds)
    assert edges.shape == images.shape and set(edges.unique().tolist()) <= {0.0, 1.0}
    for picture, found in zip(images, edges, strict=True):
        expected = cv2.Canny((picture * 255).round().byte().numpy(), *thresholds)
        assert all(np.array_equal(found[..., c].numpy() * 255, expected) for c in range(3))


def test_canny_finds_a_square():
    image = torch.zeros(1, 40, 40, 3)
    image[:, 10:30, 10:30] = 1
    edges = canny(image)[0, ..., 0]
    assert edges[8:12, 20].max() == 1 and edges[20, 20] == 0 and edges[:7].max() == 0


@pytest.mark.parametrize("thresholds", [(200, 50), (-1, 50)])
def test_cannys_thresholds_are_checked(thresholds):
    with pytest.raises(FluxError, match="low <= high"):
        canny(pictures(1, 16, 16), *thresholds)


def test_canny_without_opencv_says_what_to_install(monkeypatch):
    without(monkeypatch, "cv2")
    with pytest.raises(FluxError, match=r"pip install fluxcanvas\[preprocess\]"):
        canny(pictures(1, 16, 16))


def processor_class() -> type:
    """The processor that needs no torchvision; it has had this name since transformers 5."""
    import transformers

    return getattr(transformers, "DPTImageProcessorPil", None) or transformers.DPTImageProcessor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, save_depth_model):
    folder = tmp_path_factory.mktemp("depth")
    torch.manual_seed(0)
    levels = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    save_depth_model(folder, keep_aspect_ratio=True, **levels)
    return folder


@pytest.fixture(scope="module")
def estimator(checkpoint):
    return DepthEstimator.load(checkpoint, device="cpu")


class Auxiliary:
    """What image_gen_aux.DepthPreprocessor does with a tensor."""

    def __init__(self, model):
        self.model = model

    def __call__(self, image, return_type="pil"):
        assert return_type == "pt"
        depth = F.interpolate(self.model(image).predicted_depth[:, None], size=image.shape[2:], mode="bilinear")
        return ((depth - depth.min()) / (depth.max() - depth.min())).clamp(0, 1)


def test_depth_is_image_gen_auxs_recipe(estimator):
    images = pictures(2, 45, 75)  # no multiples of the patch: the model's map is smaller
    maps = estimator.estimate(images)
    assert maps.shape == images.shape and maps.dtype == torch.float32
    assert torch.equal(maps[..., 0], maps[..., 1]) and torch.equal(maps[..., 0], maps[..., 2])
    for picture, found in zip(images, maps, strict=True):
        with torch.inference_mode():
            expected = Auxiliary(estimator.model)(picture[None].permute(0, 3, 1, 2), "pt")
        assert torch.allclose(found[..., 0], expected[0, 0], atol=1e-6)
        assert found.min() == 0 and found.max() == 1


def test_with_image_gen_aux_the_maps_are_the_same(checkpoint, estimator, monkeypatch):
    monkeypatch.setitem(sys.modules, "image_gen_aux", types.SimpleNamespace(DepthPreprocessor=Auxiliary))
    with_it = DepthEstimator.load(checkpoint, device="cpu")
    assert isinstance(with_it.auxiliary, Auxiliary) and estimator.auxiliary is None
    images = pictures(2, 42, 70)
    assert torch.allclose(with_it.estimate(images), estimator.estimate(images), atol=1e-6)


def test_an_image_gen_aux_that_does_not_start_is_told(checkpoint, monkeypatch, caplog):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "image_gen_aux", Broken("image_gen_aux"))
    assert DepthEstimator.load(checkpoint, device="cpu").auxiliary is None
    assert "torchvision::nms" in caplog.text


def test_a_map_does_not_depend_on_its_neighbours(estimator):
    images = pictures(3, 42, 42)
    images[1] *= 0.1
    together = estimator.estimate(images)
    alone = torch.cat([estimator.estimate(one[None]) for one in images])
    assert torch.equal(together, alone)


def test_prepared_goes_through_the_processor(estimator):
    images = pictures(1, 60, 90)
    processor = estimator.processor
    assert type(processor) is processor_class()
    inputs = processor((images[0] * 255).round().byte().numpy(), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        depth = estimator.model(inputs).predicted_depth[:, None]
        depth = F.interpolate(depth, size=(60, 90), mode="bicubic", antialias=True)[0, 0]
    expected = (depth - depth.min()) / (depth.max() - depth.min())
    found = estimator.estimate(images, "prepared")
    assert torch.allclose(found[0, ..., 0], expected, atol=1e-5)
    assert not torch.allclose(found, estimator.estimate(images), atol=1e-2)


def test_inverted_and_flat_maps(estimator):
    images = pictures(1, 42, 42)
    assert torch.allclose(estimator.estimate(images, invert=True), 1 - estimator.estimate(images))
    weights = {name: torch.zeros_like(value) for name, value in estimator.model.state_dict().items()}
    flat = type(estimator.model)(estimator.model.config).eval()
    flat.load_state_dict(weights)
    assert DepthEstimator(flat, estimator.processor).estimate(images).max() == 0


def test_depth_refusals(estimator, tmp_path):
    with pytest.raises(FluxError, match="plain, prepared"):
        estimator.estimate(pictures(1, 42, 42), "best")
    with pytest.raises(FluxError, match="14 pixels or more"):
        estimator.estimate(pictures(1, 10, 42))
    with pytest.raises(FluxError, match="cannot be loaded as a depth model"):
        DepthEstimator.load(tmp_path)
    with pytest.raises(FluxError, match="neither a folder nor"):
        DepthEstimator.load("depth.safetensors")


def test_checkpoints_of_another_kind_or_with_holes(checkpoint, tmp_path):
    import shutil

    import transformers
    from safetensors.torch import load_file, save_file

    tiny = dict(hidden_size=16, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1)
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**tiny)).save_pretrained(tmp_path / "clip")
    with pytest.raises(FluxError, match="cannot be loaded as a depth model"):
        DepthEstimator.load(tmp_path / "clip")
    holed = tmp_path / "holed"
    shutil.copytree(checkpoint, holed)
    tensors = load_file(holed / "model.safetensors")
    tensors.pop("head.conv1.weight")
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FluxError, match=r"1 of its tensors are missing \(head.conv1.weight"):
        DepthEstimator.load(holed, device="cpu")
