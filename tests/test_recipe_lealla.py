"""recipes/lealla.py from translations to a card, on tiny models."""

import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS, make_texts
from datasets import Dataset
from transformers import AutoModel, BertConfig, BertTokenizer

from hf_distill import StudentModel
from hf_distill.arguments import parse_arguments
from hf_distill.cache import TeacherCache
from hf_distill.data import mix_languages, normal_form
from hf_distill.evaluation import plots
from hf_distill.evaluation.plots import pyplot
from hf_distill.layout import check_layout
from hf_distill.teachers import EncoderTeacher


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
    assert (settings["pooling"], settings["activation"], settings["projection_dim"]) == ("mean", "tanh", 8)
    card = (folder / "out" / "README.md").read_text()
    assert "| ccc |" in card.replace("  ", "")
    assert "Tatoeba, mean over languages" in card
    assert "(languages.png)" in card
    assert (folder / "out" / "languages.png").stat().st_size > 1000
    assert (
        f"2 layers, from random weights, token embeddings from the main directions of `{settings['embeddings_of']}`'s" in card
    )
    assert "The first dimensions alone, for which it was not trained" in card
    assert "the mean of its vectors subtracted" not in card
    assert not (folder / "out" / "training_head.safetensors").exists()
    check_layout(folder / "out")


def test_languages_are_drawn_in_panels_that_a_page_holds(tmp_path, monkeypatch):
    scores = {f"{first}{second}a": {"teacher": 50, "student": 40} for first in "abcdefgh" for second in "abcdefgh"}
    figures = []
    monkeypatch.setattr(plots, "pyplot", lambda: figures.append(pyplot()) or figures[-1])
    monkeypatch.setattr(pyplot(), "close", lambda figure: figures.append(figure))
    plots.draw_languages(tmp_path / "languages.png", scores, sorted(scores)[:41])
    panels = [([label.get_text() for label in axes.get_xticklabels()], axes.get_title()) for axes in figures[-1].axes]
    assert [(len(codes), title.split()[0]) for codes, title in panels] == [(21, "trained"), (20, "trained"), (23, "other")]
    assert [code for codes, _ in panels for code in codes] == sorted(scores)
    assert figures[-1].get_size_inches()[0] < 12


def test_settings_reach_the_loss_and_the_teacher_and_training_is_judged_on_dev_alone(run, folder):
    flags = "--margin 0.1 --scale 5 --logit_temperature 0.5 --normalize_targets false --max_steps 2 --baselines false"
    flags += " --eval_strategy steps --eval_steps 1"
    results = run(*flags.split(), "--teacher_prompt", "query: ", "--tatoeba", str(folder / "tatoeba.tsv"))
    assert [{key: value for key, value in loss.items() if key != "name"} for loss in results["loss"]["losses"]] == [
        {"margin": 0.1, "scale": 5.0},
        {"normalize": False},
        {"temperature": 0.5},
    ]
    assert results["teacher_fingerprint"]["prompt"] == "query: "
    assert list(results["rows"]) == ["student"]
    assert "Beside its teacher" not in (folder / "out" / "README.md").read_text()
    judged = [line for line in results["log_history"] if "eval_dev_avg" in line]
    assert len(judged) == 2
    assert not any("tatoeba" in key for line in judged for key in line)


def test_parts_without_weight_are_not_there(run, folder):
    results = run("--feature_weight", "0", "--logit_weight", "0", "--num_train_epochs", "1")
    assert [loss["name"] for loss in results["loss"]["losses"]] == ["AdditiveMarginSoftmax"]
    assert "loss_feature" not in results["log_history"][0]
    assert "tatoeba_avg" not in results["rows"]["student"]["scores"]
    assert results["teacher_fingerprint"].get("anchored") is None
    assert "Translations found" in (folder / "out" / "README.md").read_text()


def test_what_a_centred_teacher_went_through_does_not_lead_to_the_student(run, folder):
    results = run("--center", "true", "--max_steps", "1")
    assert results["teacher_fingerprint"]["projection"]["center"] is True
    assert not (folder / "out" / "teacher_projection.safetensors").exists()
    card = (folder / "out" / "README.md").read_text()
    assert "teacher_projection" not in card
    assert "the mean of its vectors subtracted" in card


@pytest.mark.parametrize("anchor", [False, True])
def test_a_centred_teacher_differs_by_its_mean_alone(opened, folder, teacher_folder, anchor):
    train = opened("--pairs", folder / "pairs").train
    teacher = TeacherCache(EncoderTeacher(teacher_folder, device="cpu"), folder / "cache")
    target = importlib.import_module("translations").open_target
    rows = list(zip(train["english"], train["translation"], strict=True))
    plain, centred = (
        target(SimpleNamespace(anchor=anchor, center=center), teacher, train).targets(rows).flatten(0, 1)
        for center in (False, True)
    )
    assert plain.mean(0).norm() > 0.1
    assert centred.mean(0).norm() < 1e-3  # float16 in the cache
    # Turned as well, they would depend on how the machine computes eigenvectors, and a run could not go on elsewhere.
    assert torch.allclose(plain - centred, (plain - centred)[:1], atol=1e-6)


