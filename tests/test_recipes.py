import importlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import make_texts
from huggingface_hub import ModelCard
from transformers import AutoModel

from hf_distill import DistillationTrainingArguments, PCAProjection, StudentModel, parse_arguments
from hf_distill.evaluation.similarity import STS_SETS
from hf_distill.layout import check_layout


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="session")
def inputs(backbone_folder, teacher_folder, tmp_path_factory):
    """Return the flags of a tiny run, text and STS folder included."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = make_texts(300, seed=3)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "sts").mkdir()
    pairs = make_texts(40, seed=4)  # none of them is in the training text, as in the embedded default
    assert not set(pairs) & set(texts)
    for file, *_ in STS_SETS.values():
        rows = [f"{a}\t{b}\t{i % 6}" for i, (a, b) in enumerate(zip(pairs[::2], pairs[1::2], strict=True))]
        (folder / "sts" / f"{file}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    flags = f"--teacher {teacher_folder} --backbone {backbone_folder} --texts {folder / 'texts.jsonl'} --layers 0 2 --dim 8"
    flags += " --dims 4 8 --held_out 40 --per_device_train_batch_size 16 --num_train_epochs 4"
    flags += " --learning_rate 1e-2 --logging_steps 5 --attention eager --start random"
    return [*flags.split(), "--disable_tqdm", "true", "--use_cpu", "true", "--bf16", "false"], str(folder / "sts")


def run(flags, output, monkeypatch, cache="cache"):
    monkeypatch.syspath_prepend(str(RECIPES))
    places = ["--output_dir", str(output), "--cache_dir", str(output.parent / cache)]
    importlib.import_module("hpd").main([*flags, *places])
    return json.loads((output / "results.json").read_text())


def test_dev_pairs_that_stand_in_the_test_sets_are_not_scored(inputs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    evaluators = importlib.import_module("inputs").sts_evaluators
    source = Path(inputs[1], "stsb-test.tsv").read_text()
    (tmp_path / "stsb-dev.tsv").write_text(source + "a new one\tanother\t1\none more\tand more\t2\nx\ty\t3\n")
    (whole,) = evaluators(SimpleNamespace(sts=None, sts_dev=str(tmp_path), dims=[]))  # no test set at hand
    assert len(whole.sets["STS-B dev"][0]) == 23
    test, dev = evaluators(SimpleNamespace(sts=inputs[1], sts_dev=str(tmp_path), dims=[]))
    assert (len(test.sets), len(dev.sets["STS-B dev"][0])) == (7, 3)
    (tmp_path / "sts16.tsv").write_text(source)  # beside it
    (dev,) = evaluators(SimpleNamespace(sts=None, sts_dev=str(tmp_path), dims=[]))
    assert len(dev.sets["STS-B dev"][0]) == 3


def test_every_recipe_is_in_the_table_has_a_target_and_a_hundred_lines():
    recipes = sorted(path.stem for path in RECIPES.glob("*.py") if "def main(" in path.read_text())
    assert recipes == ["embed_distill", "hpd", "lealla", "multi_sense"]
    for name in recipes:
        assert (RECIPES / f"{name}.py").read_text().count("\n") <= 100
        assert f"recipes/{name}.py" in (ROOT / "Makefile").read_text()
        assert f"{name}.py" in (RECIPES / "README.md").read_text()


def test_hpd_from_text_to_card(inputs, tmp_path, monkeypatch, capsys):
    flags, sts = inputs
    results = run([*flags, "--sts", sts], tmp_path / "out", monkeypatch)
    said = capsys.readouterr().out
    assert list(results["rows"]) == ["teacher", "teacher, PCA 8", "untrained student", "student"]
    scores = {name: row["scores"] for name, row in results["rows"].items()}
    assert scores["teacher"]["fidelity_spearman"] == pytest.approx(100)
    assert scores["student"]["fidelity_spearman"] > scores["untrained student"]["fidelity_spearman"]
    assert {"sts_STS12", "sts_avg", "sts_avg@4", "fidelity_spearman@4"} <= scores["student"].keys()
    assert not any(key.partition("@")[2].isdigit() for key in scores["teacher"])  # no prefix of its own means anything
    assert results["data"] | {"sha256": 0} == {
        "name": "texts.jsonl",
        "rows": 260,
        "columns": ["text"],
        "held_out": 40,
        "leaked": 0,
        "sha256": 0,
    }
    for score in (scores["student"]["sts_avg"], scores["teacher, PCA 8"]["fidelity_neighbours"]):
        assert f"{score:.2f}" in said
    assert 'SentenceTransformer("' in said
    speed = results["speed"]["rows"]
    assert (list(speed), speed["teacher"]["times_faster"]) == (["teacher", "student"], 1)
    assert {row["precision"] for row in speed.values()} == {results["teacher_fingerprint"]["dtype"]}
    weights = [tmp_path / "out" / name for name in ("model.safetensors", "2_Dense/model.safetensors")]
    assert results["speed"]["student_mb"] == pytest.approx(sum(file.stat().st_size for file in weights) / 1e6, rel=1e-4)
    low, high = results["rows"]["student"]["intervals"]["sts_avg"]
    assert low < scores["student"]["sts_avg"] < high
    assert f"({low:.2f}–{high:.2f})" in said
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"dimensions.png", "training.png"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert f"{scores['student']['sts_avg']:.2f}" in card.text
    check_layout(tmp_path / "out")
    assert PCAProjection.from_pretrained(tmp_path / "out").dim == 8
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_orthogonal_start_is_what_differing_widths_get(inputs, tmp_path, monkeypatch):
    flags = [*inputs[0], "--max_steps", "1", "--logging_steps", "1"]
    random = run(flags, tmp_path / "random", monkeypatch)
    flags[flags.index("--start") + 1] = "auto"
    fitted = run(flags, tmp_path / "fitted", monkeypatch)
    losses = [run["log_history"][0]["loss_mse"] for run in (fitted, random)]
    assert losses[0] < 0.8 * losses[1]


def test_similarity_beside_the_papers_loss_and_token_embeddings_left_alone(inputs, tmp_path, monkeypatch, backbone_folder):
    flags = [*inputs[0], "--similarity_weight", "6", "--freeze_embeddings", "true", "--max_steps", "3", "--logging_steps", "3"]
    log = run(flags, tmp_path / "out", monkeypatch)["log_history"][0]
    assert log["loss"] == pytest.approx(log["loss_mse"] + log["loss_similarity"], rel=1e-3)
    assert log["loss_similarity"] > 0
    trained = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    before = AutoModel.from_pretrained(backbone_folder).state_dict()
    same = {key for key in trained if torch.equal(trained[key], before[key])}
    assert "embeddings.word_embeddings.weight" in same
    assert "encoder.layer.0.output.dense.weight" not in same
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Loss: HPDLoss + SimilarityLoss (weights similarity 6.0, else 1)" in card
    assert "- SimilarityLoss\n" in card


def test_student_from_scratch(inputs, tmp_path, monkeypatch):
    flags = [flag for flag in inputs[0] if flag not in ("--layers", "0", "2")]
    results = run([*flags, "--from_scratch", "8", "3", "2", "16", "--max_steps", "1"], tmp_path / "out", monkeypatch)
    assert results["student"]["layers"] == [0, 1, 2]
    assert "Student: 3 layers, from random weights, mean pooling" in (tmp_path / "out" / "README.md").read_text()


def test_two_teachers_in_one_space(inputs, tmp_path, monkeypatch, backbone_folder):
    flags, _ = inputs
    StudentModel.from_backbone(backbone_folder, projection_dim=6).save_pretrained(tmp_path / "second")
    second = ["--teacher", flags[flags.index("--teacher") + 1], str(tmp_path / "second")]
    results = run([*flags, *second, "--max_steps", "1"], tmp_path / "out", monkeypatch)
    assert results["teacher"].endswith(" + second")
    assert results["rows"]["teacher"]["dim"] == 24 + 6
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_lora_flags_train_adapters_and_leave_a_plain_student(inputs, tmp_path, monkeypatch):
    flags, _ = inputs
    results = run(
        [*flags, "--lora_r", "2", "--lora_targets", "query", "value", "--save_steps", "20"], tmp_path / "out", monkeypatch
    )
    assert results["adapter"]["r"] == 2
    assert set(results["adapter"]["target_modules"]) == {"query", "value"}
    rows = results["rows"]
    assert rows["student"]["parameters"] == rows["untrained student"]["parameters"]
    assert rows["student"]["scores"]["fidelity_spearman"] > rows["untrained student"]["scores"]["fidelity_spearman"]
    assert not list((tmp_path / "out").glob("adapter*"))
    assert list((tmp_path / "out").glob("checkpoint-*/adapter_model.safetensors"))


def test_sts_adds_rows_and_leaves_the_training_as_it_is(inputs, tmp_path, monkeypatch):
    flags, sts = inputs
    plain = run([*flags, "--baselines", "false"], tmp_path / "plain", monkeypatch, "cache-a")
    assert list(plain["rows"]) == ["student"]
    scored = run([*flags, "--sts", sts], tmp_path / "scored", monkeypatch, "cache-b")
    assert plain["data"] == scored["data"]
    assert [line["loss"] for line in plain["log_history"] if "loss" in line] == [
        line["loss"] for line in scored["log_history"] if "loss" in line
    ]
    one, two = (StudentModel.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "scored"))
    assert all((one[key] == two[key]).all() for key in one)


def test_texts_of_several_places_are_taken_once(inputs, tmp_path, monkeypatch):
    flags, _ = inputs
    first = Path(flags[flags.index("--texts") + 1])
    rows = [json.loads(line)["text"] for line in first.read_text().splitlines()]
    more = make_texts(30, seed=5)
    pairs = [{"a": a, "b": b, "note": "red", "label": 1} for a, b in zip([*rows[:10], *more[:10]], more[10:], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    mine = ["--texts", str(first), f"{tmp_path / 'pairs.jsonl'}:a,b", "--max_steps", "1"]
    with pytest.raises(ValueError, match=r"--text_columns is \['a'\], beside 2 --texts, expected the columns with each"):
        run([*flags, *mine, "--text_columns", "a"], tmp_path / "other", monkeypatch)
    results = run([*flags, *mine], tmp_path / "out", monkeypatch)
    assert results["data"]["name"] == "texts.jsonl + pairs.jsonl"
    assert results["data"]["rows"] + results["data"]["held_out"] == len({*rows, *more}) == 330


def test_same_command_again_goes_on_and_another_is_refused(inputs, tmp_path, monkeypatch):
    flags, _ = inputs
    first = run(flags, tmp_path / "out", monkeypatch)
    trained = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = run(flags, tmp_path / "out", monkeypatch)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == trained
    assert again["rows"] == first["rows"]
    with pytest.raises(ValueError, match=r"holds another run \(settings.dim: 8 there, 6 now\)"):
        run([*flags, "--dim", "6"], tmp_path / "out", monkeypatch)
    with pytest.raises(ValueError, match=r"holds another run \(training.seed: 42 there, 7 now\)"):
        run([*flags, "--seed", "7"], tmp_path / "out", monkeypatch)


def test_leaks_are_reported_and_left_out(inputs, tmp_path, monkeypatch, caplog):
    flags, sts = inputs
    leaked = make_texts(40, seed=4)[7]
    text = Path(flags[flags.index("--texts") + 1]).read_text() + json.dumps({"text": f"  {leaked.upper()}! "}) + "\n"
    (tmp_path / "texts.jsonl").write_text(text)
    mine = ["--texts", str(tmp_path / "texts.jsonl"), "--max_steps", "1", "--sts", sts]
    results = run([*flags, *mine], tmp_path / "out", monkeypatch)
    assert results["data"]["leaked"] == 1
    assert results["data"]["rows"] == 260
    assert "1 training texts stand in an evaluation set" in caplog.text


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--dim", "25"], ValueError, "dim is 25, expected at most the teacher's 24"),
        (["--max_texts", "5", "--dim", "8"], ValueError, "5 texts for 8 dimensions"),
        (["--texts", "nowhere.jsonl"], FileNotFoundError, "nowhere.jsonl is neither a file"),
        (["--teacher", "nobody/nothing"], OSError, "neither a folder here nor a repository"),
        (["--sts", "nowhere"], FileNotFoundError, "0 files sts12"),
        (["--text_columns", "txt"], ValueError, "Did you mean 'text'"),
        (["--start", "pca"], ValueError, "start pca needs a student as wide as the teacher"),
        (["--start", "pac"], ValueError, "start is 'pac'"),
        (["--layers", "0", "9"], ValueError, r"layers is \[0, 9\]"),
        (["--backbone", "nobody/nothing"], OSError, "nobody/nothing can't be opened.*hf download nobody/nothing"),
    ],
)
def test_bad_input_ends_before_long_work(flags, error, message, inputs, tmp_path, monkeypatch):
    with pytest.raises(error, match=message):
        run([*inputs[0], *flags], tmp_path / "out", monkeypatch)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # nothing was encoded


def test_unknown_flag_is_refused(inputs, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run([*inputs[0], "--dimm", "8"], tmp_path / "out", monkeypatch)
    assert "unrecognized arguments: --dimm" in capsys.readouterr().err


CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


def test_configs_are_found():
    embed_distill, hpd = ["embed_distill_msmarco", "embed_distill_nq"], ["hpd_minilm_f128", "hpd_mpnet", "hpd_tinybert_f128"]
    lealla = ["lealla_base", "lealla_e5", "lealla_large", "lealla_small"]
    multi_sense = ["multi_sense_deberta", "multi_sense_llm2vec"]
    assert [path.stem for path in CONFIGS] == [*embed_distill, *hpd, *lealla, *multi_sense]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_settings_of_its_recipe_with_sources(path, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)
    recipes = {"hpd": "HPDArguments", "embed_distill": "EmbedDistillArguments", "lealla": "LEALLAArguments"}
    recipes["multi_sense"] = "MultiSenseArguments"
    module = next(name for name in recipes if path.stem.startswith(name))
    recipe_class = getattr(importlib.import_module(module), recipes[module])
    flags = ["--config", str(path), "--use_cpu", "true", "--seed", "7"]
    recipe, args = parse_arguments(recipe_class, DistillationTrainingArguments, argv=flags)
    assert args.seed == 7
    if module == "embed_distill":
        assert (recipe.metric, recipe.dim, recipe.query_weight, recipe.index_report) == ("l2", None, 1.0, False)
        assert recipe.loss().parts == ("query", "document", "score", "label")
    elif module == "lealla":
        assert recipe.loss().parts == ("ams", "feature", "logit")
        if path.stem == "lealla_e5":  # pairs are a flag
            assert len(set(recipe.languages)) == len(recipe.languages) == 49
        else:
            assert recipe.shape == path.stem.removeprefix("lealla_")
            assert all("=sentence-transformers/parallel-sentences" in name for name in recipe.pairs)
    elif module == "multi_sense":
        assert (recipe.k, recipe.cap, recipe.select, recipe.special_tokens) == (20, 1000, "dot", True)
        assert recipe.loss().parts == ("sense",)
    else:
        assert recipe.dim == 128
    if path.stem.endswith("_f128"):
        assert (recipe.activation, args.learning_rate, args.num_train_epochs) == ("tanh", 1e-4, 5)
    named = ("#", "output_dir", "texts_subset", "train_split")
    settings = [line for line in path.read_text().splitlines() if not line.startswith(named)]
    bare = [line for line in settings if "#" not in line]
    assert len(settings) > 12
    plain = r"(  - \w{3}=|teacher:|backbone:|dim|license|eval_str|save_|load_best|metric_for_best|greater_is_better|language)"
    assert all(re.match(plain, line) for line in bare), bare


def test_the_config_of_the_published_student_is_what_its_run_was_given(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    classes = (importlib.import_module("hpd").HPDArguments, DistillationTrainingArguments)
    made = json.loads((RECIPES / "results" / "hpd_mpnet.json").read_text())["provenance"]["command"]
    (run, run_args), (recipe, args) = (
        parse_arguments(*classes, argv=[*argv, "--use_cpu", "true"])
        for argv in (shlex.split(made)[1:], ["--config", str(RECIPES / "configs" / "hpd_mpnet.yaml")])
    )
    differing = {key for key, value in recipe.identity().items() if value != run.identity()[key]}
    assert differing == {"teacher", "backbone", "texts"}  # local copies of the models, more text
    for name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "warmup_steps", "lr_scheduler_type"):
        assert getattr(args, name) == getattr(run_args, name), name


@pytest.mark.slow
def test_killed_half_way_the_same_command_ends_as_if_it_had_not_been(inputs, tmp_path):
    script = """
