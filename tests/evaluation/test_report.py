import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from matplotlib import pyplot

from hf_distill.evaluation import report
from hf_distill.evaluation.plots import draw_plots
from hf_distill.evaluation.report import RunReport, command, commit, measure_speed, provenance, write_results
from hf_distill.evaluation.tables import dimension_table, score_table, table


RESULTS = {
    "rows": {
        "teacher": {
            "parameters": 22_713_216,
            "dim": 384,
            "scores": {"fidelity_spearman": 100.0, "sts_STS12": 72.3694},
        },
        "student": {
            "parameters": 17_430_000,
            "dim": 128,
            "scores": {
                "fidelity_spearman": 91.2345,
                "fidelity_neighbours": 61.5,
                "sts_STS12": 70.005001,
                "sts_avg": 69.0,
                "fidelity_spearman@32": 80.126,
                "fidelity_neighbours@32": 40.0,
                "sts_avg@64": 65.0,
                "sts_avg@32": 60.0,
            },
        },
    },
    "log_history": [
        {"loss": 0.5, "loss_mse": 0.5, "step": 5, "epoch": 0.5},
        {"eval_loss": 0.4, "step": 5},
        {"loss": 0.25, "loss_mse": 0.25, "step": 10, "epoch": 1.0},
        {"train_loss": 0.3, "step": 10},
    ],
}


# Tables


def test_a_table_is_aligned_markdown_with_a_dash_for_what_is_missing():
    rows = {"teacher": {"dim": 384, "score": 100.0}, "student": {"dim": 8, "score": 9.126, "more": 1.0}}
    assert table(rows, "model").splitlines() == [
        "| model   | dim |  score | more |",
        "|---------|----:|-------:|-----:|",
        "| teacher | 384 | 100.00 |    – |",
        "| student |   8 |   9.13 | 1.00 |",
    ]


def test_the_score_table_has_short_headings_and_full_width_only():
    assert score_table(RESULTS).splitlines() == [
        "|         | params | dim | fidelity ρ | STS12 | STS avg | same 10-NN |",
        "|---------|-------:|----:|-----------:|------:|--------:|-----------:|",
        "| teacher |  22.7M | 384 |     100.00 | 72.37 |       – |          – |",
        "| student |  17.4M | 128 |      91.23 | 70.01 |   69.00 |      61.50 |",
    ]
    whole = {"rows": {"student": {"parameters": 1e6, "dim": 8, "scores": {"sts_STS12": 1.0, "sts_avg": 2.0}}}}
    assert (
        score_table(whole).splitlines()[0] == "|         | params | dim | STS avg | STS12 |"
    )  # what is wide is cut on the right


def test_the_dimension_table_has_a_column_for_each_that_was_measured():
    assert dimension_table(RESULTS).splitlines() == [
        "|         | fidelity ρ @32 | STS avg @64 | STS avg @32 |",
        "|---------|---------------:|------------:|------------:|",
        "| student |          80.13 |       65.00 |       60.00 |",
    ]


def test_without_dimensions_there_is_no_dimension_table():
    assert dimension_table({"rows": {"teacher": RESULTS["rows"]["teacher"]}}) == ""


# Provenance


def test_a_plain_command_is_kept_word_for_word():
    argv = [
        "recipes/hpd.py",
        "--config",
        "recipes/configs/hpd.yaml",
        "--texts_name",
        "my own texts",
        "--layers",
        "0",
        "2",
    ]
    assert command(argv) == "recipes/hpd.py --config recipes/configs/hpd.yaml --texts_name 'my own texts' --layers 0 2"
    assert shlex.split(command(argv)) == argv


@pytest.mark.parametrize(
    "argv",
    [["--hub_token", "hf_sEcReT"], ["--hub_token=hf_sEcReT"], ["--hub-token", "hf_sEcReT"], ["--token=hf_sEcReT=="]],
)
def test_tokens_are_left_out_of_the_command(argv):
    found = command(["hpd.py", *argv, "--seed", "3"])
    assert "sEcReT" not in found
    assert found.startswith("hpd.py --")
    assert found.endswith("… --seed 3")


def test_names_of_folders_of_this_machine_are_left_out_of_the_command():
    found = command(["/home/me/run/hpd.py", "--sts", "/data/me/sts/", "--texts=/data/me/my.tsv.gz", "--cache_dir", "a/b"])
    assert found == "…/hpd.py --sts …/sts/ --texts=…/my.tsv.gz --cache_dir a/b"
    assert command(["hpd.py", "/x"]) == "hpd.py …/x"


def test_a_name_of_a_repository_is_no_folder():
    assert command(["hpd.py", "--teacher", "org/model", "--lr=1/3"]) == "hpd.py --teacher org/model --lr=1/3"


