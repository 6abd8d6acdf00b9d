"""LoRAs: read from files, stacked with weights, and put on a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..flux_runtime.errors import FluxError
from .edges import FLUX_LORA, FLUX_MODEL, FLUX_TEXT, LORA_STACK
from .host import Host, current
from .model_files import files, locate, state, telling
from .schema import Output, node
from .widgets import Choice, Range, Text

if TYPE_CHECKING:
    from ..flux_runtime.lora.formats import Lora

FOLDERS = ("loras",)
PUBLISHED = (
    "demo/sepia",  # comes along, for the demo model
    "black-forest-labs/FLUX.1-Canny-dev-lora",
    "black-forest-labs/FLUX.1-Depth-dev-lora",
    "ByteDance/Hyper-SD/Hyper-FLUX.1-dev-8steps-lora.safetensors",
    "ByteDance/Hyper-SD/Hyper-FLUX.1-dev-16steps-lora.safetensors",
    "alimama-creative/FLUX.1-Turbo-Alpha",
    "XLabs-AI/flux-RealismLora",
    "XLabs-AI/flux-lora-collection/anime_lora.safetensors",
    "XLabs-AI/flux-lora-collection/art_lora.safetensors",
    "XLabs-AI/flux-lora-collection/scenery_lora.safetensors",
)
NONE = "none"
MODES = ("auto", "beside", "merged")
KEPT = 16  # LoRAs whose names are held; their numbers stay in the mapped files
WEIGHT = Range(-10.0, 10.0, 0.005)  # the canvas keeps as many digits as the step has, and 0.125 is a usual weight
WEIGHT_HELP = "How strongly it acts. 1: as it was trained, 0: not at all, below 0: the other way."

_read: dict[tuple[str, str], Lora] = {}  # the newest last, so that another weight does not read a file anew
_foreign_states: dict[Path, str] = {}  # files that other packs' stacks have named, as they were when last looked at
_foreign_changes: list[Path] = []  # one for each time that such a file was found to be another

FileChoice = Annotated[
    str,
    Choice(files(*FOLDERS, more=PUBLISHED)),
    "A file from the model folder loras, or a published LoRA by its name, which is downloaded once. demo/sepia "
    "comes along, for the demo model.",
]
SlotChoice = Annotated[
    str,
    Choice(lambda: [NONE, *files(*FOLDERS, more=PUBLISHED)()]),
    "A file from the model folder loras, or a published LoRA, downloaded once. none: this place stays empty.",
]
Weight = Annotated[float, WEIGHT, WEIGHT_HELP]
Previous = Annotated[FLUX_LORA | None, "LoRAs to add these to, from another Load LoRA or LoRA Stack."]
Stack = Annotated[FLUX_LORA, Output("loras"), "The LoRAs so far, for Apply LoRA or for more of them."]


def _stamp(located: Path | str) -> str:
    return state([located]) if isinstance(located, Path) else ""


def _file_state(lora: str, **_: object) -> str:
    located = locate(current(), lora, FOLDERS, PUBLISHED)
    return f"{located}|{_stamp(located)}"


def _stack_state(lora_1: str, lora_2: str, lora_3: str, lora_4: str, **others: object) -> str:
    chosen = (lora_1, lora_2, lora_3, lora_4)
    own = [_file_state(name) for name in chosen if name not in (NONE, None)]
    return "|".join([*own, *([_foreign_state()] if "lora_stack" in others else [])])


def _foreign_state() -> str:
    """Changes when a file behind a linked stack does: hosts tell that there is a link, not yet what comes over it.

    So all files that such stacks have named are looked at; it counts their changes, for naming one more is none.
    """
    for path, before in _foreign_states.items():
        _foreign_states[path] = now = _stamp(path) if path.exists() else "gone"
        if now != before:
            _foreign_changes.append(path)
    return f"linked {len(_foreign_changes)}"


def _load(host: Host, name: str) -> Lora:
    """The LoRA of that name, read once for as long as its file stays the same; the node shows what is in it."""
    located = locate(host, name, FOLDERS, PUBLISHED)
    key = (str(located), _stamp(located))
    read = _read.pop(key, None)
    if read is None:
        tell = telling(host)
        from ..flux_runtime.lora.load import load_lora as load

        read = load(located, progress=tell)
    _read[key] = read
    while len(_read) > KEPT:
        del _read[next(iter(_read))]
    return read


@node("Load LoRA", category="loaders", aliases=("lora", "lokr", "control lora", "turbo"), fingerprint=_file_state)
def load_lora(
    lora: FileChoice,
    weight: Weight = 1.0,
    text_factor: Annotated[
        float,
        WEIGHT,
        "How strongly it acts on the text encoders, times the weight. 1: as on the model, 0: on the model alone.",
    ] = 1.0,
    blocks: Annotated[
        str,
        Text(multiline=True, placeholder="double_blocks.0-9: 0.5", longest=10_000),
        "Factors for single parts, one a line, such as double_blocks.0-9: 0.5 or single_blocks: 0. The last that fits "
        "counts. Empty: the same everywhere.",
    ] = "",
    loras: Previous = None,
) -> Stack:
    """Reads a LoRA file of any format and gives it a weight. Apply LoRA puts it on a model."""
    from ..flux_runtime.lora.stack import NO_LORAS, parse_factors

    host = current()
    factors = parse_factors(blocks)
    read = _load(host, lora)
    host.text(read.summary())
    return (loras or NO_LORAS).plus(read, weight, weight * text_factor, factors)


@node(
    "LoRA Stack", category="loaders", aliases=("lora stacker", "several loras", "lora list"), fingerprint=_stack_state
)
def lora_stack(
    lora_1: SlotChoice = NONE,
    weight_1: Weight = 1.0,
    lora_2: SlotChoice = NONE,
    weight_2: Weight = 1.0,
    lora_3: SlotChoice = NONE,
    weight_3: Weight = 1.0,
    lora_4: SlotChoice = NONE,
    weight_4: Weight = 1.0,
    loras: Previous = None,
    lora_stack: Annotated[
        LORA_STACK | None, "A LoRA stack made by a node of another pack: file names and weights."
    ] = None,
) -> Stack:
    """Reads up to four LoRAs at once, and those of another pack's stack. Use several of these for more."""
    from ..flux_runtime.lora.stack import NO_LORAS

    host = current()
    chosen = ((lora_1, weight_1), (lora_2, weight_2), (lora_3, weight_3), (lora_4, weight_4))
    made, told = loras or NO_LORAS, []
    for name, weight, text_weight in [*((n, w, w) for n, w in chosen if n != NONE), *_foreign(lora_stack or ())]:
        read = _load(host, name)
        told.append(read.summary())
        made = made.plus(read, weight, text_weight)
    host.text("\n".join(told) or "no LoRA is chosen")
    return made


