import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONES, make_backbone, make_texts
from transformers import AutoModel

from hf_distill import StudentModel
from hf_distill.layout import SAMPLE_TEXTS, check_layout
from hf_distill.student import longest_input, pool


HIDDEN = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[9.0, 9.0], [5.0, 6.0], [7.0, 8.0]]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padding on the right, and on the left


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [[2, 3], [6, 7]]), ("cls", [[1, 2], [5, 6]]), ("last", [[3, 4], [7, 8]])]
)
def test_pooling_sees_real_tokens_only_on_either_side(pooling, expected):
    assert pool(HIDDEN, MASK, pooling).tolist() == expected


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling is 'max'"):
        pool(HIDDEN, MASK, "max")


@pytest.mark.parametrize("kind", BACKBONES)
def test_one_repository_opens_four_ways_with_equal_vectors(kind, tmp_path):
    source = make_backbone(tmp_path / "source", kind)
    student = StudentModel.from_backbone(source, layers=[0, 2], projection_dim=8)
    student.save_pretrained(tmp_path / "student")
    found = check_layout(tmp_path / "student", (*SAMPLE_TEXTS, "a quick fox", "the mat " * 100))
    assert found["AutoModel"] == "backbone whole"
    assert found["SentenceTransformer"] >= 0.99999  # installed with the extra 'test': not skipped
    assert found["AutoModel(trust_remote_code=True)"] >= 0.99999
    assert np.allclose(student.encode(["a cat"]), StudentModel.from_pretrained(tmp_path / "student").encode(["a cat"]))


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "cls", "projection_dim": 8, "activation": "tanh"},
        {"pooling": "last", "projection_dim": 8, "bias": False, "normalize": False},
        {"pooling": "mean", "projection_dim": None},
    ],
)
def test_every_setting_survives_in_every_loader(options, backbone_folder, tmp_path):
    student = StudentModel.from_backbone(backbone_folder, **options)
    student.save_pretrained(tmp_path)
    check_layout(tmp_path)
    assert (tmp_path / "2_Dense").exists() == (options["projection_dim"] is not None)
    assert StudentModel.from_pretrained(tmp_path).settings == student.settings


