"""Parts of the transformer whose errors a tiny picture does not show, against diffusers'."""

import pytest
import torch

from fluxcanvas.flux_runtime.inpaint import renoise
from fluxcanvas.flux_runtime.model.attention import rope
from fluxcanvas.flux_runtime.model.blocks import DoubleBlock, SingleBlock


@pytest.mark.parametrize("axes", [(16, 56, 56), (4, 14, 14)])
def test_angles_are_exact_far_from_the_corner(axes):
    """In float32 they would be off by 1e-4 here; large pictures have ids above 200, and references lie beyond."""
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.cartesian_prod(
        torch.tensor([0.0, 1.0]), torch.tensor([3.0, 255.0, 1023.0]), torch.arange(0.0, 1024, 31)
    )
    cos, sin = FluxPosEmbed(theta=10_000, axes_dim=list(axes))(ids)
    ours = rope(ids, axes, 10_000)
    assert torch.equal(ours.real, cos[:, ::2]) and torch.equal(ours.imag, sin[:, ::2])


@torch.no_grad()
def test_float16_streams_that_overflow_are_clipped_where_the_oracles_are():
    """The text stream of a double block and the whole of a single one; the image stream of a double block is not."""
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    double, single = DoubleBlock(16, 2, 32).half(), SingleBlock(16, 2, 32).half()
    theirs = FluxTransformerBlock(16, 2, 8).half(), FluxSingleTransformerBlock(16, 2, 8).half()
    for block in (double, single, *theirs):
        for parameter in block.parameters():
            parameter.zero_()
    for last in (double.img_mlp[2], double.txt_mlp[2], single.linear2):
        last.bias.fill_(60000)
    for last in (theirs[0].ff.net[2], theirs[0].ff_context.net[2], theirs[1].proj_out):
        last.bias.fill_(60000)
    for norm in (theirs[0].norm1, theirs[0].norm1_context, theirs[1].norm):
        norm.linear.bias.fill_(1)
    ones = torch.full((1, 3, 16), 10000).half()
    rope_of = {"image_rotary_emb": (torch.ones(6, 8), torch.zeros(6, 8)), "temb": torch.zeros(1, 16).half()}
    txt, img = theirs[0](hidden_states=ones, encoder_hidden_states=ones, **rope_of)
    modulation, turn = torch.ones(1, 1, 96).half(), torch.ones(6, 4, dtype=torch.complex64)
    our_img, our_txt = double(ones, ones, modulation, modulation, turn, None)
    assert torch.equal(our_txt, txt) and torch.equal(our_img, img) and img.isinf().all() and (txt == 65504).all()
    txt, img = theirs[1](hidden_states=ones, encoder_hidden_states=ones, **rope_of)
    both = single(torch.cat([ones, ones], dim=1), modulation[..., :48], turn, None)
    assert torch.equal(both, torch.cat([txt, img], dim=1)) and (both == 65504).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_added_as_the_scheduler_adds_it(dtype):
    """To the bit: the level is rounded to the latents' type first, and so is what is left of them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 1, 64, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    for level, time in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True):
        assert torch.equal(renoise(clean, noise, level), scheduler.scale_noise(clean, time[None], noise))
