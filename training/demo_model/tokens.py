"""A byte-level BPE tokenizer that keeps the space before a word apart.

In GPT-2's scheme " Paris" and "Paris" are two different tokens, so a tiny model cannot copy a word of the question
into a JSON string. Here merges never cross the space, except for frequent lower-case words of the text (" machine"),
which are never copied as names and would otherwise cost two tokens each.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder

from dialogue import CONTROL_TOKENS, VISIBLE_TOKENS

SPACE = "\u0120"
"""How byte-level BPE writes the byte 0x20."""


@dataclass(frozen=True)
class Vocabulary:
    """What both the trainer and the GGUF file need to know."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps({"tokens": self.tokens, "merges": self.merges}), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text("utf-8"))
        return cls(tuple(raw["tokens"]), tuple((left, right) for left, right in raw["merges"]))

    def tokenizer(self) -> Tokenizer:
        """Build the encoder; it splits as llama.cpp's `gpt-2` pre-tokenizer does."""
        ids = {token: index for index, token in enumerate(self.tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(self.merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = ByteLevelDecoder()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in VISIBLE_TOKENS])
        return tokenizer


def learn_vocabulary(texts: Sequence[str], *, pieces: int, spaced_words: int) -> Vocabulary:
    """Learn about `pieces` word pieces, then give the most frequent words a form with the space in front."""
    learned = _learn_pieces(texts, pieces)
    tokens = [*CONTROL_TOKENS, *VISIBLE_TOKENS, *learned.tokens]
    merges = list(learned.merges)
    for word in _frequent_words(texts, set(learned.tokens), spaced_words):
        merges.append((SPACE, word))
        tokens.append(SPACE + word)
    return Vocabulary(tuple(tokens), tuple(merges))


def _learn_pieces(texts: Iterable[str], pieces: int) -> Vocabulary:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    raw = json.loads(tokenizer.to_str())["model"]
    by_id = sorted(raw["vocab"], key=raw["vocab"].__getitem__)
    return Vocabulary(tuple(by_id), tuple((left, right) for left, right in raw["merges"]))


def _frequent_words(texts: Iterable[str], known: set[str], count: int) -> list[str]:
    words: Counter[str] = Counter()
    for text in texts:
        words.update(re.findall(r"(?<= )(?:[a-z]{2,}\b|a\b|[^\w\s]+)", text))
    return [word for word, _ in words.most_common() if word in known][:count]
