import math

import pytest
import torch
from torch.nn import functional

from hf_distill.losses import ContrastiveLoss, EmbeddingMatching, ScoreDistillation, WeightedLoss


LOSSES = [
    *(EmbeddingMatching(metric) for metric in ("l2", "cosine", "mse")),
    ScoreDistillation(),
    ScoreDistillation("margin_mse"),
    ScoreDistillation(in_batch=True),
]


def name(loss):
    return "label_loss" if loss is label_loss else " ".join(map(str, [type(loss).__name__, *vars(loss).values()]))


def rows(count=4, columns=3, dim=6, seed=0):
    return torch.randn(count, columns, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("metric", "query", "document"),
    [
        ("l2", math.sqrt(2) / 2, (0 + math.sqrt(2) + 2 + 0) / 4),
        ("cosine", 1 / 2, (0 + 1 + 2 + 0) / 4),
        ("mse", 2 / 2, (0 + 2 + 4 + 0) / 4),
    ],
)
def test_matching_is_the_mean_distance_of_directions(metric, query, document):
    x, y = [1.0, 0.0], [0.0, 1.0]
    student = torch.tensor([[x, x, x], [y, x, y]])
    teacher = torch.tensor([[y, x, y], [y, [-7.0, 0.0], [0.0, 3.0]]])
    parts = EmbeddingMatching(metric)(student, teacher)
    assert parts["query"].item() == pytest.approx(query, abs=1e-7)
    assert parts["document"].item() == pytest.approx(document, abs=1e-7)


def test_the_norm_has_a_finite_gradient_where_student_and_teacher_agree():
    student = rows().requires_grad_()
    parts = EmbeddingMatching("l2")(student, student.detach())
    sum(parts.values()).backward()
    assert torch.isfinite(student.grad).all()


def test_queries_alone_have_no_distance_of_documents():
    student = rows(columns=1).requires_grad_()
    parts = EmbeddingMatching()(student, rows(columns=1, seed=1))
    assert parts["document"].item() == 0
    assert parts["query"].item() > 0.1


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_a_student_that_is_its_teacher_loses_nothing_and_another_does(loss):
    vectors = functional.normalize(rows(), dim=-1)
    assert all(abs(value.item()) < 1e-6 for value in loss(vectors, vectors).values())
    assert all(value.item() > 0.01 for value in loss(vectors, rows(seed=1)).values())


def label_loss(student, teacher):
    return ContrastiveLoss()(student, different(*student.shape[:2]))


def different(count, columns):
    return torch.arange(count * columns).reshape(count, columns)


@pytest.mark.parametrize("loss", [*LOSSES, label_loss], ids=name)
def test_gradient_is_that_of_finite_differences(loss):
    student, teacher = rows(3, 3, 4).double().requires_grad_(), rows(3, 3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: torch.stack(list(loss(s, teacher).values())).sum(), student)


@pytest.mark.parametrize("loss", [*LOSSES, label_loss], ids=name)
def test_default_parts_are_of_one_order_for_a_student_that_knows_nothing(loss):
    student, teacher = (functional.normalize(rows(32, 3, 64, seed), dim=-1) for seed in (0, 1))
    assert all(0.3 < value.item() < 8 for value in loss(student, teacher).values())


def test_softmax_form_is_the_divergence_of_the_two_softmaxes():
    student, teacher = rows(), rows(seed=1)
    expected = []
    for s, t in zip(student, teacher, strict=True):
        ours = [functional.cosine_similarity(s[0], d, dim=0).item() / 0.1 for d in s[1:]]
        theirs = [functional.cosine_similarity(t[0], d, dim=0).item() / 0.1 for d in t[1:]]
        p, q = ([math.exp(v) / sum(map(math.exp, side)) for v in side] for side in (theirs, ours))
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = ScoreDistillation(temperature=0.1)(student, teacher)["score"].item()
    assert found == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_margins_are_those_to_the_first_document():
    student, scores = rows(2, 4), torch.tensor([[5.0, 1.0, 0.0], [2.0, 3.0, 1.0]])
    cosines = functional.cosine_similarity(student[:, :1], student[:, 1:], dim=-1) / 0.05
    expected = [
        (cosines[i, 0] - cosines[i, j] - (scores[i, 0] - scores[i, j]) / 2).item() ** 2 for i in range(2) for j in (1, 2)
    ]
    loss = ScoreDistillation("margin_mse", reranker=True, score_temperature=2.0)
    assert loss(student, student, scores)["score"].item() == pytest.approx(0.05 * sum(expected) / 4, rel=1e-5)


@pytest.mark.parametrize("form", ["softmax", "margin_mse"])
def test_a_constant_added_to_the_scores_of_a_query_changes_nothing(form):
    student, scores = rows(), rows()[..., 1][:, 1:]
    loss = ScoreDistillation(form)
    moved = loss(student, student, scores + torch.tensor([[3.0], [-8.0], [0.5], [100.0]]))
    assert moved["score"].item() == pytest.approx(loss(student, student, scores)["score"].item(), rel=1e-4)
    other = loss(student, student, scores * 3)["score"].item()
    assert other != pytest.approx(moved["score"].item(), rel=1e-2)


