# SPDX-License-Identifier: Apache-2.0
"""What a recipe on words is given: a teacher of tokens, its sense dictionary, and tests of words and sentences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers.utils import logging

from hf_distill.cache import TeacherCache, cache_folder
from hf_distill.evaluation.word_sense import ClassificationEvaluator, sense_vectors, word_similarity
from hf_distill.multi_sense import MultiSenseStudent
from hf_distill.sense_builder import build_senses
from hf_distill.senses import SenseDictionary
from hf_distill.student import encode_sorted, pool
from hf_distill.token_teacher import SenseTeacher, TokenTeacher


logger = logging.get_logger("hf_distill.words")
States = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]


def open_dictionary(recipe: Any, teacher: TokenTeacher, texts: Any, folder: Path, seed: int) -> SenseDictionary:
    """Return the dictionary that `--senses` names, or one made from the texts; it lies in `folder`, or where it was.

    Raises:
        ValueError: If most of the texts' tokens have no sense in it: little would be replaced, or learned.
    """
    if recipe.senses:
        dictionary = SenseDictionary.from_pretrained(recipe.senses)
        sample = [text for _, text in zip(range(2000), texts.all(), strict=False)]
        ids = torch.tensor([i for row in teacher.tokens(sample) for i in row.tolist()])
        missing = 1 - dictionary.known(ids).float().mean().item()
        if missing > 0.5:
            raise ValueError(
                f"multi_sense: {missing:.0%} of the texts' tokens have no sense in {recipe.senses}, expected few. Little would be "
                "replaced, and less learned. Build one from texts of this kind: leave --senses out."
            )
        return dictionary
    place = cache_folder(recipe.cache_dir, teacher).with_name(f"{cache_folder(recipe.cache_dir, teacher).name}-states")
    dictionary = build_senses(teacher, texts.all(), place, recipe.k, recipe.cap, seed, recipe.teacher_batch_size)
    dictionary.save_pretrained(folder)
    return dictionary


def open_senses(recipe: Any, teacher: TokenTeacher, dictionary: SenseDictionary, texts: Any) -> Any:
    """Return the teacher of senses: cached, or live where the loss needs its scores or states."""
    beside = [name for name, wanted in (("sense_scores", recipe.soft), ("states", recipe.state_weight)) if wanted]
    live = SenseTeacher(teacher, dictionary, recipe.select, beside)
    if beside:
        return live
    cache = TeacherCache(live, cache_folder(recipe.cache_dir, live), batch_size=recipe.teacher_batch_size)
    cache.add(*texts.text_columns())
    return cache


def sentence_evaluators(recipe: Any) -> list[Any]:
    """Return the sets that `--classification` names, with few labels and with all."""
    folder = recipe.classification
    names = sorted({path.name.split("-")[0] for path in Path(folder).glob("*-test.*")}) if folder else []
    return [ClassificationEvaluator(folder, name) for name in names]


def encoder_of(states: States) -> Callable[..., torch.Tensor]:
    """Return texts -> the mean of their real token states, of unit length, [N, D]."""

    def embed(batch: list[str]) -> torch.Tensor:
        return functional.normalize(pool(*states(batch), "mean"), dim=-1)

    return lambda texts, **options: encode_sorted(embed, list(texts), 32)


def states_of(student: MultiSenseStudent, replace: bool) -> States:
    """Return texts -> (token states of a student in the teacher's space [N, T, D], mask [N, T]), with senses or without."""

    @torch.no_grad()
    def states(batch: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"padding": True, "truncation": True, "max_length": student.settings["max_length"], "return_tensors": "pt"}
        inputs = student.tokenizer(batch, **options).to(student.device)
        output = student.eval()(**inputs)
        found = output.states
        if replace:
            found, _ = student.dictionary.take(found, inputs["input_ids"], output.sense_scores)
        return found.float().cpu(), inputs["attention_mask"].cpu()

    return states


def word_encoder(tokenizer: Any, states: States, batch_size: int = 64) -> Callable[[list[str], list[tuple[int, int]]], Any]:
    """Return a function: texts and the characters of a word in each -> the mean state of its tokens, [N, D]."""

    def encode(texts: list[str], places: list[tuple[int, int]]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            hidden, _ = states(batch)
            offsets = tokenizer(batch, return_offsets_mapping=True, truncation=True, max_length=hidden.shape[1])[
                "offset_mapping"
            ]
            for row, (spans, (first, last)) in enumerate(zip(offsets, places[start : start + batch_size], strict=True)):
                own = [i for i, (a, b) in enumerate(spans) if a < last and b > first and b > a and i < hidden.shape[1]]
                # A word beyond the length limit has no state: the mean of the text stands for it.
                found.append(hidden[row, own].mean(0) if own else hidden[row].mean(0))
        return torch.stack(found).float().cpu().numpy()

    return encode


def dictionary_facts(recipe: Any, dictionary: SenseDictionary) -> dict[str, Any]:
    """Return how similar words are by their senses, and by one centroid each."""
    if not recipe.words:
        return {}
    many, one = (word_similarity(sense_vectors(dictionary, single), recipe.words) for single in (False, True))
    return {"words": {"senses": many, "one centroid": one}}
