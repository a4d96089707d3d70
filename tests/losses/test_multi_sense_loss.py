import math

import pytest
import torch
from torch.nn import functional

from hf_distill.losses import SenseLoss, StateLoss, WeightedLoss


NONE = -torch.inf


def scores(seed=0, rows=3, tokens=5, senses=4):
    return torch.randn(rows, 1, tokens, senses, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_mean_cross_entropy_of_tokens_with_senses_by_a_double_loop():
    student = scores()
    student[0, 0, 1, 2:] = NONE  # a token of two senses
    chosen = torch.tensor([[[3, 1, -1, 0, 2]], [[0, -1, -1, -1, -1]], [[1, 1, 2, 3, -1]]])
    terms, right = [], 0
    for row in range(3):
        for token in range(5):
            best = chosen[row, 0, token].item()
            if best >= 0:
                exponents = [math.exp(value) for value in student[row, 0, token].tolist() if value > -math.inf]
                terms.append(math.log(sum(exponents)) - student[row, 0, token, best].item())
                right += student[row, 0, token].argmax().item() == best
    found = SenseLoss()(student, chosen)
    assert len(terms) == 9
    assert found["sense"].item() == pytest.approx(sum(terms) / 9)
    assert found["sense_accuracy"].item() == pytest.approx(right / 9)


def test_padding_and_longer_neighbours_change_nothing():
    student, chosen = scores(), torch.tensor([[[3, 1, -1, 0, 2]], [[0, -1, -1, -1, -1]], [[1, 1, 2, 3, -1]]])
    alone = SenseLoss()(student, chosen)["sense"]
    padded = functional.pad(student, (0, 3, 0, 2), value=NONE)  # three senses more, two places more
    assert SenseLoss()(padded, functional.pad(chosen, (0, 2), value=-1))["sense"].item() == pytest.approx(alone.item())
    assert SenseLoss()(student, functional.pad(chosen, (0, 30), value=-1))["sense"].item() == pytest.approx(alone.item())


def test_a_state_of_zeros_knows_nothing_and_the_teachers_own_everything():
    chosen = torch.tensor([[[0, 3, 2]]])
    assert SenseLoss()(torch.zeros(1, 1, 3, 4), chosen)["sense"].item() == pytest.approx(math.log(4))
    own = 1000 * functional.one_hot(chosen, 4).double()
    assert SenseLoss()(own, chosen) == {"sense": 0, "sense_accuracy": 1}


def test_soft_targets_are_zero_where_both_agree_and_a_divergence_elsewhere():
    student, teacher = scores(), scores(1)
    student[0, 0, 1, 2:], teacher[0, 0, 1, 2:], teacher[2, 0, 4] = NONE, NONE, NONE
    assert SenseLoss(2.0, soft=True)(teacher, teacher)["sense"].item() == pytest.approx(0, abs=1e-12)
    known = torch.ones(3, 1, 5, dtype=torch.bool)
    known[2, 0, 4] = False
    ours, theirs = (functional.softmax(side[known] / 2, -1) for side in (student, teacher))
    expected = sum((p * (p / q).log()).sum() for p, q in ((t[t > 0], o[t > 0]) for t, o in zip(theirs, ours, strict=True)))
    found = SenseLoss(2.0, soft=True)(student.requires_grad_(), teacher)["sense"]
    assert found.item() == pytest.approx(expected.item() / 14)
    found.backward()
    assert torch.isfinite(student.grad).all()


def test_a_batch_without_a_known_token_has_no_loss_and_a_gradient_of_zero():
    student = torch.full((1, 1, 2, 3), NONE).requires_grad_()
    found = SenseLoss()(student, torch.full((1, 1, 2), -1))
    found["sense"].backward()
    assert found["sense"].item() == 0
    assert student.grad.abs().sum() == 0


def test_other_tokens_at_the_same_places_are_refused():
    student = scores()
    student[1, 0, 0] = NONE
    with pytest.raises(ValueError, match="expected the same tokens at the same places"):
        SenseLoss()(student, torch.zeros(3, 1, 5))


def test_states_are_compared_without_padding():
    student, teacher = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    teacher[1, 0, 2] = 0
    real = torch.cat([(student - teacher)[0].flatten(), (student - teacher)[1, 0, :2].flatten()])
    assert StateLoss()(student, teacher)["state"].item() == pytest.approx(real.square().mean().item())
    with pytest.raises(ValueError, match="expected equal"):
        StateLoss()(student, teacher[..., :2])


def test_what_a_teacher_gives_is_found_by_name_and_missed_by_name():
    student, states = scores().float(), torch.randn(3, 1, 5, 6)
    both = WeightedLoss([SenseLoss(), StateLoss()], {"state": 2.0})
    outputs = {"sense_scores": student, "states": states}
    batch = {"senses": torch.zeros(3, 1, 5).long(), "states": states + 1}
    found = both.of(outputs, batch)
    assert found["state"].item() == pytest.approx(2.0)
    assert both.monitored == ("sense_accuracy",)
    assert found["sense_accuracy"].item() == SenseLoss()(student, batch["senses"])["sense_accuracy"].item()
    cached = SenseLoss().of(outputs, {"targets": batch["senses"].float()})
    assert cached["sense"].item() == pytest.approx(found["sense"].item())
    with pytest.raises(ValueError, match="expected 'sense_scores'"):
        SenseLoss(soft=True).of(outputs, {"targets": batch["senses"]})
