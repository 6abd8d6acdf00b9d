"""The integrity check: both outcomes of both models, and that nothing passes when anything goes wrong."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from PIL import Image

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.integrity import QUESTION, TASK, IntegrityChecker, Verdict
from fluxcanvas.flux_runtime.pixtral import PixtralInputs

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]


def build_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, "yes", "no", "picture", "a", "brand"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip


def build_judge(folder):
    import transformers

    tokenizer = build_tokenizer()
    kind = getattr(transformers, "PixtralImageProcessorPil", None) or transformers.PixtralImageProcessor
    kind(patch_size={"height": 32, "width": 32}, size={"longest_edge": 128}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=128, patch_size=32
    )
    text = transformers.MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


def build_classifier(folder, labels=("normal", "nsfw")):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    kind(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrity")
    build_judge(folder / "judge")
    build_classifier(folder / "nsfw")
    return folder


@pytest.fixture
def checker(folders):
    loaded = IntegrityChecker.load(folders / "judge", folders / "nsfw", device="cpu", dtype=torch.float32)
    lean(loaded, nsfw=-5.0)
    answer(loaded, 0.0)
    return loaded


def lean(checker: IntegrityChecker, nsfw: float) -> None:
    """Make the classifier of one opinion."""
    checker.classifier.classifier.weight.zero_()
    checker.classifier.classifier.bias.copy_(torch.tensor([0.0, nsfw]))


def words(checker: IntegrityChecker) -> list[int]:
    """The tokens of "yes" and "no"."""
    return checker.inputs.tokenizer.convert_tokens_to_ids(["yes", "no"])


def answer(checker: IntegrityChecker, yes: float) -> None:
    """Make the logit of "yes" about so much larger than that of "no", for these pictures."""
    seen = []
    hook = checker.model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, -1].clone()))
    checker.yes_score(picture())
    hook.remove()
    direction = seen[0] / seen[0].norm() ** 2
    weight = checker.model.lm_head.weight
    weight.copy_(20 * direction.expand_as(weight))  # every other word is likelier than both
    yes_token, no_token = words(checker)
    weight[yes_token], weight[no_token] = yes / 2 * direction, -yes / 2 * direction


def picture(value: int = 128) -> Image.Image:
    return Image.new("RGB", (48, 32), (value, 90, 30))


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 32, 48, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.4


def test_no_passes(checker):
    answer(checker, -8.0)
    given = images()
    verdicts = checker.check(given)
    assert [verdict.flagged for verdict in verdicts] == [False, False]
    assert all(verdict.score < 0.1 and "known" in verdict.reason for verdict in verdicts)
    assert checker.pass_on(given) is given
    assert checker.check([picture()])[0].flagged is False


def test_yes_is_flagged_and_refused(checker):
    answer(checker, 8.0)
    verdicts = checker.check(images())
    assert all(verdict.flagged and verdict.score > 0.9 and "brand" in verdict.reason for verdict in verdicts)
    with pytest.raises(FluxError, match=r"picture 1 of 2 shows.*picture 2 of 2 shows.*seed"):
        checker.pass_on(images())


def test_one_flagged_picture_holds_back_the_batch(checker, monkeypatch):
    verdicts = iter([Verdict(False, 0.1, "is fine"), Verdict(True, 0.9, "shows a brand")])
    monkeypatch.setattr(IntegrityChecker, "_judge", lambda self, picture: next(verdicts))
    with pytest.raises(FluxError, match="picture 2 of 2 shows a brand") as refused:
        checker.pass_on(images())
    assert "picture 1" not in str(refused.value)


def test_undecided_counts_as_yes(checker):
    score = checker.yes_score(picture())
    assert score == pytest.approx(0.5, abs=1e-6)
    assert dataclasses.replace(checker, threshold=score).check([picture()])[0].flagged


def test_the_answer_is_that_of_generation_with_two_words_left(checker):
    answer(checker, 0.0)
    weight = checker.model.lm_head.weight
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    yes, no = words(checker)

    def only_two(ids, scores):
        kept = torch.full_like(scores, -torch.inf)
        kept[:, [yes, no]] = scores[:, [yes, no]]
        return kept

    for value in (0, 60, 120, 180, 250):
        inputs = checker.inputs(TASK, picture(value).resize((627, 418)), QUESTION)
        last = checker.model.generate(**inputs, max_new_tokens=1, do_sample=False, logits_processor=[only_two])[0, -1]
        assert (checker.yes_score(picture(value)) >= 0.5) == (last.item() == yes)


def test_the_classifier_comes_first(checker):
    answer(checker, -8.0)
    lean(checker, 5.0)
    verdict = checker.check([picture()])[0]
    assert verdict.flagged and verdict.score > 0.99 and "safe for work" in verdict.reason
    lean(checker, 1.0)  # 0.73: not sure enough
    assert not checker.check([picture()])[0].flagged
    assert checker.nsfw_score(picture()) == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=1e-5)


def test_the_picture_is_shown_at_a_quarter_of_a_megapixel_between_the_texts(checker, monkeypatch):
    shown = []
    real = PixtralInputs.__call__
    monkeypatch.setattr(PixtralInputs, "__call__", lambda self, *parts: shown.append(parts) or real(self, *parts))
    checker.check([Image.new("RGB", (2000, 500))])
    ((before, seen, after),) = shown
    assert (before, after) == (TASK, QUESTION) and seen.size == (1024, 256)
    assert dataclasses.replace(checker, questions=("a", "b")).check([picture()]) and shown[1][::2] == ("a", "b")


def test_the_inputs_are_laid_out_as_pixtral_was_trained(checker):
    inputs = checker.inputs("a picture", Image.new("RGB", (96, 60)), "a brand")
    tokenizer = checker.inputs.tokenizer
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()) == (
        ["<s>", "[INST]", "a", "picture"]
        + ["[IMG]"] * 3 + ["[IMG_BREAK]"] + ["[IMG]"] * 3 + ["[IMG_END]"]
        + ["a", "brand", "[/INST]"]
    )  # fmt: skip
    assert inputs["image_sizes"].tolist() == [[64, 96]] and inputs["pixel_values"].shape == (1, 3, 64, 96)


def broken_logits(checker):
    checker.model.lm_head.weight.fill_(float("nan"))


def broken_classifier(checker):
    checker.classifier.classifier.bias.fill_(float("nan"))


def lost_model(checker):
    object.__setattr__(checker, "model", None)


def lost_processor(checker):
    object.__setattr__(checker, "inputs", None)


def failing_model(checker):
    def fail(*inputs, **options):
        raise RuntimeError("CUDA error: out of memory\nand more")

    checker.model.forward = fail


@pytest.mark.parametrize("fault", [broken_logits, broken_classifier, lost_model, lost_processor, failing_model])
def test_nothing_passes_when_the_check_fails(checker, fault):
    answer(checker, -8.0)
    assert not checker.check(images())[0].flagged
    fault(checker)
    for run in (checker.check, checker.pass_on):
        with pytest.raises(FluxError, match="failed, so no picture is passed on: "):
            run(images())


def test_pictures_that_cannot_be_judged(checker):
    answer(checker, -8.0)
    for wrong in (images() * float("nan"), images()[0], images()[..., :1]):
        with pytest.raises(FluxError, match="no picture is passed on: pictures must be finite"):
            checker.check(wrong)


def test_a_host_may_interrupt(checker, monkeypatch):
    class Interrupted(Exception):
        pass

    def stop(self, picture):
        raise Interrupted

    monkeypatch.setattr(IntegrityChecker, "_judge", stop)
    with pytest.raises(Interrupted):
        checker.check(images())


def test_a_missing_model_is_an_error(folders, tmp_path):
    with pytest.raises(FluxError, match="cannot be loaded as the Pixtral model of the integrity check"):
        IntegrityChecker.load(tmp_path, folders / "nsfw", device="cpu")
    with pytest.raises(FluxError, match="cannot be loaded as an NSFW classifier"):
        IntegrityChecker.load(folders / "judge", tmp_path, device="cpu")
    with pytest.raises(FluxError, match="not the Pixtral model of the integrity check but of the kind 'vit'"):
        IntegrityChecker.load(folders / "nsfw", folders / "nsfw", device="cpu")


def test_a_classifier_without_the_label_is_refused(folders, tmp_path):
    build_classifier(tmp_path / "other", ("cat", "dog"))
    with pytest.raises(FluxError, match="no label 'nsfw' but cat, dog"):
        IntegrityChecker.load(folders / "judge", tmp_path / "other", device="cpu")


def test_a_tokenizer_without_the_answers_is_refused(folders, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(folders / "judge", folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"yes"', '"aye"'))
    with pytest.raises(FluxError, match="no single token for 'yes'"):
        IntegrityChecker.load(folder, folders / "nsfw", device="cpu")


def test_a_tokenizer_that_knows_no_pictures_is_refused(folders, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(folders / "judge", folder)
    for file in folder.glob("*.json"):
        file.write_text(file.read_text().replace("[IMG_BREAK]", "[OTHER]"))
    with pytest.raises(FluxError, match=r"does not know \[IMG_BREAK\]"):
        IntegrityChecker.load(folder, folders / "nsfw", device="cpu")
