import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.model.vae import AutoEncoder, VaeParams
from fluxcanvas.flux_runtime.variants import VARIANTS, FluxParams, default_axes, params_from_shapes, recognise


def shapes_of(params: FluxParams) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in FluxTransformer(params).named_parameters()}


@pytest.mark.parametrize(
    ("params", "count"),
    [
        (FluxParams(guidance_embed=False), 11_891_178_560),
        (FluxParams(), 11_901_408_320),
        (FluxParams(in_channels=128), 11_901_604_928),
        (FluxParams(in_channels=384), 11_902_391_360),
    ],
    ids=["schnell", "dev", "canny and depth", "fill"],
)
def test_the_published_sizes(params, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in FluxTransformer(params).parameters()) == count


def test_the_published_vae():
    with torch.device("meta"):
        parameters = list(AutoEncoder(VaeParams()).parameters())
    assert len(parameters) == 244
    assert sum(p.numel() for p in parameters) == 83_819_683


@pytest.mark.parametrize(
    "params",
    [
        FluxParams(),
        FluxParams(64, 64, 40, 48, 96, 3, 200, 2, 0, (4, 14, 14), guidance_embed=False),
        FluxParams(384, 64, 128, 128, 192, 6, 768, 1, 4, (4, 14, 14)),
    ],
    ids=["dev", "small schnell", "small fill"],
)
def test_shapes_tell_the_parameters(params):
    assert params_from_shapes(shapes_of(params)) == params


def test_a_missing_tensor_is_named():
    shapes = shapes_of(FluxParams(depth=1, depth_single=1))
    del shapes["txt_in.weight"]
    with pytest.raises(FluxError, match=r"txt_in\.weight"):
        params_from_shapes(shapes)


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (32, (4, 14, 14)), (24, (4, 10, 10))]
)
def test_default_axes(head_dim, axes):
    assert default_axes(head_dim) == axes


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(FluxError, match="rope axes"):
        FluxParams(axes_dim=(16, 56, 50))


@pytest.mark.parametrize(
    ("in_channels", "guidance", "hint", "name"),
    [
        (64, False, "", "schnell"),
        (64, True, "", "dev"),
        (64, True, "flux1-krea-dev.safetensors", "krea"),
        (64, True, "black-forest-labs/FLUX.1-Kontext-dev", "kontext"),
        (128, True, "", "canny"),
        (128, True, "flux1-depth-dev", "depth"),
        (384, True, "whatever", "fill"),
    ],
)
def test_recognition_is_by_shape_then_by_name(in_channels, guidance, hint, name):
    assert recognise(FluxParams(in_channels=in_channels, guidance_embed=guidance), hint) is VARIANTS[name]


def test_an_unknown_channel_count_is_refused():
    with pytest.raises(FluxError, match="96 input channels"):
        recognise(FluxParams(in_channels=96))
