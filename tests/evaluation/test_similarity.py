import gzip
import logging
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from datasets import Dataset

from hf_distill.evaluation import similarity
from hf_distill.evaluation.metrics import cosine_spearman as cosine_spearman_file
from hf_distill.evaluation.metrics import embedding_fidelity as embedding_fidelity_file
from hf_distill.evaluation.metrics.cosine_spearman import cosine_spearman
from hf_distill.evaluation.metrics.embedding_fidelity import embedding_fidelity
from hf_distill.evaluation.similarity import STS_DEV_SETS, STS_SETS, FidelityEvaluator, STSEvaluator, forms


COSINES = (0.1, 0.2, 0.4, 0.9)
# What people say of the four pairs, and 100 times Spearman's correlation with COSINES, by hand. In the last set ranks
# are 1.5, 1.5, 3, 4 and 1, 2, 3, 4: their deviations from 2.5 have the product 4.5 and the squares 4.5 and 5.
HUMAN = {
    "STS12": ([0.0, 1.0, 2.5, 5.0], 100.0),
    "STS13": ([5.0, 2.5, 1.0, 0.0], -100.0),
    "STS14": ([2, 1, 3, 4], 80.0),
    "STS15": ([2, 1, 4, 3], 60.0),
    "STS16": ([3, 4, 1, 2], -60.0),
    "STS-B": ([4, 1, 2, 3], -20.0),
    "SICK-R": ([1, 1, 2, 3], 100 * 4.5 / math.sqrt(4.5 * 5)),
}
TIED, TIED_SCORE = [1, 2, 1, 3], 100 * 3 / math.sqrt(4.5 * 5)  # ranks 1.5, 3, 1.5, 4: product 3


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write_sets(folder: Path) -> Path:
    """Write seven sets of four pairs; the first sentence is the same in all of them."""
    for name, (file, *_) in STS_SETS.items():
        rows = [f"the sea\t{name} number {i}\t{score}" for i, score in enumerate(HUMAN[name][0])]
        content = "\n".join(["sentence1\tsentence2\tscore", *rows, ""])
        (folder / f"{file}.tsv.gz").write_bytes(gzip.compress(content.encode()))
    return folder


def encode(texts: list[str]) -> np.ndarray:
    """Give "the sea" (2, 0, 0) and the i-th other sentence a vector at COSINES[i] to it; lengths differ."""

    def vector(text):
        if text == "the sea":
            return [2.0, 0.0, 0.0]
        i = int(text[-1])
        return [(i + 1) * COSINES[i], (i + 1) * math.sqrt(1 - COSINES[i] ** 2), 0.0]

    return np.array([vector(text) for text in texts], np.float32)


def naive_spearman(a, b) -> float:
    return 100 * np.corrcoef(scipy.stats.rankdata(a), scipy.stats.rankdata(b))[0, 1]


def cosine(a, b) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


# STS


def test_each_set_has_its_own_score_and_the_average_counts_each_once(tmp_path):
    scores = STSEvaluator(write_sets(tmp_path))(encode)
    expected = {f"sts_{name}": value for name, (_, value) in HUMAN.items()}
    expected["sts_avg"] = (100 - 100 + 80 + 60 - 60 - 20 + 94.8683298) / 7
    assert {name: value for name, value in scores.items() if "@" not in name} == pytest.approx(expected)
    assert all(type(value) is float for value in scores.values())


def test_the_interval_of_the_mean_is_over_pairs_of_each_set(tmp_path, rng):
    evaluator = STSEvaluator(write_sets(tmp_path))
    assert evaluator.intervals() == {}  # nothing was scored yet
    for name, (first, second, _) in evaluator.sets.items():  # larger sets, whose scores follow the cosines but for noise
        evaluator.sets[name] = (first * 50, second * 50, np.tile(COSINES, 50) + rng.normal(scale=0.3, size=200))
    scores = evaluator(encode)
    assert evaluator.intervals().keys() == {"sts_avg"}
    low, high = evaluator.intervals()["sts_avg"]
    assert low < scores["sts_avg"] < high
    single = STSEvaluator(tmp_path, sets={"STS-B": STS_SETS["STS-B"]})
    single.sets["STS-B"] = evaluator.sets["STS-B"]
    score = single(encode)["sts_STS-B"]
    left, right = single.intervals()["sts_STS-B"]
    assert left < score < right
    assert 2 < (right - left) / (high - low) < 3.2  # seven sets of one spread: narrower by the root of seven, 2.65


