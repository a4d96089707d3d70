import math

import pytest
import torch
from torch.nn import functional

from hf_distill.losses import AdditiveMarginSoftmax, FeatureDistillation, LogitDistillation


def pairs(count=5, dim=6, seed=0):
    return torch.randn(count, 2, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def different(count):
    return torch.arange(2 * count).reshape(count, 2)


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_without_a_margin_it_is_symmetric_info_nce():
    rows, scale = pairs(), 7.0
    sides = functional.normalize(rows, dim=-1)
    scores = scale * sides[:, 0] @ sides[:, 1].T
    expected = functional.cross_entropy(scores, torch.arange(5)) + functional.cross_entropy(scores.T, torch.arange(5))
    assert AdditiveMarginSoftmax(0.0, scale)(rows, different(5))["ams"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("again", [[], [(0, 3, 0)], [(1, 2, 1), (0, 4, 0)], [(0, 4, 1)]])
def test_it_is_the_papers_sum_without_sentences_that_stand_there_again(again):
    rows, texts, margin, scale = pairs(), different(5), 0.3, 4.0
    for first, second, side in again:
        texts[second, side] = texts[first, side]
        rows[second, side] = rows[first, side]
    if not again:  # a source that is another's translation
        texts[4, 1], rows[4, 1] = texts[2, 0], rows[2, 0]
    total = 0.0
    for i in range(5):
        for here, there in ((0, 1), (1, 0)):
            true = math.exp(scale * (cosine(rows[i, here], rows[i, there]) - margin))
            others = [
                math.exp(scale * cosine(rows[i, here], rows[n, there]))
                for n in range(5)
                if n != i and not set(texts[n].tolist()) & set(texts[i].tolist())
            ]
            total -= math.log(true / (true + sum(others))) / 5
    assert AdditiveMarginSoftmax(margin, scale)(rows, texts)["ams"].item() == pytest.approx(total)


def test_it_grows_with_the_margin_and_is_nothing_for_one_pair():
    found = [AdditiveMarginSoftmax(margin)(pairs(), different(5))["ams"].item() for margin in (0.0, 0.1, 0.3)]
    assert found == sorted(found)
    assert found[0] < found[1] < found[2]
    assert AdditiveMarginSoftmax()(pairs(1), different(1))["ams"].item() == 0


def test_what_compares_pairs_with_each_other_sees_the_batch_of_all_processes():
    assert [loss.in_batch for loss in (AdditiveMarginSoftmax, FeatureDistillation, LogitDistillation)] == [True, False, True]


def test_logits_are_zero_for_a_teacher_turned_scaled_and_widened():
    student = pairs()
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    teacher = 3 * functional.pad(student, (0, 3)) @ turn
    assert LogitDistillation()(student, teacher)["logit"].item() == pytest.approx(0, abs=1e-12)
    assert LogitDistillation()(2 * student, pairs(seed=2))["logit"].item() > 0.01


def test_logits_are_compared_with_every_translation():
    student, teacher = pairs(), pairs(dim=3, seed=1)
    expected = [
        ((cosine(student[i, 0], student[j, 1]) - cosine(teacher[i, 0], teacher[j, 1])) / 0.5) ** 2
        for i in range(5)
        for j in range(5)
    ]
    assert LogitDistillation(0.5)(student, teacher)["logit"].item() == pytest.approx(sum(expected) / 25)


def test_features_are_zero_where_the_head_gives_the_teacher_and_squared_norms_elsewhere():
    teacher = pairs()
    assert FeatureDistillation()(functional.normalize(teacher, dim=-1), 5 * teacher)["feature"].item() == pytest.approx(0)
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]])
    known = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [2.0, 0.0]]])
    assert FeatureDistillation()(student, known)["feature"].item() == (4 + 1 + 0 + 1) / 2
    assert FeatureDistillation(normalize=False)(student, known)["feature"].item() == (4 + 1 + 0 + 2) / 2


@pytest.mark.parametrize("loss", [AdditiveMarginSoftmax(), LogitDistillation()])
def test_rows_that_are_no_pairs_are_refused(loss):
    rows = torch.randn(4, 3, 6)
    with pytest.raises(ValueError, match=r"rows are \(4, 3, 6\), expected \[B, 2, D\]"):
        loss(rows, torch.arange(12).reshape(4, 3) if isinstance(loss, AdditiveMarginSoftmax) else rows)


def test_settings_that_mean_nothing_are_refused():
    for options in ({"margin": -0.1}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="expected a margin"):
            AdditiveMarginSoftmax(**options)
    with pytest.raises(ValueError, match="expected a positive"):
        LogitDistillation(0)