import os, signal, sys
from transformers import Trainer
step = Trainer.training_step
def dying(self, *args, **kwargs):
    if self.state.global_step == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
Trainer.training_step = dying
sys.path.insert(0, os.environ["RECIPES"])
import hpd
hpd.main(sys.argv[1:])
"""

    def launch(output, kill_at):
        flags = [*inputs[0], "--save_steps", "5", "--dropout", "0.1", "--output_dir", str(output)]
        command = [sys.executable, "-c", script, *flags, "--cache_dir", str(tmp_path / "cache")]
        environment = {**os.environ, "KILL_AT": str(kill_at), "RECIPES": str(RECIPES)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    whole = launch(tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    killed = launch(tmp_path / "killed", 23)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists()
    assert (tmp_path / "killed" / "checkpoint-20").exists()
    again = launch(tmp_path / "killed", -1)
    assert again.returncode == 0, again.stderr
    one, two = (StudentModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed"))
    assert all((one[key] == two[key]).all() for key in one)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["rows"] == results[1]["rows"]
    # A time that leaves out what the killed process took must not pass for that of the whole training.
    assert [list(result["timings_s"]) for result in results] == [
        ["caching", "evaluation", "training"],
        ["caching", "evaluation", "training since step 20"],
    ]


def test_readme_block_runs_as_it_stands(backbone_folder, teacher_folder, tmp_path, monkeypatch, hub):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block = next(block for block in blocks if "trainer.push_to_hub()" in block)
    assert len(block.strip().splitlines()) <= 23
    names = {
        "sentence-transformers/all-mpnet-base-v2": teacher_folder,
        "nreimers/MiniLM-L6-H384-uncased": backbone_folder,
        "dim=128": "dim=8",
        "bf16=True": "use_cpu=True, num_train_epochs=1, disable_tqdm=True",
    }
    for name, tiny in names.items():
        assert name in block
        block = block.replace(name, tiny)
    texts = make_texts(60)
    tiny_data = datasets.Dataset.from_dict({"anchor": texts[:30], "positive": texts[30:]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: tiny_data)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(block)
    runpy.run_path(str(tmp_path / "block.py"))
    assert "alice/minilm-128" in hub.files("alice/minilm-128")["README.md"].decode()
    check_layout(tmp_path / "minilm-128")


def test_readme_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text() + (ROOT / ".ci" / "run").read_text()))
    assert {"hpd", "test", "test-all"} <= used <= targets