def test_what_is_all_the_same_agrees_with_nothing(rng):
    assert cosine_spearman(np.ones((4, 2)), np.ones((4, 2)), [1, 2, 3, 4]) == 0
    assert embedding_fidelity(np.ones((20, 2)), rng.normal(size=(20, 3)))["fidelity_spearman"] == 0


def test_tied_scores_share_their_rank():
    first = np.tile([1.0, 0.0], (4, 1))
    second = np.array([[c, math.sqrt(1 - c * c)] for c in COSINES])
    assert cosine_spearman(first, second, TIED) == pytest.approx(TIED_SCORE)
    assert cosine_spearman(7 * first, second, TIED) == pytest.approx(TIED_SCORE)  # lengths do not matter


def test_first_dimensions_are_scored_as_embeddings_of_their_own(tmp_path, rng):
    evaluator = STSEvaluator(write_sets(tmp_path), dims=[2, 5, 8, 9])
    vectors = {text: rng.normal(size=8) for text in evaluator.texts()}
    scores = evaluator(lambda texts: np.stack([vectors[text] for text in texts]))
    for dim in (2, 5, 8):
        expected = []
        for name, (human, _) in HUMAN.items():
            pairs = [("the sea", f"{name} number {i}") for i in range(4)]
            expected.append(naive_spearman([cosine(vectors[a][:dim], vectors[b][:dim]) for a, b in pairs], human))
        assert scores[f"sts_avg@{dim}"] == pytest.approx(np.mean(expected)), dim
    assert scores["sts_avg@8"] == scores["sts_avg"] != scores["sts_avg@2"]
    assert "sts_avg@9" not in scores  # there are only eight
    assert len(scores) == 7 + 1 + 3 + 2


def test_every_sentence_is_encoded_once(tmp_path):
    calls = []
    evaluator = STSEvaluator(write_sets(tmp_path))
    evaluator(lambda texts: calls.append(texts) or encode(texts))
    assert len(calls) == 1
    assert len(calls[0]) == len(set(calls[0])) == 7 * 4 + 1
    assert calls[0] == evaluator.texts()


