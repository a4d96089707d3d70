import itertools

import numpy as np
import pytest

from hf_distill.evaluation.bitext import BitextEvaluator, load_bitext, mine_bitext, mining_scores, mining_threshold


PAIRS = {
    "deu": (["eins", "zwei", "drei", "vier"], ["one", "two", "three", "four"]),
    "fra": (["un", "deux"], ["one", "two"]),
}


def encoder(vectors):
    return lambda texts: np.array([vectors[text] for text in texts], np.float32)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_accuracy_of_both_directions_by_hand():
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    vectors = {"one": east, "two": north, "three": [1.0, 0.2], "four": west, "un": [3.0, 0.0], "deux": [5.0, 1.0]}
    vectors |= {"eins": east, "zwei": [0.1, 1.0], "drei": [0.1, 1.0], "vier": west}
    scores = BitextEvaluator(PAIRS, {"large": ["deu"]}, dims=[1])(encoder(vectors))
    assert scores["tatoeba:deu>eng"] == 75  # drei finds two
    assert scores["tatoeba:eng>deu"] == 75  # three finds eins; of zwei and drei, which are equal, two finds the first
    assert scores["tatoeba:fra>eng"] == 50
    assert scores["tatoeba:eng>fra"] == 100
    assert (scores["tatoeba:deu"], scores["tatoeba:fra"]) == (75, 75)
    assert (scores["tatoeba_avg"], scores["tatoeba_large"]) == (75, 75)
    first = {name: vector[:1] for name, vector in vectors.items()}
    alone = BitextEvaluator(PAIRS)(encoder(first))
    assert scores["tatoeba_avg@1"] == alone["tatoeba_avg"] != 75


def test_the_interval_is_over_pairs_of_each_language():
    pairs = {code: ([f"{code} {i}" for i in range(200)], [f"eng {i}" for i in range(200)]) for code in ("deu", "fra")}
    # A quarter of the German sentences stand where the next one's translation is; all of the French are right.
    turn = {f"deu {i}": i + 1 if i % 4 == 0 else i for i in range(200)}
    evaluator = BitextEvaluator(pairs)
    assert evaluator.intervals() == {}
    scores = evaluator(lambda texts: np.eye(201)[[turn.get(text, int(text.split()[1])) for text in texts]])
    low, high = evaluator.intervals()["tatoeba_avg"]
    assert low < scores["tatoeba_avg"] < high
    found = evaluator._last[0]
    half = 1.96 * found.std() / 200**0.5 / 2  # French does not vary
    assert (high - low) / 2 == pytest.approx(half, rel=0.2)


def test_a_sentence_is_encoded_once():
    seen = []

    def encode(texts):
        seen.extend(texts)
        return np.eye(len(texts))

    scores = BitextEvaluator(PAIRS)(encode)
    assert len(seen) == len(set(seen)) == 10
    assert scores["tatoeba_avg"] < 60


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((["a", "b"], ["x"]), "2 sentences and 1 translations"),
        ((["a", "b"], ["a", "b"]), "identical: True"),
        ((["a", " "], ["x", "y"]), "none of them empty"),
        (([], []), "0 sentences"),
    ],
)
def test_sides_that_are_no_translations_are_refused(sides, message):
    with pytest.raises(ValueError, match=message):
        BitextEvaluator({"deu": sides})


def test_groups_of_unknown_languages_are_refused():
    with pytest.raises(ValueError, match=r"groups name \['xxx'\]"):
        BitextEvaluator(PAIRS, {"small": ["xxx"]})


def test_both_layouts_are_read_alike(tmp_path):
    rows = [(code, *pair) for code, sides in PAIRS.items() for pair in zip(*sides, strict=True)]
    (tmp_path / "all.tsv").write_text("".join("\t".join(row) + "\n" for row in [("language", "source", "english"), *rows]))
    folder = tmp_path / "v1"
    folder.mkdir()
    for code, (first, second) in PAIRS.items():
        (folder / f"tatoeba.{code}-eng.{code}").write_text("\ufeff" + "\n".join(first) + "\n", encoding="utf-8")
        (folder / f"tatoeba.{code}-eng.eng").write_text("\n".join(second) + "\n")
    assert load_bitext(tmp_path / "all.tsv") == load_bitext(folder) == PAIRS
    assert list(load_bitext(folder, ["fra"])) == ["fra"]
    with pytest.raises(ValueError, match=r"but not \['ger'\]"):
        load_bitext(folder, ["ger", "fra"])


