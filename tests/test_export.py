import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import make_backbone, make_texts
from test_cli import call
from transformers.modeling_outputs import BaseModelOutput

import hf_distill
from hf_distill import StudentModel, export
from hf_distill.card import write_card
from hf_distill.evaluation.similarity import STS_SETS
from hf_distill.export import export_onnx, onnx_encode
from hf_distill.layout import check_layout
from hf_distill.multi_sense import MultiSenseStudent


LONG = "the old house " * 40


@pytest.fixture(scope="module")
def exported(tmp_path_factory, backbone_folder):
    """A student's folder with both files."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    StudentModel.from_backbone(backbone_folder, projection_dim=24, dropout=0.0).save_pretrained(folder)
    section = export_onnx(folder, int8=True, texts=make_texts(40))
    return folder, section


@pytest.fixture
def copied(exported, tmp_path):
    return Path(shutil.copytree(exported[0], tmp_path / "copied"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {"pooling": "cls", "projection_dim": 8, "activation": "tanh", "normalize": False}),
        pytest.param("mpnet", {"pooling": "last"}, marks=pytest.mark.slow),
        pytest.param("roberta", {}, marks=pytest.mark.slow),
        pytest.param("xlm-roberta", {"layers": [2, 0], "projection_dim": 8, "max_length": 12}, marks=pytest.mark.slow),
        pytest.param("distilbert", {"projection_dim": 8, "bias": False}, marks=pytest.mark.slow),
        ("modernbert", {"projection_dim": 8}),
    ],
)
def test_the_graph_is_the_student_at_any_size(kind, settings, tmp_path):
    student = StudentModel.from_backbone(make_backbone(tmp_path / "backbone", kind), **settings)
    student.save_pretrained(tmp_path / "student")
    [(file, row)] = export_onnx(tmp_path / "student")["files"].items()
    assert row["cosine_min"] > 0.99999
    for count, size in ((1, 1), (7, 3), (20, 20)):  # torch traced 2 texts of 8 tokens
        texts = [*make_texts(count - 1, longest=20), LONG]
        vectors = onnx_encode(tmp_path / "student" / file, student, size)(texts)
        torch.testing.assert_close(vectors, student.encode(texts, convert_to_tensor=True), atol=1e-5, rtol=1e-4)


def test_what_the_tokenizer_gives_is_what_the_graph_takes(backbone_folder, tmp_path, monkeypatch):
    student = StudentModel.from_backbone(backbone_folder, layers=[0], projection_dim=8)
    student.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own
    student.bfloat16().save_pretrained(tmp_path)
    export_onnx(tmp_path)  # in 32 bits, as it runs there
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # in 16 bits, it differs by more than is let pass
    assert check_layout(tmp_path)["onnxruntime"] > 0.99999
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == {"input_ids", "token_type_ids", "attention_mask"}
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("last_hidden_state", ["batch_size", "sequence_length", 16]),
        ("sentence_embedding", ["batch_size", 8]),
    ]


def test_a_process_without_this_package_and_torch_gives_the_same_vectors(exported):
    folder, _ = exported
    texts = ["a cat sat", LONG, "the quick brown fox jumps"]
    script = f"""
import sys
for name in ("torch", "hf_distill"):
    sys.modules[name] = None
