# SPDX-License-Identifier: Apache-2.0
"""What every recipe is given: texts, teacher, student, evaluation sets, as its flags name them."""

import json
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from demo import EMBEDDED, gcide_collection, gcide_texts
from safetensors.torch import load_file

from hf_distill.augment import BackTranslation, SynonymReplacement, augment
from hf_distill.build import from_scratch, prune_vocabulary
from hf_distill.cache import TeacherCache, cache_folder
from hf_distill.cross_encoder import CrossEncoderTeacher, pair
from hf_distill.data import TrainingTexts, find_leaks, join_texts, load_texts, require_texts, split_source
from hf_distill.evaluation.report import command
from hf_distill.evaluation.similarity import STS_DEV_SETS, STSEvaluator
from hf_distill.negatives import mine_negatives
from hf_distill.queries import QueryGenerator, SpanQueries, generate_queries
from hf_distill.student import StudentModel
from hf_distill.teachers import EncoderTeacher, JointTeacher, Teacher, TwoTowerTeacher


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
    dataset, columns = (join_texts(parts), None) if len(parts) > 1 else parts[0]
    texts = TrainingTexts.split(
        dataset, columns or args.text_columns, recipe.held_out, recipe.max_texts, args.seed, leaks_from=seen
    )
    rounds: list[tuple[Any, int]] = []
    if recipe.synonyms:
        rounds.append((SynonymReplacement(seed=args.seed), recipe.synonyms))
    if recipe.back_translation:
        rounds.append((BackTranslation(*recipe.back_translation), 1))
    return texts.extended(augment(texts.all(), rounds), seen) if rounds else texts


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


def open_student(recipe: Any, corpus: Iterable[str], **options: Any) -> StudentModel:
    """Return a student made from `--backbone`, or as `--from_scratch` says with its tokenizer; its vocabulary cut if asked."""
    if recipe.from_scratch:
        student = from_scratch(recipe.backbone, *recipe.from_scratch, **recipe.student_options(), **options)
    else:
        student = StudentModel.from_backbone(recipe.backbone, **recipe.student_options(), **options)
        student.settings["base_model"] = recipe.backbone_name or student.settings["base_model"]
    if recipe.max_vocabulary:
        prune_vocabulary(student, list(corpus), recipe.max_vocabulary)
    student.backbone.get_input_embeddings().requires_grad_(not recipe.freeze_embeddings)
    return student


@dataclass
class Collections:
    """A collection with three disjoint sets of queries: to train on, to choose by, to report (None for none)."""

    train: Any
    dev: Any
    test: Any

    def evaluated(self) -> list[str]:
        """Return the queries that no training query may repeat."""
        return [text for side in (self.dev, self.test) if side for text in side.queries.values()]


