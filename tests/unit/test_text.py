"""Prompts at their limits, and finding tokenizers."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.text.tokenize import clip_text, find_tokenizer, load_tokenizer, token_ids, tokenizer_kind


@pytest.fixture(scope="module")
def real(shared):
    """The published tokenizers."""
    folder = [shared / "tokenizers"]
    return {
        "clip": load_tokenizer("clip", folder, 49408, download=False),
        "t5": load_tokenizer("t5", folder, 32128, download=False),
    }


class TestLimits:
    def test_default_is_what_the_checkpoint_was_made_with(self, demo):
        text = demo.text
        tokenizer = text.t5_tokenizer
        assert text.default_tokens == min(tokenizer.model_max_length, 512)
        assert (
            text.encode("a cat").tokens.shape[1]
            == text.encode("a cat", max_tokens=0).tokens.shape[1]
            == text.default_tokens
        )

    def test_too_many_tokens_name_the_limit(self, demo):
        schnell = replace(demo.text, max_tokens=256, variant="schnell")
        assert schnell.encode("a cat", max_tokens=256).tokens.shape[1] == 256
        with pytest.raises(FluxError, match=r"FLUX.1 schnell reads at most 256 T5 tokens, not 257"):
            schnell.encode("a cat", max_tokens=257)
        with pytest.raises(FluxError, match="at most 512"):
            demo.text.encode("a cat", max_tokens=100_000)
        with pytest.raises(FluxError, match="-1 T5 tokens"):
            demo.text.encode("a cat", max_tokens=-1)

    @pytest.mark.parametrize("wrong", [None, 3, [], ["a", None], [["a"]]])
    def test_what_is_no_text(self, demo, wrong):
        with pytest.raises(FluxError, match="a text or a list of texts"):
            demo.text.encode(wrong)

    def test_numbers_of_prompts_must_pair_up(self, demo):
        with pytest.raises(FluxError, match="2 prompts and 3 second prompts"):
            demo.text.encode(["a", "b"], ["c", "d", "e"])

    def test_empty_prompt(self, demo):
        prompt = demo.text.encode("")
        assert torch.isfinite(prompt.tokens).all() and torch.isfinite(prompt.pooled).all()

    def test_prompts_do_not_touch_each_other(self, demo):
        together = demo.text.encode(["a red house", "a boat at sea"])
        for i, prompt in enumerate(["a red house", "a boat at sea"]):
            alone = demo.text.encode(prompt)
            torch.testing.assert_close(together.tokens[i], alone.tokens[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(together.pooled[i], alone.pooled[0], rtol=1e-5, atol=1e-5)


class TestTruncation:
    def test_lost_words_are_named(self, real, caplog):
        words = [f"word{i}" for i in range(40)] + ["zebra", "umbrella"]
        with caplog.at_level(logging.WARNING, logger="fluxcanvas"):
            (ids,) = token_ids(real["clip"], [" ".join(words)], 77, "CLIP")
        (message,) = [r.getMessage() for r in caplog.records]
        assert "CLIP reads 77 tokens" in message and "zebra umbrella" in message and "word1 " not in message
        assert len(ids) == 77

    def test_nothing_is_said_of_a_prompt_that_fits(self, real, caplog):
        for kind in real:
            token_ids(real[kind], ["a red house", ""], 77, kind)
        assert not caplog.records

    @pytest.mark.parametrize(
        "text", ["lots of words " * 700_000, "x" * 10_000_000, " \n" * 5_000_000, "🦊" * 2_500_000]
    )
    @pytest.mark.parametrize(("kind", "limit"), [("clip", 77), ("t5", 512)])
    def test_ten_megabytes(self, real, text, kind, limit, caplog):
        """The tokenizer is spared what no encoder will ever see, and what is lost is told."""
        longest = []

        def tokenizer(texts, **options):
            longest.append(max(map(len, [texts] if isinstance(texts, str) else texts)))
            return real[kind](texts, **options)

        tokenizer.decode = real[kind].decode
        with caplog.at_level(logging.WARNING, logger="fluxcanvas"):
            (ids,) = token_ids(tokenizer, [text], limit, kind)
        assert max(longest) <= 64 * limit and len(ids) == limit
        assert bool(caplog.records) == bool(text.strip())

    @pytest.mark.parametrize("kind", ["clip", "t5"])
    def test_cutting_first_changes_no_token(self, real, kind):
        """Before the cut and after it the tokenizer sees the same beginning."""
        limit = {"clip": 77, "t5": 128}[kind]
        text = "  an   extraordinarily internationalised\n\n watercolour, " * 400
        (ids,) = token_ids(real[kind], [text], limit, kind)
        whole = real[kind](text, max_length=limit, padding="max_length", truncation=True)["input_ids"]
        assert len(text) > len(clip_text(text, limit)[0]) and ids == whole

    def test_cut_prefers_a_gap_between_words(self):
        head, tail = clip_text("abc " * 1000, 10)
        assert head.endswith("abc") and len(head) <= 640 and tail.startswith(" abc")
        assert clip_text("short", 10) == ("short", "")


class TestTokenizers:
    def test_kinds(self, shared, checkout):
        assert tokenizer_kind(shared / "tokenizers" / "clip") == "clip"  # vocab.json and merges.txt alone
        assert tokenizer_kind(shared / "tokenizers" / "t5") == "t5"
        assert tokenizer_kind(checkout / "demo" / "weights" / "tokenizer") == "clip"
        assert tokenizer_kind(checkout) is None

    def test_order_of_places(self, tokenizers, tmp_path):
        for name in ("far/t5", "near/tokenizer_2"):
            shutil.copytree(tokenizers / "tokenizer_2", tmp_path / name)
        assert find_tokenizer("t5", [tmp_path / "near", tmp_path / "far"]) == tmp_path / "near" / "tokenizer_2"
        assert find_tokenizer("t5", [tmp_path / "far" / "t5"]) == tmp_path / "far" / "t5"
        assert find_tokenizer("clip", [tmp_path / "near", tmp_path / "far"]) is None

    def test_none_found_says_where_and_what_to_do(self, tmp_path):
        with pytest.raises(FluxError) as error:
            load_tokenizer("t5", [tmp_path], 192, download=True)
        assert str(tmp_path) in str(error.value) and "tokenizer_2" in str(error.value)

    def test_published_ones_offline(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        with pytest.raises(FluxError, match="no T5 tokenizer was found"):
            load_tokenizer("t5", [tmp_path], 32128, download=True)
        assert "could not be fetched" in caplog.text

    def test_of_another_model(self, shared):
        with pytest.raises(FluxError, match="32100 tokens but this T5 knows 192"):
            load_tokenizer("t5", [shared / "tokenizers"], 192, download=False)

    @pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": 3}', '{"model": {"type": "Unigram"}}', "[" * 90_000])
    def test_damaged(self, tmp_path, text):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(FluxError, match="tokenizer"):
            load_tokenizer("t5", [tmp_path], 32128, download=False)

    def test_length_of_the_demo(self, checkout):
        config = json.loads((checkout / "demo" / "weights" / "tokenizer_2" / "tokenizer_config.json").read_text())
        tokenizer = load_tokenizer("t5", [checkout / "demo" / "weights"], 10_000, download=False)
        assert tokenizer.model_max_length == config["model_max_length"]
