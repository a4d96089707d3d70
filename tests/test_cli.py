import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_texts
from typer.testing import CliRunner

from hf_distill import EncoderTeacher, StudentModel, TeacherCache
from hf_distill.cli import app
from hf_distill.evaluation.retrieval import RetrievalData, RetrievalEvaluator
from hf_distill.evaluation.similarity import STS_SETS, FidelityEvaluator


@pytest.fixture
def files(tmp_path):
    texts = make_texts(60)
    (tmp_path / "one.txt").write_text("\n".join(texts[:30]) + "\n")
    rows = [{"a": a, "b": b, "note": "x"} for a, b in zip(texts[20:40], texts[40:], strict=True)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_cache_is_what_the_library_makes(files, teacher_folder):
    command = ["cache", teacher_folder, files / "one.txt", f"{files / 'two.jsonl'}:a,b", "--folder", files / "caches"]
    done = call(*command, "--dtype", "float32", "--batch-size", 7)
    assert done.exit_code == 0, done.output
    assert "60 new texts, 60 in all, 24 dimensions" in done.output
    [folder] = (files / "caches").iterdir()
    live = EncoderTeacher(teacher_folder)
    assert TeacherCache.open(folder).encode(make_texts(60)).numpy() == pytest.approx(
        live.encode(make_texts(60)).numpy(), abs=1e-2
    )
    assert json.loads((folder / "manifest.json").read_text())["batch_size"] == 7
    assert "0 new texts, 60 in all" in call(*command, "--dtype", "float32").output


def test_evaluate_prints_and_writes_the_librarys_scores(files, teacher_folder, student):
    student.save_pretrained(files / "student")
    (files / "sts").mkdir()
    for file, *_ in STS_SETS.values():
        rows = [f"{a}\t{b}\t{i % 6}" for i, (a, b) in enumerate(zip(make_texts(40)[::2], make_texts(40)[1::2], strict=True))]
        (files / "sts" / f"{file}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    options = ["--sts", files / "sts", "--dim", 4, "--dim", 8, "--output", files / "scores.json"]
    done = call("evaluate", files / "student", *options, "--teacher", teacher_folder, "--texts", files / "one.txt")
    assert done.exit_code == 0, done.output
    scores = json.loads((files / "scores.json").read_text())["scores"]
    texts = make_texts(30)
    expected = FidelityEvaluator(texts, EncoderTeacher(teacher_folder).encode(texts), [4, 8])(
        EncoderTeacher(files / "student").encode
    )
    assert expected.items() <= {key: pytest.approx(value, rel=1e-4) for key, value in scores.items()}.items()
    assert {"sts_STS12", "sts_avg", "sts_avg@4", "sts_avg@8"} <= scores.keys()
    assert re.search(rf"sts_avg +│ +{scores['sts_avg']:.2f}", done.output)


def test_compare_puts_encoders_beside_each_other(files, teacher_folder, student, collection):
    student.save_pretrained(files / "student")
    options = ["--retrieval", collection[0], "--split", "train", "--output", files / "out", "--rounds", 2]
    done = call("compare", teacher_folder, files / "student", *options)
    assert done.exit_code == 0, done.output
    found = json.loads((files / "out" / "comparison.json").read_text())
    assert list(found["rows"]) == [Path(teacher_folder).name, "student"]
    data = RetrievalData.load(collection[0], "train")
    scores = RetrievalEvaluator(data)(EncoderTeacher(files / "student", dtype="float32").encode)
    row = found["rows"]["student"]
    assert row["scores"] == pytest.approx(scores, rel=1e-4)
    low, high = row["intervals"]["retrieval_ndcg10"]
    assert low < scores["retrieval_ndcg10"] < high
    assert found["rows"][Path(teacher_folder).name]["speed"]["times_faster"] == 1
    assert row["speed"]["from"] <= row["speed"]["times_faster"] <= row["speed"]["to"]
    assert f"{scores['retrieval_ndcg10']:.2f}" in done.output
    assert f"{low:.2f}–{high:.2f}" in done.output
    assert (files / "out" / "comparison.png").stat().st_size > 1000


SCRIPT = """
import os, pathlib, sys
pathlib.Path("seen.txt").write_text(" ".join([*sys.argv[1:], os.environ.get("ACCELERATE_MIXED_PRECISION", "")]))
pathlib.Path("threads.txt").write_text(os.environ["OMP_NUM_THREADS"])
sys.exit("no" in sys.argv)
"""


def test_train_launches_a_recipe_with_its_flags_and_ends_as_it_does(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "own.py").write_text(SCRIPT)
    (files / "launch.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\n")
    done = call("train", "own.py", "--config", "hpd_mpnet", "--accelerate_config", "launch.yaml", "--seed", "3", "--lora_r", 8)
    assert done.exit_code == 0, done.output
    first, config, *rest = (files / "seen.txt").read_text().split()
    assert (first, rest) == ("--config", ["--seed", "3", "--lora_r", "8", "bf16"])
    assert Path(config).read_text().startswith("#")
    assert Path(config).parts[-3:] == ("recipes", "configs", "hpd_mpnet.yaml")
    for given, threads in ((None, str(os.cpu_count())), ("5", "5")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False) if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert call("train", "own.py").exit_code == 0
        assert (files / "threads.txt").read_text() == threads
    assert call("train", "own.py", "no").exit_code == 1
    done = call("train", "hpb")
    assert done.exit_code == 1
    assert call("train", "inputs").exit_code == 1  # what recipes share
    assert "train: hpb is neither a file nor one of embed_distill, hpd, lealla, multi_sense." in done.output.replace("\n", " ")


def test_evaluate_searches_a_collection(files, teacher_folder, collection):
    options = ["--retrieval", collection[0], "--split", "train", "--output", files / "new" / "scores.json"]
    done = call("evaluate", teacher_folder, *options)
    assert done.exit_code == 0, done.output
    scores = json.loads((files / "new" / "scores.json").read_text())["scores"]
    data = RetrievalData.load(collection[0], "train")
    assert len(data.queries) == 100
    assert scores == pytest.approx(RetrievalEvaluator(data)(EncoderTeacher(teacher_folder).encode), rel=1e-4)


def test_inspect_says_what_a_student_is(files, backbone_folder):
    student = StudentModel.from_backbone(backbone_folder, projection_dim=8, layers=[0, 2])
    student.save_pretrained(files / "student")
    (files / "student" / "distillation.json").write_text(json.dumps({"teacher": "org/big", "loss": {"name": "HPDLoss"}}))
    done = call("inspect", files / "student", "--check", "--output", files / "facts.json")
    assert done.exit_code == 0, done.output
    facts = json.loads((files / "facts.json").read_text())
    assert facts["backbone"].startswith("BertModel, layers [0, 2] of ")
    assert (facts["projection"], facts["teacher"]) == ("16 to 8, identity", "org/big")
    assert facts["through SentenceTransformer"] > 0.99999
    assert "org/big" in done.output
    assert "through" not in call("inspect", files / "student").output


def test_push_publishes_a_folder_with_its_card(files, student, hub):
    student.save_pretrained(files / "student")
    done = call("push", files / "student", "alice/by-line", "--private")
    assert done.exit_code == 0, done.output
    assert hub.store.repos["models", "alice/by-line"].private
    assert 'SentenceTransformer("alice/by-line")' in hub.files("alice/by-line")["README.md"].decode()
    done = call("card", files / "student", "--name", "me/other")
    assert done.exit_code == 0, done.output
    assert 'SentenceTransformer("me/other")' in (files / "student" / "README.md").read_text()
    done = call("push", files / "student", "bob/theirs")
    assert done.exit_code == 1
    (files / "student" / "results.json").write_text('{"student": {"projection_dim": 3}, "rows": {}}')
    done = call("push", files / "student", "alice/by-line")
    assert done.exit_code == 1
    assert "results.json in" in done.output
    assert "is of another student (projection_dim: 3 there, 24 here)" in done.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "nobody/nothing", "--sts", "x"], "neither a folder here nor a repository"),
        (["evaluate", "nobody/nothing"], "expected --sts, --retrieval, or --teacher with --texts"),
        (["inspect", "."], "config.json"),
        (["card", "."], "holds no student"),
        (["push", ".", "a/b/c"], "'a/b/c' is no name of a repository"),
        (["compare", "one", "two", "--output", "out"], "nothing to compare"),
        (["evaluate", "nobody/nothing", "--sts", "x", "--teacher", "y"], "one of these two alone scores nothing"),
        (["evaluate", "nobody/nothing", "--sts", "x", "--output", "a.txt"], "a.txt, expected a name that ends in .json"),
        (["cache", "nobody/nothing", "one.txt:b", "--folder", "c"], "one of ['text']"),
        (["evaluate", "[/nobody]", "--sts", "x"], "[/nobody] is neither a folder here"),
        (["train", "hpd", "--config", "nowhere"], "nowhere is neither a file nor one of embed_distill_msmarco, "),
        (["cache", "nobody/nothing", "nowhere.txt", "--folder", "c"], "nowhere.txt is neither a file"),
    ],
)
def test_wrong_input_ends_with_its_message(words, message, files, monkeypatch):
    monkeypatch.chdir(files)
    done = call(*words)
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


def test_every_command_has_an_example():
    commands = [command.callback.__name__ for command in app.registered_commands]
    assert commands == ["train", "cache", "evaluate", "compare", "inspect", "card", "push", "export", "explain"]
    for name in commands:
        assert f"hf-distill {name} " in call(name, "--help").output


def test_help_costs_no_torch():
    script = "import sys, hf_distill.cli; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
