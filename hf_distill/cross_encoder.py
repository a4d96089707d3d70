# SPDX-License-Identifier: Apache-2.0
"""Rerankers as teachers: a score for a query and a document that are read together."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .student import encode_sorted, load_safe, longest_input, pool
from .teachers import Teacher, fetch, fingerprint, license_of


_BETWEEN = "\x1f"  # ASCII's unit separator: in no text that a person wrote


def pair(query: str, document: str) -> str:
    """Return query and document as one text, by which a score is cached like a vector.

    Raises:
        ValueError: If one of them holds the separator (U+001F): the pair would be cut elsewhere.
    """
    if _BETWEEN in query or _BETWEEN in document:
        raise ValueError(
            f"pair: {query[:40]!r} or its document {document[:40]!r} holds the character U+001F, expected text. The pair would "
            "be cut there, and another one scored. Remove it."
        )
    return f"{query}{_BETWEEN}{document}"


class CrossEncoderTeacher(Teacher):
    """A frozen reranker: any `AutoModelForSequenceClassification` that reads query and document together.

    Its "texts" are pairs (`pair(query, document)`), its "vectors" scores of one dimension, so `TeacherCache` keeps scores as
    it keeps vectors, keyed by both texts. A score is the model's raw output, before any sigmoid; higher is better.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        label: Which output is the score, by number or by its name in `id2label`; only for a model that has several.
        max_length: Longest pair in tokens; None for as long as the model takes. The longer side is cut, as in
            sentence-transformers.
        dtype: torch dtype or its name; float32 by default.
        device: None for a GPU where there is one.
        pooled: Whether the score is followed by the means of the last states of the query's tokens and of the document's
            (H numbers each), which `DualPoolingTeacher` is made from.

    Raises:
        OSError: If there is no such model, or only pickled weights.
        ValueError: If the model has several outputs and none is named, or lacks weights: scores from a random head look like
            scores.
    """

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        label: int | str | None = None,
        max_length: int | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        pooled: bool = False,
    ) -> None:
        self.name = Path(name).name if Path(name).is_dir() else str(name)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        folder = fetch(name, revision)
        self.license = license_of(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        options = {"dtype": self.dtype, "output_loading_info": True}
        self.model, info = load_safe(AutoModelForSequenceClassification, str(folder), **options)
        if info["missing_keys"]:
            first = sorted(info["missing_keys"])[0]
            raise ValueError(
                f"CrossEncoderTeacher: {name} is missing {len(info['missing_keys'])} weights ({first}, ...), expected a whole "
                "reranker. Scores would come from random weights. A bi-encoder is an EncoderTeacher."
            )
        self.model.to(self.device).eval().requires_grad_(False)
        self.label, self.pooled = self._column(label), pooled
        self.dim = 1 + 2 * self.model.config.hidden_size if pooled else 1
        self.max_length = longest_input(self.model.base_model, self.tokenizer, max_length)
        self._fingerprint: dict[str, Any] | None = None

    def _column(self, label: int | str | None) -> int:
        names = self.model.config.id2label
        if label is None and len(names) == 1:
            return 0
        found = [number for number, name in names.items() if label in (number, name)]
        if len(found) != 1:
            raise ValueError(
                f"CrossEncoderTeacher: {self.name} has the outputs {names} and label is {label!r}, expected the one that says "
                "how well the document answers. Another would be learned as the score. Pass label=..."
            )
        return found[0]

    @property
    def num_parameters(self) -> int:
        """How many weights a score runs through, embedding tables included."""
        return self.model.num_parameters()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes a score: a digest of weights and tokenizer, and each setting."""
        if self._fingerprint is None:
            settings = {"label": self.label, **({"pooled": True} if self.pooled else {})}
            self._fingerprint = fingerprint(self, [self.model.state_dict()], **settings)
        return self._fingerprint

    @torch.no_grad()
    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return the scores of pairs, [N, 1] float32 on the CPU; pooled, [N, 1 + 2H].

        Args:
            texts: N texts that `pair` made.
            batch_size: Pairs a batch.
            show_progress_bar: As in `EncoderTeacher.encode`.

        Raises:
            ValueError: If a text is no pair.
        """

        def embed(batch: list[str]) -> Tensor:
            sides = [text.split(_BETWEEN) for text in batch]
            wrong = [text for text, side in zip(batch, sides, strict=True) if len(side) != 2]
            if wrong:
                raise ValueError(
                    f"CrossEncoderTeacher: {wrong[0][:60]!r} is no pair, expected what pair(query, document) returns. It would "
                    "be scored without its partner."
                )
            queries, documents = zip(*sides, strict=True)
            options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
            inputs = self.tokenizer(list(queries), list(documents), **options)
            outputs = self.model(**inputs.to(self.device), output_hidden_states=self.pooled)
            vectors = [outputs.logits[:, self.label, None]]
            if self.pooled:
                side_of = [inputs.sequence_ids(row) for row in range(len(batch))]  # None for special tokens
                for side in (0, 1):
                    mask = torch.tensor([[found == side for found in row] for row in side_of], device=self.device)
                    vectors.append(pool(outputs.hidden_states[-1], mask, "mean"))
            return torch.cat(vectors, dim=-1)

        vectors = encode_sorted(embed, texts, batch_size, show_progress_bar)
        return vectors if len(vectors) else torch.empty(0, self.dim)

    def score(self, queries: Iterable[str], documents: Iterable[str], batch_size: int = 64) -> Tensor:
        """Return the scores of queries with their documents, [N] float32 on the CPU."""
        return self.encode([pair(*sides) for sides in zip(queries, documents, strict=True)], batch_size)[:, 0]


class DualPoolingTeacher(Teacher):
    """Embeddings of queries and documents out of a reranker, so that a bi-encoder student can be matched to it.

    Source: dual pooling of EmbedDistill, Kim et al. 2023, https://huggingface.co/papers/2301.12005: the tokens of the query
    and those of the document are pooled apart after both were read together, and the product of the two is fitted to the
    score.
    Differs from the paper: the reranker stays as it is and a linear map for each side is fitted, with score ~ scale * cosine +
    offset, for students are compared by cosine.

    A query was read with each document of its row; its target is the mean of what those readings gave.

    Args:
        pairs: A `CrossEncoderTeacher(pooled=True)`, or its cache.
        query_map, document_map: [H + 1, dim], the last row an offset.
        agreement: Correlation of the cosines with the reranker's scores on queries that they were not fitted to; see `fit`.
        fitted_to: A digest of the texts and settings of the fit.
    """

    def __init__(self, pairs: Teacher, query_map: Tensor, document_map: Tensor, agreement: float, fitted_to: str) -> None:
        self.pairs, self.query_map, self.document_map = pairs, query_map, document_map
        self.name, self.dim, self.num_parameters = f"{pairs.name}, dual pooling", query_map.shape[1], pairs.num_parameters
        self.agreement, self.fitted_to = agreement, fitted_to

    @classmethod
    def fit(
        cls, pairs: Teacher, rows: Sequence[Sequence[str]], dim: int = 256, steps: int = 1000, seed: int = 42
    ) -> "DualPoolingTeacher":
        """Return the teacher whose cosines come closest to the reranker's scores, in mean squares.

        Args:
            pairs: A `CrossEncoderTeacher(pooled=True)`, or its cache.
            rows: A query and its documents each. At most 20,000 pairs are used; those of every tenth query measure the
                agreement.
            dim: Length of the embeddings.
            steps: Of Adam, with 1024 pairs each.
            seed: Of the maps' start and the order of the pairs.

        Raises:
            ValueError: If the reranker gives no pooled states, or there are fewer than ten queries.
        """
        number = {query: i for i, query in enumerate(dict.fromkeys(row[0] for row in rows))}
        if pairs.dim < 3 or len(number) < 10:
            raise ValueError(
                f"DualPoolingTeacher: {pairs.name} gives {pairs.dim} numbers a pair, and there are {len(number)} queries, "
                "expected a score with pooled states and ten queries or more. There would be nothing to fit. Use "
                "CrossEncoderTeacher(pooled=True)."
            )
        width = len(rows[0]) - 1
        rows = rows[: max(10, 20_000 // width)]
        texts = [pair(row[0], document) for row in rows for document in row[1:]]
        vectors = pairs.encode(texts)
        scores = (vectors[:, 0] - vectors[:, 0].mean()) / vectors[:, 0].std().clamp(min=1e-9)
        queries, documents = (_with_offset(side) for side in vectors[:, 1:].chunk(2, dim=1))
        held_out = torch.tensor([number[row[0]] % 10 == 9 for row in rows]).repeat_interleave(width)
        chance = torch.Generator().manual_seed(seed)
        shape = (queries.shape[1], dim)
        maps = [nn.Parameter(torch.randn(shape, generator=chance) * shape[0] ** -0.5) for _ in range(2)]
        scale, offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        optimizer = torch.optim.Adam([*maps, scale, offset], lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        known = (~held_out).nonzero()[:, 0]
        with torch.enable_grad():
            for _ in range(steps):
                some = known[torch.randint(len(known), (min(1024, len(known)),), generator=chance)]
                cosines = nn.functional.cosine_similarity(queries[some] @ maps[0], documents[some] @ maps[1])
                loss = nn.functional.mse_loss(scale * cosines + offset, scores[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        query_map, document_map = maps[0].detach(), maps[1].detach() * scale.detach().sign()
        cosines = nn.functional.cosine_similarity(queries[held_out] @ query_map, documents[held_out] @ document_map)
        agreement = float(torch.corrcoef(torch.stack([cosines, scores[held_out]]))[0, 1])
        digest = hashlib.sha256("\n".join([*texts, repr((dim, steps, seed))]).encode()).hexdigest()
        return cls(pairs, query_map, document_map, agreement, digest)

    @property
    def live(self) -> None:
        """None: it reads no text alone."""
        return None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the reranker, and what the maps were fitted to."""
        return {"pairs": self.pairs.fingerprint, "dual_pooling": self.fitted_to}

    def facts(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {"dim": self.dim, "agreement": self.agreement}

    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Raise: a text alone has no embedding here.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"DualPoolingTeacher: asked for {len(texts)} texts alone, expected rows of a query and its documents (`targets`). "
            "A reranker reads them together."
        )

    def require_columns(self, columns: Sequence[Iterable[str]]) -> None:
        """Raise if the cache lacks a pair of the query with one of its documents."""
        for column in columns[1:]:
            self.pairs.require(map(pair, columns[0], column))

    def targets(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """Return unit targets of rows of a query and its documents, [B, C, dim]."""
        pairs = self.pairs.encode([pair(row[0], document) for row in rows for document in row[1:]])
        queries, documents = (
            nn.functional.normalize(_with_offset(side) @ fitted, dim=-1).reshape(len(rows), -1, self.dim)
            for side, fitted in zip(pairs[:, 1:].chunk(2, dim=1), (self.query_map, self.document_map), strict=True)
        )
        return torch.cat([nn.functional.normalize(queries.mean(1, keepdim=True), dim=-1), documents], dim=1)


def _with_offset(states: Tensor) -> Tensor:
    return torch.cat([states.float(), torch.ones(len(states), 1)], dim=1)