def lists(seed=0, known=12, others=9):
    """Return sources and targets, the first `known` of each a noisy pair, in another order on the right."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(known, 32))
    left = np.concatenate([shared, rng.normal(size=(others, 32))])
    right = np.concatenate([shared[::-1] + 0.4 * rng.normal(size=(known, 32)), rng.normal(size=(others + 4, 32))])
    return left, right, [(i, known - 1 - i) for i in range(known)]


@pytest.mark.parametrize("margin", ["ratio", "distance", "absolute"])
def test_mining_is_the_greedy_choice_by_margin(margin):
    left, right, _ = lists()
    near_left = [np.sort([cosine(a, b) for b in right])[-4:].mean() for a in left]
    near_right = [np.sort([cosine(a, b) for a in left])[-4:].mean() for b in right]

    def score(i, j):
        mean = (near_left[i] + near_right[j]) / 2
        value = cosine(left[i], right[j])
        return {"ratio": value / mean, "distance": value - mean, "absolute": value}[margin]

    candidates = set()
    for i in range(len(left)):
        close = np.argsort([-cosine(left[i], b) for b in right])[:4]
        candidates.add((i, int(max(close, key=lambda j: score(i, j)))))
    for j in range(len(right)):
        close = np.argsort([-cosine(a, right[j]) for a in left])[:4]
        candidates.add((int(max(close, key=lambda i: score(i, j))), j))
    expected, used = [], (set(), set())
    for i, j in sorted(candidates, key=lambda pair: -score(*pair)):
        if i not in used[0] and j not in used[1]:
            expected.append((i, j))
            used[0].add(i)
            used[1].add(j)
    scores, pairs = mine_bitext(left, right, margin=margin)
    assert [tuple(pair) for pair in pairs.tolist()] == expected
    assert scores.tolist() == pytest.approx([score(*pair) for pair in expected], rel=1e-5)


def test_the_threshold_is_that_of_the_best_f1_and_is_used_on_another_set():
    left, right, gold = lists()
    scores, pairs = mine_bitext(left, right)
    threshold = mining_threshold(scores, pairs, gold)
    values = [mining_scores(scores, pairs, gold, bound)["f1"] for bound in (-1, *scores.tolist(), 9)]
    assert mining_scores(scores, pairs, gold, threshold)["f1"] == max(values) > 90
    assert mining_scores(scores, pairs, gold, float("inf")) == {"precision": 0, "recall": 0, "f1": 0}
    other_left, other_right, other_gold = lists(seed=1)
    other = mining_scores(*mine_bitext(other_left, other_right), other_gold, threshold)
    right_ones = sum(map(other_gold.__contains__, map(tuple, mine_bitext(other_left, other_right)[1].tolist())))
    assert right_ones >= 10
    assert other["f1"] > 80


def test_a_threshold_does_not_divide_equal_scores():
    scores, pairs = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.5]), np.array([[i, i] for i in range(6)])
    gold = [(0, 0), (1, 1)]
    threshold = mining_threshold(scores, pairs, gold)
    assert threshold == pytest.approx(0.7)
    assert mining_scores(scores, pairs, gold, threshold)["f1"] == pytest.approx(200 / 3)


def test_measures_by_hand():
    pairs, gold = np.array([[0, 0], [1, 1], [2, 9], [3, 3]]), [(0, 0), (1, 1), (3, 3), (4, 4)]
    found = mining_scores(np.array([4.0, 3.0, 2.0, 1.0]), pairs, gold, 2.0)
    assert found == {"precision": pytest.approx(200 / 3), "recall": 50, "f1": pytest.approx(400 / 7)}
    assert mining_threshold(np.array([4.0, 3.0, 2.0, 1.0]), pairs, gold) == 1.0  # all four: f1 6 / 8


@pytest.mark.parametrize(("sizes", "margin"), [((3, 9), "ratio"), ((9, 9), "cosine")])
def test_mining_without_enough_neighbours_or_a_known_margin_is_refused(sizes, margin):
    sides = [np.eye(9)[:size] for size in sizes]
    with pytest.raises(ValueError, match="expected one of"):
        mine_bitext(*sides, margin=margin)
    assert len(list(itertools.chain(*sides))) == sum(sizes)
