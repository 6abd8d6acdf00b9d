"""What a FLUX.1 transformer can be: its shape (`FluxParams`) and the published variants, recognised offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import FluxError

CANVAS_CHANNELS = 64  # 16 latent channels in 2x2 patches
CONTROL_CHANNELS = 2 * CANVAS_CHANNELS  # canvas and control image (Canny, Depth)
FILL_CHANNELS = 6 * CANVAS_CHANNELS  # canvas, masked image, and an 8x8 mask per latent (256 channels when packed)


@dataclass(frozen=True)
class FluxParams:
    """Everything the transformer's tensors depend on; the defaults are FLUX.1-dev."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    num_heads: int = 24
    mlp_hidden: int = 12288
    depth: int = 19
    depth_single: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise FluxError(f"hidden size {self.hidden_size} is not a multiple of the {self.num_heads} heads")
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise FluxError(f"rope axes {self.axes_dim} must be even and sum to the head size {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Variant:
    """A published FLUX.1 model: where it comes from and the settings its makers recommend."""

    name: str
    repo_id: str
    steps: int
    guidance: float
    max_tokens: int = 512
    dynamic_shift: bool = True  # the sigmas shift with the number of image tokens; schnell's do not
    in_channels: int = CANVAS_CHANNELS
    guidance_embed: bool = True


VARIANTS = {
    v.name: v
    for v in (
        Variant("schnell", "black-forest-labs/FLUX.1-schnell", 4, 0.0, 256, dynamic_shift=False, guidance_embed=False),
        Variant("dev", "black-forest-labs/FLUX.1-dev", 28, 3.5),
        Variant("krea", "black-forest-labs/FLUX.1-Krea-dev", 28, 4.5),
        Variant("kontext", "black-forest-labs/FLUX.1-Kontext-dev", 28, 2.5),
        Variant("fill", "black-forest-labs/FLUX.1-Fill-dev", 50, 30.0, in_channels=FILL_CHANNELS),
        Variant("canny", "black-forest-labs/FLUX.1-Canny-dev", 50, 30.0, in_channels=CONTROL_CHANNELS),
        Variant("depth", "black-forest-labs/FLUX.1-Depth-dev", 30, 10.0, in_channels=CONTROL_CHANNELS),
    )
}


def default_axes(head_dim: int) -> tuple[int, int, int]:
    """Rope dimensions (index, row, column) where no config names them: an eighth, and the rest in even halves.

    128 gives FLUX.1's own (16, 56, 56).
    """
    if head_dim < 8 or head_dim % 2:
        raise FluxError(f"a head size of {head_dim} cannot be split into rope axes; it must be even and at least 8")
    side = (head_dim - head_dim // 8) // 4 * 2
    return head_dim - 2 * side, side, side


def params_from_shapes(shapes: Mapping[str, Sequence[int]], axes_dim: Sequence[int] | None = None) -> FluxParams:
    """Read the parameters off tensor shapes under BFL names (without prefix); a missing key tensor is a `FluxError`."""

    def shape(name: str) -> Sequence[int]:
        if name not in shapes:
            raise FluxError(f"this is not a whole FLUX.1 transformer: the tensor {name!r} is missing")
        return shapes[name]

    hidden, in_channels = shape("img_in.weight")
    head_dim = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    return FluxParams(
        in_channels=in_channels,
        out_channels=shape("final_layer.linear.weight")[0],
        vec_in_dim=shape("vector_in.in_layer.weight")[1],
        context_in_dim=shape("txt_in.weight")[1],
        hidden_size=hidden,
        num_heads=hidden // head_dim,
        mlp_hidden=shape("double_blocks.0.img_mlp.0.weight")[0],
        depth=_count(shapes, "double_blocks"),
        depth_single=_count(shapes, "single_blocks"),
        axes_dim=tuple(axes_dim) if axes_dim else default_axes(head_dim),
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


def _count(shapes: Mapping[str, Sequence[int]], stack: str) -> int:
    return 1 + max((int(k.split(".")[1]) for k in shapes if k.startswith(stack + ".")), default=-1)


def recognise(params: FluxParams, hint: str = "") -> Variant:
    """The variant these shapes belong to; `hint` (the name of a variant, file or repo) tells equal shapes apart.

    dev, Krea and Kontext have one shape, Canny and Depth another: without a telling hint the answer is dev, or canny.
    """
    same = [
        v for v in VARIANTS.values() if (v.in_channels, v.guidance_embed) == (params.in_channels, params.guidance_embed)
    ]
    if not same:
        known = ", ".join(f"{v.name} {v.in_channels}" for v in VARIANTS.values())
        raise FluxError(
            f"no FLUX.1 variant has {params.in_channels} input channels with"
            f"{'' if params.guidance_embed else 'out'} a guidance embedding (known: {known})"
        )
    plain = VARIANTS["dev"] if VARIANTS["dev"] in same else same[0]
    named = [v for v in same if v is not plain and v.name in hint.lower()]  # every name but schnell's contains "dev"
    return named[0] if named else plain
