import logging

import numpy as np
import pytest
import torch
from conftest import make_backbone, make_texts
from sentence_transformers import SentenceTransformer
from torch.nn.functional import pdist
from transformers import AutoTokenizer

from hf_distill import StudentModel
from hf_distill.build import LEALLA_SHAPES, from_scratch, narrow_embeddings, plan, start_embeddings
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


def test_a_tokenizer_that_pads_on_the_left_or_not_at_all(backbone_folder, tmp_path):
    """BERT counts places from the first token: padded on the left, a text's embedding would depend on its batch."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder, padding_side="left", pad_token=None, eos_token="[SEP]")
    tokenizer.save_pretrained(tmp_path / "left")
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)
    student = from_scratch(str(tmp_path / "left"), 8, 2, 2, 16, projection_dim=8, pooling="cls", dropout=0.0)
    student.save_pretrained(tmp_path / "student")
    texts = ["a cat sat", "the old house and the cat that sat on the mat"]
    opened = (student, StudentModel.from_pretrained(tmp_path / "student"), SentenceTransformer(str(tmp_path / "student")))
    for model in opened:
        assert model.encode(texts)[0] == pytest.approx(model.encode(texts[:1])[0], abs=1e-6)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        from_scratch(str(tmp_path / "none"), 8, 2, 2, 16)


def test_heads_that_do_not_divide_the_width(backbone_folder):
    with pytest.raises(ValueError, match="3 heads for 8 dimensions"):
        from_scratch(backbone_folder, 8, 1, 3, 8)


@pytest.mark.parametrize(("name", "millions"), [("small", 69.0), ("base", 107.0), ("large", 147.4)])
def test_lealla_shapes_have_the_papers_sizes_with_labses_vocabulary(backbone_folder, name, millions):
    hidden, layers, heads, ffn = LEALLA_SHAPES[name]
    with torch.device("meta"):
        student = from_scratch(backbone_folder, *LEALLA_SHAPES[name], projection_dim=hidden, pooling="cls", activation="tanh")
    size = student.num_parameters() + (501_153 - len(student.tokenizer)) * hidden
    # The paper's pooler is our Linear behind the pooling; the backbone's own, of the same size, is published and not used.
    assert (size - hidden * hidden - hidden) / 1e6 == pytest.approx(millions, abs=0.05)
    shape = student.config
    assert (shape.num_hidden_layers, shape.num_attention_heads, shape.intermediate_size) == (layers, heads, ffn)


def test_a_plan_is_the_largest_that_holds_the_vocabulary(backbone_folder):
    words = len(StudentModel.from_backbone(backbone_folder).tokenizer)
    for budget in (2_000_000, 5_000_000, 9_000_000):
        found = plan(budget, words)
        student = from_scratch(
            backbone_folder, found.hidden_size, found.layers, found.heads, found.intermediate_size,
            projection_dim=found.hidden_size, pooling="cls", activation="tanh",
        )  # fmt: skip
        assert student.num_parameters() == found.parameters <= budget
        assert found.vocabulary == words
    widths = [plan(budget, words).hidden_size for budget in (2_000_000, 5_000_000, 9_000_000)]
    assert widths == [96, 128, 160]
    assert plan(20_000_000, 118_000).hidden_size == 128
    assert [plan(budget, words).layers for budget in (2_000_000, 5_000_000, 9_000_000)] == [12, 24, 24]
    assert (plan(20_000_000, 118_000).layers, plan(20_000_000, 125_000).layers) == (24, 12)
    assert plan(20_000_000, 125_000).hidden_size == 128
    assert plan(20_000_000, 145_000).hidden_size == 96
    assert plan(20_000_000, 110_000, dim=384).parameters - plan(20_000_000, 110_000).parameters == 256 * 128 + 256
    cut = plan(2_000_000, 125_000)
    assert (cut.hidden_size, cut.layers) == (64, 12)
    assert cut.vocabulary == 21_232
    assert 1_999_936 < cut.parameters <= 2_000_000
    with pytest.raises(ValueError, match="No token would fit"):
        plan(500_000, 1)


def test_embeddings_start_from_the_main_directions_of_another_table(backbone_folder):
    student = from_scratch(backbone_folder, 8, 1, 2, 16)
    table = StudentModel.from_backbone(backbone_folder).backbone.get_input_embeddings().weight.detach()
    share = start_embeddings(student, backbone_folder)
    own = student.backbone.get_input_embeddings().weight.detach()
    u, s, _ = np.linalg.svd((table - table.mean(0)).numpy(), full_matrices=False)
    assert share == pytest.approx((s[:8] ** 2).sum() / (s**2).sum(), abs=1e-4)
    assert own.std().item() == pytest.approx(0.02, rel=1e-3)
    # The same distances between tokens as the best eight dimensions have, up to the scale.
    ours, theirs = pdist(own), pdist(torch.as_tensor(u[:, :8] * s[:8]))
    assert (ours / theirs).std() < 1e-3 * (ours / theirs).mean()
    wide = from_scratch(backbone_folder, 32, 1, 2, 16)
    with pytest.raises(ValueError, match="has 16 dimensions, the student 32"):
        start_embeddings(wide, backbone_folder)
    student.tokenizer.add_tokens(["newword"])
    with pytest.raises(ValueError, match=r"tokens, expected the student's \d+, the same ones"):
        start_embeddings(student, backbone_folder)


def test_a_narrow_table_that_holds_all_directions_changes_nothing(backbone_folder, tmp_path):
    student = StudentModel.from_backbone(backbone_folder, layers=[0, 2], projection_dim=5, activation="tanh", max_length=30)
    directions = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, weight in student.backbone.embeddings.named_parameters():
            if name.endswith("embeddings.weight"):
                own = torch.randn(len(weight), 7, generator=torch.Generator().manual_seed(len(weight)))
                weight.copy_(own @ directions + own[:, :1])  # and a mean of its own, which the layer norm takes away
    texts = make_texts(40)
    before, narrow = student.encode(texts), narrow_embeddings(student, 9)
    assert narrow.encode(texts) == pytest.approx(before, abs=1e-5)
    assert narrow.backbone.embeddings.word_embeddings.weight.shape == (len(student.tokenizer), 9)
    assert narrow.settings == {**student.settings, "embedding_dim": 9}
    narrow.save_pretrained(tmp_path)
    check_layout(tmp_path, ("a cat sat", "the old house " * 40))
    opened = StudentModel.from_pretrained(tmp_path)
    assert opened.config.model_type == "electra"
    assert opened.encode(texts) == pytest.approx(before, abs=1e-5)


def test_a_narrower_table_keeps_what_it_can(backbone_folder, caplog):
    student = StudentModel.from_backbone(backbone_folder)
    tokens = torch.arange(len(student.tokenizer))[None]
    before = student.backbone.embeddings.eval()(tokens).detach()
    lost = []
    for dim in (3, 8, 13):
        with caplog.at_level(logging.INFO, "hf_distill"):
            narrow = narrow_embeddings(student, dim)
        after = narrow.backbone.embeddings_project(narrow.backbone.embeddings.eval()(tokens))
        exact = narrow.encode(make_texts(40))
        with torch.autocast("cpu", torch.bfloat16):  # what is trained is what was measured, rounded
            assert narrow.encode(make_texts(40)) == pytest.approx(exact, abs=0.05)
        lost.append(float((after.detach() - before).square().sum() / (before - before.mean(1)).square().sum()))
        assert f"{100 * (1 - lost[-1]):.1f} % of what the first layer is given is kept" in caplog.text
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 2 * lost[-1] > 0


def test_tables_that_cannot_be_narrowed(tmp_path, backbone_folder):
    with pytest.raises(ValueError, match="a table of 16 dimensions, to be 16"):
        narrow_embeddings(StudentModel.from_backbone(backbone_folder), 16)
    other = StudentModel.from_backbone(make_backbone(tmp_path, "mpnet"))
    with pytest.raises(ValueError, match="the student is of type mpnet"):
        narrow_embeddings(other, 4)
