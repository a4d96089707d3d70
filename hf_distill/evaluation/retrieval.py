# SPDX-License-Identifier: Apache-2.0
"""Retrieval: queries against a collection, searched exactly, scored by judgements."""

import csv
import gzip
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import load_texts
from .uncertainty import interval


try:
    from .metrics.retrieval_measures import query_measures
except ImportError as error:
    raise ImportError(f"Retrieval scores need {error.name}. Install it with: pip install 'hf_distill[retrieval]'") from error


Encode = Callable[..., Any]
_DEPTH = 100  # documents a query that are scored: what recall@100 and MAP@100 see


@dataclass
class RetrievalData:
    """A collection, queries, and which documents answer them.

    documents: Id -> text (the title before it, if there is one). queries: Id -> text, of the judged ones only. relevant:
    Query id -> document id -> relevance, an integer; 0 is judged and not relevant.

    Raises:
        ValueError: If judgements name unknown ids, a query has no relevant document, or a text is empty. Scores would be
            means over something else than the test set.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]

    def __post_init__(self) -> None:
        unknown = self.relevant.keys() - self.queries.keys()
        self.queries = {key: text for key, text in self.queries.items() if key in self.relevant}
        judged = {document for row in self.relevant.values() for document in row}
        found = {
            "judged queries that are not there": unknown,
            "judged documents that are not there": judged - self.documents.keys(),
            "queries without a relevant document": {q for q, row in self.relevant.items() if max(row.values(), default=0) <= 0},
            "empty documents": {key for key, text in self.documents.items() if not text.strip()},
            "empty queries": {key for key, text in self.queries.items() if not text.strip()},
        }
        wrong = [f"{len(ids)} {what} ({', '.join(sorted(ids)[:5])})" for what, ids in found.items() if ids]
        if wrong or not self.relevant:
            raise ValueError(
                f"RetrievalData: {'; '.join(wrong) or 'no judgements'}, expected judged queries with a relevant document each, "
                "all of it in the collection. Scores would be a mean over something else. Correct the files."
            )

    @classmethod
    def load(cls, source: str | Path, split: str = "test", documents: dict[str, str] | None = None) -> "RetrievalData":
        """Read a set in BEIR's layout.

        Args:
            source: Folder with corpus.jsonl, queries.jsonl (`_id`, `title`, `text`; gz too) and qrels/<split>.tsv (`query-id`,
                `corpus-id`, `score`), or a Hub id that has them as configurations corpus, queries and default ("mteb/scifact"),
                or "BeIR/<name>", whose judgements lie in "BeIR/<name>-qrels".
            split: Which judgements.
            documents: The collection, if it is there already from another split.

        Raises:
            FileNotFoundError: If a part is missing.
            ValueError: If an id stands twice, or the parts do not fit.
        """
        if Path(source).is_dir():
            folder = Path(source)
            qrels = _judgements(_file(folder, f"qrels/{split}.tsv"))
            parts = {part: _file(folder, f"{part}.jsonl") for part in ("corpus", "queries")}
            queries = _texts(load_texts(parts["queries"]), "queries", source)
            documents = documents or _texts(load_texts(parts["corpus"]), "corpus", source)
        else:
            own = not str(source).startswith("BeIR/")
            qrels = load_texts(source, "default", split) if own else load_texts(f"{source}-qrels", None, split)
            queries = _texts(load_texts(source, "queries", "queries"), "queries", source)
            documents = documents or _texts(load_texts(source, "corpus", "corpus"), "corpus", source)
        relevant: dict[str, dict[str, int]] = {}
        for row in qrels:
            query, document, relevance = str(row["query-id"]), str(row["corpus-id"]), int(row["score"])
            if relevant.setdefault(query, {}).setdefault(document, relevance) != relevance:
                raise ValueError(
                    f"RetrievalData: {source} judges document {document} for query {query} twice, and differently, expected "
                    "one judgement. Either could count. Remove one."
                )
        return cls(documents, queries, relevant)

    def split(self, count: int, seed: int) -> tuple["RetrievalData", "RetrievalData"]:
        """Return (the other queries, `count` random ones), over the same documents.

        Raises:
            ValueError: If there are not more queries than that.
        """
        if not 0 < count < len(self.queries):
            raise ValueError(
                f"RetrievalData: {count} of {len(self.queries)} queries to split off, expected fewer, and one or more."
            )
        ids = sorted(self.queries)
        held = set(np.random.default_rng(seed).permutation(ids)[:count].tolist())
        sides = ({key: row for key, row in self.relevant.items() if (key in held) == side} for side in (False, True))
        rest, held_out = (RetrievalData(self.documents, self.queries, relevant) for relevant in sides)
        return rest, held_out

    def with_documents(self, documents: dict[str, str]) -> "RetrievalData":
        """Return the same queries over a part of the documents."""
        return RetrievalData(documents, self.queries, self.relevant)

    def own_documents(self) -> list[int | None] | None:
        """Return for each query the row of the document that has its id; None if none has."""
        row = {key: i for i, key in enumerate(self.documents)}
        found = [row.get(query) for query in self.queries]
        return found if any(place is not None for place in found) else None

    def rows_of(self) -> tuple[list[str], list[list[int]]]:
        """Return the query texts, and for each the rows of its relevant documents, counted from 0."""
        row = {key: i for i, key in enumerate(self.documents)}
        answers = [[row[key] for key, score in self.relevant[query].items() if score > 0] for query in self.queries]
        return list(self.queries.values()), answers


def _judgements(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table of judgements; ids stay as they are written ("01" is not 1)."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    have = set(rows[0]) if rows else set()
    if not {"query-id", "corpus-id", "score"} <= have:
        raise ValueError(
            f"RetrievalData: the first line of {path} is {sorted(map(str, have))}, expected query-id, corpus-id and score, "
            "separated by tabs. A judgement would be taken for the heading. Write that line on top."
        )
    return rows


def _texts(rows: Any, name: str, source: str | Path) -> dict[str, str]:
    ids = list(map(str, rows["_id"]))
    twice = [key for key, number in Counter(ids).items() if number > 1]
    if twice:
        raise ValueError(
            f"RetrievalData: {name} of {source} has {len(twice)} ids that stand there twice ({', '.join(twice[:5])}), "
            "expected one row each. A judgement would belong to either. Remove one."
        )
    titles = rows["title"] if "title" in rows.column_names else [None] * len(ids)
    parts = zip(ids, titles, rows["text"], strict=True)
    return {key: f"{title or ''} {text or ''}".strip() for key, title, text in parts}


def _file(folder: Path, name: str) -> Path:
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise FileNotFoundError(f"RetrievalData: {folder} has no {name} (or .gz), expected BEIR's layout.")
    return found[0]


class ExactSearch:
    """The k documents of highest inner product with each query, from documents that come some at a time.

    scores: [Q, k], best first; fewer than k as long as fewer documents came. rows: [Q, k], which documents, counted from 0.

    Args:
        queries: [Q, D].
        k: How many to keep.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries, self.k, self.count = queries, k, 0
        self.scores = torch.empty(len(queries), 0)
        self.rows = torch.empty(len(queries), 0, dtype=torch.long)

    def add(self, documents: Tensor) -> None:
        """Search the next documents, [n, D], too."""
        rows = torch.arange(self.count, self.count + len(documents)).expand(len(self.queries), -1)
        scores = torch.cat([self.scores, self.queries @ documents.T], dim=1)
        self.scores, best = scores.topk(min(self.k, scores.shape[1]))
        self.rows = torch.cat([self.rows, rows], dim=1).gather(1, best)
        self.count += len(documents)