def test_words_stay_apart_next_to_what_was_left_out():
    found = command(["/home/me/hpd.py", "--texts_name", "my own texts", "--language", "it's"])
    assert shlex.split(found) == ["…/hpd.py", "--texts_name", "my own texts", "--language", "it's"]


def test_provenance_says_what_was_run_on_what(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/hpd.py", "--hub_token", "hf_sEcReT"])
    found = provenance(7)
    assert found["command"] == "…/hpd.py --hub_token …"
    assert found["seed"] == 7
    assert found["versions"]["python"] == platform.python_version()
    for package in ("torch", "transformers", "datasets", "accelerate", "safetensors"):
        assert found["versions"][package] == importlib.metadata.version(package), package
    assert re.fullmatch(r"\d+ cores of .+", found["hardware"]) or torch.cuda.is_available()
    assert found["commit"] == commit()
    json.dumps(found)


def test_packages_that_are_not_installed_have_no_version(monkeypatch):
    monkeypatch.setattr(report, "_PACKAGES", ("torch", "there-is-no-such-package"))
    assert list(provenance(0)["versions"]) == ["python", "torch"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit that holds hf_distill/evaluation/report.py; call it with git's arguments."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    folder = tmp_path / "checkout"
    path = folder / "hf_distill" / "evaluation" / "report.py"
    path.parent.mkdir(parents=True)
    path.write_text("# one\n")
    monkeypatch.setattr(report, "__file__", str(path))

    def git(*args):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(folder), *who, *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git.folder, git.path = folder, path
    return git


def test_the_commit_is_that_of_the_checkout_and_changes_are_told(checkout):
    head = checkout("rev-parse", "HEAD")[:12]
    assert commit() == head
    (checkout.folder / "new.txt").write_text("not in the repository\n")
    assert commit() == head
    checkout.path.write_text("# two\n")
    assert commit() == head + "+changes"


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(report, "__file__", str(tmp_path / "hf_distill" / "evaluation" / "report.py"))
    assert commit() is None


def test_the_commit_of_another_project_is_not_taken_for_ours(checkout, monkeypatch):
    installed = checkout.folder / ".venv" / "lib" / "site-packages" / "hf_distill" / "evaluation" / "report.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(report, "__file__", str(installed))
    assert commit() is None


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None


# results.json


def test_results_are_rounded_to_six_digits_at_every_depth(tmp_path):
    results = {
        "a": 1 / 3,
        "b": {"c": [12345.678901, (1e-7 / 3,)]},
        5: 123456789,
        "name": "ρ",
        "on": True,
        "none": None,
    }
    path = write_results(tmp_path, results)
    assert path == tmp_path / "results.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": 0.333333,
        "b": {"c": [12345.7, [3.33333e-8]]},
        "5": 123456789,
        "name": "ρ",
        "on": True,
        "none": None,
    }
    assert "ρ" in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").endswith("}\n")


# Plots


def test_plots_are_drawn_as_images(tmp_path):
    assert draw_plots(tmp_path, RESULTS) == ["training.png", "dimensions.png"]
    assert pyplot.get_fignums() == []  # no figure stays open
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dimensions.png", "training.png"]
    for name in ("training.png", "dimensions.png"):
        image = matplotlib.image.imread(tmp_path / name)
        assert min(image.shape[:2]) > 200
        assert image.std() > 0.01  # something is drawn on it


def test_what_was_not_measured_is_not_drawn(tmp_path):
    rows = {"teacher": RESULTS["rows"]["teacher"]}
    assert draw_plots(tmp_path, {"rows": rows, "log_history": RESULTS["log_history"][:2]}) == []
    assert list(tmp_path.iterdir()) == []
    assert draw_plots(tmp_path, {"rows": rows, "log_history": RESULTS["log_history"]}) == ["training.png"]


def test_lines_have_a_point_for_each_dimension_in_order(tmp_path, monkeypatch):
    lines = []

    def read(figure, path, dpi):
        for axes in figure.axes:
            lines.extend((line.get_label(), *map(list, line.get_data())) for line in axes.lines)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", read)
    draw_plots(tmp_path, RESULTS)
    assert [line for line in lines if not line[0].startswith("teacher")] == [
        ("mse", [5, 10], [0.5, 0.25]),
        ("student", [32, 64], [60, 65]),
        ("student", [32], [80.126]),
    ]
    # The teacher has no dimensions of its own: a level line, where it has the score at all.
    assert [(name, y) for name, _, y in lines if name.startswith("teacher")] == [("teacher (384-d)", [100, 100])]


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Plots need matplotlib.*hf_distill\[eval\]"):
        draw_plots(tmp_path, RESULTS)


# A run


