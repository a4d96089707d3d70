# SPDX-License-Identifier: Apache-2.0
"""Rerankers as teachers: a score for a query and a document that are read together."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .student import encode_sorted, load_safe, longest_input
from .teachers import Teacher, fetch, tokenizer_digest, weights_digest


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

    Raises:
        OSError: If there is no such model, or only pickled weights.
        ValueError: If the model has several outputs and none is named, or lacks weights: scores from a random head look like
            scores.
    """

    dim = 1

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        label: int | str | None = None,
        max_length: int | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
    ) -> None:
        self.name = Path(name).name if Path(name).is_dir() else str(name)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        folder = fetch(name, revision)
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
        self.label = self._column(label)
        longest = longest_input(self.model.base_model, self.tokenizer)
        self.max_length = min(max_length or longest, longest)
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
            self._fingerprint = {
                "weights": weights_digest([self.model.state_dict()]),
                "tokenizer": tokenizer_digest(self.tokenizer),
                "label": self.label,
                "max_length": self.max_length,
                "dtype": str(self.dtype).removeprefix("torch."),
            }
        return self._fingerprint

    @torch.no_grad()
    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return the scores of pairs, [N, 1] float32 on the CPU.

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
            return self.model(**inputs.to(self.device)).logits[:, self.label, None]

        scores = encode_sorted(embed, texts, batch_size, show_progress_bar)
        return scores if len(scores) else torch.empty(0, 1)

    def score(self, queries: Iterable[str], documents: Iterable[str], batch_size: int = 64) -> Tensor:
        """Return the scores of queries with their documents, [N] float32 on the CPU."""
        return self.encode([pair(*sides) for sides in zip(queries, documents, strict=True)], batch_size)[:, 0]
