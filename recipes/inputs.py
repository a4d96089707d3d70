# SPDX-License-Identifier: Apache-2.0
"""What every recipe is given: texts, teacher, student, evaluation sets, as its flags name them."""

from typing import Any

from datasets import Dataset
from demo import EMBEDDED, gcide_texts

from hf_distill.cache import TeacherCache, cache_folder
from hf_distill.data import join_texts, load_texts, split_source, text_columns
from hf_distill.evaluation.similarity import STS_DEV_SETS, STSEvaluator
from hf_distill.student import StudentModel
from hf_distill.teachers import EncoderTeacher, JointTeacher, Teacher


def training_texts(recipe: Any, columns: list[str] | None = None) -> Dataset:
    """Return the rows that `--texts` names: those of the only data set as they are, or the texts of several."""
    parts = [
        (gcide_texts() if name == EMBEDDED else load_texts(name, recipe.texts_subset), own)
        for name, own in map(split_source, recipe.texts)
    ]
    if len(parts) > 1:
        return join_texts(parts)
    [(dataset, own)] = parts
    return dataset.select_columns(text_columns(dataset, own or columns))


def sts_evaluators(recipe: Any) -> list[STSEvaluator]:
    """Return the STS sets that `--sts` and `--sts_dev` name."""
    tests = [STSEvaluator(recipe.sts, dims=recipe.dims)] if recipe.sts else []
    return tests + ([STSEvaluator(recipe.sts_dev, STS_DEV_SETS)] if recipe.sts_dev else [])


def open_teacher(recipe: Any) -> Teacher:
    """Return the cached teacher that `--teacher` names, or the joint one of several."""
    caches = []
    for name in recipe.teacher:
        teacher = EncoderTeacher(name, **recipe.teacher_options())
        if recipe.teacher_name and len(recipe.teacher) == 1:
            teacher.name = recipe.teacher_name
        caches.append(TeacherCache(teacher, cache_folder(recipe.cache_dir, teacher), batch_size=recipe.teacher_batch_size))
    return caches[0] if len(caches) == 1 else JointTeacher(caches, recipe.combine)


def open_student(recipe: Any, **options: Any) -> StudentModel:
    """Return a student made from `--backbone`."""
    student = StudentModel.from_backbone(recipe.backbone, **recipe.student_options(), **options)
    student.settings["base_model"] = recipe.backbone_name or student.settings["base_model"]
    return student
