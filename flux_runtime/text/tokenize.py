"""Finding the two tokenizers, and cutting prompts to what the encoders take: never silently."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import FluxError

log = logging.getLogger("fluxcanvas")

CHARS_PER_TOKEN = 64  # four times the longest piece of either vocabulary
BLANKS = 64  # a prompt may be so many times longer by blanks alone
MAX_TOKENIZER_JSON = 64_000_000  # bytes

SUBFOLDERS = {"clip": ("tokenizer", "clip", "clip_l"), "t5": ("tokenizer_2", "t5", "t5xxl")}
PUBLISHED = {  # the tokenizers of FLUX.1, where no licence need be accepted: repo, folder in it
    "clip": (("openai/clip-vit-large-patch14", ""),),
    "t5": (("google-t5/t5-small", ""),),  # every T5 reads this vocabulary, and not every repository has it as JSON
}
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
EMBEDDINGS = {"clip": 49408, "t5": 32128}  # rows of the published encoders: only these may use the published tokenizers
PADDING = 128  # an encoder has at most so many rows more than its tokenizer has tokens
LABELS = {"clip": "CLIP", "t5": "T5"}


def tokenizer_kind(folder: Path) -> str | None:
    """`clip`, `t5`, or None when the folder is no tokenizer of these."""
    file = folder / "tokenizer.json"
    try:
        if file.is_file() and file.stat().st_size <= MAX_TOKENIZER_JSON:
            model = json.loads(file.read_text(encoding="utf-8"))["model"]
            return {"BPE": "clip", "Unigram": "t5"}.get(model.get("type"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # damaged: as good as none; the caller says where it looked
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return "clip"
    return "t5" if (folder / "spiece.model").is_file() else None


def find_tokenizer(kind: str, bases: Iterable[Path]) -> Path | None:
    """The first tokenizer folder of a kind in or directly under the given folders."""
    for base in bases:
        for folder in (base, *(base / name for name in SUBFOLDERS[kind])):
            if folder.is_dir() and tokenizer_kind(folder) == kind:
                return folder
    return None


def load_tokenizer(
    kind: str, bases: Sequence[Path], embeddings: int, *, download: bool, several: Sequence[Path] = ()
) -> Any:
    """The tokenizer for so many embeddings: from `bases`, else the first that fits of those in `several` (folders
    with tokenizers of many models), else (with `download`) the published one."""
    folder = find_tokenizer(kind, bases)
    if folder is None and (fitting := _fitting(kind, several, embeddings)):
        return fitting
    if folder is None and download and embeddings == EMBEDDINGS[kind]:
        folder = _published(kind)
    if folder is None:
        looked = ", ".join(str(base) for base in bases) or "no folder"
        raise FluxError(
            f"no {LABELS[kind]} tokenizer was found (looked in: {looked}); put the '{SUBFOLDERS[kind][0]}' folder of a "
            f"FLUX.1 repository beside the model, or into the model folder 'tokenizers' as '{SUBFOLDERS[kind][1]}', "
            "or name its path"
        )
    tokenizer = _open(kind, folder)
    if len(tokenizer) > embeddings:
        raise FluxError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but this {LABELS[kind]} knows {embeddings}: "
            "it belongs to another model; name the folder of the right one"
        )
    return tokenizer


def _fitting(kind: str, folders: Sequence[Path], embeddings: int) -> Any:
    """The first tokenizer with as many tokens as the encoder knows; None when there is none."""
    for folder in filter(None, (find_tokenizer(kind, [base]) for base in folders)):
        try:
            tokenizer = _open(kind, folder)
        except FluxError as error:
            log.info("passed over: %s", error)
            continue
        if embeddings - PADDING < len(tokenizer) <= embeddings:
            return tokenizer
    return None


def _open(kind: str, folder: Path) -> Any:
    import transformers

    cls = transformers.CLIPTokenizerFast if kind == "clip" else transformers.T5TokenizerFast
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception; interruptions are no Exception here
        raise FluxError(
            f"the {LABELS[kind]} tokenizer in {folder} cannot be read ({_first_line(error)}); copy it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _published(kind: str) -> Path | None:
    """A folder of the download cache with the published tokenizer; None (and a warning) when it cannot be had."""
    from ..weights.hub import fetch_files

    for repo, folder in PUBLISHED[kind]:
        try:
            return fetch_files(repo, [f"{folder}/{name}" if folder else name for name in FILES])
        except FluxError as error:
            log.warning("the %s tokenizer could not be fetched: %s", LABELS[kind], error)
    return None


def clip_text(text: str, limit: int) -> tuple[str, str]:
    """Cut a text of absurd length before it is tokenised: what is kept and what is surely beyond `limit` tokens."""
    most = limit * CHARS_PER_TOKEN
    if len(text) <= most:
        return text, ""
    text, rest = " ".join(text[: BLANKS * most].split()), text[BLANKS * most :]  # a run of blanks counts as one blank
    if len(text) > most:
        cut = text.rfind(" ", most // 2, most)
        cut = cut if cut > 0 else most
        text, rest = text[:cut], text[cut:] + rest
    return text, rest if rest.strip() else ""


def token_ids(tokenizer: Any, texts: Sequence[str], limit: int, label: str) -> list[list[int]]:
    """Ids of each text, end token included, cut to `limit` and padded to it; words that fall away are told."""
    kept = []
    for text in texts:
        head, tail = clip_text(text, limit)
        ids = tokenizer(head, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        if len(ids) > limit or tail:
            _tell_lost(tokenizer, ids, tail, limit, label)
        kept.append(head)
    batch = tokenizer(kept, padding="max_length", max_length=limit, truncation=True)
    return batch["input_ids"]


def _tell_lost(tokenizer: Any, ids: list[int], tail: str, limit: int, label: str) -> None:
    lost = tokenizer.decode(ids[limit - 1 : -1][:64], skip_special_tokens=True) + tail[:200]
    shown = lost.strip()[:160]
    count = f"{len(ids)}" if not tail else f"more than {len(ids)}"
    log.warning(
        "%s reads %d tokens and the prompt has %s; lost is: %s",
        label,
        limit,
        count,
        shown + ("..." if len(lost) > 160 else ""),
    )