def open_collection(recipe: Any) -> Collections:
    """Return what `--collection` names, its training queries split by `--split_seed`."""
    from hf_distill.evaluation.retrieval import RetrievalData  # the extra retrieval

    if recipe.collection == EMBEDDED:
        everything, test = gcide_collection()
    else:
        everything = RetrievalData.load(recipe.collection, recipe.train_split)
        split = recipe.test_split
        test = RetrievalData.load(recipe.collection, split, everything.documents) if split else None
    if recipe.max_queries:
        sides = (everything, test)
        everything, test = (
            side.split(recipe.max_queries, recipe.split_seed)[1] if side and len(side.queries) > recipe.max_queries else side
            for side in sides
        )
    if recipe.max_documents and recipe.max_documents < len(everything.documents):
        judged = {key for side in (everything, test) if side for row in side.relevant.values() for key in row}
        others = [key for key in everything.documents if key not in judged]
        random.Random(recipe.split_seed).shuffle(others)
        kept = judged | set(others[: max(recipe.max_documents - len(judged), 0)])
        documents = {key: text for key, text in everything.documents.items() if key in kept}
        everything, test = everything.with_documents(documents), test and test.with_documents(documents)
    train, dev = everything.split(recipe.dev_queries or len(everything.queries) // 5, recipe.split_seed)
    return Collections(train, dev, test)


def open_towers(recipe: Any, documents: list[str]) -> TwoTowerTeacher:
    """Return the cached teacher of queries and of documents; vectors that exist already are not encoded again."""

    def tower(prompt: str | None) -> TeacherCache:
        teacher = EncoderTeacher(recipe.teacher[0], prompt=prompt, **recipe.teacher_options())
        teacher.name = recipe.teacher_name or teacher.name
        return TeacherCache(teacher, cache_folder(recipe.cache_dir, teacher), batch_size=recipe.teacher_batch_size)

    queries = tower(recipe.query_prompt)
    if recipe.document_embeddings:
        path = Path(recipe.document_embeddings)
        folder = Path(recipe.cache_dir) / f"{path.stem}-{path.stat().st_size}-{path.stat().st_mtime_ns}"
        return TwoTowerTeacher(
            queries, TeacherCache.from_embeddings(documents, read_vectors(path), folder, f"{queries.name} ({path.name})")
        )
    same = recipe.document_prompt == recipe.query_prompt
    towers = TwoTowerTeacher(queries, queries if same else tower(recipe.document_prompt))
    towers.documents.add(documents)
    return towers


def read_vectors(path: Path) -> Any:
    """Return [N, D] from a .npy, .safetensors (its only tensor) or .faiss file.

    Raises:
        ValueError: If it is of another kind, or holds something else.
    """
    if path.suffix == ".npy":
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    elif path.suffix == ".safetensors":
        tensors = load_file(path)
        vectors = next(iter(tensors.values())) if len(tensors) == 1 else np.empty(0)
    elif path.suffix == ".faiss":
        import faiss

        index = faiss.read_index(str(path))
        vectors = index.reconstruct_n(0, index.ntotal)
    else:
        vectors = np.empty(0)
    if vectors.ndim != 2 or not bool(np.isfinite(np.asarray(vectors)).all()):
        raise ValueError(
            f"--document_embeddings: {path} holds {tuple(vectors.shape)}, expected finite vectors [N, D] in a .npy, .faiss, or "
            ".safetensors file of one tensor. Queries would be matched with noise."
        )
    return vectors


def more_queries(recipe: Any, documents: list[str], seed: int) -> Dataset | None:
    """Return rows of a made query and its document, as `--spans` and `--generator` ask; None for none."""
    folder = Path(recipe.cache_dir) / "queries"
    if recipe.generator:
        generator = QueryGenerator(recipe.generator, recipe.generator_prompt, recipe.generated)
        return generate_queries(documents, generator, folder, seed)
    return generate_queries(documents, SpanQueries(recipe.spans), folder, seed) if recipe.spans else None


def retrieval_rows(recipe: Any, collections: Collections, towers: TwoTowerTeacher, seed: int) -> tuple[Dataset, dict[str, Any]]:
    """Return (rows of a query, a document that answers it, and hard negatives; what results.json says of them)."""
    documents = list(collections.train.documents.values())
    queries, answers = collections.train.rows_of()
    made = more_queries(recipe, documents, seed)
    if made is not None:
        row = {text: i for i, text in enumerate(documents)}
        queries = [*queries, *made["query"]]
        answers = [*answers, *([row[text]] for text in made["document"])]
    leaks = set(find_leaks(Dataset.from_dict({"query": queries}), ["query"], collections.evaluated())[0])
    kept = [i for i in range(len(queries)) if i not in leaks]
    queries, answers = [queries[i] for i in kept], [answers[i] for i in kept]
    towers.queries.add(queries, collections.evaluated())
    vectors = towers.documents.encode(documents)
    found = mine_negatives(towers.encode(queries), vectors, answers, recipe.negatives, margin=recipe.negative_margin, seed=seed)
    rows = [
        {"query": query, "positive": documents[answer], **{f"negative_{i + 1}": documents[n] for i, n in enumerate(others)}}
        for query, rows_of, others in zip(queries, answers, found.tolist(), strict=True)
        for answer in rows_of
    ]
    dataset = Dataset.from_list(rows)
    facts = {"name": str(recipe.texts_name or recipe.collection), "rows": len(dataset), "columns": dataset.column_names}
    facts |= {"documents": len(documents), "queries": len(queries), "made_queries": 0 if made is None else len(made)}
    facts |= {"held_out": len(collections.dev.queries), "leaked": len(leaks)}
    return dataset, {**facts, "sha256": require_texts(dataset, dataset.column_names)}


def open_reranker(recipe: Any, rows: Dataset) -> TeacherCache | None:
    """Return the scores of `--reranker` for all rows, cached."""
    if recipe.reranker is None:
        return None
    label = recipe.reranker_label
    live = CrossEncoderTeacher(recipe.reranker, label=int(label) if label and label.isdigit() else label)
    cache = TeacherCache(live, cache_folder(recipe.cache_dir, live), dtype="float32")
    cache.add(*([pair(q, d) for q, d in zip(rows["query"], rows[column], strict=True)] for column in rows.column_names[1:]))
    return cache


def retrieval_evaluators(recipe: Any, collections: Collections, documents: torch.Tensor | None) -> list[Any]:
    """Return the searches of dev and, where there is one, test; over these vectors, or documents encoded by what is scored.

    Each time that the test queries are to be searched, a line is added to test-evaluations.jsonl beside the caches.
    """
    from hf_distill.evaluation.retrieval import RetrievalEvaluator

    sides, found = ("query", "document"), [("dev", collections.dev)]
    if collections.test:
        found.append(("test", collections.test))
        line = {"time": time.strftime("%F %T"), "collection": str(recipe.collection), "command": command(sys.argv)}
        Path(recipe.cache_dir).mkdir(parents=True, exist_ok=True)
        with open(Path(recipe.cache_dir) / "test-evaluations.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    return [RetrievalEvaluator(data, documents, recipe.dims, name, sides) for name, data in found]