@pytest.fixture
def opened(monkeypatch, backbone_folder):
    """Return a function: flags -> what the recipe is given of its data."""
    monkeypatch.syspath_prepend(str(RECIPES))

    def start(*flags):
        arguments = importlib.import_module("lealla").LEALLAArguments
        recipe = parse_arguments(arguments, argv=["--teacher", "t", "--backbone", backbone_folder, *map(str, flags)])[0]
        return importlib.import_module("translations").open_translations(recipe)

    return start


def write(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def test_what_stands_in_the_test_and_what_is_its_own_translation_is_left_out(opened, folder):
    path, tested = folder / "pairs" / "eng-aaa.tsv", make_texts(400)[-1]
    leaks = [(tested.upper() + "!", "an other"), ("a dog sat", translate(tested, 3).title())]
    path.write_text(path.read_text() + "the cat\tthe cat\n" + "".join("\t".join(leak) + "\n" for leak in leaks))
    data = opened("--pairs", folder / "pairs", "--tatoeba", folder / "tatoeba.tsv", "--held_out", 20)
    assert (data.facts["leaked"], data.facts["identical"]) == (2, 1)
    everywhere = [*data.corpus, *data.train["english"], *data.train["translation"], *data.evaluators[0].texts()]
    assert not {text for leak in leaks for text in leak}.intersection(everywhere)
    assert "the cat" not in everywhere
    kept = opened("--pairs", folder / "pairs", "--held_out", 20)
    assert leaks[0][1] in kept.corpus  # it would have been there


def test_held_out_english_is_trained_on_in_no_language_and_stands_in_dev_once(opened, folder):
    english = make_texts(60)
    twice = [*((text, translate(text, 3)) for text in english), *((text.upper(), translate(text, 4)) for text in english)]
    twice += [(text, translate(english[0], 3)) for text in english[1:20]]  # one translation of many
    names = [("english", "translation")]
    (folder / "own").mkdir()
    write(folder / "own" / "eng-aaa.tsv", names + twice)
    write(folder / "own" / "eng-bbb.tsv", names + [(text, translate(text, 7)) for text in english[:40]])
    data = opened("--pairs", folder / "own", "--held_out", 10)
    (dev,) = data.evaluators
    assert {code: len(sides[1]) for code, sides in dev.pairs.items()}.keys() == {"aaa", "bbb"}
    held = {normal_form(text) for _, there in dev.pairs.values() for text in there}
    assert len(held) >= 6
    assert not held & {normal_form(text) for text in data.train["english"]}
    assert {normal_form(text) for text in english} - held == {normal_form(text) for text in data.train["english"]}
    for there, sides in dev.pairs.values():
        for side in (there, sides):
            assert len(set(map(normal_form, side))) == len(side)
    assert data.facts["languages"]["aaa"] > len(english)  # trained on both ways of saying it
    assert opened("--pairs", folder / "own", "--held_out", 10).evaluators[0].pairs == dev.pairs
    assert opened("--pairs", folder / "own", "--held_out", 10, "--split_seed", 7).evaluators[0].pairs != dev.pairs


def test_several_corpora_of_a_language_are_joined_and_sides_are_found_by_name(opened, folder):
    english = make_texts(60, seed=4)
    there = [translate(text, 5) for text in english]
    write(
        folder / "one.tsv", [("english", "translation", "corpus"), *((a, b, "x") for a, b in zip(english, there, strict=True))]
    )
    swapped = zip(there[:30], english[:30], strict=True)
    write(folder / "two.tsv", [("source", "English"), *((a.title(), b.title()) for a, b in swapped)])
    data = opened("--pairs", f"xxx={folder / 'one.tsv'}", f"xxx={folder / 'two.tsv'}", "--held_out", 0)
    assert data.facts["languages"] == {"xxx": 90}
    assert list(data.train["english"]) == english + [text.title() for text in english[:30]]
    assert list(data.train["translation"])[60:] == [text.title() for text in there[:30]]
    assert data.evaluators == []
    named = opened("--pairs", f"xxx={folder / 'two.tsv'}:source,English", "--held_out", 0)
    assert named.train["english"][0] == there[0].title()  # English is what is named first
    assert data.corpus[:60] == english
    assert data.languages == ["english"] * 90 + ["xxx"] * 90


def test_languages_are_grouped_by_their_pairs_and_codes_that_the_test_lacks_are_named(opened, folder, caplog):
    with caplog.at_level(logging.WARNING, "hf_distill"):
        data = opened("--pairs", folder / "pairs", "--tatoeba", folder / "tatoeba.tsv", "--max_pairs", 150)
    assert not caplog.text
    assert data.facts["languages"] == {"aaa": 150, "bbb": 105}
    groups = {"trained": ["aaa", "bbb"], "few_pairs": ["bbb"], "many_pairs": ["aaa"], "other": ["ccc"]}
    assert data.evaluators[-1].groups == groups
    assert len(data.corpus) == len(data.languages) == 300 + 300 + 120  # a vocabulary is counted on all there are
    (folder / "pairs" / "eng-bbb.tsv").rename(folder / "pairs" / "eng-zzz.tsv")
    with caplog.at_level(logging.WARNING, "hf_distill"):
        data = opened("--pairs", folder / "pairs", "--tatoeba", folder / "tatoeba.tsv")
    assert data.evaluators[-1].groups == {"trained": ["aaa"], "other": ["bbb", "ccc"]}
    assert "the test has no zzz" in caplog.text
    with pytest.raises(ValueError, match=r"--pairs has \['zzz'\], the test \['aaa', 'bbb', 'ccc'\]"):
        opened("--pairs", folder / "pairs", "--tatoeba", folder / "tatoeba.tsv", "--languages", "zzz")


def test_pairs_that_lack_a_side_are_left_out_and_an_equals_sign_in_a_folder_is_none_of_a_language(opened, folder, caplog):
    english = make_texts(60, seed=4)
    (folder / "split=train").mkdir()
    rows = [("german", "text in english"), *((translate(text, 5), text) for text in english), (" ", "here"), ("there", "")]
    write(folder / "split=train" / "eng-xxx.tsv", rows)
    with caplog.at_level(logging.INFO, "hf_distill"):
        data = opened("--pairs", folder / "split=train", "--held_out", 0)
    assert data.facts["languages"] == {"xxx": 60}
    assert f"2 of {folder / 'split=train' / 'eng-xxx.tsv'} lack a side" in caplog.text
    assert "has no column english; german is taken for it" in caplog.text
    assert data.train["english"][0] == translate(english[0], 5)
    for name in (folder / "split=train" / "eng-xxx.tsv", f"{folder / 'split=train' / 'eng-xxx.tsv'}:text in english,german"):
        named = opened("--pairs", f"yyy={name}", "--held_out", 0)
        assert named.facts["languages"] == {"yyy": 60}
    assert named.train["english"][0] == english[0]
    assert not [message for message in caplog.messages if "text in english is taken" in message]
    rows = [("language", "a", "b"), *(("zzz", text, translate(text, 5)) for text in english)]
    write(folder / "split=train" / "all.tsv", rows)
    assert opened("--pairs", f"{folder / 'split=train' / 'all.tsv'}:a,b", "--held_out", 0).facts["languages"] == {"zzz": 60}


@pytest.mark.parametrize("kind", ["two files", "table", "one file", "nested"])
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
        rows = [{"en": a, "xx": b} for a, b in zip(english, there, strict=True)]
        rows = [{"id": str(i), **({"translation": row} if kind == "nested" else row)} for i, row in enumerate(rows)]
        (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"xxx={folder / 'one.jsonl'}{'' if kind == 'nested' else ':en,xx'}"
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
            (["--pairs", f"xxx={folder / 'same.tsv'}:english"], r"has the text columns \['english'\], expected two"),
            (["--logit_weight", "-1"], r"weights {'logit': -1.0} are negative"),
            (["--per_device_train_batch_size", "1"], "a batch is 1 row of 2 texts"),
            (["--shape", "small"], "expected one of them. They name different students"),
            (["--layers", "0"], r"'layers': \[0\], 'from_scratch': .* expected one of them"),
            (["--language_temperature", "0.5"], "temperature is 0.5"),
            (["--mini_batch_size", "0"], "mini_batch_size is 0, expected 1 or more"),
            (["--coverage", "99.5"], "coverage is 99.5, expected a share"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            run(*flags, output=f"refused-{number}")
    with pytest.raises(FileNotFoundError, match="holds no file eng-"):
        run("--pairs", str(folder / "pairs" / ".."), output="refused-folder")
    with pytest.raises(ValueError, match="max_params is '20 M', expected a number of weights"):
        parse_arguments(importlib.import_module("lealla").LEALLAArguments, argv=["--max_params", "20 M"])
    for flag in ("max_vocabulary", "embedding_dim"):
        with pytest.raises(ValueError, match=rf"\['{flag}'\] beside max_params 20M, expected neither"):
            parse_arguments(importlib.import_module("lealla").LEALLAArguments, argv=f"--max_params 20M --{flag} 64".split())
    assert not (folder / "caches").exists()


@pytest.fixture
def words_folder(tmp_path):
    """Return the folder of a tiny encoder with a WordPiece tokenizer of the tests' words, 160 dimensions wide."""
    letters = sorted(set("".join(WORDS)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    BertTokenizer(vocabulary).save_pretrained(tmp_path / "words")
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=160, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_a_student_is_planned_in_a_budget(opened, monkeypatch, folder, words_folder, teacher_folder, caplog):
    main = importlib.import_module("lealla").main
    flags = f"--pairs {folder / 'pairs'} --teacher {teacher_folder} --backbone {words_folder} --max_params 1.5M --max_steps 1"
    flags += f" --use_cpu true --bf16 false --disable_tqdm true --held_out 0 --cache_dir {folder / 'caches'} --max_length 30"
    with caplog.at_level(logging.INFO, "hf_distill"):
        main([*flags.split(), "--output_dir", str(folder / "planned"), "--per_device_train_batch_size", "4"])
    student = StudentModel.from_pretrained(folder / "planned")
    assert student.num_parameters() <= 1_500_000
    assert (student.dim, len(student.settings["layers"])) == (96, 12)
    assert student.settings["vocabulary"]["languages"].keys() == {"english", "aaa", "bbb"}
    assert "tokens kept by language, the least first: " in caplog.text
    assert f"Plan: {student.num_parameters() / 1e6:.1f}M of 1.5M parameters: 12 layers of 96 dimensions" in caplog.text
    results = json.loads((folder / "planned" / "results.json").read_text())
    assert results["data"]["name"] == "pairs"


def test_a_teachers_own_layers_with_a_narrow_table(opened, folder, backbone_folder, teacher_folder):
    flags = f"--pairs {folder / 'pairs'} --teacher {teacher_folder} --backbone {backbone_folder} --layers 0 2 --dim 6 --dims 3"
    flags += f" --use_cpu true --bf16 false --disable_tqdm true --max_steps 1 --cache_dir {folder / 'caches'}"
    flags += f" --learning_rate 0 --logging_steps 1 --embedding_dim 5 --output_dir {folder / 'narrow'}"
    flags += f" --tatoeba {folder / 'tatoeba.tsv'}"
    importlib.import_module("lealla").main(flags.split())
    student = StudentModel.from_pretrained(folder / "narrow")
    assert student.backbone.embeddings.word_embeddings.weight.shape[1] == 5
    assert (student.dim, student.settings["layers"]) == (6, [0, 2])
    # It starts centred: what its own layers make of all texts alike is taken away.
    student.settings["normalize"] = False
    vectors = student.encode(make_texts(300))
    assert np.linalg.norm(vectors.mean(0)) < 0.4 * np.linalg.norm(vectors, axis=1).mean()
    results = json.loads((folder / "narrow" / "results.json").read_text())
    # So does its head: of two unit vectors a pair, a random one would leave 2 and more.
    assert results["log_history"][0]["loss_feature"] < 1
    rows = results["rows"]
    assert "tatoeba_avg@3" in rows["student"]["scores"]
    assert "tatoeba_avg@3" not in rows["teacher"]["scores"]


def test_own_pairs_make_the_papers_student_with_the_teachers_tokenizer(opened, monkeypatch, folder):
    demo = importlib.import_module("demo")
    arguments = importlib.import_module("lealla").LEALLAArguments

    def filled(*flags):
        recipe = parse_arguments(arguments, argv=list(flags))[0]
        demo.fill_in(recipe)
        return recipe

    (folder / "de").mkdir()
    file = write(folder / "de" / "mine.tsv", [("english", "german"), ("a", "b")])
    own = filled("--pairs", f"deu={file}:english,german", f"fra={file},{file}", "org/data@en-it", "--teacher", "my/teacher")
    assert (own.backbone, own.shape, own.anchor, own.layers) == ("my/teacher", "small", False, None)
    assert own.texts_name == "deu=mine.tsv + fra=mine.tsv,mine.tsv + org/data@en-it"
    assert filled("--pairs", "a/b", "--teacher", "t", "--layers", "0", "--backbone", "b").shape is None
    assert filled("--pairs", "a/b", "--teacher", "t", "--anchor", "true").anchor is True
    with pytest.raises(ValueError, match="there are --pairs, but no --teacher"):
        filled("--pairs", "a/b")
    assert filled("--pairs", "a/b", "--backbone", "b").anchor is True  # the embedded teacher knows English
    default = filled()
    assert (default.shape, default.anchor, default.max_vocabulary, default.max_pairs) == ("small", True, 12_000, 5000)
    assert filled("--anchor", "false").anchor is False
    assert filled("--from_scratch", "8", "2", "2", "16").shape is None


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
