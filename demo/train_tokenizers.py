"""The two tokenizers, made from captions alone, in the file formats of CLIP and T5."""

import json
import math
import random
import re
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

from .captions import caption
from .scenes import TRAINING, sample_scene

CLIP_VOCABULARY, T5_WORDS, CLIP_LENGTH, T5_LENGTH = 1000, 400, 77, 48
START, END = "<|startoftext|>", "<|endoftext|>"
BLANK, LETTER_SCORE = "\u2581", -12.0
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"-:;()"


@lru_cache(maxsize=1)
def make_tokenizers(seed: int, captions: int) -> tuple[object, object]:
    """(CLIP tokenizer, T5 tokenizer) whose vocabularies fit the captions; any other text falls into pieces."""
    rng = random.Random(f"tokenizers {seed}")
    texts = [caption(sample_scene(rng, TRAINING), rng).text for _ in range(captions)]
    return _clip(texts), _t5(texts)


def _clip(texts: list[str]) -> object:
    """Byte pairs of lower-case words, as CLIP's, with the end of a word marked."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizerFast

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.model.save(scratch)
        merges = (Path(scratch) / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    # CLIP's own order: every byte, every byte at a word's end, the merges, and the two special tokens.
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge.split(" ")) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    with tempfile.TemporaryDirectory() as scratch:
        _write_clip_files(Path(scratch), vocabulary, merges)
        return CLIPTokenizerFast.from_pretrained(
            scratch, model_max_length=CLIP_LENGTH, bos_token=START, eos_token=END, unk_token=END, pad_token=END
        )


def _write_clip_files(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _t5(texts: list[str]) -> object:
    """Unigrams with SentencePiece's marks for blanks: the captions' words whole, anything else letter by letter.

    Padding is 0, the end 1, the unknown 2, as in T5.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    counts = Counter(word for text in texts for word in re.findall(r"[A-Za-z]+", text))
    words = [(BLANK + word, math.log(count / len(texts))) for word, count in counts.most_common(T5_WORDS)]
    letters = [(letter, LETTER_SCORE) for letter in (BLANK, *LETTERS)]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    about = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": T5_LENGTH,
    }
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(str(Path(scratch) / "tokenizer.json"))
        (Path(scratch) / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
        return T5TokenizerFast.from_pretrained(scratch)
