"""recipes/lealla.py from translations to a card, on tiny models."""

import importlib
import json
from pathlib import Path

import pytest
from conftest import WORDS, make_texts
from datasets import Dataset

from hf_distill import StudentModel
from hf_distill.data import mix_languages
from hf_distill.layout import check_layout


RECIPES = Path(__file__).parents[1] / "recipes"


def translate(text, shift):
    return " ".join(WORDS[(WORDS.index(word) + shift) % len(WORDS)] for word in text.split())


@pytest.fixture
def folder(tmp_path):
    """Return a folder of pairs in two made languages, and Tatoeba's table of these and a third."""
    english = make_texts(400)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for code, shift, count in (("aaa", 3, 300), ("bbb", 7, 120)):
        rows = [("english", "translation"), *((text, translate(text, shift)) for text in english[:count])]
        (pairs / f"eng-{code}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    test = [
        (code, translate(text, shift), text) for code, shift in (("aaa", 3), ("bbb", 7), ("ccc", 1)) for text in english[-60:]
    ]
    rows = [("language", "source", "english"), *test]
    (tmp_path / "tatoeba.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def run(folder, backbone_folder, teacher_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))

    def start(*flags, output="out"):
        base = f"--pairs {folder / 'pairs'} --teacher {teacher_folder} --backbone {backbone_folder} --from_scratch 8 2 2 16"
        base += " --per_device_train_batch_size 32 --num_train_epochs 4 --learning_rate 5e-3 --logging_steps 2 --held_out 20"
        base += f" --disable_tqdm true --use_cpu true --bf16 false --attention eager --output_dir {folder / output} --dims 4"
        base += f" --cache_dir {folder / 'caches'}"
        importlib.import_module("lealla").main([*base.split(), *flags])
        return json.loads((folder / output / "results.json").read_text())

    return start


def test_a_thin_student_learns_to_find_translations(run, folder):
    results = run("--tatoeba", str(folder / "tatoeba.tsv"), "--anchor", "true", "--num_train_epochs", "30")
    rows = {name: row["scores"] for name, row in results["rows"].items()}
    assert list(rows) == ["teacher", "untrained student", "student"]
    assert rows["student"]["dev_avg"] > rows["untrained student"]["dev_avg"] + 5
    assert rows["student"]["tatoeba_trained"] > rows["untrained student"]["tatoeba_trained"] + 5
    assert {"tatoeba_other", "tatoeba_avg", "tatoeba:ccc", "tatoeba:aaa>eng", "tatoeba:eng>aaa"} <= rows["student"].keys()
    data = results["data"]
    assert data["languages"] == {"aaa": 276, "bbb": 108}  # 24 sentences are held out, 12 of the smaller language
    assert (data["held_out"], data["rows"], data["leaked"]) == (20 + 12, 384, 0)
    assert results["teacher_fingerprint"]["anchored"] is True
    assert results["rows"]["student"]["parameters"] == StudentModel.from_pretrained(folder / "out").num_parameters()
    log = [line for line in results["log_history"] if "loss_ams" in line]
    assert {"loss_ams", "loss_feature", "loss_logit"} <= log[-1].keys()
    assert log[-1]["loss_ams"] < log[0]["loss_ams"]
    settings = StudentModel.from_pretrained(folder / "out").settings
    assert (settings["pooling"], settings["activation"], settings["projection_dim"]) == ("cls", "tanh", 8)
    card = (folder / "out" / "README.md").read_text()
    assert "| ccc |" in card.replace("  ", "")
    assert "Tatoeba, mean over languages" in card
    assert "(languages.png)" in card
    assert (folder / "out" / "languages.png").stat().st_size > 1000
    assert not (folder / "out" / "training_head.safetensors").exists()
    check_layout(folder / "out")


def test_parts_without_weight_are_not_there(run, folder):
    results = run("--feature_weight", "0", "--logit_weight", "0", "--num_train_epochs", "1")
    assert [loss["name"] for loss in results["loss"]["losses"]] == ["AdditiveMarginSoftmax"]
    assert "loss_feature" not in results["log_history"][0]
    assert "tatoeba_avg" not in results["rows"]["student"]["scores"]
    assert results["teacher_fingerprint"].get("anchored") is None
    assert "Translations found" in (folder / "out" / "README.md").read_text()


def test_what_stands_in_the_test_and_what_is_its_own_translation_is_left_out(run, folder):
    path = folder / "pairs" / "eng-aaa.tsv"
    path.write_text(path.read_text() + "the cat\tthe cat\n" + f"a dog sat\t{make_texts(400)[-1].upper()}!\n")
    results = run("--tatoeba", str(folder / "tatoeba.tsv"), "--num_train_epochs", "1")
    assert (results["data"]["leaked"], results["data"]["identical"]) == (1, 1)
    before, added = 276, results["data"]["languages"]["aaa"]
    assert abs(added - before) <= 4  # neither row is there; others are held out


def test_held_out_english_is_in_no_language(run, folder, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    module = importlib.import_module("translations")
    english = make_texts(50)
    parts = {
        code: Dataset.from_dict({"english": english[:count], "translation": [translate(text, 3) for text in english[:count]]})
        for code, count in (("aaa", 50), ("bbb", 40), ("ccc", 3))
    }
    held = module._held_out(parts, 4, 1)
    assert len(held) >= 4
    assert held == module._held_out(parts, 4, 1) != module._held_out(parts, 4, 2)
    for code, count in (("aaa", 4), ("bbb", 4), ("ccc", 0)):
        assert sum(module.normal_form(text) in held for text in parts[code]["english"]) >= count


@pytest.mark.parametrize("kind", ["two files", "table", "one file"])
def test_pairs_are_read_from(run, folder, kind):
    english = make_texts(60, seed=4)
    there = [translate(text, 5) for text in english]
    if kind == "two files":
        (folder / "a.en").write_text("\n".join(english) + "\n")
        (folder / "a.xx").write_text("\n".join(there) + "\n")
        source = f"xxx={folder / 'a.en'},{folder / 'a.xx'}"
    elif kind == "table":
        rows = [("language", "english", "other"), *(("xxx", *pair) for pair in zip(english, there, strict=True))]
        (folder / "all.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
        source = str(folder / "all.tsv")
    else:
        rows = [{"id": str(i), "en": a, "xx": b} for i, (a, b) in enumerate(zip(english, there, strict=True))]
        (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"xxx={folder / 'one.jsonl'}:en,xx"
    results = run("--pairs", source, "--num_train_epochs", "1")
    assert results["data"]["languages"] == {"xxx": 54}


def test_wrong_pairs_are_refused_before_any_work(run, folder, tmp_path):
    (folder / "a.en").write_text("one\ntwo\n")
    (folder / "a.xx").write_text("eins\n")
    (folder / "same.tsv").write_text("english\ttranslation\n" + "".join(f"{text}\t{text}\n" for text in make_texts(30)))
    for number, (flags, message) in enumerate(
        (
            (["--pairs", f"xxx={folder / 'a.en'},{folder / 'a.xx'}"], "2 lines and .* 1, expected as many"),
            (["--pairs", f"xxx={folder / 'same.tsv'}"], "all 30 pairs of xxx have two identical sides"),
            (["--languages", "aaa", "deu"], r"but not \['deu'\], expected codes"),
            (["--pairs", str(folder / "same.tsv")], "expected a column `language`, or a code before it"),
            (["--per_device_train_batch_size", "1"], "a batch of one pair has no other translation"),
            (["--shape", "small"], "expected one of them. They name different students"),
            (["--language_temperature", "0.5"], "temperature is 0.5"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            run(*flags, output=f"refused-{number}")
    assert not (folder / "caches").exists()


def test_small_languages_are_repeated_by_the_temperature():
    parts = {code: Dataset.from_dict({"a": [f"{code}{i}" for i in range(n)]}) for code, n in (("x", 100), ("y", 25), ("z", 4))}
    plain = mix_languages(parts)
    assert sorted(plain["a"]) == sorted(text for part in parts.values() for text in part["a"])
    mixed = mix_languages(parts, temperature=2.0)
    numbers = {code: list(mixed["language"]).count(code) for code in parts}
    assert numbers == {"x": 100, "y": 50, "z": 20}
    rows = list(mixed["a"])
    assert {rows.count(text) for text in parts["y"]["a"]} == {2}
    assert {rows.count(text) for text in parts["z"]["a"]} == {5}
    uneven = list(mix_languages(parts, temperature=1.5)["a"])
    assert {uneven.count(text) for text in parts["y"]["a"]} == {1, 2}
    assert uneven == list(mix_languages(parts, temperature=1.5)["a"])


def test_streams_are_interleaved_by_their_shares():
    parts = {code: Dataset.from_dict({"a": [code] * n}).to_iterable_dataset() for code, n in (("x", 900), ("y", 100))}
    mixed = mix_languages(parts, temperature=2.0, sizes={"x": 900, "y": 100})
    first = [row["language"] for _, row in zip(range(400), mixed, strict=False)]
    assert 60 < first.count("y") < 140  # a quarter of them: 30 : 10
    with pytest.raises(ValueError, match="how many rows"):
        mix_languages(parts)
