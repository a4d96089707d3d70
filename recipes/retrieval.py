# SPDX-License-Identifier: Apache-2.0
"""What a recipe on queries and documents is given: collection, teacher of both sides, rows to train on, searches."""

import hashlib
import io
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value, concatenate_datasets
from demo import EMBEDDED, gcide_collection
from inputs import open_teacher
from safetensors.torch import load_file
from torch.nn import functional
from transformers.utils import logging

from hf_distill.cache import TeacherCache, cache_folder
from hf_distill.cross_encoder import CrossEncoderTeacher, DualPoolingTeacher, pair
from hf_distill.data import find_leaks, load_texts, require_texts
from hf_distill.evaluation.report import command
from hf_distill.negatives import mine_negatives
from hf_distill.processes import process_state, score
from hf_distill.projection import PCAProjection
from hf_distill.queries import QueryGenerator, SpanQueries, generate_queries
from hf_distill.shards import keys_of, write_whole
from hf_distill.student import StudentModel
from hf_distill.teachers import EncoderTeacher, JointTeacher, Teacher, TwoTowerTeacher


logger = logging.get_logger("hf_distill.retrieval")


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
    held_out = len(everything.queries) // 5 if recipe.dev_queries is None else recipe.dev_queries
    train, dev = everything.split(held_out, recipe.split_seed)
    return Collections(train, dev, test)


def open_towers(recipe: Any, documents: list[str]) -> TwoTowerTeacher:
    """Return the cached teacher of queries and of documents; vectors that exist already are not encoded again."""
    queries = open_teacher(recipe, recipe.query_prompt, "query")
    if recipe.document_embeddings:
        vectors = read_vectors(recipe.document_embeddings)
        found = hashlib.sha256(np.ascontiguousarray(vectors))
        found.update(keys_of(documents).tobytes())  # which text each belongs to
        digest = found.hexdigest()[:12]
        name = f"{queries.name} ({Path(recipe.document_embeddings).name} {digest})"
        folder = Path(recipe.cache_dir) / f"index-{digest}"
        return TwoTowerTeacher(queries, TeacherCache.from_embeddings(documents, vectors, folder, name))
    own = {side: prompts_of(queries, side) for side in ("query", "document")}
    given = {"query": recipe.query_prompt, "document": recipe.document_prompt}
    asked, told = (own[side] if prompt is None else [prompt] * len(own[side]) for side, prompt in given.items())
    same = asked == told
    towers = TwoTowerTeacher(queries, queries if same else open_teacher(recipe, recipe.document_prompt, "document"))
    towers.documents.add(documents)
    return towers


def document_encoder(recipe: Any, towers: TwoTowerTeacher) -> dict[str, Any]:
    """Return what a student says of the encoder of its documents; of a prompt None where it is not known."""
    live = towers.documents.live
    prompt = live.prompt if isinstance(live, EncoderTeacher) else recipe.document_prompt
    asked = {"pooling": recipe.teacher_pooling, "max_length": recipe.teacher_max_length}
    told = {key: value for key, value in asked.items() if value is not None}
    return {"name": towers.queries.name, "revision": towers.queries.revision, "prompt": prompt, **told}


def prompts_of(teacher: Teacher, side: str) -> list[str]:
    """Return the prompts that teachers have of their own for queries or documents."""
    live = teacher.live
    return [one.prompt_of(side) for one in (live.teachers if isinstance(live, JointTeacher) else [live])]


def read_vectors(name: str) -> np.ndarray:
    """Return [N, D] from a .npy, .safetensors (its only tensor) or .faiss file, or a data set's only column of vectors.

    Raises:
        ValueError: If there is something else: queries would be matched with noise.
    """
    path, vectors = Path(name), np.empty(0)
    if path.suffix == ".npy":
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    elif path.suffix == ".safetensors":
        tensors = list(load_file(path).values())
        vectors = tensors[0].float().numpy() if len(tensors) == 1 else vectors
    elif path.suffix == ".faiss":
        import faiss

        index = faiss.read_index(name)
        if type(index) is faiss.IndexIDMap or (
            type(index) is faiss.IndexIDMap2 and (faiss.vector_to_array(index.id_map) != np.arange(index.ntotal)).any()
        ):
            raise ValueError(
                f"--document_embeddings: {name} maps its vectors to ids of its own, expected the collection's order. Each "
                "would be taken for another document's. Give the index inside (index.index), or ids from 0 on (IndexIDMap2)."
            )
        vectors = index.reconstruct_n(0, index.ntotal)
    else:
        table = load_texts(name).with_format("numpy")
        columns = [column for column, feature in table.features.items() if not isinstance(feature, Value)]
        vectors = np.asarray(table[columns[0]][:], np.float32) if len(columns) == 1 else vectors
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"--document_embeddings: {name} holds {vectors.shape}, expected finite vectors [N, D]: in a .npy, .faiss or "
            ".safetensors file of one tensor, or in a data set's only column that is none of texts or numbers. Queries would "
            "be matched with noise."
        )
    lengths = np.linalg.norm(np.asarray(vectors[:10_000], np.float32), axis=1)
    if abs(lengths - 1).max() > 0.01:
        logger.warning(
            f"--document_embeddings: vectors of {name} have lengths from {lengths.min():.3f} to {lengths.max():.3f}, not 1. "
            "All here compares by cosine: an index that searches them by inner product ranks otherwise than is measured."
        )
    return vectors