def test_one_copy_of_the_weights(student, tmp_path):
    student.save_pretrained(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert files == ["2_Dense/model.safetensors", "model.safetensors"]
    size = sum((tmp_path / file).stat().st_size for file in files)
    assert size < 4 * student.num_parameters() + 20_000


def test_sharded_weights_open_everywhere(student, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    check_layout(tmp_path)


@pytest.mark.slow
def test_fresh_processes_open_the_file_they_should(student, tmp_path):
    student.save_pretrained(tmp_path)
    ours = student.encode(["a quick fox"])[0].tolist()
    remote = (
        "import sys, json, inspect; sys.modules['hf_distill'] = None\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "print(json.dumps([inspect.getfile(type(model)), model.encode(['a quick fox'])[0].tolist()]))"
    )
    stock = (
        "import sys, json, inspect; sys.modules['hf_distill'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(tmp_path)!r}, device='cpu')\n"
        "print(json.dumps([inspect.getfile(type(model[0].auto_model)), model.encode(['a quick fox'])[0].tolist()]))"
    )
    for script, file in ((remote, "transformers_modules"), (stock, "modeling_bert")):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        where, vector = json.loads(done.stdout.strip().splitlines()[-1])
        assert file in where
        assert np.allclose(vector, ours, atol=1e-6)


def test_kept_layers_are_those_of_the_backbone(backbone_folder):
    whole = AutoModel.from_pretrained(backbone_folder)
    student = StudentModel.from_backbone(backbone_folder, layers=[0, 2], projection_dim=8)
    kept = student.backbone.encoder.layer
    assert len(kept) == student.config.num_hidden_layers == 2
    for mine, theirs in zip(kept, (whole.encoder.layer[0], whole.encoder.layer[2]), strict=True):
        for key, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key
    assert student.settings["layers"] == [0, 2]


def test_settings_given_layer_by_layer_are_cut_too(tmp_path):
    source = make_backbone(tmp_path, "modernbert")
    types = AutoModel.from_pretrained(source).config.layer_types
    student = StudentModel.from_backbone(source, layers=[0, 2], projection_dim=8)
    assert student.config.layer_types == [types[0], types[2]]


@pytest.mark.parametrize(("kind", "longest"), [("bert", 40), ("roberta", 41), ("xlm-roberta", 41), ("mpnet", 38)])
def test_longest_input_leaves_out_the_padding_offset(kind, longest, tmp_path):
    student = StudentModel.from_backbone(make_backbone(tmp_path, kind), projection_dim=8)
    assert longest_input(student.backbone, student.tokenizer) <= longest
    assert student.settings["max_length"] == longest_input(student.backbone, student.tokenizer)
    student.encode(["the " * 200])  # runs past the table if the limit is one too high


def test_encode_keeps_the_order_and_does_not_depend_on_the_batch(student):
    texts = make_texts(23)
    together = student.encode(texts, batch_size=5)
    alone = np.stack([student.encode(text) for text in texts])
    assert together.shape == (23, 24)
    assert together.dtype == np.float32
    assert np.allclose(together, alone, atol=1e-6)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_encode_empty_list_and_tensors(student):
    assert student.encode([]).shape == (0, 24)
    assert torch.equal(student.encode(["a cat"], convert_to_tensor=True), torch.from_numpy(student.encode(["a cat"])))


def test_encode_leaves_the_mode_as_it_was(student):
    student.train()
    student.encode(["a cat"])
    assert student.training


def test_truncated_embeddings_are_the_first_dimensions_at_unit_length(student):
    whole, cut = student.encode(["a cat", "the sea"]), student.encode(["a cat", "the sea"], truncate_dim=5)
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    assert np.allclose(cut, expected, atol=1e-6)


def test_prompts_are_put_before_the_text_and_saved(backbone_folder, tmp_path):
    student = StudentModel.from_backbone(backbone_folder, projection_dim=8, prompts={"query": "old house "})
    student.save_pretrained(tmp_path)
    opened = StudentModel.from_pretrained(tmp_path)
    assert np.allclose(opened.encode("a cat", prompt_name="query"), student.encode("old house a cat"))
    saved = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert saved["prompts"] == {"query": "old house ", "document": ""}
    with pytest.raises(ValueError, match=r"prompt_name is 'qeury'.*'document', 'query'"):
        student.encode("a cat", prompt_name="qeury")


def test_projection_starts_from_given_values(student, texts):
    student.projection.bias.data.fill_(9)
    student.start_projection(torch.eye(24, 16))
    assert torch.equal(student.projection.weight, torch.eye(24, 16))
    assert torch.equal(student.projection.bias, torch.zeros(24))
    inputs = student.tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.allclose(student.pooled(texts), student.eval()(**inputs).projected[:, :16], atol=1e-5)
    student.start_projection(torch.eye(24, 16), torch.arange(24.0))
    assert torch.equal(student.projection.bias, torch.arange(24.0))
    with pytest.raises(ValueError, match=r"weight is \(24, 16\), but the start is \(16, 24\)"):
        student.start_projection(torch.eye(16, 24))


def test_dropout_is_set_everywhere(backbone_folder):
    student = StudentModel.from_backbone(backbone_folder, projection_dim=8, dropout=0.0).train()
    inputs = student.tokenizer(["a quick fox"], return_tensors="pt")
    assert torch.equal(student(**inputs).embedding, student(**inputs).embedding)
    noisy = StudentModel.from_backbone(backbone_folder, projection_dim=8).train()  # the backbone's own 0.1
    assert not torch.equal(noisy(**inputs).embedding, noisy(**inputs).embedding)


def test_pooler_is_frozen_and_published(student, tmp_path):
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == [
        "backbone.pooler.dense.weight",
        "backbone.pooler.dense.bias",
    ]
    student.save_pretrained(tmp_path)
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_save_uses_the_state_dict_it_is_given_and_only_the_main_process_writes(student, tmp_path):
    doubled = {key: value * 2 for key, value in student.state_dict().items()}
    student.save_pretrained(tmp_path / "a", state_dict=doubled)
    opened = StudentModel.from_pretrained(tmp_path / "a").state_dict()
    assert all(torch.equal(opened[key], value) for key, value in doubled.items())
    student.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()


def test_missing_or_foreign_projection_is_refused(student, tmp_path):
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hf_distill"]["projection_dim"] = 12
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"2_Dense.*holds .*24, 16.*expected .*12, 16"):
        StudentModel.from_pretrained(tmp_path)
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="2_Dense/model.safetensors"):
        StudentModel.from_pretrained(tmp_path)


