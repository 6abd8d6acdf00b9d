"""The parts of a ControlNet that no oracle has: MistoLine's output and its stem."""

import pytest
import torch
import torch.nn.functional as F

from fluxcanvas.flux_runtime.bind import Inputs, with_residuals
from fluxcanvas.flux_runtime.model.sidenet import SideNet, SideNetParams
from fluxcanvas.flux_runtime.model.transformer import Residuals
from fluxcanvas.flux_runtime.model.trunk import Context
from fluxcanvas.flux_runtime.sidenets import spread
from fluxcanvas.flux_runtime.variants import FluxParams

TRUNK = FluxParams(64, 64, 12, 20, 32, 2, 64, 2, 1, (4, 6, 6))
STEM = [(3, 1), (1, 1), (3, 1), (3, 2), (3, 1), (3, 2), (3, 1), (3, 2), (1, 1), (3, 1)]  # kernel, stride


@pytest.fixture(scope="module")
def nets():
    """An XLabs net, and a MistoLine net with the same trunk and the same output projections."""
    torch.manual_seed(0)
    xlabs, mistoline = (SideNet(SideNetParams(TRUNK, hint)).eval() for hint in ("xlabs", "mistoline"))
    weights = {name: torch.randn_like(value) * 0.2 for name, value in xlabs.state_dict().items()}
    xlabs.load_state_dict(weights)
    same = {n: w for n, w in weights.items() if not n.startswith(("input_hint_block", "controlnet_blocks."))}
    same = {n: w for n, w in same.items() if not n.startswith("controlnet_single_blocks.")}
    mistoline.load_state_dict(same, strict=False)
    for name in ("controlnet_blocks", "controlnet_single_blocks"):
        for theirs, ours in zip(getattr(xlabs, name), getattr(mistoline, name), strict=True):
            ours.linear.load_state_dict(theirs.state_dict())
    return xlabs, mistoline


@torch.no_grad()
def test_mistoline_adds_the_silu_of_what_a_plain_net_adds(nets):
    xlabs, mistoline = nets
    img, txt, hint = torch.randn(1, 6, 64), torch.randn(1, 3, 20), torch.randn(1, 6, 32)
    context = xlabs.prepare(txt, torch.zeros(9, 3))
    modulation = xlabs.modulate(xlabs.embed(torch.tensor([0.5]), torch.tensor([3.5]), torch.randn(1, 12)))
    plain = xlabs(img, hint, Context(context.txt, context.rope), modulation)
    silu = mistoline(img, hint, Context(context.txt, context.rope), modulation)
    assert len(silu.double) == 2
    assert len(silu.single) == 1
    for a, b in zip((*plain.double, *plain.single), (*silu.double, *silu.single), strict=True):
        assert torch.allclose(b, F.silu(a), atol=1e-6)
        assert not torch.allclose(b, a, atol=1e-3)


@torch.no_grad()
def test_mistolines_stem_is_ten_convolutions(nets):
    stem = nets[1].input_cond_block
    x = expected = torch.rand(1, 3, 32, 48) * 2 - 1
    layers = [layer for layer in stem.encoder if isinstance(layer, torch.nn.Conv2d)]
    for index, (layer, (kernel, stride)) in enumerate(zip(layers, STEM, strict=True)):
        expected = F.conv2d(expected, layer.weight, layer.bias, stride=stride, padding=kernel // 2)
        expected = F.silu(expected) if index < len(STEM) - 1 else expected
    assert torch.allclose(stem(x), expected, atol=1e-6)
    assert stem(x).shape == (1, 16, 4, 6)
    assert nets[1].hint_tokens(x).shape == (1, 6, 32)


def test_two_nets_hold_no_more_sums_than_they_have_residuals():
    """A net's few residuals serve many blocks each; so must the sums, which are as large as the image stream."""
    short, long = (tuple(torch.randn(1, 4, 8) for _ in range(count)) for count in (2, 3))
    first, second = (spread(Residuals(own, own), 1.0, 19, 38, in_runs=True) for own in (short, long))
    nothing = Inputs(torch.zeros(1, 4, 8), None, None, None, 1.0)
    both = with_residuals(with_residuals(nothing, first), second).residuals
    assert all(torch.equal(s, a + b) for s, a, b in zip(both.single, first.single, second.single, strict=True))
    assert len({id(tensor) for tensor in both.single}) == len({id(tensor) for tensor in both.double}) == 4
