import json
import shutil

import pytest
import torch
from conftest import make_backbone, make_texts
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from hf_distill import EncoderTeacher, JointTeacher, PCAProjection, StudentModel, Teacher, TeacherCache
from hf_distill.teachers import AnchoredTeacher, TwoTowerTeacher, fetch
from hf_distill.token_teacher import TokenTeacher


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
    torch.manual_seed(1)
    first = [EncoderTeacher(tmp_path, pooling="cls"), TokenTeacher(tmp_path)]
    torch.manual_seed(2)  # the pooler, of which there are no weights, is another one, and not used
    again = [EncoderTeacher(tmp_path, pooling="cls"), TokenTeacher(tmp_path)]
    assert not torch.equal(first[0].model.pooler.dense.weight, again[0].model.pooler.dense.weight)
    assert [teacher.fingerprint for teacher in first] == [teacher.fingerprint for teacher in again]
    whole = EncoderTeacher(backbone_folder, pooling="cls").fingerprint["weights"]
    assert whole != first[0].fingerprint["weights"]  # a pooler that is there counts
    with pytest.raises(ValueError, match=r"missing 2 weights \(pooler.dense"):
        EncoderTeacher(tmp_path, pooling="pooler")


def test_labse_as_its_repository_holds_it_and_lealla_as_its_port_does(tmp_path):
    """Of both, [CLS], a Dense with tanh and unit length: in modules of its own, or as BERT's own pooler."""
    plain = make_backbone(tmp_path / "lealla")
    folder = shutil.copytree(plain, tmp_path / "labse")
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize"))
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    change(folder, "sentence_bert_config.json", max_seq_length=30, do_lower_case=False)
    flags = {f"pooling_mode_{name}": name == "cls_token" for name in ("cls_token", "mean_tokens", "max_tokens")}
    change(folder, "1_Pooling/config.json", word_embedding_dimension=16, **flags)
    tanh = "torch.nn.modules.activation.Tanh"
    change(folder, "2_Dense/config.json", in_features=16, out_features=16, bias=True, activation_function=tanh)
    pooler = AutoModel.from_pretrained(plain).pooler.dense
    weights = {f"linear.{name}": value.detach() for name, value in pooler.named_parameters()}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    model, tokenizer = AutoModel.from_pretrained(plain).eval(), AutoTokenizer.from_pretrained(plain)
    states = model(**tokenizer(["a quick fox"], return_tensors="pt")).last_hidden_state
    expected = torch.nn.functional.normalize(torch.tanh(states[:, 0] @ pooler.weight.T + pooler.bias), dim=-1)
    for teacher in (EncoderTeacher(folder, dtype="float32"), EncoderTeacher(plain, pooling="pooler", dtype="float32")):
        assert torch.allclose(teacher.encode(["a quick fox"]), expected, atol=1e-6)
    assert teacher.encode(["a quick fox"]).norm().item() == pytest.approx(1, abs=1e-5)


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


def test_a_data_set_that_is_not_there_is_fetched_as_one():
    with pytest.raises(OSError, match="`hf download nobody/nothing --repo-type dataset`"):
        fetch("nobody/nothing", kind="dataset")


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


class Table(Teacher):
    """A teacher of given vectors."""

    def __init__(self, name, vectors, known=None):
        self.name, self.vectors, self.known = name, vectors, known
        self.dim, self.num_parameters = len(next(iter(vectors.values()))), 7
        self.fingerprint = {"table": name}

    def encode(self, texts, batch_size=64, show_progress_bar=None):
        return torch.tensor([self.vectors[text] for text in texts])

    def require(self, texts):
        if not set(texts) <= self.vectors.keys():
            raise ValueError(f"no target in {self.name}")


def test_joined_spaces_have_the_mean_of_the_cosines():
    one = Table("one", {"a": [3.0, 0.0], "b": [0.0, 2.0]})
    two = Table("two", {"a": [1.0, 0.0, 0.0], "b": [0.6, 0.8, 0.0]})
    joint = JointTeacher([one, two], weights=[1, 3])
    assert (joint.name, joint.dim, joint.num_parameters) == ("one + two", 5, 14)
    a, b = joint.encode(["a", "b"])
    assert (a @ b).item() == pytest.approx(0.25 * 0 + 0.75 * 0.6)
    assert a.norm().item() == pytest.approx(1)
    assert a.tolist() == pytest.approx([0.5, 0, 0.75**0.5, 0, 0])
    assert [len(block) for block in joint.blocks(["a", "b", "a"])] == [3]
    assert JointTeacher([one, two]).fingerprint != joint.fingerprint


def test_joint_teachers_need_not_all_be_cached_and_have_a_common_precision(teacher, teacher_folder, texts, tmp_path):
    other = EncoderTeacher(teacher_folder, dtype="float32", prompt="a ")
    joint = JointTeacher([TeacherCache(teacher, tmp_path, dtype="float32"), other])
    joint.add(texts[:3])
    assert len(joint.teachers[0]) == 3
    joint.project(PCAProjection.fit(joint.blocks(texts[:3]), 2)).add(texts[:5])
    assert len(joint.teachers[0]) == 5
    assert joint.live.fingerprint["dtype"] == "float32"
    other.dtype, other._fingerprint = torch.bfloat16, None
    assert "dtype" not in joint.live.fingerprint


