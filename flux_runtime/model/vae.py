"""The autoencoder of FLUX.1, under the module names of the original `ae.safetensors`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AT_ONCE = 1024**2  # pixels; the activations of the last layers take 1 GB for them in bfloat16


@dataclass(frozen=True)
class VaeParams:
    """Shape of the autoencoder and the affine map between its latents and the transformer's; FLUX.1's by default."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each resolution, finest first
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    groups: int = 32
    scale: float = 0.3611
    shift: float = 0.1159
    sample_size: int = 1024  # the picture side that the model was made for, in pixels

    @property
    def factor(self) -> int:
        """Picture pixels per latent."""
        return 2 ** (len(self.channels) - 1)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = _conv3(in_channels, out_channels)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = _conv3(out_channels, out_channels)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Attention over all pixels with a single head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2)[:, None] for proj in (self.q, self.k, self.v))  # (B, 1, HW, C)
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(seen)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then the step to the next one."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        step = self.downsample or self.upsample
        return x if step is None else step(x)


class Encoder(nn.Module):
    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        widths = [params.channels[0], *params.channels]
        self.conv_in = _conv3(params.in_channels, widths[0])
        self.down = nn.ModuleList(Level(a, b, params.num_res_blocks, params.groups) for a, b in pairwise(widths))
        for level, width in zip(self.down[:-1], params.channels, strict=False):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1], params.groups)
        self.norm_out = _norm(widths[-1], params.groups)
        self.conv_out = _conv3(widths[-1], 2 * params.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        widths = [*params.channels, params.channels[-1]]  # entered from the coarse end; `up` is listed finest first
        self.conv_in = _conv3(params.z_channels, widths[-1])
        self.mid = Middle(widths[-1], params.groups)
        self.up = nn.ModuleList(Level(b, a, params.num_res_blocks + 1, params.groups) for a, b in pairwise(widths))
        for level, width in zip(self.up[1:], params.channels[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = _norm(widths[0], params.groups)
        self.conv_out = _conv3(widths[0], params.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoEncoder(nn.Module):
    """Pictures (B, 3, H, W) in -1..1 <-> raw latents (B, z_channels, H / factor, W / factor)."""

    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def encode(self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """The mean of the latent distribution, or a sample of it where a generator is given (one, or one a picture)."""
        return sample(self.moments(images), generator)

    def moments(self, images: Tensor) -> Tensor:
        """(B, 2 * z_channels, h, w): the mean of the latent distribution and the logarithm of its variance."""
        return torch.cat([self.encoder(part) for part in in_parts(images, 1)])

    def decode(self, latents: Tensor) -> Tensor:
        """Unclamped pictures of raw latents."""
        return torch.cat([self.decoder(part) for part in in_parts(latents, self.params.factor)])


def sample(moments: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """The mean, or a sample where a generator is given (one, or one a picture)."""
    mean, log_variance = moments.chunk(2, dim=1)
    if generator is None:
        return mean
    deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
    return mean + deviation * _randn_like(mean, generator)


def in_parts(batch: Tensor, factor: int) -> tuple[Tensor, ...]:
    """A batch of pictures, `factor` pixels to a point, as many at a time as memory is sure to hold."""
    pixels = batch.shape[-2] * batch.shape[-1] * factor**2
    return batch.split(max(1, AT_ONCE // pixels))


def _randn_like(x: Tensor, generator: torch.Generator | list[torch.Generator]) -> Tensor:
    if isinstance(generator, list):
        return torch.cat([_randn_like(row, g) for row, g in zip(x.split(1), generator, strict=True)])
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device)
    return noise.to(x.device)
