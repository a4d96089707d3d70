import pytest
import torch

from hf_distill.losses import DistillationLoss, HPDLoss, WeightedLoss


class Length(DistillationLoss):
    output = "embedding"
    parts = ("length",)

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, student, teacher):
        return {"length": self.scale * (student.norm(dim=-1) - teacher.norm(dim=-1)).abs().mean()}


OUTPUTS = {"projected": torch.tensor([[[1.0, 0.0]]]), "embedding": torch.tensor([[[3.0, 4.0]]])}
TEACHER = torch.tensor([[[0.0, 2.0]]])


def test_weighted_sum_on_the_output_that_each_part_asks_for():
    loss = WeightedLoss([HPDLoss(), Length()], {"length": 0.1})
    assert loss.parts == ("mse", "length")
    assert loss.outputs == ("projected", "embedding")
    found = loss.of(OUTPUTS, {"targets": TEACHER})
    assert {name: value.item() for name, value in found.items()} == pytest.approx({"mse": 2.5, "length": 0.1 * 3})
    assert HPDLoss().of(OUTPUTS, {"targets": TEACHER})["mse"].item() == 2.5


def test_facts_name_everything_that_a_resumed_run_must_share():
    facts = WeightedLoss([HPDLoss(normalize=True), Length(2.0)], {"mse": 3}).facts()
    assert facts == {
        "name": "WeightedLoss",
        "weights": {"mse": 3},
        "losses": [{"name": "HPDLoss", "normalize": True}, {"name": "Length", "scale": 2.0}],
    }


def test_a_weight_for_a_part_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"a weight for \['mes'\], expected parts of the losses, \['length', 'mse'\]"):
        WeightedLoss([HPDLoss(), Length()], {"mes": 1.0})


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"the parts are \['mse', 'mse'\], expected different names"):
        WeightedLoss([HPDLoss(), HPDLoss(normalize=True)])