def test_given_scores_win_over_the_teachers_vectors_and_reach_the_loss_through_a_sum():
    student, scores = rows(), rows(columns=2, dim=1, seed=2)[..., 0]
    alone = ScoreDistillation()(student, rows(seed=1), scores)
    summed = WeightedLoss([ScoreDistillation(reranker=True), ContrastiveLoss()], {"score": 2.0})
    assert summed.needs == ("scores",)
    parts = summed.of({"embedding": student}, {"scores": scores, "texts": different(4, 3)})
    assert parts["score"].item() == pytest.approx(2 * alone["score"].item(), rel=1e-6)
    assert parts["label"].item() == pytest.approx(label_loss(student, None)["label"].item())
    assert WeightedLoss([ScoreDistillation(), ContrastiveLoss()]).needs == ("targets",)


def test_list_of_a_query_in_batch_is_all_documents():
    student, teacher = rows(2, 2), rows(2, 2, seed=1)
    wide = [torch.stack([side[i, 0], side[0, 1], side[1, 1]]) for side in (student, teacher) for i in range(2)]
    expected = ScoreDistillation()(torch.stack(wide[:2]), torch.stack(wide[2:]))["score"].item()
    assert ScoreDistillation(in_batch=True)(student, teacher)["score"].item() == pytest.approx(expected, rel=1e-6)


def test_label_loss_is_the_cross_entropy_over_all_documents_of_the_batch():
    student = rows(3, 3)
    documents = [(i, c) for i in range(3) for c in (1, 2)]
    total = 0.0
    for i in range(3):
        cosines = [functional.cosine_similarity(student[i, 0], student[j, c], dim=0).item() / 0.05 for j, c in documents]
        total -= cosines[documents.index((i, 1))] - math.log(sum(map(math.exp, cosines)))
    assert label_loss(student, None)["label"].item() == pytest.approx(total / 3, rel=1e-5)


def test_a_document_that_two_queries_share_is_no_negative():
    student, texts = rows(3, 2), torch.tensor([[0, 1], [2, 3], [4, 1]])
    total = 0.0
    for i, others in ((0, [1]), (1, [0, 2]), (2, [1])):
        cosines = [functional.cosine_similarity(student[i, 0], student[j, 1], dim=0).item() / 0.05 for j in [i, *others]]
        total -= cosines[0] - math.log(sum(map(math.exp, cosines)))
    assert ContrastiveLoss()(student, texts)["label"].item() == pytest.approx(total / 3, rel=1e-5)


def test_another_answer_of_the_same_query_is_no_negative():
    x, y, z = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    student = torch.tensor([[x, x], [x, x], [y, z]])  # both answers of the first query found, of the other none
    texts = torch.tensor([[0, 1], [0, 2], [3, 4]])
    found = ContrastiveLoss(temperature=1.0)(student, texts)["label"].item()
    first, other = math.log(math.e + 1) - 1, math.log(3)  # each answer against z alone; z against x twice, at cosine 0
    assert found == pytest.approx((2 * first + other) / 3, rel=1e-6)
    assert ContrastiveLoss(temperature=1.0)(student[:2], texts[:2])["label"].item() == 0


def test_the_last_batch_of_an_epoch_may_be_one_pair():
    for loss in (ContrastiveLoss(), ScoreDistillation(in_batch=True)):
        student = rows(1, 2).requires_grad_()
        [(_, value)] = loss.of({"embedding": student}, {"texts": different(1, 2), "targets": rows(1, 2, seed=1)}).items()
        value.backward()
        assert value.item() == 0
        assert student.grad.abs().max() < 1e-6


def test_with_documents_frozen_at_unit_length_scores_differ_by_no_more_than_the_queries():
    student, teacher = (functional.normalize(rows(50, 6, 8, seed), dim=-1) for seed in (0, 1))
    student[:, 1:] = teacher[:, 1:]
    scores = [torch.einsum("bd,bcd->bc", side[:, 0], side[:, 1:]) for side in (student, teacher)]
    bound = torch.linalg.vector_norm(student[:, 0] - teacher[:, 0], dim=-1, keepdim=True)
    assert ((scores[0] - scores[1]).abs() <= bound + 1e-6).all()
    parts = EmbeddingMatching()(student, teacher)
    assert parts["query"].item() == pytest.approx(bound.mean().item(), rel=1e-6)
    assert parts["document"].item() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingMatching("l1"), r"metric is 'l1', expected one of \('l2', 'cosine', 'mse'\)"),
        (lambda: ScoreDistillation("kl"), "form is 'kl'"),
        (lambda: ScoreDistillation(temperature=0), "temperatures are 0 and 1.0"),
        (lambda: ScoreDistillation("margin_mse", in_batch=True), "in_batch with softmax over"),
        (lambda: ScoreDistillation(in_batch=True, reranker=True), "in_batch is True, reranker True"),
        (lambda: ContrastiveLoss(-1), "temperature is -1"),
        (lambda: ScoreDistillation()(rows(4, 2), rows(4, 2)), "With one the loss would be zero"),
        (lambda: ScoreDistillation()(rows(), rows(), rows()[..., 0]), r"the teacher's \(4, 3\), expected equal"),
        (lambda: EmbeddingMatching()(rows(), rows(columns=1)), r"EmbeddingMatching: student is \(4, 3, 6\)"),
    ],
)
def test_what_would_teach_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("loss", [ContrastiveLoss(), ScoreDistillation(in_batch=True)])
def test_queries_without_a_document_are_refused(loss):
    alone = torch.randn(4, 1, 8)
    with pytest.raises(ValueError, match=r"rows are \(4, 1, 8\), expected \[B, C, D\] of a query and one document or more"):
        loss(alone, different(4, 1) if isinstance(loss, ContrastiveLoss) else alone)