def test_a_missing_set_is_refused(tmp_path):
    (write_sets(tmp_path) / "sts14.tsv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"0 files sts14\.\* in .*'sts13.tsv.gz'.*read as the mean of all sets"):
        STSEvaluator(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"0 files sts12\.\* in .*no folder"):
        STSEvaluator(tmp_path / "nowhere")


def test_two_files_of_one_set_are_refused(tmp_path):
    (write_sets(tmp_path) / "stsb-test.csv").write_text("sentence1,sentence2,score\n")
    with pytest.raises(FileNotFoundError, match=r"2 files stsb-test\.\*"):
        STSEvaluator(tmp_path)


def test_a_set_without_scores_is_refused(tmp_path):
    (write_sets(tmp_path) / "sts16.tsv.gz").write_bytes(gzip.compress(b"sentence1\ts2\tgold\na\tb\t1\n"))
    with pytest.raises(ValueError, match=r"STS16 has columns \['sentence1', 's2', 'gold'\], .*\['score', 'sentence2'\]"):
        STSEvaluator(tmp_path)


def test_other_sets_can_be_scored_in_any_format(tmp_path):
    rows = [f'{{"sentence1": "the sea", "sentence2": "n {i}", "score": {4 - i}}}' for i in range(4)]
    (tmp_path / "stsb-dev.jsonl").write_text("\n".join(rows))
    assert STSEvaluator(tmp_path, sets=STS_DEV_SETS)(encode) == pytest.approx({"sts_STS-B dev": -100})


def test_pairs_of_a_test_set_are_not_chosen_on(tmp_path, caplog):
    pairs = [("the sea", "n 0", 4), ("a 1", "C, 3", 9), ("the sea", "n 1", 3), ("the sea", "n 2", 2), ("c 2", "d 3", 0)]
    lines = ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t{score}" for a, b, score in pairs)]
    (tmp_path / "stsb-dev.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "sts12.tsv").write_text("sentence1\tsentence2\tscore\nc 3\ta  1\t1\nd\tother\t2\nc 2\tD 3\t3\nx\ty\t3\n")
    test = STSEvaluator(tmp_path, {"STS12": STS_SETS["STS12"]})
    dev = STSEvaluator(tmp_path, STS_DEV_SETS)
    before = dev.texts()
    whole = dev(encode)
    with caplog.at_level(logging.INFO, "hf_distill"):
        dev.leave_out([test])
    assert "STS-B dev: 2 of 5 pairs stand in test sets and are not scored" in caplog.text
    assert dev(encode) == pytest.approx({"sts_STS-B dev": -100})  # n 0, n 1, n 2
    assert whole["sts_STS-B dev"] > -90
    assert dev.texts() == before  # no training may hold them all the same
    with pytest.raises(ValueError, match="0 of 3 pairs of STS-B dev are in no test set"):
        dev.leave_out([STSEvaluator(tmp_path, STS_DEV_SETS)])


def test_a_missing_score_is_named(tmp_path):
    rows = ['{"sentence1": "a", "sentence2": "b", "score": 1.5}', '{"sentence1": "a", "sentence2": "b", "score": null}']
    (tmp_path / "stsb-dev.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="STS-B dev has no score in row 1"):
        STSEvaluator(tmp_path, sets=STS_DEV_SETS)


def test_sets_from_the_hub_are_asked_for_by_their_id():
    with pytest.raises(FileNotFoundError, match=r"mteb/sts12-sts.*split 'test'"):
        STSEvaluator()


def test_the_dev_set_from_the_hub_is_not_the_test_set(monkeypatch):
    asked, rows = [], Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "score": [1.0]})
    monkeypatch.setattr(similarity, "load_texts", lambda source, split="train": asked.append((source, split)) or rows)
    STSEvaluator(sets=STS_DEV_SETS)
    STSEvaluator()
    assert asked[0] == ("mteb/stsbenchmark-sts", "validation")
    assert asked[1:] == [(names[1], "test") for names in STS_SETS.values()]


# Fidelity


def turned(vectors, rng):
    rotation, _ = np.linalg.qr(rng.normal(size=(vectors.shape[1], vectors.shape[1])))
    return vectors @ rotation


def on_a_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


# Nearest neighbours 1, 0, 1, 2 and 1, 2, 1, 2: three of four agree. The angles of the pairs 01, 02, 03, 12, 13, 23 are
# 10, 44, 90, 34, 80, 46 and 40, 51, 90, 11, 50, 39, their ranks 1, 3, 6, 2, 5, 4 and 3, 5, 6, 1, 4, 2: squared
# differences sum to 14, so Spearman's correlation is 1 - 6 * 14 / 210.
TEACHER, STUDENT = on_a_circle(0, 10, 44, 90), on_a_circle(0, 40, 51, 90)
BY_HAND = {"fidelity_spearman": 60.0, "fidelity_neighbours": 75.0}


@pytest.mark.parametrize("change", [lambda x, rng: x, turned, lambda x, rng: x * rng.uniform(0.1, 9, (len(x), 1))])
def test_the_teacher_itself_turned_or_stretched_agrees_wholly(change, rng):
    vectors = rng.normal(size=(40, 6))
    scores = embedding_fidelity(change(vectors, rng), vectors)
    assert scores == pytest.approx({"fidelity_spearman": 100, "fidelity_neighbours": 100}, abs=1e-3)


def test_scores_are_those_by_hand():
    assert embedding_fidelity(STUDENT, TEACHER, neighbours=1) == pytest.approx(BY_HAND)


def test_scores_equal_a_naive_derivation(rng):
    student, teacher = rng.normal(size=(25, 3)), rng.normal(size=(25, 7))
    near, cosines = [], []
    for vectors in (student, teacher):
        matrix = [[cosine(a, b) for b in vectors] for a in vectors]
        near.append([sorted((j for j in range(25) if j != i), key=lambda j: -matrix[i][j])[:4] for i in range(25)])
        cosines.append([matrix[i][j] for i in range(25) for j in range(i)])
    shared = sum(len(set(a) & set(b)) for a, b in zip(*near, strict=True)) / (25 * 4)
    expected = {"fidelity_spearman": naive_spearman(*cosines), "fidelity_neighbours": 100 * shared}
    assert embedding_fidelity(student, teacher, neighbours=4) == pytest.approx(expected, abs=1e-3)


def test_too_few_texts_are_refused(rng):
    vectors = rng.normal(size=(12, 4))
    embedding_fidelity(vectors, vectors)
    with pytest.raises(ValueError, match="11 student and 11 teacher vectors, expected as many of both and more than 11"):
        embedding_fidelity(vectors[:11], vectors[:11])
    with pytest.raises(ValueError, match="12 student and 11 teacher"):
        embedding_fidelity(vectors, vectors[:11])


def test_the_evaluator_encodes_the_held_out_texts_and_their_first_dimensions(rng):
    texts = [f"text {i}" for i in range(20)]
    vectors, teacher = rng.normal(size=(20, 6)), rng.normal(size=(20, 9))
    evaluator = FidelityEvaluator(texts, teacher, dims=[2, 7], neighbours=3)
    scores = evaluator(lambda asked: vectors if asked == texts else None)
    whole, cut = embedding_fidelity(vectors, teacher, 3), embedding_fidelity(vectors[:, :2], teacher, 3)
    assert {key: value for key, value in scores.items() if key[-1] not in "8y"} == {
        **whole,
        **{f"{name}@2": value for name, value in cut.items()},
    }
    assert whole["fidelity_spearman"] != cut["fidelity_spearman"]


def test_students_and_teachers_are_scored_as_they_are(student, cache, texts):
    scores = FidelityEvaluator(texts, cache.encode(texts), dims=[8])(student.encode)
    endings = ("", "@8", "@int8", "@binary")
    assert list(scores) == [f"fidelity_{score}{form}" for form in endings for score in ("spearman", "neighbours")]
    assert scores["fidelity_spearman"] == pytest.approx(scores["fidelity_spearman@int8"], abs=1)
    assert scores["fidelity_spearman@binary"] < scores["fidelity_spearman@int8"] - 1
    assert FidelityEvaluator(texts, cache.encode(texts))(cache.encode)["fidelity_neighbours"] == 100


def test_what_is_kept_to_save_space_by_hand():
    found = forms(np.array([[1.0, -4.0], [-0.5, 3.0], [0.0, 0.0]], np.float32), dims=[1, 3])
    assert list(found) == ["", "@1", "@int8", "@binary"]
    assert found["@1"].tolist() == [[1.0], [-0.5], [0.0]]
    # Steps of 1/127 and 4/127: -0.5 is 63.5 steps, rounded to the even 64; 3 is 95.25.
    assert found["@int8"] == pytest.approx(np.array([[1, -4], [-64 / 127, 95 * 4 / 127], [0, 0]]))
    assert found["@binary"].tolist() == [[1, -1], [-1, 1], [-1, -1]]


# As modules of `evaluate`


@pytest.fixture
def load(monkeypatch):
    """`evaluate.load`, with every connection refused."""
    import evaluate

    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return lambda module, **options: evaluate.load(module.__file__, **options)


def test_the_sts_metric_opens_from_its_file(load):
    metric = load(cosine_spearman_file)
    assert not type(metric).__module__.startswith("hf_distill")  # a copy of the file, which therefore stands alone
    pairs = [[[1.0, 0.0], [c, math.sqrt(1 - c * c)]] for c in COSINES]
    assert metric.compute(predictions=pairs, references=TIED) == {"cosine_spearman": pytest.approx(TIED_SCORE)}


def test_the_fidelity_metric_opens_from_its_file_and_takes_its_option(load):
    metric = load(embedding_fidelity_file)
    assert not type(metric).__module__.startswith("hf_distill")
    found = metric.compute(predictions=STUDENT.tolist(), references=TEACHER.tolist(), neighbours=1)
    assert found == pytest.approx(BY_HAND)


@pytest.mark.parametrize("module", [cosine_spearman_file, embedding_fidelity_file])
def test_metrics_need_nothing_of_this_package(module):
    source = Path(module.__file__).read_text(encoding="utf-8")
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.lstrip().startswith(("import ", "from "))}
    assert imported == {"datasets", "evaluate", "numpy", "scipy"}


def test_metrics_can_be_fed_in_batches(load):
    metric = load(embedding_fidelity_file, keep_in_memory=True)
    for rows in (slice(0, 3), slice(3, 4)):
        metric.add_batch(predictions=STUDENT[rows].tolist(), references=TEACHER[rows].tolist())
    assert metric.compute(neighbours=1) == pytest.approx(BY_HAND)


@pytest.mark.parametrize("missing", ["evaluate", "scipy"])
def test_without_the_extra_the_message_names_it(missing):
    script = (
        "import sys, types\n"
        "sys.modules['evaluate'] = types.ModuleType('evaluate')\n"  # the real one takes ten seconds
        f"sys.modules[{missing!r}] = None\n"
        "import hf_distill.evaluation"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    message = f"ImportError: hf_distill.evaluation needs {missing}. Install it with: pip install 'hf_distill[eval]'"
    assert done.stderr.strip().splitlines()[-1] == message
