import copy
import json
import logging
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_distill.card import run_card, write_card
from hf_distill.evaluation.report import write_results


RUN = {
    "teacher": "sentence-transformers/all-MiniLM-L6-v2",
    "loss": {"name": "HPDLoss", "normalize": True},
    "student": {
        "base_model": "nreimers/MiniLM-L6-H384-uncased",
        "layers": [0, 2, 5],
        "pooling": "mean",
        "projection_dim": 128,
        "activation": "identity",
        "normalize": True,
        "max_length": 256,
    },
}
RESULTS = {
    "recipe": "hpd",
    "paper": "2203.07687",
    "data": {"name": "org/texts", "rows": 204_321, "columns": ["text"], "held_out": 1987, "leaked": 13},
    "projection": {"dim": 128, "center": False, "explained_variance": 0.87654},
    "rows": {
        "teacher": {
            "parameters": 22_713_216,
            "dim": 384,
            "scores": {"fidelity_spearman": 100.0, "sts_STS12": 72.3694, "sts_STS-B": 82.0315, "sts_avg": 77.2004},
        },
        "student": {
            "parameters": 17_394_816,
            "dim": 128,
            "scores": {
                "fidelity_spearman": 91.23456,
                "fidelity_neighbours": 61.5,
                "sts_STS12": 70.1251,
                "sts_STS-B": 80.0049,
                "sts_avg": 75.065,
                "fidelity_spearman@32": 80.126,
                "sts_avg@32": 61.2345,
            },
        },
    },
    "hyperparameters": {"steps": 6402, "epochs": 2.0, "batch": 64, "learning rate": 0.0003, "bf16": True},
    "timings_s": {"caching": 512.4, "training": 1999.6},
    "license": "apache-2.0",
    "language": "en",
    "provenance": {
        "command": "…/hpd.py --sts …/sts",
        "commit": "0123456789ab",
        "seed": 42,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": "2 cores of a CPU",
    },
}
HEADINGS = {"fidelity ρ": "fidelity_spearman", "same 10-NN": "fidelity_neighbours", "STS avg": "sts_avg"}


def changed(results=RESULTS, **changes):
    """Return a copy with some values set; a__b is b in a."""
    results = copy.deepcopy(results)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = results
        for part in path:
            place = place[part]
        place[last] = value
    return results


@pytest.fixture
def make():
    def card(results=RESULTS, run=RUN, plots=("training.png", "dimensions.png"), projection=True, name="hpd-minilm") -> str:
        return run_card({"data": {}, **run, **(results or {})}, name, plots, projection)

    return card


