import json
import shutil

import pytest
import torch
from conftest import make_backbone, make_texts
from transformers import AutoModel, AutoTokenizer

from hf_distill import EncoderTeacher, StudentModel
from hf_distill.teachers import fetch


def change(folder, file, **settings):
    path = folder / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**old, **settings}))


@pytest.fixture
def copy(teacher_folder, tmp_path):
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_vectors_equal_those_of_sentence_transformers(kind, pooling, tmp_path):
    from sentence_transformers import SentenceTransformer

    source = make_backbone(tmp_path / "backbone", kind)
    student = StudentModel.from_backbone(source, projection_dim=8, pooling=pooling, activation="tanh")
    student.save_pretrained(tmp_path / "teacher")
    texts = [*make_texts(20), "the mat " * 100]
    theirs = torch.from_numpy(SentenceTransformer(str(tmp_path / "teacher"), device="cpu").encode(texts))
    ours = EncoderTeacher(tmp_path / "teacher", dtype="float32").encode(texts)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_folder_that_sentence_transformers_writes_today_is_read_too(teacher_folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(teacher_folder, device="cpu").save_pretrained(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert "sentence_transformers.models" not in modules[0]["type"]  # it is the newer spelling that is tested here
    texts = make_texts(5)
    ours = [EncoderTeacher(folder, dtype="float32").encode(texts) for folder in (tmp_path, teacher_folder)]
    assert torch.allclose(*ours, atol=1e-6)


def test_plain_model_with_its_pooling_named(backbone_folder):
    teacher = EncoderTeacher(backbone_folder, pooling="cls", normalize=False, dtype="float32")
    model, tokenizer = (
        AutoModel.from_pretrained(backbone_folder).eval(),
        AutoTokenizer.from_pretrained(backbone_folder),
    )
    expected = model(**tokenizer(["a quick fox"], return_tensors="pt")).last_hidden_state[:, 0]
    assert torch.allclose(teacher.encode(["a quick fox"]), expected, atol=1e-6)
    assert teacher.dim == 16


def test_own_pooler_of_a_plain_model(backbone_folder, tmp_path):
    teacher = EncoderTeacher(backbone_folder, pooling="pooler", normalize=False, dtype="float32")
    model, tokenizer = (
        AutoModel.from_pretrained(backbone_folder).eval(),
        AutoTokenizer.from_pretrained(backbone_folder),
    )
    expected = model(**tokenizer(["a quick fox"], return_tensors="pt")).pooler_output
    assert torch.allclose(teacher.encode(["a quick fox"]), expected, atol=1e-6)
    AutoModel.from_pretrained(backbone_folder, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    EncoderTeacher(tmp_path, pooling="cls")
    with pytest.raises(ValueError, match=r"missing 2 weights \(pooler.dense"):
        EncoderTeacher(tmp_path, pooling="pooler")


def test_plain_model_without_pooling_is_refused(backbone_folder):
    with pytest.raises(ValueError, match=r"no modules.json, so its pooling is unknown.*\['cls', 'last', 'mean', 'pooler'\]"):
        EncoderTeacher(backbone_folder)


def test_pooling_against_modules_json_is_refused(teacher_folder):
    with pytest.raises(ValueError, match="says its own in modules.json"):
        EncoderTeacher(teacher_folder, pooling="mean")


def test_nothing_is_trained(teacher):
    assert not any(p.requires_grad for module in [teacher.model, *teacher.heads] for p in module.parameters())
    assert not teacher.model.training
    assert not teacher.encode(["a cat"]).requires_grad
    assert teacher.num_parameters == sum(p.numel() for p in teacher.model.parameters()) + 24 * 16 + 24


def test_prompts_default_given_and_none(copy):
    settings = {"prompts": {"sts": "old house "}, "default_prompt_name": "sts"}
    change(copy, "config_sentence_transformers.json", **settings)
    plain = EncoderTeacher(copy, prompt="", dtype="float32")
    expected = plain.encode(["old house a cat"])
    assert torch.allclose(EncoderTeacher(copy, dtype="float32").encode(["a cat"]), expected, atol=1e-6)
    assert torch.allclose(EncoderTeacher(copy, prompt="old house ", dtype="float32").encode(["a cat"]), expected, atol=1e-6)
    assert not torch.allclose(plain.encode(["a cat"]), expected, atol=1e-3)


def test_length_limit_of_the_repository_counts(copy):
    change(copy, "sentence_bert_config.json", max_seq_length=6)
    teacher = EncoderTeacher(copy, dtype="float32")
    assert teacher.max_length == 6
    assert torch.allclose(*teacher.encode(["a cat sat on", "a cat sat on the mat"]), atol=1e-6)


def test_do_lower_case_is_honoured(copy):
    change(copy, "sentence_bert_config.json", do_lower_case=True)
    teacher = EncoderTeacher(copy, dtype="float32")
    assert torch.allclose(teacher.encode(["A CAT"]), teacher.encode(["a cat"]), atol=1e-6)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True},
            "pools by .*max",
        ),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "expected exactly one of"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pools by .*weightedmean"),
        ("2_Dense/config.json", {"activation_function": "my.package.Act"}, "has activation my.package.Act"),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual=True"),
    ],
)
def test_what_would_be_a_guess_is_refused(copy, file, settings, message):
    change(copy, file, **settings)
    with pytest.raises(ValueError, match=message):
        EncoderTeacher(copy)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["Transformer", "Pooling", "LSTM"], r"models.LSTM \(position 2\)"),
        (["Transformer", "Pooling", "Normalize", "Dense"], r"Dense \(position 3\)"),
        (["Pooling", "Transformer"], r"Pooling \(position 0\)"),
        (["Transformer", "Dense", "Pooling"], r"Dense \(position 1\)"),
        (["Transformer"], "no Pooling"),
    ],
)
def test_unknown_modules_and_orders_are_refused(copy, kinds, message):
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, kind)} for kind in kinds]
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message):
        EncoderTeacher(copy)


