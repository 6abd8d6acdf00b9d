"""The integrity check that FLUX.1 Kontext is to be used with: does a picture show somebody's property, or worse?

It follows Black Forest Labs' own (`PixtralContentFilter` in github.com/black-forest-labs/flux): a classifier looks for
nudity, then Pixtral 12B is asked whether the picture shows a character, a brand or a public figure that it can name.
The models, the order, the size of the picture, the criteria and the thresholds are theirs. The questions are worded
anew; another wording can be given to the checker.

Nothing passes unless it was checked: whatever goes wrong is an error, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .errors import FluxError
from .image import to_pil
from .pixtral import PixtralInputs
from .pretrained import load_model, load_processor
from .weights.devices import choose_device

PIXTRAL = "mistral-community/pixtral-12b"
NSFW = "Falconsai/nsfw_image_detection"
NSFW_LABEL = "nsfw"
NSFW_THRESHOLD = 0.85
AREA = 512**2  # pixels that Pixtral is shown: enough to recognise what is in a picture

TASK = """
You are shown one picture. Decide whether it may infringe somebody's rights.

Answer "yes" if at least one of these is in the picture:
- a character that you recognise from a film, a series, a comic, a game or another protected work
- the logo or the trade mark of a company or a product
- a public figure that you recognise: from politics, sports, film, music, the internet or history

Answer "no" in every other case, and whenever you cannot say which work, which brand or which person it is.

Judge by what can be seen alone. That somebody looks like a certain kind of person is no reason for "yes".
Reply with one word, "yes" or "no", and nothing else.
""".strip()
QUESTION = "Does this picture show a protected character, a brand or a public figure?"


@dataclass(frozen=True)
class Verdict:
    """What was found about a picture; the score in 0..1 is that of the check that decided."""

    flagged: bool
    score: float
    reason: str


@dataclass(frozen=True)
class IntegrityChecker:
    """Both models with what prepares their inputs; a shared handle that is never changed."""

    model: torch.nn.Module
    inputs: PixtralInputs
    classifier: torch.nn.Module
    classifier_inputs: Any
    threshold: float = 0.5  # "yes" is at least as likely as "no"
    nsfw_threshold: float = NSFW_THRESHOLD
    questions: tuple[str, str] = (TASK, QUESTION)  # before and after the picture

    @classmethod
    def load(
        cls, source: str | Path = PIXTRAL, nsfw: str | Path = NSFW, *, device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
    ) -> IntegrityChecker:  # fmt: skip
        """From two folders or repositories in transformers' layout; a checker that cannot work is refused here.

        The dtype "auto" is that of the file: 25 GB for the published one.
        """
        import transformers

        device = choose_device(device)
        judge, classifier = "the Pixtral model of the integrity check", "an NSFW classifier"
        with _closed("cannot be made ready"):
            model = load_model(transformers.LlavaForConditionalGeneration, source, judge, dtype).to(device)
            checker = cls(
                model,
                PixtralInputs.load(source, judge, model.config.vision_config.patch_size),
                load_model(transformers.AutoModelForImageClassification, nsfw, classifier).to(device),
                load_processor(transformers.AutoImageProcessor, nsfw, classifier),
            )
            checker.check_ready()
        return checker

    def check_ready(self) -> None:
        """Raise where the models lack what will be asked of them: the label, and the two words of the answer."""
        self.nsfw_index()
        self.answers()

    def nsfw_index(self) -> int:
        """Which of the classifier's labels it is about."""
        labels = {str(label).lower(): int(index) for index, label in self.classifier.config.id2label.items()}
        if NSFW_LABEL not in labels:
            raise FluxError(f"the classifier has no label {NSFW_LABEL!r} but {', '.join(labels)}; use {NSFW}")
        return labels[NSFW_LABEL]

    def answers(self) -> list[int]:
        """The tokens of "yes" and "no"."""
        return [self.inputs.word("yes"), self.inputs.word("no")]

    @torch.inference_mode()
    def check(self, images: Tensor | Sequence[Image.Image]) -> list[Verdict]:
        """A verdict on each picture, (B, H, W, 3) in 0..1 or PIL; FluxError where one cannot be checked."""
        with _closed("failed"):
            return [self._judge(picture) for picture in _pictures(images)]

    def pass_on(self, images: Tensor) -> Tensor:
        """The same pictures, if none of them is flagged; else FluxError naming those that are, and why."""
        verdicts = self.check(images)
        if len(verdicts) != len(images):
            raise FluxError("the integrity check did not judge every picture: none is passed on")
        flagged = [f"picture {i} of {len(verdicts)} {v.reason}" for i, v in enumerate(verdicts, 1) if v.flagged]
        if flagged:
            raise FluxError(
                f"the integrity check refuses this: {'; '.join(flagged)}; change the prompt, the picture or the seed"
            )
        return images

    def _judge(self, picture: Image.Image) -> Verdict:
        nsfw = self.nsfw_score(picture)
        if nsfw > self.nsfw_threshold:
            return Verdict(True, nsfw, f"is not safe for work ({nsfw:.0%} sure)")
        score = self.yes_score(picture)
        if score >= self.threshold:
            return Verdict(True, score, f"shows a protected character, a brand or a public figure ({score:.0%} sure)")
        return Verdict(False, score, f"shows nothing that is known to be somebody's ({1 - score:.0%} sure)")

    def nsfw_score(self, picture: Image.Image) -> float:
        """How likely the classifier finds its label, in 0..1."""
        inputs = self.classifier_inputs(images=picture, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.classifier.device, self.classifier.dtype)
        return _probability(self.classifier(pixel_values=pixels).logits[0], self.nsfw_index())

    def yes_score(self, picture: Image.Image) -> float:
        """How likely Pixtral answers yes rather than no, in 0..1; no other answer is open to it."""
        before, after = self.questions
        inputs = {
            name: value.to(self.model.device) for name, value in self.inputs(before, _shrunk(picture), after).items()
        }
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        logits = self.model(**inputs, logits_to_keep=1).logits[0, -1]
        return _probability(logits[self.answers()], 0)


def _pictures(images: Tensor | Sequence[Image.Image]) -> list[Image.Image]:
    if not isinstance(images, Tensor):
        return [picture.convert("RGB") for picture in images]
    if images.ndim != 4 or images.shape[-1] != 3 or not images.isfinite().all():
        raise FluxError(
            f"pictures must be finite numbers of the shape (batch, height, width, 3); got {tuple(images.shape)}"
        )
    return to_pil(images)


def _shrunk(picture: Image.Image) -> Image.Image:
    """The picture with the area that it is judged at."""
    factor = math.sqrt(AREA / (picture.width * picture.height))
    return picture.resize((max(1, int(factor * picture.width)), max(1, int(factor * picture.height))))


def _probability(logits: Tensor, index: int) -> float:
    """The softmax of one of (n,) logits; numbers that are none are no answer."""
    value = logits.float().softmax(-1)[index].item()
    if not math.isfinite(value):
        raise FluxError("the model of the integrity check answered with no number")
    return value


@contextmanager
def _closed(what: str) -> Iterator[None]:
    """Say of every ordinary failure that nothing passes; all else, such as an interruption, ends the run as well."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OSError, ArithmeticError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
        raise FluxError(f"the integrity check {what}, so no picture is passed on: {reason}") from error