def test_missing_backbone_weights_are_refused(student, tmp_path):
    from safetensors.torch import load_file, save_file

    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config.json.*encoder.layer.0.output.dense.weight"):
        StudentModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is missing 1 weights"):
        StudentModel.from_backbone(str(tmp_path), projection_dim=8)


def test_a_plain_backbone_is_no_student(backbone_folder):
    with pytest.raises(ValueError, match=r"no `hf_distill` settings.*from_backbone"):
        StudentModel.from_pretrained(backbone_folder)


def test_pickled_weights_are_refused(backbone_folder, tmp_path):
    model = AutoModel.from_pretrained(backbone_folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="no weights in safetensors"):
        StudentModel.from_backbone(str(tmp_path), projection_dim=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 3]}, r"layers is \[0, 3\], expected numbers from 0 to 2"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"activation": "relu", "projection_dim": 8}, "activation is 'relu'"),
        ({"activation": "tanh"}, "'tanh' without a projection"),
        ({"projection_dim": 0}, "projection_dim is 0"),
        ({"max_length": 4000}, "max_length is 4000, expected at most 40"),
    ],
)
def test_bad_settings_are_refused(options, message, backbone_folder):
    with pytest.raises(ValueError, match=message):
        StudentModel.from_backbone(backbone_folder, **options)


def test_truncate_dim_beyond_the_width_is_refused(student):
    with pytest.raises(ValueError, match="truncate_dim is 25, expected 1 to 24"):
        student.encode("a cat", truncate_dim=25)


def test_texts_that_are_no_strings_are_named(student):
    with pytest.raises(TypeError, match="row 1 is of type NoneType"):
        student.encode(["a cat", None])


def test_layout_check_finds_a_loader_that_disagrees(student, tmp_path):
    student.save_pretrained(tmp_path)
    dense = tmp_path / "2_Dense" / "config.json"
    dense.write_text(dense.read_text().replace("linear.Identity", "activation.ReLU"))
    with pytest.raises(ValueError, match="gives other vectors through SentenceTransformer"):
        check_layout(tmp_path)


def test_layout_check_says_when_a_leg_is_skipped(student, tmp_path, monkeypatch):
    student.save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert check_layout(tmp_path)["SentenceTransformer"].startswith("skipped")


def test_saving_again_from_remote_code_keeps_the_layout(student, tmp_path):
    student.save_pretrained(tmp_path / "a")
    remote = AutoModel.from_pretrained(tmp_path / "a", trust_remote_code=True)
    remote.save_pretrained(tmp_path / "b")
    files = [sorted(str(p.relative_to(tmp_path / x)) for p in (tmp_path / x).rglob("*") if p.is_file()) for x in "ab"]
    assert files[0] == files[1]
    assert len(files[0]) >= 10
    assert Path(tmp_path / "b" / "student.py").read_text() == Path(tmp_path / "a" / "student.py").read_text()
    check_layout(tmp_path / "b")