import json, onnxruntime
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file({str(folder / "tokenizer.json")!r})
tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
tokenizer.enable_truncation({StudentModel.from_pretrained(folder).settings["max_length"]})
rows = tokenizer.encode_batch({texts!r})
inputs = {{"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}}
session = onnxruntime.InferenceSession({str(folder / "onnx" / "model.onnx")!r}, providers=["CPUExecutionProvider"])
print(json.dumps(session.run(["sentence_embedding"], inputs)[0].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(done.stdout), StudentModel.from_pretrained(folder).encode(texts), atol=1e-5)


def test_the_readmes_lines_give_the_same_vectors(exported, monkeypatch):
    folder, _ = exported
    readme = (Path(hf_distill.__file__).parents[1] / "README.md").read_text()
    [block] = [part for part in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "InferenceSession" in part]
    assert block.count('["A text."]') == block.count("padding=True, truncation=True") == 1
    texts = ["a cat sat", LONG]
    found = {}
    exec(block.replace("outputs/hpd", str(folder)).replace('["A text."]', repr(texts)), found)  # noqa: S102
    np.testing.assert_allclose(found["embeddings"], StudentModel.from_pretrained(folder).encode(texts), atol=1e-5)


def test_sentence_transformers_finds_the_file_and_pools_it(exported, monkeypatch):
    """Optimum is not installed here: what stands in for it reads the output of the name that its class reads."""
    folder, _ = exported

    class ORTModelForFeatureExtraction(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, name, config, export, subfolder, file_name, **_):
            assert not export
            self = cls()
            self.config = config
            self.session = onnxruntime.InferenceSession(Path(name, subfolder, file_name), providers=["CPUExecutionProvider"])
            return self

        def forward(self, input_ids, attention_mask, **_):
            inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
            [states] = self.session.run(["last_hidden_state"], inputs)
            return BaseModelOutput(last_hidden_state=torch.from_numpy(states))

        def _save_pretrained(self, folder):
            raise NotImplementedError

    stand_in = types.ModuleType("optimum.onnxruntime")
    stand_in.ONNX_WEIGHTS_NAME = "model.onnx"
    stand_in.ORTModelForFeatureExtraction = ORTModelForFeatureExtraction
    for task in ("CausalLM", "MaskedLM", "SequenceClassification"):
        setattr(stand_in, f"ORTModelFor{task}", None)
    monkeypatch.setitem(sys.modules, "optimum", types.ModuleType("optimum"))
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", stand_in)
    from sentence_transformers import SentenceTransformer

    texts = ["a cat sat", LONG, "the quick brown fox jumps"]
    model = SentenceTransformer(str(folder), backend="onnx", device="cpu")
    np.testing.assert_allclose(model.encode(texts), StudentModel.from_pretrained(folder).encode(texts), atol=1e-5)


def test_eight_bits_are_smaller_and_close_and_their_cost_is_written(exported, tmp_path):
    folder, section = exported
    exact, small = section["files"]["onnx/model.onnx"], section["files"]["onnx/model_qint8.onnx"]
    assert 0.9 < small["cosine_min"] < small["cosine_mean"] < 0.99999 < exact["cosine_min"]
    student = StudentModel.from_pretrained(folder)
    texts = make_texts(40)
    ours, theirs = (encode(texts) for encode in (student.encode, onnx_encode(folder / "onnx" / "model_qint8.onnx", student)))
    cosines = torch.cosine_similarity(torch.from_numpy(ours), theirs)
    assert (small["cosine_min"], small["cosine_mean"]) == pytest.approx((cosines.min().item(), cosines.mean().item()), abs=1e-5)
    assert exact["scores"]["fidelity_spearman"] == pytest.approx(100)
    assert 90 < small["scores"]["fidelity_spearman"] < 99.99
    written = json.loads((folder / "results.json").read_text())["onnx"]
    assert written["files"]["onnx/model_qint8.onnx"]["cosine_min"] == pytest.approx(small["cosine_min"], abs=1e-5)
    assert written["texts"] == 40
    weights = onnx.load(folder / "onnx" / "model_qint8.onnx").graph.initializer
    kinds = {weight.data_type for weight in weights if len(weight.dims) == 2 and min(weight.dims) > 8}
    assert kinds == {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}  # matrices, embeddings


def test_eight_bits_take_a_quarter_where_weights_are_what_is_large(tmp_path):
    wide = make_backbone(tmp_path / "backbone", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    StudentModel.from_backbone(wide).save_pretrained(tmp_path)
    files = export_onnx(tmp_path, int8=True)["files"]
    sizes = {file: (tmp_path / file).stat().st_size / 1e6 for file in files}
    assert {file: row["mb"] for file, row in files.items()} == pytest.approx(sizes)
    assert sizes["onnx/model_qint8.onnx"] < 0.3 * sizes["onnx/model.onnx"]


def test_an_export_without_eight_bits_leaves_none_of_before(copied):
    assert "`onnx/model_qint8.onnx`" in write_card(copied, "me/student").read_text()
    (copied / "results.json").write_text('{"timings_s": {"training": 1}}')
    assert "onnx" not in write_card(copied, "me/student").read_text()  # a graph that nothing was measured of
    export_onnx(copied)
    assert [path.name for path in (copied / "onnx").iterdir()] == ["model.onnx"]
    results = json.loads((copied / "results.json").read_text())
    assert results["timings_s"] == {"training": 1}
    assert list(results["onnx"]["files"]) == ["onnx/model.onnx"]
    card = write_card(copied, "me/student").read_text()
    assert 'hf_hub_download("me/student", "onnx/model.onnx")' in card
    assert "cosines of a few texts." in card
    assert "qint8" not in card


def test_nothing_of_this_machine_is_in_the_files(exported):
    folder, _ = exported
    for file in (folder / "onnx").iterdir():
        data = file.read_bytes()
        for name in (b"site-packages", b"student.py", os.fsencode(Path(hf_distill.__file__).parent), os.fsencode(folder)):
            assert name not in data


def test_a_graph_of_other_weights_is_not_kept(copied, monkeypatch):
    before = (copied / "onnx" / "model.onnx").read_bytes()
    write = export._write_graph

    def write_wrongly(exact, path):
        with torch.no_grad():
            exact.projection.bias += 0.1
        write(exact, path)
        with torch.no_grad():
            exact.projection.bias -= 0.1

    monkeypatch.setattr(export, "_write_graph", write_wrongly)
    with pytest.raises(ValueError, match=r"gives other vectors than it does \(smallest cosine 0\.\d+ in batches of 1\)"):
        export_onnx(copied, int8=True)
    assert (copied / "onnx" / "model.onnx").read_bytes() == before
    assert not list(copied.glob(".onnx-*"))


def test_a_graph_that_ignores_padding_is_not_kept(backbone_folder, tmp_path, monkeypatch):
    StudentModel.from_backbone(backbone_folder, layers=[0]).save_pretrained(tmp_path)

    class Unmasked(export._Graph):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, torch.ones_like(attention_mask) * attention_mask[:, :1])

    monkeypatch.setattr(export, "_Graph", Unmasked)
    with pytest.raises(ValueError, match="in batches of 2"):
        export_onnx(tmp_path)
    assert not (tmp_path / "onnx").exists()


def test_an_old_graph_beside_new_weights_is_found(copied, monkeypatch):
    assert check_layout(copied)["onnxruntime"] > 0.99999
    student = StudentModel.from_pretrained(copied)
    with torch.no_grad():
        student.projection.bias += 0.1
    student.save_pretrained(copied)
    with pytest.raises(ValueError, match="gives other vectors through onnxruntime"):
        check_layout(copied)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert check_layout(copied)["onnxruntime"] == "skipped: onnxruntime is not installed"


def test_graphs_are_published_and_old_ones_deleted(exported, student, hub):
    folder, section = exported
    StudentModel.from_pretrained(folder).push_to_hub("alice/graphs")
    sent = hub.files("alice/graphs")
    assert {name for name in sent if name.startswith("onnx/")} == set(section["files"])
    for file, row in section["files"].items():
        cells = f"{row['mb']:.1f}", f"{row['cosine_min']:.4f}", f"{row['cosine_mean']:.4f}"
        assert re.search(rf"`{file}` +" + "".join(rf"\| +{cell} +" for cell in cells), sent["README.md"].decode())
    student.push_to_hub("alice/graphs")  # made anew: it has no graph
    sent = hub.files("alice/graphs")
    assert not [name for name in sent if name.startswith("onnx/")]
    assert "InferenceSession" not in sent["README.md"].decode()


def test_command_scores_both_files(backbone_folder, tmp_path):
    StudentModel.from_backbone(backbone_folder, layers=[0]).save_pretrained(tmp_path / "student")
    (tmp_path / "sts").mkdir()
    for file, *_ in STS_SETS.values():
        rows = [f"{a}\t{b}\t{i % 6}" for i, (a, b) in enumerate(zip(make_texts(40)[::2], make_texts(40)[1::2], strict=True))]
        (tmp_path / "sts" / f"{file}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(30)) + "\n")
    options = ["--int8", "--sts", tmp_path / "sts", "--texts", tmp_path / "texts.txt", "--max-texts", 20]
    done = call("export", tmp_path / "student", *options)
    assert done.exit_code == 0, done.output
    section = json.loads((tmp_path / "student" / "results.json").read_text())["onnx"]
    assert section["texts"] == 20
    assert list(section["files"]) == ["onnx/model.onnx", "onnx/model_qint8.onnx"]
    for file, row in section["files"].items():
        assert file in done.output.replace("\n", "")
        for key in ("sts_avg", "fidelity_neighbours"):
            assert re.search(rf"{key} +│ +{row['scores'][key]:.1f}"[:-1], done.output)
    done = call("export", tmp_path / "student", "--format", "openvino")
    assert done.exit_code == 1
    assert "format is 'openvino', expected 'onnx'" in done.output


def test_refusals(student, backbone_folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nobody/nothing has no config.json, expected a student's folder"):
        export_onnx("nobody/nothing")
    with pytest.raises(ValueError, match="has no `hf_distill` settings"):
        export_onnx(backbone_folder)
    speaker = MultiSenseStudent.from_backbone(backbone_folder)
    speaker.settings["senses"] = {"name": "../senses"}
    speaker.save_pretrained(tmp_path / "senses")
    with pytest.raises(ValueError, match="is a MultiSenseStudent, expected a StudentModel"):
        export_onnx(tmp_path / "senses")
    student.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        forward = StudentModel.forward
        patch.setattr(
            StudentModel, "forward", lambda self, ids, *a, **k: forward(self, ids if ids.sum() > 3 else -ids, *a, **k)
        )
        with pytest.raises(ValueError, match="can't write BertModel as a graph"):
            export_onnx(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs \['onnxscript'\].*pip install 'hf_distill\[onnx\]'"):
        export_onnx(tmp_path)
