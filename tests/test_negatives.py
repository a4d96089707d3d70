import pytest
import torch
from torch.nn import functional

from hf_distill.negatives import mine_negatives


# Documents on a circle: document i stands at 10 * i degrees, so that cosines are known.
ANGLES = torch.deg2rad(torch.arange(36) * 10.0)
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def cosine(query, row):
    return functional.cosine_similarity(CIRCLE[query], CIRCLE[row], dim=0).item()


def test_negatives_are_close_but_below_the_margin_and_never_answers():
    relevant = [[1], [19, 20], [0]]
    queries = [0, 18, 35]
    found = mine_negatives(3 * CIRCLE[queries], CIRCLE * 2, relevant, count=3, depth=12, margin=0.1)
    assert found.shape == (3, 3)
    for query, answers, rows in zip(queries, relevant, found.tolist(), strict=True):
        best = max(cosine(query, answer) for answer in answers)
        assert len(set(rows)) == 3
        assert not set(rows) & set(answers)
        assert all(cosine(query, row) <= best - 0.1 + 1e-6 for row in rows)
        assert all(cosine(query, row) > 0 for row in rows)  # among the 12 or 14 nearest, 90 degrees to each side


def test_without_a_margin_the_nearest_may_be_taken():
    close = {row for seed in range(40) for row in mine_negatives(CIRCLE[:1], CIRCLE, [[1]], 1, 4, 0.0, seed)[0].tolist()}
    assert {2, 34} <= close <= {2, 34, 35}  # 35 is as close as the answer; 0, the query's own place, is closer


def test_the_seed_decides():
    draws = [mine_negatives(CIRCLE[:5], CIRCLE, [[1]] * 5, 2, 20, 0.0, seed).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_where_all_near_ones_are_too_close_those_further_down_are_taken():
    same = torch.cat([CIRCLE[:1].expand(30, 2), CIRCLE[9:12]])
    found = mine_negatives(CIRCLE[:1], same, [[0]], count=2, depth=8, margin=0.5)
    assert set(found[0]) <= {30, 31, 32}
    nothing_below = mine_negatives(CIRCLE[:1], CIRCLE[:1].expand(5, 2), [[2]], count=3, margin=0.5)
    assert set(nothing_below[0]) <= {0, 1, 3, 4}


def test_further_down_they_are_the_nearest_below_the_margin(monkeypatch):
    monkeypatch.setattr("hf_distill.negatives._BLOCK", 7)
    torch.manual_seed(0)
    queries, documents = (functional.normalize(torch.randn(n, 6), dim=-1) for n in (40, 300))
    cosines = queries @ documents.T
    answers = [[int(row.argsort(descending=True)[150 + i])] for i, row in enumerate(cosines)]  # all near ones are above them
    found = mine_negatives(queries, documents, answers, count=3, depth=10, margin=0.05)
    for row, (answer,), chosen in zip(cosines, answers, found.tolist(), strict=True):
        below = [i for i in row.argsort(descending=True).tolist() if row[i] <= row[answer] - 0.05]
        assert sorted(chosen) == sorted(below[:3])


@pytest.mark.parametrize(
    ("relevant", "count"), [([[1], []], 1), ([[1]], 1), ([[1], [2]], 36)], ids=["none", "fewer", "too small"]
)
def test_queries_without_answers_and_small_collections_are_refused(relevant, count):
    with pytest.raises(ValueError, match="mine_negatives: 2 queries, relevant documents for"):
        mine_negatives(CIRCLE[:2], CIRCLE, relevant, count)
