import pytest
import torch

from hf_distill import StudentModel
from hf_distill.build import from_scratch
from hf_distill.layout import check_layout


def test_a_student_from_scratch_has_the_shape_asked_for_and_opens_everywhere(backbone_folder, tmp_path):
    student = from_scratch(backbone_folder, 8, 4, 2, 24, projection_dim=5, dropout=0.0, max_length=30)
    vocabulary = len(student.tokenizer)
    layer = 4 * (8 * 8 + 8) + (8 * 24 + 24) + (24 * 8 + 8) + 2 * 16
    pooler, embeddings = 8 * 8 + 8, (vocabulary + 512 + 2) * 8 + 16
    assert student.num_parameters() == 4 * layer + embeddings + pooler + 8 * 5 + 5
    assert (student.dim, student.settings["max_length"], student.settings["base_model"]) == (5, 30, None)
    student.save_pretrained(tmp_path)
    check_layout(tmp_path, ("a cat sat", "the old house " * 40))
    assert torch.equal(StudentModel.from_pretrained(tmp_path).projection.weight, student.projection.weight)


def test_heads_that_do_not_divide_the_width(backbone_folder):
    with pytest.raises(ValueError, match="3 heads for 8 dimensions"):
        from_scratch(backbone_folder, 8, 1, 3, 8)
