# SPDX-License-Identifier: Apache-2.0
"""Hard negatives: documents that the teacher finds close to a query and nobody calls an answer."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


_BLOCK = 256  # queries that are compared with all documents at a time


def mine_negatives(
    queries: Tensor,
    documents: Tensor,
    relevant: Sequence[Sequence[int]],
    count: int = 1,
    depth: int = 50,
    margin: float = 0.05,
    seed: int = 42,
) -> np.ndarray:
    """Return rows of documents, [Q, count], for each query: close by the teacher, and not answers.

    Drawn at random among the `depth` documents of highest cosine, less those that are relevant and those whose cosine is
    not at least `margin` below that of the best relevant document, for they may be answers that nobody marked. Where too few
    are left in that depth, the next ones below the margin are taken; of a collection in which none is, any that is not
    relevant.

    Args:
        queries: [Q, D], the teacher's.
        documents: [N, D], the teacher's.
        relevant: For each query the rows of its relevant documents.
        count: Negatives a query.
        depth: How far down is looked first.
        margin: How much lower the cosine of a negative must be, in [0, 2].
        seed: Of the choice.

    Raises:
        ImportError: If faiss is not installed.
        ValueError: If a query has no relevant document, or the collection too few others.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("Mining negatives needs faiss. Install it with: pip install 'hf_distill[retrieval]'") from error
    most = max(map(len, relevant), default=0)
    if len(queries) != len(relevant) or min(map(len, relevant), default=0) == 0 or len(documents) < most + count:
        raise ValueError(
            f"mine_negatives: {len(queries)} queries, relevant documents for {sum(map(bool, relevant))}, {len(documents)} "
            f"documents, expected a relevant one for each query and {count} others. A query would get its answer as a negative."
        )
    rng = np.random.default_rng(seed)
    queries, documents = (nn.functional.normalize(side.float(), dim=-1).numpy() for side in (queries, documents))
    depth = min(len(documents), max(depth, 4 * count) + most)
    scores, found = faiss.knn(queries, documents, depth, faiss.METRIC_INNER_PRODUCT)
    chosen, deeper = np.empty((len(queries), count), np.int64), []
    bounds = [float((documents[list(rows)] @ query).max()) - margin for query, rows in zip(queries, relevant, strict=True)]
    for row, answers in enumerate(relevant):
        pool = found[row][~np.isin(found[row], answers) & (scores[row] <= bounds[row])]
        if len(pool) < count:  # all that are close are too close
            deeper.append(row)
        else:
            chosen[row] = rng.choice(pool, count, replace=False)
    for start in range(0, len(deeper), _BLOCK):
        rows = deeper[start : start + _BLOCK]
        cosines = torch.from_numpy(queries[rows] @ documents.T)
        for cosine, row in zip(cosines, rows, strict=True):
            cosine[list(relevant[row])] = torch.nan
        below = cosines <= torch.tensor([bounds[row] for row in rows])[:, None]
        closest = cosines.where(below, -torch.inf).topk(count).indices
        farthest = cosines.nan_to_num(torch.inf).topk(count, largest=False).indices
        chosen[rows] = torch.where(below.sum(1, keepdim=True) >= count, closest, farthest).numpy()
    return chosen
