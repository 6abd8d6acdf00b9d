"""Pictures that lead the drawing: ControlNets, and the control image of the Canny and Depth models."""

from __future__ import annotations

from typing import Annotated

from ..flux_runtime.errors import FluxError
from ..flux_runtime.union import UNION_MODES
from .checks import forward, numbers
from .edges import FLUX_CONDITIONING, FLUX_CONTROLNET, FLUX_VAE, IMAGE
from .host import current
from .latent import FIT, FIT_HELP, picture
from .model_files import AUTO, DTYPE_HELP, DTYPES, dtype_of, files, locate, make_room, state, tell_report, telling
from .schema import Output, node
from .widgets import Choice, Range, Text

FOLDERS = ("controlnet", "xlabs_controlnets")
PUBLISHED = (
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0",
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro",
    "InstantX/FLUX.1-dev-Controlnet-Union",
    "InstantX/FLUX.1-dev-Controlnet-Canny",
    "Shakker-Labs/FLUX.1-dev-ControlNet-Depth",
    "jasperai/Flux.1-dev-Controlnet-Upscaler",
    "XLabs-AI/flux-controlnet-canny-v3",
    "XLabs-AI/flux-controlnet-depth-v3",
    "XLabs-AI/flux-controlnet-hed-v3",
    "TheMistoAI/MistoLine_Flux.dev",
)
NO_MODE = "none"


def _state(source: str, **_: object) -> str:
    located = locate(current(), source, FOLDERS, PUBLISHED)
    return located if isinstance(located, str) else state([located])


@node("Load ControlNet", category="loaders", aliases=("controlnet", "union", "canny", "depth"), fingerprint=_state)
def load_control_net(
    source: Annotated[
        str,
        Choice(files(*FOLDERS, more=PUBLISHED)),
        "A file from the model folder controlnet, or a published ControlNet by its name, which is downloaded once.",
    ],
    dtype: Annotated[str, Choice(DTYPES), DTYPE_HELP] = AUTO,
) -> Annotated[FLUX_CONTROLNET, Output("controlnet"), "The net, for ControlNet."]:
    """Loads a FLUX ControlNet of InstantX, Shakker Labs, XLabs, MistoLine or Jasper, in any of their formats."""
    host = current()
    tell = telling(host)
    from ..flux_runtime.weights import load_controlnet

    located = locate(host, source, FOLDERS, PUBLISHED)
    make_room(host, located)
    net = load_controlnet(located, device=host.device(), dtype=dtype_of(dtype), progress=tell)
    tell_report(host, net.report)
    return net


@node(
    "ControlNet",
    category="control",
    aliases=("apply controlnet", "union", "canny", "depth", "pose", "tile"),
    validate=forward("the net takes part from start to end, so 0 to 1 is the whole run"),
)
def control_net(
    conditioning: Annotated[FLUX_CONDITIONING, "The prompt, from Encode Prompt or another condition."],
    controlnet: Annotated[FLUX_CONTROLNET, "The net, from Load ControlNet."],
    image: Annotated[IMAGE, "The control image: edges, depth, a pose, or what else the net reads."],
    scale: Annotated[float, Range(0.0, 5.0, 0.05), "How strongly the net leads. 0.5 to 0.8 leaves room to draw."] = 0.7,
    start: Annotated[float, Range(0.0, 1.0, 0.01), "Where in the run the net begins to lead."] = 0.0,
    end: Annotated[
        float, Range(0.0, 1.0, 0.01), "Where in the run it stops. 0.6 fixes the layout and frees the details."
    ] = 1.0,
    mode: Annotated[
        str, Choice((NO_MODE, *UNION_MODES)), "For union nets: what kind of picture the control image is. Else none."
    ] = NO_MODE,
    curve: Annotated[
        str,
        Text(placeholder="1, 0.5, 0"),
        "Numbers that multiply the scale over the run, spread evenly and interpolated. Empty: the same throughout.",
    ] = "",
    negative: Annotated[
        str,
        Choice(("reuse", "none", "again")),
        "What the net does for the negative prompt: reuse its answer, stay out, or be asked again (slower).",
    ] = "reuse",
    fit: Annotated[str, FIT, FIT_HELP] = "crop",
    vae: Annotated[FLUX_VAE | None, "The VAE, from Load FLUX. XLabs' and MistoLine's nets do without it."] = None,
) -> Annotated[FLUX_CONDITIONING, Output("conditioning"), "The prompt with this net; several may follow each other."]:
    """Lets a ControlNet lead the drawing after a control image. Use several of these for several nets."""
    from ..flux_runtime.conditions import SideNetCondition

    if controlnet.model.reads_latents and vae is None:
        raise FluxError(f"the ControlNet {controlnet.name} reads encoded pictures: connect the vae of Load FLUX to it")
    hint, steps = picture(image, vae, fit), numbers(curve, "the curve")
    condition = SideNetCondition(
        controlnet, hint, scale, start, end, steps, _mode_number(controlnet, mode), negative
    )  # fmt: skip
    return conditioning.plus(condition)


def _mode_number(controlnet: FLUX_CONTROLNET, mode: str) -> int | None:
    """What a union net calls its mode; a net that knows none is told about, a union net without one is refused."""
    number = None if mode == NO_MODE else UNION_MODES.index(mode)
    if not controlnet.model.side.modes:
        if number is not None:
            current().text(f"{controlnet.name} is no union ControlNet: the mode has no effect")
        return None
    if number is None:
        raise FluxError(
            f"{controlnet.name} is a union ControlNet: choose what the control image is as its mode: "
            f"{', '.join(UNION_MODES)}"
        )
    controlnet.check_mode(number)
    return number


@node("Control Image", category="control", aliases=("canny", "depth", "flux control", "instruct pix2pix"))
def control_image(
    conditioning: Annotated[FLUX_CONDITIONING, "The prompt, from Encode Prompt or another condition."],
    image: Annotated[IMAGE, "The control image: edges from Canny Map, or depth from Depth Map."],
    vae: Annotated[FLUX_VAE, "The VAE, from Load FLUX."],
    fit: Annotated[str, FIT, FIT_HELP] = "crop",
) -> Annotated[FLUX_CONDITIONING, Output("conditioning"), "The prompt with this control image."]:
    """Gives the FLUX.1 Canny and Depth models the picture that they draw after. Other models have no place for it."""
    from ..flux_runtime.conditions import ControlImage

    return conditioning.plus(ControlImage(picture(image, vae, fit)))
