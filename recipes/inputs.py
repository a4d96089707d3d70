# SPDX-License-Identifier: Apache-2.0
"""What every recipe is given: texts, teacher, student, evaluation sets, as its flags name them."""

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from demo import EMBEDDED, demo_defaults, fill_in, gcide_texts
from transformers import set_seed

from hf_distill.arguments import DistillationTrainingArguments, parse_arguments
from hf_distill.augment import BackTranslation, SynonymReplacement, augment
from hf_distill.build import from_scratch, narrow_embeddings, start_embeddings
from hf_distill.cache import TeacherCache, cache_folder
from hf_distill.data import TrainingTexts, join_texts, load_texts, split_source
from hf_distill.evaluation.report import RunReport
from hf_distill.evaluation.similarity import STS_DEV_SETS, STS_SETS, STSEvaluator
from hf_distill.runs import claim_output_dir
from hf_distill.student import StudentModel
from hf_distill.teachers import EncoderTeacher, JointTeacher
from hf_distill.vocabulary import prune_vocabulary


def begin(name: str, paper: str, arguments: type, argv: list[str] | None) -> tuple[Any, Any, RunReport]:
    """Return (the recipe's arguments, the trainer's, an empty report); the output folder is this run's from here on."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)
    recipe, args = parse_arguments(arguments, DistillationTrainingArguments, argv=argv, **demo_defaults(name))
    claim_output_dir(args.output_dir, {"recipe": name, "settings": recipe.identity(), "training": args.identity()})
    fill_in(recipe)
    set_seed(args.seed)  # a projection that starts at random is made before the trainer
    return recipe, args, RunReport(name, paper)


def training_texts(recipe: Any, args: Any, seen: list[str]) -> TrainingTexts:
    """Return what `--texts` names, cut and augmented: the rows of the only data set, or the texts of several.

    Args:
        recipe: The recipe's arguments.
        args: The trainer's.
        seen: Texts of evaluation sets, which are left out.
    """
    parts = [
        (gcide_texts() if name == EMBEDDED else load_texts(name, recipe.texts_subset), own)
        for name, own in map(split_source, recipe.texts)
    ]
    if len(parts) > 1 and args.text_columns:
        raise ValueError(
            f"--text_columns is {args.text_columns}, beside {len(parts)} --texts, expected the columns with each: "
            f"{recipe.texts[0]}:a,b. Which of the texts have them would be a guess."
        )
    dataset, columns = (join_texts(parts), None) if len(parts) > 1 else parts[0]
    texts = TrainingTexts.split(
        dataset, columns or args.text_columns, recipe.held_out, recipe.max_texts, recipe.split_seed, leaks_from=seen
    )
    rounds: list[tuple[Any, int]] = []
    if recipe.synonyms:
        rounds.append((SynonymReplacement(seed=recipe.split_seed), recipe.synonyms))
    if recipe.back_translation:
        rounds.append((BackTranslation(*recipe.back_translation), 1))
    return texts.extended(augment(texts.all(), rounds), seen) if rounds else texts


def sts_evaluators(recipe: Any) -> list[STSEvaluator]:
    """Return the STS sets that `--sts` and `--sts_dev` name; of dev without the pairs that stand in a test set at hand."""
    tests = [STSEvaluator(recipe.sts, dims=recipe.dims)] if recipe.sts else []
    if not recipe.sts_dev:
        return tests
    dev = STSEvaluator(recipe.sts_dev, STS_DEV_SETS)
    dev.leave_out(tests or known_sts(recipe.sts_dev, STS_SETS))
    return [*tests, dev]


def known_sts(folder: str, sets: dict[str, tuple[str, str, str]]) -> list[STSEvaluator]:
    """Return an evaluator of each of the sets that lies in a folder."""
    found = []
    for name, place in sets.items():
        with contextlib.suppress(FileNotFoundError):
            found.append(STSEvaluator(folder, {name: place}))
    return found


def open_teacher(recipe: Any, prompt: str | None = None, side: str | None = None) -> Any:
    """Return the cached teacher that `--teacher` names, or the joint one of several.

    Args:
        recipe: The recipe's arguments.
        prompt: Put before every text; None for the teacher's own prompt of that side.
        side: "query", "document", or None for the teacher's default prompt.
    """
    caches = []
    for name in recipe.teacher:
        teacher = EncoderTeacher(name, prompt=prompt, side=side, **recipe.teacher_options())
        if recipe.teacher_name and len(recipe.teacher) == 1:
            teacher.name = recipe.teacher_name
        teacher.license = recipe.teacher_license or teacher.license
        caches.append(TeacherCache(teacher, cache_folder(recipe.cache_dir, teacher), batch_size=recipe.teacher_batch_size))
    return caches[0] if len(caches) == 1 else JointTeacher(caches, recipe.combine)


def open_student(recipe: Any, corpus: Iterable[str], languages: Iterable[str] | None = None, **options: Any) -> StudentModel:
    """Return a student made from `--backbone`, or as `--from_scratch` says with its tokenizer; its vocabulary cut if asked.

    Args:
        recipe: The recipe's arguments.
        corpus: What the vocabulary is counted on.
        languages: The language of each text of it, where there are several.
        **options: Whatever else `StudentModel.from_parts` takes.
    """
    if recipe.from_scratch:
        student = from_scratch(recipe.backbone, *recipe.from_scratch, **recipe.student_options(), **options)
        if getattr(recipe, "start_embeddings", False):
            start_embeddings(student, recipe.backbone)
            student.settings["embeddings_of"] = recipe.backbone_name or student.settings["embeddings_of"]
    else:
        student = StudentModel.from_backbone(recipe.backbone, **recipe.student_options(), **options)
        student.settings["base_model"] = recipe.backbone_name or student.settings["base_model"]
    if recipe.max_vocabulary:
        prune_vocabulary(student, list(corpus), recipe.max_vocabulary, languages)
    if recipe.embedding_dim:
        student = narrow_embeddings(student, recipe.embedding_dim)
    student.backbone.get_input_embeddings().requires_grad_(not recipe.freeze_embeddings)
    return student
