import math

import pytest
import torch

from hf_distill import DistillationLoss, HPDLoss


STUDENT = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # [B, C, D] = [1, 2, 2]
TEACHER = torch.tensor([[[0.0, 2.0], [3.0, 1.0]]])


def test_it_is_the_mean_squared_difference_over_all_numbers():
    parts = HPDLoss()(STUDENT, TEACHER)
    assert list(parts) == ["mse"]
    assert parts["mse"].shape == ()
    assert parts["mse"].item() == (1 + 0 + 0 + 9) / 4


def test_several_columns_give_the_mean_of_their_losses():
    student, teacher = torch.randn(5, 3, 7), torch.randn(5, 3, 7)
    columns = [HPDLoss()(student[:, [i]], teacher[:, [i]])["mse"] for i in range(3)]
    assert HPDLoss()(student, teacher)["mse"].item() == pytest.approx(sum(columns).item() / 3, rel=1e-6)


def test_gradient_is_twice_the_difference_over_the_count_of_numbers():
    student = STUDENT.clone().requires_grad_()
    HPDLoss()(student, TEACHER)["mse"].backward()
    assert student.grad.tolist() == [[[0.5, 0.0], [0.0, 1.5]]]


@pytest.mark.parametrize("degrees", [0, 60, 90, 180])
def test_normalized_it_is_two_times_one_minus_cosine_over_dimensions(degrees):
    angle = math.radians(degrees)
    student, teacher = torch.tensor([[[5.0, 0.0]]]), torch.tensor([[[math.cos(angle), math.sin(angle)]]]) * 0.3
    expected = 2 * (1 - math.cos(angle)) / 2
    assert HPDLoss(normalize=True)(student, teacher)["mse"].item() == pytest.approx(expected, abs=1e-6)


def test_only_normalized_it_is_blind_to_length():
    for normalize, blind in ((True, True), (False, False)):
        loss = HPDLoss(normalize=normalize)
        once, twice = loss(STUDENT, TEACHER)["mse"], loss(2 * STUDENT, 5 * TEACHER)["mse"]
        assert torch.allclose(once, twice) is blind
    assert HPDLoss().normalize is False


def test_a_vector_of_zeros_has_a_finite_gradient():
    student = torch.zeros(1, 1, 4, requires_grad=True)
    HPDLoss(normalize=True)(student, torch.ones(1, 1, 4))["mse"].backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_targets_of_any_dtype_are_cast_to_the_students_before_anything_else(dtype):
    for normalize in (False, True):
        loss = HPDLoss(normalize=normalize)
        found = loss(STUDENT, TEACHER.to(dtype))["mse"]  # these targets are exact in each dtype
        assert found.dtype == torch.float32
        assert found.item() == loss(STUDENT, TEACHER)["mse"].item()


def test_targets_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"student is \(4, 2, 8\), teacher \(4, 1, 8\), expected equal \[B, C, D\]"):
        HPDLoss()(torch.zeros(4, 2, 8), torch.zeros(4, 1, 8))


def test_another_width_is_refused_with_both_remedies():
    message = r"HPDLoss: student is \(4, 1, 8\).*projection_dim=24, or project the teacher to 8 dimensions"
    with pytest.raises(ValueError, match=message):
        HPDLoss(normalize=True)(torch.zeros(4, 1, 8), torch.zeros(4, 1, 24))


def test_it_says_which_output_it_compares_and_what_it_returns():
    loss = HPDLoss(normalize=True)
    assert (loss.output, loss.paper) == ("projected", "2203.07687")
    assert tuple(loss(STUDENT, TEACHER)) == loss.parts
    assert vars(loss) == {"normalize": True}  # what a run is compared by when it is resumed


def test_a_loss_without_a_formula_cannot_be_made():
    with pytest.raises(TypeError, match="abstract.*__call__"):
        DistillationLoss()


def test_a_loss_of_ones_own_needs_a_formula_only():
    class Cosine(DistillationLoss):
        def __call__(self, student, teacher):
            return {"cos": (1 - torch.cosine_similarity(student, self._same_shape(student, teacher), -1)).mean()}

    assert Cosine.output == "embedding"  # what is deployed, if it says nothing else
    assert Cosine()(STUDENT, 3 * STUDENT)["cos"].item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="Cosine: student is"):
        Cosine()(STUDENT, TEACHER[:, :1])