def tables(card: str) -> list[dict[str, dict[str, str]]]:
    """Return the Markdown tables of a card: row -> column -> cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", card, re.M):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append({row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows})
    return found


# The YAML head


def test_the_head_says_what_the_hub_asks_for(make):
    data = ModelCard(make()).data
    assert (data.license, data.language, data.model_name) == ("apache-2.0", "en", "hpd-minilm")
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert data.base_model == ["nreimers/MiniLM-L6-H384-uncased", "sentence-transformers/all-MiniLM-L6-v2"]
    assert data.datasets == ["org/texts"]
    assert ModelCard(make(changed(language="de"))).data.language == "de"
    assert {"hf_distill", "knowledge-distillation", "HPDLoss", "sentence-transformers"} <= set(data.tags)


def test_the_head_holds_the_students_score_of_each_set(make):
    results = ModelCard(make()).data.eval_results
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in results} == {
        ("STS12", "cosine_spearman", 70.13),
        ("STS-B", "cosine_spearman", 80.0),
    }
    assert {r.task_type for r in results} == {"STS"}


def test_the_head_holds_the_search_of_the_test_queries_and_not_that_of_dev(make):
    scores = {"dev_ndcg10": 70.111, "test_ndcg10": 61.456, "test_recall10": 75.0, "test_ndcg10@64": 58.0}
    (result,) = ModelCard(make(changed(rows__student__scores=scores))).data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("information-retrieval", "cosine_ndcg@10", 61.46)
    assert (result.dataset_type, result.dataset_name) == ("org/texts", "org/texts, test queries")


def test_the_head_is_the_first_thing_and_plain_yaml(make):
    card = make()
    assert card.startswith("---\n")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["model-index"][0]["name"] == "hpd-minilm"
    assert None not in head.values()


def test_what_is_no_repository_is_not_linked_as_one(make):
    run = {**RUN, "teacher": "teacher-folder", "student": {**RUN["student"], "base_model": "backbone-folder"}}
    data = ModelCard(make(changed(data__name="some definitions (a package)"), run)).data
    assert data.base_model is None
    assert data.datasets is None


def test_one_model_that_is_teacher_and_backbone_is_named_once(make):
    run = {**RUN, "student": {**RUN["student"], "base_model": RUN["teacher"]}}
    assert ModelCard(make(run=run)).data.base_model == [RUN["teacher"]]


def test_without_sts_there_are_no_results_in_the_head(make):
    scores = {"fidelity_spearman": 91.0, "fidelity_neighbours": 61.0}
    assert ModelCard(make(changed(rows__student__scores=scores))).data.eval_results is None


def test_the_paper_is_a_tag(make):
    assert "arxiv:2203.07687" in ModelCard(make()).data.tags


def test_no_teacher_has_no_licence_to_look_at(make):
    terms = changed(teacher_license=None)
    assert "The teacher's licence is unknown" in make(terms)
    assert "licence is unknown" not in make(terms, {**RUN, "teacher": None})


def test_results_of_another_teacher_are_refused_and_a_cut_vocabulary_is_none(student, tmp_path):
    student.settings["vocabulary"] = {"kept": 3, "of": 9, "coverage": 0.987654321, "languages": {}}
    student.save_pretrained(tmp_path)
    run = {"teacher": "org/teacher", "teacher_fingerprint": {"weights": "abc"}, "loss": {"name": "HPDLoss", "tau": 1 / 3}}
    (tmp_path / "distillation.json").write_text(json.dumps(run))
    facts = changed(student=student.settings, **run, rows__student__scores={"sts_avg": 1 / 3})
    write_results(tmp_path, facts)
    write_card(tmp_path, "me/x")
    write_results(tmp_path, {**facts, "teacher_fingerprint": {"weights": "xyz"}})
    with pytest.raises(ValueError, match=r"results.json in .* is of another student \(weights: 'xyz' there, 'abc' here\)"):
        write_card(tmp_path, "me/x")
    with pytest.raises(ValueError, match=r"nothing holds no student"):
        write_card(tmp_path / "nothing", "me/x")


# The text


def test_every_number_of_the_score_table_is_that_of_results_json(make, tmp_path):
    saved = json.loads(write_results(tmp_path, RESULTS).read_text(encoding="utf-8"))
    scores, dimensions = tables(make(saved))
    saved = saved["rows"]
    assert list(scores) == list(saved) == ["teacher", "student"]
    columns = [*HEADINGS, "STS12", "STS-B"]
    for name, row in saved.items():
        expected = {"params": f"{row['parameters'] / 1e6:.1f}M", "dim": str(row["dim"])}
        for column in columns:
            value = row["scores"].get(HEADINGS.get(column, f"sts_{column}"))
            expected[column] = "–" if value is None else f"{value:.2f}"
        assert scores[name] == expected
    assert dimensions == {"student": {"fidelity ρ @32": "80.13", "STS avg @32": "61.23"}}
    kept = {**RESULTS["rows"]["student"]["scores"], "sts_avg@int8": 75.049, "sts_avg@binary": 70.5}
    _, dimensions, precisions = tables(make(changed(rows__student__scores=kept)))
    assert list(dimensions["student"]) == ["fidelity ρ @32", "STS avg @32"]
    assert precisions == {"student": {"STS avg @int8": "75.05", "STS avg @binary": "70.50"}}


def test_changed_results_change_the_card(make):
    assert "| 70.13 |" in make()
    other = make(changed(rows__student__scores={**RESULTS["rows"]["student"]["scores"], "sts_STS12": 12.345}))
    assert "| 70.13 |" not in other
    assert tables(other)[0]["student"]["STS12"] == "12.35"
    assert ModelCard(other).data.eval_results[0].metric_value == 12.35


def test_data_settings_and_provenance_are_told(make):
    card = make()
    for words in (
        "17.4M parameters",
        "embeddings of 128 dimensions, distilled from `sentence-transformers/all-MiniLM-L6-v2`",
        "1987 held-out texts",
        "layers [0, 2, 5] of `nreimers/MiniLM-L6-H384-uncased`, mean pooling, Linear to 128 dimensions (identity)",
        "at most 256 tokens",
        "reduced by PCA to 128 dimensions (87.7 % of its variance, not centred)",
        "(https://huggingface.co/papers/2203.07687)",
        "org/texts: 204321 rows; 13 texts that stand in an evaluation set were left out",
        "steps 6402, epochs 2.0, batch 64, learning rate 0.0003, bf16 True.",
        "`…/hpd.py --sts …/sts`, commit 0123456789ab, seed 42, 2 cores of a CPU; python 3.11.7, torch 2.13.0.",
        "caching 512 s, training 2000 s.",
    ):
        assert words in card, words


@pytest.mark.parametrize(
    ("changes", "run"),
    [
        ({}, {}),
        ({"license": None, "language": None}, {}),
        ({"data__name": None, "provenance__commit": None}, {}),
        ({"projection": None}, {"projection_dim": None, "activation": "identity", "normalize": False}),
    ],
)
@pytest.mark.parametrize("measured", [True, False])
def test_nothing_is_left_to_be_filled_in(changes, run, measured, make):
    results = changed(**changes) if measured else None
    card = make(results, {**RUN, "student": {**RUN["student"], **run}}, projection="projection" not in changes)
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\b(None|null|nan|undefined|TODO|TBD)\b|More Information", card)
    assert not re.search(r" [,.;:](\s|$)|``(?!`)|\(\)|\[\]\(|\n{4}", card.replace("```", ""))
    ModelCard(card)


def test_headings_tables_and_images_stand_apart(make):
    lines = make().split("\n")
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith(("# ", "## ", "![")) or (line.startswith("|") and not before.startswith("|")):
            assert before == "", line
        if line.startswith(("# ", "## ", "![")) or (line.startswith("|") and not after.startswith("|")):
            assert after == "", line
    assert sum(line.startswith("```") for line in lines) == 12


def test_only_plots_that_are_there_are_shown(make):
    assert re.findall(r"!\[.*\]\((.*)\)", make(plots=("training.png",))) == ["training.png"]
    assert re.findall(r"!\[.*\]\((.*)\)", make()) == ["training.png", "dimensions.png"]


def test_the_projection_is_explained_where_there_is_one(make):
    assert "PCAProjection" not in make(projection=False)
    card = make(projection=True)
    assert 'PCAProjection.from_pretrained("hpd-minilm")(teacher_vectors)  # [N, D] -> [N, 128]' in card
    assert "(but see the projection above)" in card


def test_examples_in_the_card_are_python(make):
    examples = re.findall(r"```python\n(.*?)```", make(), re.S)
    assert len(examples) == 4
    for example in examples:
        compile(example, "card", "exec")


def test_a_run_without_a_licence_is_warned_of_in_log_and_card(make, caplog):
    with caplog.at_level(logging.WARNING):
        card = make(changed(license=None))
    assert "card: hpd-minilm has no licence (--license)" in caplog.text
    assert "No licence was given for this model" in card
    assert ModelCard(card).data.license is None


def test_what_a_teachers_licence_asks_for_is_said_in_log_and_card(make, caplog):
    with caplog.at_level(logging.WARNING):
        card = make(changed(teacher_license="cc-by-nc-4.0"))
    words = "The teacher's licence (cc-by-nc-4.0) forbids commercial use"
    assert words in card
    assert words in caplog.text
    caplog.clear()
    assert "forbids" not in make(changed(teacher_license="mit"))
    assert caplog.text == ""


def test_a_run_with_a_licence_is_not_warned_of(make, caplog):
    with caplog.at_level(logging.WARNING):
        assert "No licence" not in make()
    assert caplog.text == ""


def test_without_results_the_card_says_what_the_trainer_knows(make, caplog):
    with caplog.at_level(logging.WARNING):
        card = make(None, plots=())
    data = ModelCard(card).data
    assert data.base_model == ["nreimers/MiniLM-L6-H384-uncased", "sentence-transformers/all-MiniLM-L6-v2"]
    assert (data.eval_results, data.datasets, data.license) == (None, None, None)
    assert "embeddings of 128 dimensions, distilled from `sentence-transformers/all-MiniLM-L6-v2`" in card
    assert "* Loss: HPDLoss.\n" in card
    assert "What it keeps" not in card
    assert tables(card) == []
    assert re.findall(r"^## (.*)$", card, re.M) == ["Use", "How it was made", "Limits", "Citation"]
    assert caplog.text == ""