def _foreign(entries: Sequence[Any]) -> Iterator[tuple[str, float, float]]:
    """What other packs' stacks hold: (file name, weight on the model, weight on the text encoders)."""
    for number, entry in enumerate(entries, 1):
        whole = isinstance(entry, (tuple, list)) and len(entry) == 3 and isinstance(entry[0], str)
        if not whole or any(WEIGHT.fault(weight, float) for weight in entry[1:]):
            raise FluxError(
                f"LoRA Stack: entry {number} of lora_stack is {str(entry)[:120]}; it must be a file name and two "
                f"weights from {WEIGHT.low:g} to {WEIGHT.high:g}, for the model and for the text encoders"
            )
        name, weight, text_weight = entry
        if name.lower() != NONE:
            yield _listed(name.replace("\\", "/"), number), weight, text_weight


def _listed(name: str, number: int) -> str:
    """The name, if a loras folder (or the list of published ones) has it."""
    try:
        located = locate(current(), name, FOLDERS, PUBLISHED)
    except FluxError as error:
        raise FluxError(f"LoRA Stack: entry {number} of lora_stack: {error}") from error
    if isinstance(located, Path):
        _foreign_states[located] = _stamp(located)
    return name


@node("Apply LoRA", category="model", aliases=("lora", "apply lora stack", "add lora"))
def apply_lora(
    model: Annotated[FLUX_MODEL, "The model, from Load FLUX or another Apply LoRA."],
    loras: Annotated[FLUX_LORA, "The LoRAs, from Load LoRA or LoRA Stack."],
    mode: Annotated[
        str,
        Choice(MODES),
        "Where the changes go while the model draws. auto: what suits each. beside: next to the weights, which stay as "
        "they are. merged: into a copy of plain weights, which takes memory and no time a step.",
    ] = "auto",
    text: Annotated[FLUX_TEXT | None, "The text encoders, for LoRAs that change these too."] = None,
) -> tuple[
    Annotated[FLUX_MODEL, Output("model"), "The model with the LoRAs; the one that came in stays without."],
    Annotated[FLUX_TEXT, Output("text"), "The text encoders with the LoRAs, for Encode Prompt."],
]:
    """Puts LoRAs on a model and shows which of their layers it has. Nothing of the model is changed for good."""
    from ..flux_runtime.flux import add_loras

    if not loras:
        current().text("no LoRA is chosen: the model is as before")
        return model, text
    changed, encoders, fits = add_loras(model, text, loras, mode)
    told = [fit.text() for fit in fits]
    if model.loras and mode != model.lora_mode:
        told.append(f"the mode {mode} now holds for the earlier LoRAs too, which had {model.lora_mode}")
    current().text("\n".join(told))
    return changed, encoders
