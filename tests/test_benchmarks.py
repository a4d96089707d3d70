"""benchmarks/: what hours of runs are started with, and what is made of them."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_backbone

from hf_distill.arguments import DistillationTrainingArguments, parse_arguments


ROOT = Path(__file__).parents[1]
ARGUMENTS = {"embed_distill": "EmbedDistillArguments", "lealla": "LEALLAArguments", "multi_sense": "MultiSenseArguments"}


@pytest.fixture
def benchmark(monkeypatch):
    for folder in ("recipes", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


def test_every_rung_is_flags_of_its_recipe_and_every_row_is_of_a_rung(benchmark):
    ladders = benchmark("ladder").LADDERS
    assert {"ladder", "reranker", "parts", "choices", "start", "curve", "rates", "senses"} <= ladders.keys()
    for ladder in ladders.values():
        arguments = getattr(benchmark(ladder.recipe), ARGUMENTS[ladder.recipe])
        for flags in ladder.rungs.values():
            parse_arguments(arguments, DistillationTrainingArguments, argv=[*flags.split(), "--output_dir", "out"])
        assert len(set(ladder.rungs.values())) == len(ladder.rungs)
        assert {rung for rung, _ in ladder.rows.values()} == ladder.rungs.keys()
        assert ladder.rows[ladder.reference] == (next(iter(ladder.rungs)), "teacher")  # the run that scores it


@pytest.fixture
def ladder(benchmark, monkeypatch, tmp_path):
    """Return a function that climbs a ladder whose runs are made up, and the commands it started."""
    module, started = benchmark("ladder"), []

    def run(words, check):
        started.append(words[1:])
        own = dict(zip(words[2::2], words[3::2], strict=True))
        score = 10.0 * int(own["--seed"]) + float(own.get("--learning_rate", 0)) + (own.get("--state_weight", "0") == "1")
        keys = ("sts_avg", "wic", "sst2_few", "trec_few", "end_avg", "state_error")
        rows = {"student": score, "student, without senses": score - 1}
        if "--baselines" not in own:
            rows |= {"teacher": 50.0, "teacher, replaced": 49.0, "untrained student": 1.0, "untrained student, replaced": 0.5}
        scores = {name: {"parameters": 2_000_000, "scores": dict.fromkeys(keys, value)} for name, value in rows.items()}
        made = {"command": module.command(words[1:])}
        Path(own["--output_dir"]).mkdir(parents=True)
        content = json.dumps({"rows": scores, "provenance": made})
        (Path(own["--output_dir"]) / "results.json").write_text(content)

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "provenance", lambda seed: {"seed": seed})
    (tmp_path / "recipes" / "results").mkdir(parents=True)

    def climb(*flags):
        monkeypatch.setattr(sys, "argv", ["ladder.py", "made", *flags])
        module.main()
        return json.loads((tmp_path / "recipes" / "results" / f"made_{flags[0]}.json").read_text())

    return climb, started


def test_a_ladder_starts_each_rung_and_seed_once_and_averages_over_seeds(ladder, capsys):
    climb, started = ladder
    found = climb("senses", "--seeds", "1", "2", "--", "--k", "5")
    assert len(started) == 6
    assert ["--baselines" in words for words in started] == [False] + [True] * 5
    assert all(words[1:3] == ["--k", "5"] for words in started)
    rows = found["table"]
    assert rows["teacher"]["end avg"] == 50
    assert rows["student of states, replaced"]["end avg"] == pytest.approx(16.001)  # a made-up 11 and 21
    assert rows["student of states"]["end avg, range"] == "10.00–20.00"
    assert rows["student of senses, replaced"]["end avg, of the teacher"] == pytest.approx(30, abs=0.01)
    assert climb("senses", "--seeds", "1", "2", "--", "--k", "5") == found
    assert len(started) == 6  # finished runs are kept
    with pytest.raises(SystemExit):
        climb("senses", "--seeds", "1", "2", "--", "--k", "7")
    assert "Its scores would stand beside those of other flags" in capsys.readouterr().err


def test_some_rungs_of_a_ladder_lie_where_all_of_them_would(ladder, capsys):
    climb, started = ladder
    found = climb("senses", "--seeds", "1", "--rungs", "states", "--", "--k", "5")
    assert [Path(words[words.index("--output_dir") + 1]).name for words in started] == ["0-1", "2-1"]
    assert {"teacher", "student of senses", "student of states, replaced"} < found["table"].keys()
    assert not any("senses and states" in heading for heading in found["table"])
    whole = climb("senses", "--seeds", "1", "--", "--k", "5")
    assert len(started) == 3
    assert found["table"].items() < whole["table"].items()
    with pytest.raises(SystemExit):
        climb("senses", "--rungs", "stats")
    assert "['stats'] are none of senses, expected some of ['senses'" in capsys.readouterr().err


def test_what_settings_are_chosen_by_takes_no_test(ladder, capsys):
    climb, started = ladder
    for flags in (["--sts", "folder"], ["--sts=folder"]):
        with pytest.raises(SystemExit):
            climb("rates", "--seeds", "1", "--", *flags)
    assert not started
    assert "expected --sts_dev in place of --sts, the tests" in capsys.readouterr().err
    climb("rates", "--seeds", "1", "--", "--sts_dev", "folder")
    assert all(words[words.index("--split") + 1] == "dev" for words in started)
    assert len(started) == 6


def test_the_rule_takes_the_best_of_the_smallest_k_near_the_best(benchmark):
    choose = benchmark("senses").choose
    rows = {
        "layer -1": {"end avg": 90.0},
        "layer -1, k 1, dot": {"k": 1, "end avg": 69.0},
        "layer -1, k 5, dot": {"k": 5, "end avg": 79.9},
        "layer -1, k 5, l2": {"k": 5, "end avg": 79.95},
        "layer -1, k 20, l2": {"k": 20, "end avg": 80.1},
        "layer -2, k 1, l2": {"k": 1, "end avg": 85.0},
    }
    assert choose(rows | {"layer -1": {"end avg": 90.0}}) == "layer -1, k 5, l2"
    assert choose({}) is None


def test_the_sweep_scores_every_combination_once_and_goes_on_where_it_stopped(benchmark, monkeypatch, word_tests):
    module, folder = benchmark("senses"), word_tests
    monkeypatch.setattr(module, "RECIPES", folder)
    (folder / "results").mkdir()
    teacher = make_backbone(folder / "teacher", seed=5)
    words = f"senses.py --texts {folder / 'texts.txt'} --teacher {teacher} --backbone {teacher} --held_out 20"
    words += (
        f" --cache_dir {folder} --wic {folder / 'wic'} --classification {folder / 'classes'} --words {folder / 'words.tsv'}"
    )

    def sweep(*more):
        monkeypatch.setattr(sys, "argv", [*words.split(), "--use_cpu", "true", "--output_dir", str(folder / "out"), *more])
        module.main()
        return json.loads((folder / "results" / "senses_teacher.json").read_text())

    asked = ("--layers", "-1", "-2", "--numbers", "1", "3")
    found = sweep(*asked)
    rows = found["table"]
    assert len(rows) == 2 * (1 + 2 * (1 + 3))
    assert found["chosen"] == module.choose(rows)
    assert found["provenance"]["command"].startswith("senses.py --texts")
    for row in rows.values():
        assert row["end avg"] == pytest.approx((row["wic"] + row["made few"]) / 2, abs=1e-3)
    apart = rows["layer -1, k 3, dot, special tokens kept"]
    assert apart["k"] == 3
    assert apart != rows["layer -1, k 3, dot"] != rows["layer -2, k 3, dot"]
    assert {"MB", "words"} <= apart.keys()
    added = []
    monkeypatch.setattr(module.EndTasks, "add", lambda *row: added.append(row[1]))
    assert sweep(*asked) == found
    assert not added  # all of them stood in the file
    with pytest.raises(SystemExit, match="tests are not chosen on"):
        sweep("--split", "test")
    words = re.sub(r"--(wic|classification) \S+", "", words)  # words alone, beside what dev said
    sweep("--layers", "-2", "-1", "--numbers", "1", "3")
    sweep("--layers", "-1", "--numbers", "1", "--name", "other")
    assert {path.stem for path in (folder / "results").iterdir()} == {"senses_teacher", "words_teacher", "other"}
    alone = json.loads((folder / "results" / "words_teacher.json").read_text())
    assert alone["table"].keys() == {f"layer {layer}, k {k}" for layer in (-2, -1) for k in (1, 3)}
    assert all(row["words"] == rows[f"{name}, dot"]["words"] for name, row in alone["table"].items())
    assert alone["chosen"] is None
