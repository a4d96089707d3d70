"""recipes/multi_sense.py from texts to a card, on tiny models."""

import importlib
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_backbone

from hf_distill.cli import _open
from hf_distill.evaluation.word_sense import ClassificationEvaluator, WiCEvaluator
from hf_distill.layout import check_layout
from hf_distill.multi_sense import MultiSenseStudent
from hf_distill.senses import SenseDictionary


RECIPES = Path(__file__).parents[1] / "recipes"
BASELINES = ["teacher", "teacher, replaced", "untrained student", "untrained student, replaced"]


@pytest.fixture
def folder(word_tests):
    """Return `word_tests`, by a short name."""
    return word_tests


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    teacher = make_backbone(folder / "teacher", seed=5)

    def start(*flags, output="out"):
        base = f"--texts {folder / 'texts.txt'} --teacher {teacher} --backbone {teacher} --layers 0 2 --held_out 20 --k 3"
        base += " --per_device_train_batch_size 16 --num_train_epochs 8 --learning_rate 5e-3 --logging_steps 4"
        base += f" --disable_tqdm true --use_cpu true --bf16 false --attention eager --output_dir {folder / output}"
        base += f" --cache_dir {folder / 'caches'}"
        importlib.import_module("multi_sense").main([*base.split(), *flags])
        return json.loads((folder / output / "results.json").read_text())

    return start


def log_accuracy(results):
    return [line["sense_accuracy"] for line in results["log_history"] if "sense_accuracy" in line][-1]


def in_context(student, replace):
    """Return texts and the characters of a word in each -> its mean state, a text at a time."""

    def encode(texts, places):
        found = []
        for text, (first, last) in zip(texts, places, strict=True):
            inputs = student.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=64)
            ids = torch.tensor([inputs["input_ids"]])
            with torch.no_grad():
                output = student(input_ids=ids)
            states = student.dictionary.lookup(output.states, ids)[0] if replace else output.states
            own = [place for place, (a, b) in enumerate(inputs["offset_mapping"]) if a < last and b > first]
            found.append(states[0, own].mean(0))
        return torch.stack(found)

    return encode


def test_a_shorter_model_learns_the_senses_and_is_measured_with_and_without(run, folder):
    tests = f"--wic {folder / 'wic'} --classification {folder / 'classes'} --words {folder / 'words.tsv'}".split()
    results = run(*tests, "--explained", "cat", "catalogue")
    shown = (folder / "out" / "explained" / "README.md").read_text()
    assert "## cat" in shown
    assert "[cat]" in shown  # in its contexts
    assert "catalogue" not in shown  # several tokens
    assert (folder / "out" / "explained" / "cat.png").stat().st_size > 10_000
    rows = {name: row["scores"] for name, row in results["rows"].items()}
    assert list(rows) == [*BASELINES, "student, without senses", "student"]
    assert rows["teacher"]["fidelity_spearman"] == pytest.approx(100)
    assert rows["student"]["fidelity_spearman"] > rows["untrained student"]["fidelity_spearman"]
    for scores in rows.values():
        assert scores["end_avg"] == pytest.approx(np.mean([scores["wic"], scores["made_few"]]), abs=1e-4)
    assert rows["student"] != rows["student, without senses"]
    errors = {name: scores["state_error"] for name, scores in rows.items()}
    assert errors["teacher"] == 0
    assert 0 < errors["teacher, replaced"] < errors["student"] < errors["untrained student"]
    facts = results["dictionary"]
    assert (facts["k"], facts["select"], facts["layer"]) == (3, "l2", -1)
    assert facts["without_sense"] == 0
    assert 100 * log_accuracy(results) - 20 < facts["sense_accuracy"] < 100
    assert 0.5 < facts["agreement"] < 0.9999
    assert f"a mean cosine of {facts['agreement']:.2f} with its own" in (folder / "out" / "README.md").read_text()
    assert facts["mb"] * 1e6 < (folder / "out-senses" / "senses.safetensors").stat().st_size < facts["mb"] * 1e6 + 5000
    assert set(results["words"]) == {"senses", "one centroid"}
    assert results["words"]["senses"]["words_known"] == 100
    log = [line for line in results["log_history"] if "sense_accuracy" in line]
    assert log[-1]["sense_accuracy"] > log[0]["sense_accuracy"] + 0.1
    card = (folder / "out" / "README.md").read_text()
    assert "Multi-Sense Embeddings for Language Models" in card
    assert "replaced by senses of the dictionary `out-senses`, a repository beside this one, before" in card
    assert 'the row "student, without senses"' in card
    assert "classification with 8 texts a label" in card
    assert "states that a row's leave unexplained" in card
    assert f" MB, its dictionary another {facts['mb']:.0f} MB; it encodes with senses." in card
    assert "with senses, " in card.split("Word similarity")[1]
    assert "comparable as they are" not in card  # replaced states are the teacher's own
    check_layout(folder / "out")
    texts = ["a cat sat", "the dog"]  # the terminal scores what the student is, not what it is without its senses
    opened = MultiSenseStudent.from_pretrained(folder / "out")
    assert _open(str(folder / "out")).encode(texts) == pytest.approx(opened.encode(texts), abs=1e-6)
    assert np.abs(opened.encode(texts, replace=False) - opened.encode(texts)).max() > 1e-3
    classes, words = ClassificationEvaluator(folder / "classes", "made"), WiCEvaluator(folder / "wic")
    for name, replace in (("student", True), ("student, without senses", False)):  # both rows come of one reading
        found = classes(partial(opened.encode, replace=replace)) | words(in_context(opened, replace))
        assert found == pytest.approx({key: rows[name][key] for key in found}, abs=1e-3)
    # Moved together, student and dictionary find each other; alone, the student says what it lacks.
    (folder / "elsewhere").mkdir()
    for name in ("out", "out-senses"):
        shutil.copytree(folder / name, folder / "elsewhere" / name)
    found = MultiSenseStudent.from_pretrained(folder / "elsewhere" / "out").encode(["a cat sat"])
    assert found == pytest.approx(MultiSenseStudent.from_pretrained(folder / "out").encode(["a cat sat"]), abs=1e-6)
    shutil.rmtree(folder / "elsewhere" / "out-senses")
    with pytest.raises(OSError, match="out-senses"):
        MultiSenseStudent.from_pretrained(folder / "elsewhere" / "out")


