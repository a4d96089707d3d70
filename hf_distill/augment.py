# SPDX-License-Identifier: Apache-2.0
"""More training text from the text there is: other words, or there and back through another language."""

import hashlib
import importlib.util
import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from .student import load_safe


Augmentation = Callable[[list[str], int], list[str]]  # (texts, round) -> as many texts, some of them changed


class SynonymReplacement:
    """Replaces words by synonyms of WordNet.

    A word that is a base form in WordNet is replaced, with probability `share`, by another single word of its most frequent
    sense. What becomes of a text depends on the text, the round and the seed only.

    Source: HPD, Zhao et al. 2022, https://huggingface.co/papers/2203.07687, names WordNet substitution, two rounds; share and
    choice of sense are not given there.

    Args:
        share: Probability for each word that has a synonym, in (0, 1].
        seed: Of the choices.

    Raises:
        ImportError: If nltk, or its WordNet data, is not installed.
    """

    def __init__(self, share: float = 0.3, seed: int = 42) -> None:
        if importlib.util.find_spec("nltk") is None:
            raise ImportError("SynonymReplacement needs nltk. Install it with: pip install 'hf_distill[augment]'")
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise ImportError("SynonymReplacement needs WordNet: python -m nltk.downloader wordnet") from error
        self.share, self.seed, self._wordnet = share, seed, wordnet
        self._synonyms = lru_cache(maxsize=200_000)(self._look_up)

    def _look_up(self, word: str) -> tuple[str, ...]:
        for sense in self._wordnet.synsets(word):
            names = [name.lower() for name in sense.lemma_names()]
            if word in names:  # "cats" is found as "cat", and would become singular
                return tuple(dict.fromkeys(name for name in names if name != word and name.isalpha()))
        return ()

    def __call__(self, texts: list[str], number: int = 0) -> list[str]:
        """Return as many texts; of round `number`, which makes other choices than round 0."""
        return [self._replace(text, number) for text in texts]

    def _replace(self, text: str, number: int) -> str:
        rng = random.Random(hashlib.sha256(f"{self.seed} {number} {text}".encode("utf-8", "surrogatepass")).digest())

        def other(found: re.Match[str]) -> str:
            word = found[0]
            synonyms = self._synonyms(word.lower())
            if not synonyms or rng.random() >= self.share:
                return word
            chosen = rng.choice(synonyms)
            return chosen.capitalize() if word[0].isupper() else chosen

        return re.sub(r"\b[^\W\d_]{3,}\b", other, text)


class BackTranslation:
    """Translates texts into another language and back, with any two sequence-to-sequence models.

    Args:
        there: Folder or Hub id of a model from the texts' language.
        back: Of one into it.
        batch_size: Texts at a time.
        device: None for a GPU where there is one.
        **generation: What `generate` takes (num_beams, do_sample, forced_bos_token_id, ...); sampled rounds differ.

    Raises:
        OSError: If there is no such model, or only pickled weights.
    """

    def __init__(
        self, there: str, back: str, batch_size: int = 32, device: str | torch.device | None = None, **generation: Any
    ) -> None:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size, self.generation = batch_size, {"max_new_tokens": 128, **generation}
        self._ways = [
            (AutoTokenizer.from_pretrained(name), load_safe(AutoModelForSeq2SeqLM, name).to(device).eval())
            for name in (there, back)
        ]

    @torch.no_grad()
    def __call__(self, texts: list[str], number: int = 0) -> list[str]:
        """Return as many texts; round `number` seeds what is sampled."""
        with torch.random.fork_rng():  # what is drawn after it is the run's
            torch.manual_seed(number)
            for tokenizer, model in self._ways:
                translated = []
                for start in logging.tqdm(range(0, len(texts), self.batch_size), desc="Translating", unit="batch"):
                    batch = texts[start : start + self.batch_size]
                    inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(model.device)
                    translated += tokenizer.batch_decode(model.generate(**inputs, **self.generation), skip_special_tokens=True)
                texts = translated
        return texts


def augment(texts: Iterable[str], augmentations: Sequence[tuple[Augmentation, int]]) -> list[str]:
    """Return the new texts of every round of every augmentation, each distinct one once, the given ones left out.

    Args:
        texts: What is augmented.
        augmentations: (augmentation, rounds).
    """
    given = list(texts)
    new: dict[str, None] = {}
    for change, rounds in augmentations:
        for number in range(rounds):
            new |= dict.fromkeys(text.strip() for text in change(given, number))
    known = set(given)
    return [text for text in new if text and text not in known]