class RetrievalEvaluator:
    """nDCG@10, MRR@10, recall@10, recall@100 and MAP@100, times 100, of an exact search by cosine.

    A document with a query's own id is never counted as found for it, as BEIR does.

    Args:
        data: The set.
        documents: [N, D] vectors of its documents, in order, where they exist already: only queries are encoded then.
        dims: Also search with the first so many dimensions (nDCG@10 only), as `retrieval_ndcg10@64`.
        name: What the scores begin with.
        prompt_names: What `encode` is told of queries and of documents (`encode(texts, prompt_name="query")`), for models that
            treat them differently; None to tell it nothing.
        chunk: Documents that are encoded and searched at a time.

    Raises:
        ValueError: If there are vectors for another number of documents, or some are not finite.
    """

    def __init__(
        self,
        data: RetrievalData,
        documents: Tensor | None = None,
        dims: Sequence[int] = (),
        name: str = "retrieval",
        prompt_names: tuple[str, str] | None = None,
        chunk: int = 4096,
    ) -> None:
        if documents is not None and (len(documents) != len(data.documents) or not torch.isfinite(documents).all()):
            raise ValueError(
                f"RetrievalEvaluator: {len(documents)} vectors (finite: {bool(torch.isfinite(documents).all())}) for "
                f"{len(data.documents)} documents, expected a finite one for each, in order. Documents would be found by the "
                "vectors of others."
            )
        self.data, self.documents, self.dims, self.name, self.chunk = data, documents, dims, name, chunk
        self._last: dict[str, dict[str, float]] = {}  # measure -> query -> value
        self._query, self._document = ({"prompt_name": side} if side else {} for side in prompt_names or (None, None))

    def texts(self) -> list[str]:
        """Return every text of the set: what the leak check compares with."""
        return [*self.data.documents.values(), *self.data.queries.values()]

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Return the measures as {"<name>_ndcg10": ..., ...}.

        Args:
            encode: texts -> [N, D].

        Raises:
            ValueError: If queries and documents have different dimensions.
        """
        queries = torch.as_tensor(encode(list(self.data.queries.values()), **self._query)).float()
        widths = [queries.shape[1], *(dim for dim in self.dims if dim < queries.shape[1])]
        searches = [ExactSearch(_unit(queries[:, :width]), _DEPTH + 1) for width in widths]  # one may be the query itself
        for block in self._blocks(encode):
            if block.shape[1] != queries.shape[1]:
                raise ValueError(
                    f"RetrievalEvaluator: queries have {queries.shape[1]} dimensions, documents {block.shape[1]}, expected as "
                    "many. They are not of one space. Use the encoder that the documents were made for, or project one side."
                )
            for width, search in zip(widths, searches, strict=True):
                search.add(_unit(block[:, :width]))
        self._last = self._measure(searches[0])
        scores = {f"{self.name}_{measure}": _mean(values) for measure, values in self._last.items()}
        for dim in self.dims:
            if dim in widths:
                scores[f"{self.name}_ndcg10@{dim}"] = _mean(self._measure(searches[widths.index(dim)])["ndcg10"])
        return scores

    def intervals(self) -> dict[str, list[float]]:
        """Return the 95 % bootstrap interval of the last call's nDCG@10 over its queries."""
        values = np.array(list(self._last.get("ndcg10", {}).values()))
        return {f"{self.name}_ndcg10": interval([(len(values), lambda rows: values[rows].mean())])} if len(values) else {}

    def _blocks(self, encode: Encode) -> Iterator[Tensor]:
        if self.documents is not None:
            yield from (block.float() for block in self.documents.split(self.chunk))
            return
        texts = iter(self.data.documents.values())
        while window := list(islice(texts, self.chunk)):
            yield torch.as_tensor(encode(window, **self._document)).float()

    def _measure(self, search: ExactSearch) -> dict[str, dict[str, float]]:
        ids, run = list(self.data.documents), {}
        for query, scores, rows in zip(self.data.queries, search.scores.tolist(), search.rows.tolist(), strict=True):
            found = {ids[row]: score for row, score in zip(rows, scores, strict=True) if ids[row] != query}
            run[query] = dict(list(found.items())[:_DEPTH])
        return query_measures(run, self.data.relevant)


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors, dim=-1)