def test_a_dictionary_that_exists_is_used_and_one_of_other_words_refused(run, folder):
    run("--special_tokens", "true", output="first")
    again = run("--senses", str(folder / "first-senses"), "--select", "cos", output="second")
    assert not (folder / "second-senses").exists()
    student = MultiSenseStudent.from_pretrained(folder / "second")
    assert student.settings["senses"]["select"] == "cos"
    assert again["dictionary"]["texts"] == 230
    card = (folder / "second" / "README.md").read_text()
    assert "The dictionary: " in card
    assert "end avg" not in card
    for flag, other in (("--teacher_layer", "1"), ("--teacher_max_length", "5"), ("--bidirectional", "true")):
        with pytest.raises(ValueError, match=f"first-senses was made with .*'{flag.removeprefix('--teacher_').strip('-')}'"):
            run("--senses", str(folder / "first-senses"), flag, other, output=f"with{flag}")
    with pytest.raises(ValueError, match="is False, the dictionary .*first-senses has senses of such tokens"):
        run("--senses", str(folder / "first-senses"), "--special_tokens", "false", output="special")
    run("--baselines", "false", "--num_train_epochs", "1", output="apart")
    apart = MultiSenseStudent.from_pretrained(folder / "apart").dictionary
    assert not apart.known(torch.tensor(apart.tokenizer.all_special_ids)).any()
    known = SenseDictionary.from_pretrained(folder / "first-senses")
    known.tokenizer.add_tokens(["zebra"])
    end = known.offsets[10]
    others = (known.senses[:end], known.offsets[:11], known.counts[:end], known.facts, known.tokenizer)
    SenseDictionary(*others).save_pretrained(folder / "of-others")
    with pytest.raises(ValueError, match="number tokens differently: 'zebra' and None at"):
        run("--senses", str(folder / "of-others"), output="of")
    known = SenseDictionary.from_pretrained(folder / "first-senses")
    few = SenseDictionary(known.senses[:0], known.offsets * 0, known.counts[:0], known.facts, known.tokenizer)
    few.save_pretrained(folder / "few")
    assert student.settings["senses"]["name"] == "../first-senses"
    with pytest.raises(ValueError, match="100% of the texts' tokens have no sense"):
        run("--senses", str(folder / "few"), output="third")