def test_every_evaluator_scores_every_row_and_prefixes_can_be_left_out():
    run = RunReport("hpd", "2203.07687")
    run.evaluators = [lambda encode: {"a": encode(["x"]), "a@32": 1.0}, lambda encode: {"b": 2.0}]
    run.add("teacher", lambda texts: 10.0 * len(texts), 5, 384, prefixes=False)
    run.add("student", lambda texts: 7.0, 3, 128)
    assert run.rows == {
        "teacher": {"parameters": 5, "dim": 384, "scores": {"a": 10.0, "b": 2.0}},
        "student": {"parameters": 3, "dim": 128, "scores": {"a": 7.0, "a@32": 1.0, "b": 2.0}},
    }


def test_seconds_of_one_name_add_up(monkeypatch):
    clock = iter([10.0, 13.0, 20.0, 24.5, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    run = RunReport("hpd", "")
    for what in ("evaluation", "evaluation", "training"):
        with run.timed(what):
            pass
    assert run.timings_s == {"evaluation": 7.5, "training": 1.0}


def test_a_finished_run_lies_whole_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "check_layout", lambda folder: {"AutoModel": f"checked {folder}"})
    monkeypatch.setattr(report, "measure_speed", lambda trainer, folder: {"student_mb": 1.5})
    (tmp_path / "emissions.csv").write_text("project,emissions\none,0.25\none,0.5\n")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"of other weights")
    cards = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            output_dir=str(tmp_path),
            train_batch_size=8,
            gradient_accumulation_steps=2,
            world_size=3,
            learning_rate=1e-3 / 3,
            lr_scheduler_type="SchedulerType.LINEAR",
            warmup_steps=0.05,
            bf16=False,
            seed=11,
        ),
        is_world_process_zero=lambda: True,
        run_facts={"teacher": "the teacher", "student": {"pooling": "mean"}},
        resumed_at=0,
        state=SimpleNamespace(global_step=10, epoch=0.98765, log_history=RESULTS["log_history"]),
        create_model_card=lambda: cards.append(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))),
    )
    recipe = SimpleNamespace(dropout=0.0, license="mit", language=None)
    run = RunReport("hpd", "2203.07687")
    run.rows, run.timings_s = RESULTS["rows"], {"training": 90.0}
    closing = run.finish(trainer, recipe, {"name": "texts"}, projection={"dim": 128})
    (results,) = cards  # the card is made when results.json is there
    assert results["hyperparameters"] == {
        "steps": 10,
        "epochs": 0.99,
        "batch": 48,
        "learning rate": 0.000333333,
        "schedule": "linear",
        "warmup": 0.05,
        "bf16": False,
        "dropout": 0.0,
    }
    assert (results["recipe"], results["paper"], results["teacher"]) == ("hpd", "2203.07687", "the teacher")
    assert (results["speed"], results["co2_eq_emissions"]["emissions"]) == ({"student_mb": 1.5}, 750.0)
    assert not (tmp_path / "onnx").exists()
    assert (results["data"], results["projection"]) == ({"name": "texts"}, {"dim": 128})
    assert (results["license"], results["language"], results["provenance"]["seed"]) == ("mit", None, 11)
    assert results["layout"] == {"AutoModel": f"checked {tmp_path}"}
    assert results["log_history"] == RESULTS["log_history"]
    assert (tmp_path / "training.png").exists()
    assert score_table(RESULTS) in closing
    assert dimension_table(RESULTS) in closing
    assert "training 1.5 min" in closing
    assert f'SentenceTransformer("{tmp_path}")' in closing


def test_speed_is_that_of_the_live_teacher_on_texts_of_the_training(student, tmp_path):
    student.save_pretrained(tmp_path)
    weights = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    (tmp_path / "teacher_projection.safetensors").write_bytes(b"x" * 999)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"x" * 999)
    seen = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(device="cpu"),
        columns=["text", "other"],
        train_dataset=[{"text": f"text {i}", "other": "no"} for i in range(100)],
        teacher=SimpleNamespace(live=SimpleNamespace(encode=seen.append, fingerprint={"dtype": "bfloat16"})),
    )
    found = measure_speed(trainer, tmp_path, count=5)
    assert seen == [[f"text {i}" for i in range(5)]] * 4
    assert (found["texts"], list(found["rows"]), found["student_mb"]) == (5, ["teacher", "student"], weights / 1e6)
    assert 0 < found["rows"]["student"]["times_faster"] < 1  # than a teacher that does nothing
    assert [row["precision"] for row in found["rows"].values()] == ["bfloat16", "bfloat16"]
    trainer.teacher.live = None
    alone = measure_speed(trainer, tmp_path)["rows"]
    assert {name: row["precision"] for name, row in alone.items()} == {"student": "float32"}


def test_only_the_main_process_reports(tmp_path):
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), is_world_process_zero=lambda: False)
    assert RunReport("hpd", "").finish(trainer, None, {}) == ""
    assert list(tmp_path.iterdir()) == []