def test_prompt_left_out_of_the_pooling_is_refused(copy):
    change(copy, "1_Pooling/config.json", include_prompt=False)
    EncoderTeacher(copy)
    with pytest.raises(ValueError, match="include_prompt is false"):
        EncoderTeacher(copy, prompt="query: ")


def test_pickled_weights_are_refused(copy):
    torch.save({}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no weights in safetensors"):
        EncoderTeacher(copy)


def test_pickled_head_is_refused(copy):
    (copy / "2_Dense" / "model.safetensors").rename(copy / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(OSError, match="no weights in safetensors in 2_Dense/"):
        EncoderTeacher(copy)


@pytest.mark.parametrize("name", ["nobody/there-is-no-such-model", "no such folder"])
def test_unknown_name_is_refused_with_the_remedy(name):
    with pytest.raises(OSError, match=r"neither a folder here nor a repository .*hf download"):
        EncoderTeacher(name)


def test_fetch_returns_a_folder_as_it_is(tmp_path):
    assert fetch(tmp_path) == tmp_path


def test_fingerprint_changes_with_everything_that_changes_a_target(teacher_folder, copy):
    def digest(folder=teacher_folder, **options):
        return json.dumps(EncoderTeacher(folder, **{"dtype": "float32", **options}).fingerprint, sort_keys=True)

    same = digest()
    assert digest() == same
    assert digest(copy) == same  # where it lies does not matter
    others = [digest(prompt="a "), digest(max_length=7), digest(normalize=False), digest(dtype="bfloat16")]
    change(copy, "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    others.append(digest(copy))
    model = AutoModel.from_pretrained(teacher_folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5, 3] += 1e-3
    shutil.copytree(teacher_folder, copy, dirs_exist_ok=True)
    model.save_pretrained(copy)
    others.append(digest(copy))
    shutil.copytree(teacher_folder, copy, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(copy)
    others.append(digest(copy))
    assert len({same, *others}) == 8
