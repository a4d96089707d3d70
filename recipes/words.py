# SPDX-License-Identifier: Apache-2.0
"""What a recipe on words is given: a sense dictionary, a teacher of senses, and tests of words and sentences."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import EMBEDDED, gcide_contexts
from inputs import known_sts, sts_evaluators
from torch.nn import functional
from transformers.utils import logging

from hf_distill.cache import TeacherCache, cache_folder
from hf_distill.evaluation.explain import explain
from hf_distill.evaluation.report import RunReport
from hf_distill.evaluation.similarity import STS_DEV_SETS, STS_SETS
from hf_distill.evaluation.word_sense import (
    ClassificationEvaluator,
    TokenStates,
    WiCEvaluator,
    sense_purity,
    sense_vectors,
    state_errors,
    statistics,
    word_similarity,
    word_states,
)
from hf_distill.multi_sense import MultiSenseStudent
from hf_distill.processes import process_state
from hf_distill.sense_builder import build_senses
from hf_distill.senses import SenseDictionary, require_same_tokens
from hf_distill.student import encode_sorted, pool
from hf_distill.token_teacher import SenseTeacher, TokenTeacher


logger = logging.get_logger("hf_distill.words")


class EndTasks:
    """The tests of sentences and words that `--sts`, `--sts_dev`, `--classification` and `--wic` name, and their mean.

    seen: The texts of all their splits, which no training may hold. The mean, end_avg, is over the STS sets, Word-in-Context,
    and each classification set with few labels.
    """

    def __init__(self, recipe: Any, report: RunReport) -> None:
        folder, split, full = recipe.classification, recipe.split, recipe.all_labels
        names = sorted({path.name.rpartition("-train.")[0] for path in Path(folder).glob("*-train.*")}) if folder else []
        if folder and not names:
            raise FileNotFoundError(f"multi_sense: no file *-train.* in {folder}, expected <name>-train and <name>-{split}.")
        both = [(name, other) for name in names for other in ("dev", "test")]
        classes = {key: ClassificationEvaluator(folder, *key, full=full) for key in both}
        report.evaluators = [*sts_evaluators(recipe), *(classes[name, split] for name in names)]
        self.wic = WiCEvaluator(recipe.wic, test=split) if recipe.wic else None
        sets = STS_SETS if recipe.sts else STS_DEV_SETS  # beside the tests, dev is no task of its own
        scored = sets if recipe.sts or recipe.sts_dev else ()
        self.ends = [*(["wic"] if self.wic else []), *(f"sts_{name}" for name in scored), *(f"{name}_few" for name in names)]
        self.report = report
        self.taught: tuple[TokenStates, list[str]] | None = None  # the teacher's states, and texts of no training
        # Of all splits, so that what dev chooses was made from the texts that are trained on when it is tested.
        sources: list[Any] = [*classes.values(), *([WiCEvaluator(recipe.wic, tune="dev")] if recipe.wic else [])]
        for sts in sorted({recipe.sts, recipe.sts_dev} - {None}):
            sources += known_sts(sts, {**STS_SETS, **STS_DEV_SETS})
        self.seen = [text for source in sources for text in source.texts()]

    def add(self, names: Sequence[str], states: TokenStates, model: Any, parameters: int) -> None:
        """Score a row of the table for each kind of states; every text is read once.

        Beside the tests: state_error, `state_errors` against the states that `taught` names.

        Args:
            names: Of the rows.
            states: texts -> (token states [N, T, D] of each row, mask [N, T]).
            model: The teacher or student that they are of: its tokenizer and width.
            parameters: How many weights a state runs through.
        """

        def side_by_side(batch: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            *kinds, mask = states(batch)
            return torch.cat(kinds, -1), mask

        def embed(batch: list[str]) -> torch.Tensor:
            pooled = pool(*side_by_side(batch), "mean").unflatten(-1, (len(names), model.dim))
            return functional.normalize(pooled, dim=-1).flatten(1)

        encode = Remembered(lambda texts: encode_sorted(embed, texts, 32))
        encode_words = Remembered(word_states(model.tokenizer, side_by_side))
        errors = state_errors(states, *self.taught) if self.taught else [None] * len(names)
        for name, columns, error in zip(names, torch.arange(len(names) * model.dim).split(model.dim), errors, strict=True):

            def own(found: Remembered, columns: torch.Tensor = columns) -> Callable[..., torch.Tensor]:
                return lambda *rows: found(*rows)[:, columns]

            self.report.add(name, own(encode), parameters, model.dim, prefixes=False)
            scores = self.report.rows[name]["scores"]
            scores |= {} if error is None else {"state_error": error}
            if self.wic:
                scores |= self.wic(own(encode_words))
            if self.ends:
                scores["end_avg"] = float(np.mean([scores[key] for key in self.ends]))


class Remembered:
    """An encoder, columns of N values -> [N, D], that computes each row once."""

    def __init__(self, encode: Callable[..., Any]) -> None:
        self.encode = encode
        self.known: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, *columns: Iterable[Any]) -> torch.Tensor:
        """Return the vectors of the rows, [N, D]."""
        rows = list(zip(*columns, strict=True))
        new = [row for row in dict.fromkeys(rows) if row not in self.known]
        if new:
            self.known |= zip(new, torch.as_tensor(self.encode(*map(list, zip(*new, strict=True)))), strict=True)
        return torch.stack([self.known[row] for row in rows])


def open_token_teacher(recipe: Any, student: MultiSenseStudent) -> TokenTeacher:
    """Return the teacher that `--teacher` names; it reads what the student reads, or as the dictionary of `--senses` says."""
    others = ("teacher_int8", "teacher_device_map", "teacher_pooling", "max_vocabulary", "embedding_dim")
    others += ("from_scratch", "freeze_embeddings")
    given = [name for name in others if getattr(recipe, name)] + (["teacher"] if len(recipe.teacher) > 1 else [])
    if given:
        raise ValueError(f"multi_sense: {given} are given, expected one teacher, and a student of its tokens, both whole.")
    asked = {"layer": recipe.teacher_layer, "max_length": recipe.teacher_max_length, "bidirectional": recipe.bidirectional}
    options = {"layer": -1, "max_length": student.settings["max_length"]}
    if recipe.senses:
        made = SenseDictionary.from_pretrained(recipe.senses).facts.get("fingerprint") or {}
        options |= {key: made[key] for key in ("layer", "bidirectional", "max_length", "dtype") if key in made}
        wrong = {key: options[key] for key, value in asked.items() if key in made and value not in (None, options[key])}
        if wrong:
            raise ValueError(
                f"multi_sense: the dictionary {recipe.senses} was made with {wrong}, the flags say "
                f"{ {key: asked[key] for key in wrong} }, expected the same. Its senses are of other states. Say the "
                "same, or leave --senses out to make another."
            )
    options |= {key: value for key, value in asked.items() if value is not None}
    teacher = TokenTeacher(recipe.teacher[0], recipe.teacher_revision, **options)
    teacher.name = recipe.teacher_name or teacher.name
    teacher.license = recipe.teacher_license or teacher.license
    return teacher


def open_dictionary(recipe: Any, args: Any, teacher: TokenTeacher, texts: Any) -> tuple[SenseDictionary, str]:
    """Return (the dictionary that `--senses` names, or one made from the texts; the name that a student finds it by).

    One that is made lies beside the output folder. With `--push_to_hub` it is published beside the student; so is a local one.

    Raises:
        ValueError: If it is another tokenizer's, or most of the texts' tokens have no sense in it: little would be replaced.
    """
    beside = f"{Path(args.hub_model_id if args.push_to_hub and args.hub_model_id else args.output_dir).name}-senses"
    folder = Path(args.output_dir).with_name(beside)
    if recipe.senses:
        dictionary = SenseDictionary.from_pretrained(recipe.senses)
        require_same_tokens(dictionary.tokenizer, teacher.tokenizer)
        special = dictionary.facts.get("special_tokens", True)
        if recipe.special_tokens not in (None, special):
            raise ValueError(
                f"multi_sense: --special_tokens is {recipe.special_tokens}, the dictionary {recipe.senses} has "
                f"{'' if special else 'no '}senses of such tokens, expected the same. Their states would be treated otherwise "
                "than asked for. Leave the flag out, or --senses, to make another."
            )
        sample = [text for _, text in zip(range(2000), texts.all(), strict=False)]
        ids = torch.tensor([i for row in teacher.tokens(sample) for i in row.tolist()])
        missing = 1 - dictionary.known(ids).float().mean().item()
        if missing > 0.5:
            raise ValueError(
                f"multi_sense: {missing:.0%} of the texts' tokens have no sense in {recipe.senses}, expected few. Little would "
                "be replaced, and less learned. Build one from texts of this kind: leave --senses out."
            )
        if not Path(recipe.senses).is_dir():
            return dictionary, recipe.senses
        if not args.push_to_hub:
            return dictionary, os.path.relpath(recipe.senses, args.output_dir)
    else:
        states = cache_folder(recipe.cache_dir, teacher)
        states = states.with_name(f"{states.name}-states")
        dictionary = build_senses(
            teacher, texts.all(), states, recipe.k, recipe.cap, recipe.split_seed, recipe.teacher_batch_size
        )
        dictionary = dictionary if recipe.special_tokens else dictionary.without_special_tokens()
        dictionary.facts |= {"select": recipe.select, "license": recipe.license}
    if args.process_index == 0:
        dictionary.save_pretrained(folder)
        if args.push_to_hub:
            owner = f"{Path(args.hub_model_id).parent}/" if args.hub_model_id and "/" in args.hub_model_id else ""
            dictionary.push_to_hub(f"{owner}{beside}", private=args.hub_private_repo, token=args.hub_token)
    process_state().wait_for_everyone()
    return dictionary, f"../{beside}"


def open_senses(recipe: Any, teacher: TokenTeacher, dictionary: SenseDictionary, texts: Any) -> Any:
    """Return the teacher of senses: cached, or live where the loss needs its scores or states; of states, for these alone."""
    if not recipe.sense_weight:
        return teacher
    beside = [name for name, wanted in (("sense_scores", recipe.soft), ("states", recipe.state_weight)) if wanted]
    live = SenseTeacher(teacher, dictionary, recipe.select, beside)
    if beside:
        return live
    cache = TeacherCache(live, cache_folder(recipe.cache_dir, live), batch_size=recipe.teacher_batch_size)
    cache.add(*texts.text_columns())
    return cache


def both_states(student: MultiSenseStudent) -> TokenStates:
    """Return texts -> (states in the teacher's space [N, T, D], these with each replaced by its sense, mask [N, T])."""

    def read(batch: list[str]) -> tuple[torch.Tensor, ...]:
        options = {"padding": True, "truncation": True, "max_length": student.settings["max_length"], "return_tensors": "pt"}
        inputs = student.tokenizer(batch, **options).to(student.device)
        output = student.outputs(batch)
        replaced, _ = student.dictionary.take(output.states, inputs["input_ids"], output.sense_scores)
        return output.states.float().cpu(), replaced.float().cpu(), inputs["attention_mask"].cpu()

    return read


def sense_accuracy(source: SenseTeacher, student: MultiSenseStudent, texts: list[str]) -> float:
    """Return the share of the texts' tokens that have senses for which the student chooses the teacher's, in [0, 1]."""
    right = total = 0
    for start in range(0, len(texts), 32):
        batch = texts[start : start + 32]
        states, ids, mask = source.teacher.read(batch)
        _, wanted = source.dictionary.lookup(states, ids, mask, source.select)
        found = student.outputs(batch).sense_scores.argmax(-1).to(wanted.device)
        right += int((found == wanted)[wanted >= 0].sum())
        total += int((wanted >= 0).sum())
    return right / max(1, total)


def agreement(source: SenseTeacher, texts: list[str]) -> float:
    """Return the mean cosine between the teacher's embeddings with states replaced and as they are."""

    def cosines(batch: list[str]) -> torch.Tensor:
        *kinds, mask = source.states(batch)
        return functional.cosine_similarity(*(pool(states, mask, "mean") for states in kinds))[:, None]

    return float(encode_sorted(cosines, texts, 32).mean())


def explain_words(recipe: Any, args: Any, source: SenseTeacher, texts: Iterable[str]) -> None:
    """Write the senses of `--explained` with their contexts, and a map each: people look before they trust. Not published."""
    folder, found = Path(args.output_dir) / "explained", []
    if not recipe.explained or args.process_index:
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(texts)
    for word in recipe.explained:
        try:
            explained = explain(word, source.dictionary, source.teacher, texts, select=source.select)
            explained.draw(folder / f"{word}.png")
        except ValueError as error:  # a word of several tokens, or one that the texts hardly hold
            logger.warning(str(error))
            continue
        found.append(f"## {word}\n\n{explained.table()}\n\n![contexts of {word}]({word}.png)\n")
    (folder / "README.md").write_text("# Senses of some words\n\n" + "\n".join(found), encoding="utf-8")


def dictionary_facts(recipe: Any, source: SenseTeacher, student: MultiSenseStudent, texts: list[str]) -> dict[str, Any]:
    """Return what the dictionary costs and covers, and how often the student chooses as the teacher.

    With `--baselines`, as they are the same for every student of it: how alike the teacher's embeddings stay, how well senses
    keep definitions apart, and how similar words are by them.
    """
    dictionary = source.dictionary
    own = {**dictionary.facts, **statistics(dictionary, texts)}
    own["sense_accuracy"] = 100 * sense_accuracy(source, student, texts)
    facts: dict[str, Any] = {"dictionary": own}
    if not recipe.baselines:
        return facts
    own["agreement"] = agreement(source, texts)
    if EMBEDDED in recipe.texts:
        own |= sense_purity(source, gcide_contexts())
    if recipe.words:
        found = (word_similarity(sense_vectors(dictionary, single), recipe.words) for single in (False, True))
        facts["words"] = dict(zip(("senses", "one centroid"), found, strict=True))
    return facts
