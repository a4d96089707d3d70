import pytest
import torch

from hf_distill.losses import HPDLoss, SimilarityLoss


def test_it_is_the_mean_squared_difference_of_cosines_over_pairs_of_different_texts():
    student = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]], [[1.0, 1.0]]])  # cosines 0, 1/sqrt 2, 1/sqrt 2
    teacher = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 5.0]]])  # cosines 1, 0, 0
    parts = SimilarityLoss()(student, teacher)
    assert list(parts) == ["similarity"]
    assert parts["similarity"].item() == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_columns_are_texts_like_any_other():
    student, teacher = torch.randn(3, 2, 7), torch.randn(3, 2, 7)
    flat = SimilarityLoss()(student.reshape(6, 1, 7), teacher.reshape(6, 1, 7))
    assert SimilarityLoss()(student, teacher)["similarity"].item() == pytest.approx(flat["similarity"].item(), rel=1e-6)


def test_a_turned_space_is_as_good_and_lengths_do_not_count():
    teacher = torch.randn(5, 1, 4)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    student = teacher @ turn * torch.rand(5, 1, 1).add(0.5)
    assert SimilarityLoss()(student, teacher)["similarity"].item() == pytest.approx(0, abs=1e-10)
    assert HPDLoss(normalize=True)(student, teacher)["mse"].item() > 0.01


def test_gradient_is_that_of_finite_differences():
    student, teacher = torch.randn(4, 1, 3, dtype=torch.double, requires_grad=True), torch.randn(4, 1, 3)
    assert torch.autograd.gradcheck(lambda s: SimilarityLoss()(s, teacher)["similarity"], student)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_text_and_vectors_of_zeros_have_a_finite_gradient(rows):
    student = torch.zeros(rows, 1, 4, requires_grad=True)
    loss = SimilarityLoss()(student, torch.ones(rows, 1, 4))["similarity"]
    loss.backward()
    assert loss.item() == (0 if rows == 1 else 1)
    assert torch.isfinite(student.grad).all()


def test_targets_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"SimilarityLoss: student is \(4, 2, 8\), teacher \(4, 1, 8\)"):
        SimilarityLoss()(torch.zeros(4, 2, 8), torch.zeros(4, 1, 8))