def test_what_dev_chooses_is_made_from_the_texts_that_are_trained_on_when_it_is_tested(run, folder):
    seen = (folder / "classes" / "made-test.tsv").read_text().splitlines()[1].split("\t")[0]
    lines = (folder / "texts.txt").read_text().splitlines()
    (folder / "texts.txt").write_text("\n".join([*lines[:100], seen, *lines[100:]]))
    tests = f"--wic {folder / 'wic'} --classification {folder / 'classes'} --num_train_epochs 1 --split".split()
    dev, test = (run(*tests, split, output=split) for split in ("dev", "test"))
    assert dev["data"]["sha256"] == test["data"]["sha256"]
    assert dev["data"]["leaked"] == test["data"]["leaked"] == 1
    assert {"wic", "made_few", "made_full"} < dev["rows"]["teacher"]["scores"].keys()
    assert dev["rows"]["teacher"]["scores"]["made_few"] != test["rows"]["teacher"]["scores"]["made_few"]
    evaluator = ClassificationEvaluator(folder / "classes", "made", "dev")
    assert (len(evaluator.train), len(evaluator.test)) == (54, 6)
    assert not set(evaluator.train["text"]) & set(evaluator.test["text"])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--sense_weight 0 --state_weight 1", {"loss_state"}),
        ("--soft true --state_weight 0.5", {"loss_state", "loss_sense"}),
    ],
)
def test_other_losses(run, flags, parts):
    results = run(*flags.split(), "--num_train_epochs", "1", "--baselines", "false")
    assert list(results["rows"]) == ["student, without senses", "student"]
    assert "sense_accuracy" in results["dictionary"]
    assert "agreement" not in results["dictionary"]  # the dictionary's own, as a run with baselines says
    log = results["log_history"]
    assert {key for line in log for key in line if key.startswith("loss_")} == parts


def test_killed_in_training_the_same_command_goes_on(run, folder, monkeypatch):
    whole = run("--save_strategy", "epoch", output="whole")
    save, saved = MultiSenseStudent.save_pretrained, []

    def dying(self, place, *args, **kwargs):
        save(self, place, *args, **kwargs)
        saved.append(Path(place).name)
        if len(saved) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MultiSenseStudent, "save_pretrained", dying)
        with pytest.raises(KeyboardInterrupt):
            run("--save_strategy", "epoch")
    assert saved[-1].startswith("checkpoint-")
    again = run("--save_strategy", "epoch")
    assert any("training since step" in name for name in again["timings_s"])
    assert again["rows"]["student"] == whole["rows"]["student"]
    assert again["dictionary"]["sense_accuracy"] == whole["dictionary"]["sense_accuracy"]


def test_wrong_input_is_refused_before_the_work(run, folder):
    other = make_backbone(folder / "other", vocab_size=40)
    tokenizer = json.loads((folder / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (folder / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="number tokens differently: 'cat' and 'dog' at 6"):
        run("--backbone", other)
    with pytest.raises(FileNotFoundError, match=r"no file \*-train\.\*"):
        run("--classification", str(folder / "wic"), output="b")
    with pytest.raises(ValueError, match="expected one of"):
        run("--select", "best", output="c")
    with pytest.raises(ValueError, match="k is 0"):
        run("--k", "0", output="d")
    with pytest.raises(ValueError, match=r"\['embedding_dim', 'teacher'\] are given"):
        run("--embedding_dim", "5", "--teacher", other, other, output="f")
    narrow = make_backbone(folder / "narrow", hidden_size=8)
    with pytest.raises(ValueError, match="states have 8 dimensions, the senses 16"):
        run("--backbone", narrow, output="e")
    assert not (folder / "caches").exists()


def test_a_set_of_labelled_texts_may_have_any_name(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    for split in ("train", "test"):
        shutil.copy(folder / "classes" / f"made-{split}.tsv", folder / "classes" / f"sst-2-{split}.tsv")
    recipe = SimpleNamespace(
        classification=folder / "classes", split="test", all_labels=False, wic=None, sts=None, sts_dev=None
    )
    tasks = importlib.import_module("words").EndTasks(recipe, SimpleNamespace(evaluators=[]))
    assert tasks.ends == ["made_few", "sst-2_few"]