def test_mean_of_spaces():
    one, two = Table("one", {"a": [3.0, 0.0]}), Table("two", {"a": [0.0, 5.0]})
    assert JointTeacher([one, two], "mean").encode(["a"]).tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match=r"combine is 'mean' for teachers of \[2, 3\] dimensions"):
        JointTeacher([one, Table("three", {"a": [1.0, 2, 3]})], "mean")
    with pytest.raises(ValueError, match="combine is 'add'"):
        JointTeacher([one, two], "add")


@pytest.mark.parametrize(("count", "weights"), [(1, None), (2, [1]), (2, [1, 0])])
def test_joint_teacher_needs_two_and_a_weight_for_each(count, weights):
    with pytest.raises(ValueError, match="expected two teachers or more and a positive weight"):
        JointTeacher([Table("t", {"a": [1.0]})] * count, weights=weights)


def test_a_text_that_one_of_the_teachers_lacks_is_found_before_the_training():
    one, two = Table("one", {"a": [1.0], "b": [1.0]}), Table("two", {"a": [1.0]})
    JointTeacher([one, two]).require(["a"])
    with pytest.raises(ValueError, match=r"JointTeacher: two does not have every text.*\(no target in two\)"):
        JointTeacher([one, two]).require(["a", "b"])


def test_pca_of_the_joint_space_of_two_caches(teacher, teacher_folder, texts, tmp_path):
    lower = EncoderTeacher(teacher_folder, dtype="float32", prompt="a ")
    joint = JointTeacher([TeacherCache(t, tmp_path / str(i), dtype="float32") for i, t in enumerate((teacher, lower))])
    joint.add(texts)
    projection = PCAProjection.fit(joint.blocks(texts), 6)
    whole = torch.cat([t.encode(texts) / 2**0.5 for t in (teacher, lower)], dim=1)
    expected = (whole - whole.mean(0)) @ torch.linalg.svd(whole - whole.mean(0)).Vh[:6].T
    found = joint.project(projection).encode(texts)
    assert torch.allclose((found - found.mean(0)).abs(), expected.abs(), atol=1e-4)


def test_a_teacher_spread_by_a_device_map_gives_the_same_vectors(teacher, texts, tmp_path, backbone_folder):
    plain = EncoderTeacher(backbone_folder, pooling="mean", dtype="float32", device="cpu")
    device_map = {
        "embeddings": "cpu",
        "encoder.layer.0": "cpu",
        "encoder.layer.1": "disk",
        "encoder.layer.2": "disk",
        "pooler": "disk",
    }
    spread = EncoderTeacher(
        backbone_folder, pooling="mean", dtype="float32", device_map=device_map, offload_folder=str(tmp_path)
    )
    held = [name for name, parameter in spread.model.named_parameters() if parameter.is_meta]
    assert any(name.startswith("encoder.layer.2") for name in held)
    assert torch.allclose(spread.encode(texts), plain.encode(texts), atol=1e-6)
    assert spread.fingerprint == plain.fingerprint


@pytest.mark.slow
def test_a_teacher_in_eight_bits_is_close_and_another_teacher(texts, tmp_path):
    folder = make_backbone(tmp_path, hidden_size=64, intermediate_size=128)
    plain = EncoderTeacher(folder, pooling="mean", dtype="float32", device="cpu")
    small = EncoderTeacher(folder, pooling="mean", dtype="float32", device="cpu", int8=True)
    assert small.model.encoder.layer[0].attention.self.query.weight.dtype == torch.int8
    cosine = (small.encode(texts) * plain.encode(texts)).sum(1)
    assert 0.9 < cosine.min() < 0.99999
    assert small.fingerprint["weights"] != plain.fingerprint["weights"]


def test_an_anchored_teacher_says_of_every_column_what_it_says_of_the_first(teacher, tmp_path):
    cache = TeacherCache(teacher, tmp_path / "cache", dtype="float32")
    cache.add(["a cat", "a dog"])
    anchored = AnchoredTeacher(cache)
    rows = [("a cat", "eine Katze", "un chat"), ("a dog", "ein Hund", "un chien")]
    found = anchored.targets(rows)
    assert found.shape == (2, 3, cache.dim)
    for row, vectors in zip(rows, found, strict=True):
        assert torch.equal(vectors, cache.encode([row[0]]).expand(3, -1))
    anchored.require_columns([["a cat", "a dog"], ["nobody", "knows"]])  # the others need no target
    with pytest.raises(ValueError, match="eine Katze"):
        anchored.require_columns([["a cat", "eine Katze"]])
    assert anchored.fingerprint != cache.fingerprint


def test_every_teacher_leads_to_the_one_that_runs(teacher, tmp_path):
    cache = TeacherCache(teacher, tmp_path / "cache")
    cache.add(["a cat", "a dog", "a hen", "a fox"])
    projected = cache.project(PCAProjection.fit(cache, dim=2))
    wrapped = (teacher, cache, projected, AnchoredTeacher(projected), TwoTowerTeacher(cache, cache))
    assert [one.live for one in wrapped] == [teacher] * 5
    joint = JointTeacher([cache, teacher], weights=[1, 3]).live
    assert (joint.teachers, joint.weights) == ([teacher, teacher], [0.25, 0.75])
    vectors = TeacherCache.from_embeddings(["a cat"], teacher.encode(["a cat"]), tmp_path / "given", "an API")
    assert vectors.live is None
    assert JointTeacher([vectors, teacher]).live is None


def test_eight_bits_without_bitsandbytes_name_the_extra(backbone_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf_distill\[int8\]'"):
        EncoderTeacher(backbone_folder, pooling="mean", int8=True)
