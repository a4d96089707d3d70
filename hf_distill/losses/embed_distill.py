# SPDX-License-Identifier: Apache-2.0
"""EmbedDistill: match the teacher's embeddings and its scores, beside the labels.

The first text column holds the query, the others its documents: the positive one, then negatives. Scores are cosines.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .base import DistillationLoss


METRICS = ("l2", "cosine", "mse")
FORMS = ("softmax", "margin_mse")


class EmbeddingMatching(DistillationLoss):
    """Distance between the student's embedding and the teacher's, of queries and of documents.

    Source: EmbedDistill, Kim et al. 2023, https://huggingface.co/papers/2301.12005, Eq. 7 (queries) and 8 (documents): the
    mean over texts of the Euclidean norm of the difference, not of its square.
    Differs from the paper: both sides are scaled to unit length first, so each part lies in [0, 2] (mse: in [0, 4]).

    Where the student's documents are the teacher's own (`DistillationTrainer(inherited_columns=...)`), the part "document" is
    zero, as in the paper's asymmetric setting.

    Args:
        metric: "l2" (paper); "cosine", 1 - cos; or "mse", D times the mean square, so that it does not shrink with the width.

    Raises:
        ValueError: If there is no such metric.

    Example:
        >>> import torch
        >>> EmbeddingMatching()(torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
        {'query': tensor(1.4142), 'document': tensor(0.)}
    """

    parts = ("query", "document")
    paper = "2301.12005"

    def __init__(self, metric: str = "l2") -> None:
        if metric not in METRICS:
            raise ValueError(f"EmbeddingMatching: metric is {metric!r}, expected one of {METRICS}.")
        self.metric = metric

    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"query": scalar >= 0, "document": scalar >= 0}; without documents the second is zero.

        Args:
            student: [B, C, D], with gradient; column 0 holds the queries.
            teacher: [B, C, D].

        Raises:
            ValueError: If the shapes differ.
        """
        teacher = self._same_shape(student, teacher)
        student, teacher = nn.functional.normalize(student, dim=-1), nn.functional.normalize(teacher, dim=-1)
        if self.metric == "l2":
            # The derivative of this norm at zero is zero in torch; that of sqrt would be infinite.
            distance = torch.linalg.vector_norm(student - teacher, dim=-1)
        elif self.metric == "cosine":
            distance = 1 - (student * teacher).sum(-1)
        else:
            distance = (student - teacher).square().sum(-1)
        documents = distance[:, 1:]
        return {"query": distance[:, 0].mean(), "document": documents.mean() if documents.numel() else documents.sum()}


class ScoreDistillation(DistillationLoss):
    """The student's scores of a query's documents against the teacher's.

    Source: EmbedDistill, Kim et al. 2023, https://huggingface.co/papers/2301.12005 (score-based distillation), as cross-entropy
    between the softmax of both sides' scores; "margin_mse" is Hofstätter et al. 2020, https://huggingface.co/papers/2010.02666.
    Differs from the papers: the teacher's entropy, which no student changes, is subtracted, so the part is zero where both
    agree; and it is not multiplied by temperature², which on cosines (temperature 0.05) would make it 400 times too small to
    be heard beside the other parts. Squared margins are multiplied by the temperature, which keeps them of the order of 1.
    Both forms ignore a constant added to all scores of a query.

    Args:
        form: "softmax", or "margin_mse": squared difference of the margins between the first document and the others.
        temperature: What the student's cosines are divided by, and the teacher's, where they come from its vectors.
        in_batch: Whether a query's list holds the documents of the other rows, too; "softmax" only, not with a reranker.
        reranker: Whether the scores are those of the trainer's reranker, in place of the teacher's cosines.
        score_temperature: What a reranker's scores are divided by.

    Raises:
        ValueError: If there is no such form, or a temperature is not positive.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> ScoreDistillation()(rows, rows)
        {'score': tensor(0.)}
    """

    parts = ("score",)
    paper = "2301.12005"

    def __init__(
        self,
        form: str = "softmax",
        temperature: float = 0.05,
        in_batch: bool = False,
        reranker: bool = False,
        score_temperature: float = 1.0,
    ) -> None:
        wide = in_batch and (form == "margin_mse" or reranker)
        if form not in FORMS or min(temperature, score_temperature) <= 0 or wide:
            raise ValueError(
                f"ScoreDistillation: form is {form!r}, temperatures are {temperature} and {score_temperature}, in_batch is "
                f"{in_batch}, reranker {reranker}, expected one of {FORMS}, positive temperatures, and in_batch with softmax "
                "over a teacher's vectors only."
            )
        self.form, self.temperature, self.in_batch = form, temperature, in_batch
        self.reranker, self.score_temperature = reranker, score_temperature

    @property
    def needs(self) -> tuple[str, ...]:
        """A reranker's scores, or a teacher's vectors to make some from."""
        return ("scores",) if self.reranker else ("targets",)

    def of(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part, against whatever teacher it was made for."""
        return self(outputs[self.output], batch.get("targets"), batch["scores"] if self.reranker else None)

    def __call__(self, student: Tensor, teacher: Tensor | None = None, scores: Tensor | None = None) -> dict[str, Tensor]:
        """Return {"score": scalar >= 0}.

        Args:
            student: [B, C, D], with gradient; column 0 holds the queries, C - 1 >= 2 documents (or in_batch).
            teacher: [B, C, D]; not needed with scores.
            scores: [B, C - 1], a teacher's scores of the query with each of its documents, in place of its cosines.

        Raises:
            ValueError: If rows have one document only and are not compared with each other: its softmax is 1 whatever the
                student does, so nothing would be learned at a loss of zero; or if the shapes do not fit.
        """
        ours = _scores(student, self.in_batch) / self.temperature
        if scores is None:
            theirs = _scores(self._same_shape(student, teacher), self.in_batch) / self.temperature
        else:
            theirs = scores.to(student) / self.score_temperature
        if ours.shape != theirs.shape or (ours.shape[1] < 2 and not self.in_batch):
            raise ValueError(
                f"ScoreDistillation: the student's scores are {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}, "
                "expected equal [rows, documents] with two documents or more. With one the loss would be zero and nothing "
                "learned. Give rows a negative, or in_batch=True with a teacher that has embeddings."
            )
        if self.form == "margin_mse":
            ours, theirs = (side[:, :1] - side[:, 1:] for side in (ours, theirs))
            return {"score": self.temperature * nn.functional.mse_loss(ours, theirs)}
        ours, theirs = (nn.functional.log_softmax(side, dim=-1) for side in (ours, theirs))
        return {"score": nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)}


class ContrastiveLoss(DistillationLoss):
    """Cross-entropy of the labels: a query's first document against all documents of the batch.

    Source: the label loss of EmbedDistill, Kim et al. 2023, https://huggingface.co/papers/2301.12005; in-batch negatives as in
    Karpukhin et al. 2020, https://huggingface.co/papers/2004.04906.
    What answers a query is no negative of it, where the batch shows it: the document itself, should it stand there again (two
    queries may share one), and the positives of other rows with the same query.

    The negatives are those of one batch, on all processes.

    Args:
        temperature: What cosines are divided by.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> ContrastiveLoss(temperature=1.0)(rows, torch.tensor([[0, 1, 2]]))  # log(1 + exp(-1))
        {'label': tensor(0.3133)}
    """

    parts = ("label",)
    needs = ()
    in_batch = True
    paper = "2301.12005"

    def __init__(self, temperature: float = 0.05) -> None:
        if temperature <= 0:
            raise ValueError(f"ContrastiveLoss: temperature is {temperature}, expected a positive number.")
        self.temperature = temperature

    def of(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part; of the batch it needs which texts are the same."""
        return self(outputs[self.output], batch["texts"])

    def __call__(self, student: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return {"label": scalar >= 0}; 0 for one document alone, as the last batch of an epoch may have.

        Args:
            student: [B, C, D], with gradient; column 0 holds the queries, column 1 their positive documents.
            texts: [B, C], a number for each distinct text.
        """
        rows, columns = student.shape[:2]
        scores = _scores(student, in_batch=True) / self.temperature  # [B, B * (C - 1)]
        positive = torch.arange(rows, device=student.device) * (columns - 1)
        positives = texts[:, 1:2] == texts[:, 1:].reshape(1, -1)  # row -> documents that are its positive
        asked = texts[:, :1] == texts[:, 0]  # row -> rows of the same query
        answers = (asked.float() @ positives.float()) > 0
        answers[torch.arange(rows), positive] = False
        return {"label": nn.functional.cross_entropy(scores.masked_fill(answers, -torch.inf), positive)}


def _scores(vectors: Tensor, in_batch: bool) -> Tensor:
    """Return cosines of the queries (column 0) with their own documents, [B, C - 1], or with all of the batch."""
    if vectors.shape[1] < 2:
        raise ValueError(
            f"embed_distill: rows are {tuple(vectors.shape)}, expected [B, C, D] of a query and one document or more. There "
            "would be nothing to find. Name the columns: --text_columns query document."
        )
    vectors = nn.functional.normalize(vectors, dim=-1)
    queries, documents = vectors[:, 0], vectors[:, 1:]
    if in_batch:
        return queries @ documents.flatten(0, 1).T  # [B, B * (C - 1)]
    return torch.einsum("bd,bcd->bc", queries, documents)
