# SPDX-License-Identifier: Apache-2.0
"""What an index costs and finds: the same vectors in faiss's kinds of index, measured side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .metrics.retrieval_measures import retrieval_measures


try:
    import faiss
except ImportError as error:
    raise ImportError("The index report needs faiss. Install it with: pip install 'hf_distill[retrieval]'") from error

logger = logging.get_logger(__name__)
Search = Callable[[np.ndarray, int], np.ndarray]


@dataclass
class IndexKind:
    """A kind of index.

    factory: faiss's description of it ("HNSW32"); {lists} stands for 4 sqrt(N) inverted lists, {bytes} for D / 8 bytes of
    product quantisation, or fewer. settings: What is set on it before it searches. rescored: How many times k candidates are
    scored again, for an index of sign bits. at_least: How many vectors it takes to make one. trained_on: How many of them, at
    most, it learns from.
    """

    factory: str
    settings: Mapping[str, int] | None = None
    rescored: int = 0
    at_least: int = 1
    trained_on: int | None = None


KINDS = {
    "flat": IndexKind("Flat"),
    "int8": IndexKind("SQ8"),
    "IVF": IndexKind("IVF{lists},Flat", {"nprobe": 16}),
    "IVF, int8": IndexKind("IVF{lists},SQ8", {"nprobe": 16}),
    "HNSW": IndexKind("HNSW32,Flat", {"efSearch": 64}),
    # np: without polysemous training, which takes minutes and helps a search by Hamming distance only.
    "PQ": IndexKind("PQ{bytes}x8np", at_least=256, trained_on=10_000),
    "binary, rescored": IndexKind("BFlat", rescored=10),
}


@dataclass
class Space:
    """Documents and queries of one encoder at one dimension, scaled to unit length here.

    documents: [N, D]. queries: [Q, D]. kinds: Names of KINDS to build.
    """

    documents: Any
    queries: Any
    kinds: Sequence[str] = tuple(KINDS)

    def __post_init__(self) -> None:
        self.documents, self.queries = _unit(self.documents), _unit(self.queries)


def index_report(
    spaces: Mapping[str, Space],
    relevant: Sequence[Sequence[int]],
    k: int = 10,
    rounds: int = 5,
    single: int = 200,
    own: Sequence[int | None] | None = None,
) -> dict[str, dict[str, float]]:
    """Return a row for each index of each space; the first space's flat index is what the others are compared with.

    All indexes are built first and then timed in turn, round by round, in this process, so that a busy machine slows all of
    them. Ratios are medians over rounds.

    Args:
        spaces: Name -> `Space`; documents and queries are the same texts in each. The first, the teacher's, must have "flat".
        relevant: For each query the rows of the documents that answer it.
        k: How many documents are asked for.
        rounds: How often everything is timed.
        single: How many queries are asked one by one in a round.
        own: For each query the row of the document that has its id, which is never counted as found for it (BEIR); None for
            none.

    Returns:
        Name -> dim, MB per million vectors (of the index as faiss writes it, without what it takes for none), build_s,
        overlap (share of the first index's k documents, times 100), recall and ndcg (against `relevant`, times 100), p50_ms
        and p95_ms of one query, single_qps (one thread), batch_qps (all threads), and how many times smaller, and faster with
        single and batched queries, than the first.

    Raises:
        ValueError: If the spaces hold other numbers of texts: rows would be other documents.
    """
    counts = {(len(space.documents), len(space.queries)) for space in spaces.values()}
    first = next(iter(spaces))
    if len(counts) != 1 or counts.pop()[1] != len(relevant) or spaces[first].kinds[0] != "flat":
        sizes = {name: (len(space.documents), len(space.queries)) for name, space in spaces.items()}
        raise ValueError(
            f"index_report: documents and queries of the spaces are {sizes}, judged queries {len(relevant)}, expected the same "
            "texts in each, and a flat index first. Rows would be compared with other documents."
        )
    rows: dict[str, dict[str, float]] = {}
    searches: dict[str, tuple[Search, np.ndarray]] = {}
    exact = None
    for space_name, space in spaces.items():
        for kind in space.kinds:
            if len(space.documents) < KINDS[kind].at_least:
                logger.info(f"index_report: no {kind} of {len(space.documents)} documents; it takes {KINDS[kind].at_least}.")
                continue
            name = f"{space_name}, {kind}"
            started = time.perf_counter()
            search, size = _build(space.documents, KINDS[kind])
            built = time.perf_counter() - started
            found = _without_own(search(space.queries, k + (own is not None)), own, k)
            exact = found if exact is None else exact
            rows[name] = {"dim": space.documents.shape[1], "mb_per_million": size / len(space.documents), "build_s": built}
            rows[name] |= _quality(found, exact, relevant, k)
            searches[name] = (search, space.queries)
    for name, seconds in _timings(searches, k, rounds, single).items():
        rows[name] |= seconds
    reference = next(iter(rows.values()))["mb_per_million"]
    for row in rows.values():
        row["times_smaller"] = reference / row["mb_per_million"]
    return rows


def _build(documents: np.ndarray, kind: IndexKind) -> tuple[Search, int]:
    """Return a search, and the bytes that its index takes."""
    count, dim = documents.shape
    parts = next(parts for parts in range(max(1, dim // 8), 0, -1) if dim % parts == 0)  # of equal width
    description = kind.factory.format(lists=max(1, min(int(4 * count**0.5), count // 39)), bytes=parts)
    if kind.rescored:
        bits = np.packbits(documents > 0, axis=1)
        binary = faiss.index_binary_factory(8 * bits.shape[1], description)
        binary.add(bits)

        def search(queries: np.ndarray, k: int) -> np.ndarray:
            _, candidates = binary.search(np.packbits(queries > 0, axis=1), min(kind.rescored * k, count))
            # The query keeps its floats, a document is its signs: the bits are all that is needed (faiss has a copy).
            signs = np.unpackbits(bits[candidates], axis=-1, count=dim).astype(np.float32) * 2 - 1
            scores = np.einsum("qcd,qd->qc", signs, queries)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            return np.take_along_axis(candidates, best, axis=1)

        return search, bits.nbytes
    index = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(count)[: kind.trained_on] if kind.trained_on else slice(None)
    index.train(documents[sample])
    index.add(documents)
    for setting, value in (kind.settings or {}).items():
        faiss.ParameterSpace().set_index_parameter(index, setting, value)
    return (lambda queries, k: index.search(queries, k)[1]), len(faiss.serialize_index(index))


def _without_own(found: np.ndarray, own: Sequence[int | None] | None, k: int) -> np.ndarray:
    """Return [Q, k] of [Q, k + 1] rows, without each query's own document."""
    if own is None:
        return found
    mine = np.array([-2 if row is None else row for row in own])[:, None]
    order = np.argsort(found == mine, axis=1, kind="stable")  # what is left keeps its order
    return np.take_along_axis(found, order, axis=1)[:, :k]


def _quality(found: np.ndarray, exact: np.ndarray, relevant: Sequence[Sequence[int]], k: int) -> dict[str, float]:
    real = [(a[a >= 0], b[b >= 0]) for a, b in zip(found, exact, strict=True)]  # -1 where there are fewer documents than k
    overlap = [len(np.intersect1d(a, b)) / len(b) for a, b in real]
    run = {
        str(query): {str(row): float(-rank) for rank, row in enumerate(rows) if row >= 0}
        for query, rows in enumerate(found.tolist())
    }
    judged = {str(query): {str(row): 1 for row in rows} for query, rows in enumerate(relevant)}
    scores = retrieval_measures(run, judged, {"recall": f"R@{k}", "ndcg": f"nDCG@{k}"})
    return {"overlap": 100 * float(np.mean(overlap)), **scores}


def _timings(
    searches: Mapping[str, tuple[Search, np.ndarray]], k: int, rounds: int, single: int
) -> dict[str, dict[str, float]]:
    one: dict[str, list[list[float]]] = {name: [] for name in searches}
    batch: dict[str, list[float]] = {name: [] for name in searches}
    threads = faiss.omp_get_max_threads()
    for _ in range(rounds):
        for name, (search, queries) in searches.items():
            faiss.omp_set_num_threads(1)  # one query is one thread's work: others wait in line
            seconds = []
            for row in range(min(single, len(queries))):
                started = time.perf_counter()
                search(queries[row : row + 1], k)
                seconds.append(time.perf_counter() - started)
            one[name].append(seconds)
            faiss.omp_set_num_threads(threads)
            started = time.perf_counter()
            search(queries, k)
            batch[name].append((time.perf_counter() - started) / len(queries))
    first = next(iter(searches))
    rows = {}
    for name in searches:
        seconds = [value for values in one[name] for value in values]
        rows[name] = {
            "p50_ms": 1000 * statistics.median(seconds),
            "p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
            "single_qps": len(seconds) / sum(seconds),
            "batch_qps": 1 / statistics.median(batch[name]),
            "times_faster": statistics.median(sum(a) / sum(b) for a, b in zip(one[first], one[name], strict=True)),
            "times_faster_batch": statistics.median(a / b for a, b in zip(batch[first], batch[name], strict=True)),
        }
    return rows


def _unit(vectors: Any) -> np.ndarray:
    vectors = np.ascontiguousarray(torch.as_tensor(vectors).float().numpy())
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