def require_match(queries: torch.Tensor, vectors: torch.Tensor, answers: list[list[int]]) -> None:
    """Raise if queries are no closer to their own answers than to those of other queries, by the teacher.

    Raises:
        ValueError: If 50 % are, give or take three standard deviations of chance: so it would be in an index of another
            teacher or another order.
    """
    own = torch.tensor([rows[0] for rows in answers])
    others = own.roll(len(own) // 2)  # made queries of one document stand side by side
    asked = functional.normalize(queries[own != others], dim=-1)
    near, far = (functional.normalize(vectors[side[own != others]], dim=-1) for side in (own, others))
    closer = ((asked * near).sum(-1) > (asked * far).sum(-1)).float().mean().item()
    if closer < min(0.5 + 1.5 / max(len(asked), 1) ** 0.5, 1.0):
        raise ValueError(
            f"embed_distill: {closer:.0%} of the training queries are closer to their own answer than to another query's, by "
            "the teacher's vectors, expected more than by chance. With an index of another teacher, or in another order than "
            "the collection, queries would be matched with noise. Check --document_embeddings, --teacher and the prompts."
        )


def more_queries(recipe: Any, documents: list[str], seed: int) -> Dataset | None:
    """Return rows of a made query and its document, as `--spans` and `--generator` ask; None for none."""
    makers: list[Any] = [SpanQueries(recipe.spans)] if recipe.spans else []
    if recipe.generator:
        makers.append(QueryGenerator(recipe.generator, recipe.generator_prompt, recipe.generated))
    made = [generate_queries(documents, maker, Path(recipe.cache_dir) / "queries", seed) for maker in makers]
    return concatenate_datasets(made) if made else None


def rows(recipe: Any, collections: Collections, towers: TwoTowerTeacher, seed: int) -> tuple[Dataset, dict[str, Any]]:
    """Return (rows of a query, a document that answers it, and hard negatives; what results.json says of them)."""
    documents = list(collections.train.documents.values())
    queries, answers = collections.train.rows_of()
    made = more_queries(recipe, documents, recipe.split_seed)  # the same data for each seed of a comparison
    if made is not None:
        row = {text: i for i, text in enumerate(documents)}
        queries = [*queries, *made["query"]]
        answers = [*answers, *([row[text]] for text in made["document"])]
    leaks = set(find_leaks(Dataset.from_dict({"query": queries}), ["query"], collections.evaluated())[0])
    kept = [i for i in range(len(queries)) if i not in leaks]
    queries, answers = [queries[i] for i in kept], [answers[i] for i in kept]
    towers.queries.add(queries, collections.evaluated())
    found = hard_negatives(recipe, towers, queries, documents, answers, seed)
    rows = [
        {"query": query, "positive": documents[answer], **{f"negative_{i + 1}": documents[n] for i, n in enumerate(others)}}
        for query, rows_of, others in zip(queries, answers, found.tolist(), strict=True)
        for answer in rows_of
    ]
    dataset = Dataset.from_list(rows)
    facts = {"name": str(recipe.texts_name or recipe.collection), "rows": len(dataset), "columns": dataset.column_names}
    facts |= {"documents": len(documents), "queries": len(queries), "made_queries": 0 if made is None else len(made)}
    facts |= {"held_out": len(collections.dev.queries), "leaked": len(leaks), **overlap(collections)}
    return dataset, {**facts, "sha256": require_texts(dataset, dataset.column_names)}


def overlap(collections: Collections) -> dict[str, int]:
    """Return how many test queries there are, and how many of them an answer of a training query answers, too."""
    if collections.test is None:
        return {}
    trained, asked = (
        {q: {d for d, s in row.items() if s > 0} for q, row in side.relevant.items()}
        for side in (collections.train, collections.test)
    )
    known = set().union(*trained.values())
    return {"test_queries": len(asked), "test_queries_with_trained_answers": sum(bool(row & known) for row in asked.values())}


def hard_negatives(
    recipe: Any, towers: TwoTowerTeacher, queries: list[str], documents: list[str], answers: list[list[int]], seed: int
) -> np.ndarray:
    """Return rows of documents, [Q, `--negatives`]; mined once, by the main process, and kept beside the caches."""
    facts = json.dumps([towers.fingerprint, recipe.negatives, recipe.negative_margin, seed, answers]).encode()
    made = b"".join([facts, keys_of(queries).tobytes(), keys_of(documents).tobytes()])
    path = Path(recipe.cache_dir) / f"negatives-{hashlib.sha256(made).hexdigest()[:20]}.npy"
    if process_state().is_main_process and not path.exists():
        asked, vectors = towers.encode(queries), towers.documents.encode(documents)
        require_match(asked, vectors, answers)
        found = io.BytesIO()
        np.save(found, mine_negatives(asked, vectors, answers, recipe.negatives, margin=recipe.negative_margin, seed=seed))
        write_whole(path, found.getvalue())
    process_state().wait_for_everyone()
    return np.load(path, allow_pickle=False)


def open_reranker(recipe: Any, rows: Dataset) -> TeacherCache | None:
    """Return the scores of `--reranker` for all rows, cached."""
    if recipe.reranker is None:
        return None
    label = int(recipe.reranker_label) if str(recipe.reranker_label).isdigit() else recipe.reranker_label
    live = CrossEncoderTeacher(recipe.reranker, label=label, pooled=bool(recipe.dual_pooling))
    cache = TeacherCache(live, cache_folder(recipe.cache_dir, live), dtype="float32")
    columns = [[pair(q, d) for q, d in zip(rows["query"], rows[column], strict=True)] for column in rows.column_names[1:]]
    cache.add(*columns)
    some = torch.stack([cache.encode(column[:1000])[:, 0] for column in columns]) / recipe.score_temperature
    spread = float((some.amax(0) - some.amin(0)).mean())
    if len(columns) > 1 and spread < 1:
        logger.warning(
            f"embed_distill: the scores of {recipe.reranker} for one query lie {spread:.2g} apart, divided by score_temperature"
            f" {recipe.score_temperature:g}, expected 1 or more, as logits do. All documents would be about as good. Lower "
            "--score_temperature; 0.05 for scores in [0, 1]."
        )
    return cache


def open_space(
    recipe: Any, towers: TwoTowerTeacher, documents: list[str], reranker: TeacherCache | None, rows: Dataset
) -> tuple[Teacher, dict[str, Any]]:
    """Return (the teacher whose vectors the student learns, what results.json says of it)."""
    if recipe.dual_pooling:
        dual = DualPoolingTeacher.fit(reranker, list(zip(*rows[:].values(), strict=True)), recipe.dual_pooling)
        return dual, {"dual_pooling": dual.facts()}
    if recipe.dim:
        projection = PCAProjection.fit(towers.documents.blocks(documents), recipe.dim)
        return towers.project(projection), {"projection": projection.facts()}
    return towers, {}


def measure_indexes(
    recipe: Any, collections: Collections, towers: TwoTowerTeacher, space: Teacher, student: StudentModel
) -> dict[str, Any]:
    """Return {"index": the report}: the teacher, at full size and reduced, beside the student."""
    if not recipe.index_report:
        return {}
    from hf_distill.evaluation.index import Space, index_report

    data = collections.test or collections.dev
    documents, (queries, relevant) = list(data.documents.values()), data.rows_of()

    def measure(encode: Any) -> dict[str, Any]:
        known = (encode if recipe.symmetric else space.encode)(documents, prompt_name="document")
        asked = encode(queries, prompt_name="query")
        spaces = {"teacher": Space(towers.encode(documents, prompt_name="document"), towers.encode(queries))}
        if recipe.dim:  # what fewer dimensions cost, apart from the smaller encoder
            reduced = (space.encode(documents, prompt_name="document"), space.encode(queries))
            spaces[f"teacher {space.dim}-d"] = Space(*reduced)
        for dim in [space.dim, *(dim for dim in recipe.dims if recipe.dim and dim < space.dim)]:
            spaces[f"student {dim}-d"] = Space(known[:, :dim], asked[:, :dim])
        if data is collections.test:
            log_test_search(recipe, f"index report, {len(spaces)} spaces")
        return {"index": index_report(spaces, relevant, own=data.own_documents())}

    return score([measure], student.encode)


def evaluators(recipe: Any, collections: Collections, teacher: Teacher | None) -> list[Any]:
    """Return the searches of dev and, where there is one, test; over a teacher's documents, or those of what is scored."""
    from hf_distill.evaluation.retrieval import RetrievalEvaluator

    class Logged(RetrievalEvaluator):
        """Counts the searches of the test queries."""

        def __call__(self, encode: Any) -> dict[str, float]:
            log_test_search(recipe, "exact search")
            return super().__call__(encode)

    dims = recipe.dims if recipe.dim else ()  # of the teacher's whole space the first dimensions are no embedding
    documents = None
    if teacher is not None and process_state().is_main_process:  # which alone searches
        documents = teacher.encode(list(collections.train.documents.values()), prompt_name="document")
    options = {"documents": documents, "dims": dims, "prompt_names": ("query", "document")}
    found = [RetrievalEvaluator(collections.dev, name="dev", **options)]
    return found + ([Logged(collections.test, name="test", **options)] if collections.test else [])


def log_test_search(recipe: Any, how: str) -> None:
    """Add a line to test-evaluations.jsonl, beside the caches: the test queries are about to be searched."""
    line = {"time": time.strftime("%F %T"), "collection": recipe.texts_name, "how": how, "command": command(sys.argv)}
    Path(recipe.cache_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(recipe.cache_dir) / "test-evaluations.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
