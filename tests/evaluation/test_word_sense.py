import math

import numpy as np
import pytest
import torch
from conftest import make_backbone, make_texts, make_tokenizer
from typer.testing import CliRunner

from hf_distill.cli import app
from hf_distill.evaluation.explain import explain
from hf_distill.evaluation.word_sense import (
    ClassificationEvaluator,
    WiCEvaluator,
    best_threshold,
    sense_purity,
    sense_vectors,
    state_errors,
    statistics,
    word_place,
    word_similarity,
    word_states,
    word_tokens,
)
from hf_distill.sense_builder import build_senses
from hf_distill.senses import SenseDictionary
from hf_distill.token_teacher import SenseTeacher, TokenTeacher


@pytest.fixture
def dictionary():
    """cat has two senses, dog one, mat three; all else none."""
    tokenizer = make_tokenizer()
    known = {
        "cat": ([[1.0, 0.0], [0.0, 1.0]], [1, 3]),
        "dog": ([[0.0, 2.0]], [5]),
        "mat": ([[1.0, 1.0], [1.0, -1.0], [3.0, 0.0]], [1, 1, 1]),
    }
    rows = [known.get(word, ([], [])) for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    senses = torch.tensor([sense for own, _ in rows for sense in own])
    offsets = torch.tensor([0, *np.cumsum([len(own) for own, _ in rows])])
    counts = torch.tensor([count for _, own in rows for count in own])
    return SenseDictionary(senses, offsets, counts, {"teacher": "t"}, tokenizer)


def write(path, *rows):
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def test_words_are_as_similar_as_their_closest_senses(dictionary, tmp_path):
    source = write(
        tmp_path / "words.tsv",
        ("word1", "word2", "score", "set"),
        ("cat", "dog", 9, "A"),  # 1: the second sense of cat
        ("cat", "mat", 7, "A"),  # 1 / 1
        ("dog", "mat", 8, "A"),  # 0.707
        ("cat", "sky", 1, "A"),  # no sense
        ("cat", "dog", 1, "B"),
    )
    many, one = (word_similarity(sense_vectors(dictionary, single), source) for single in (False, True))
    # Several: cosines 1, 1, 0.707 against 9, 7, 8. One: cat (0.25, 0.75), mat (5/3, 0): 0.949, 0.316, 0 against the same.
    assert many["words_A"] == pytest.approx(0.0)
    assert one["words_A"] == pytest.approx(50.0)
    assert many["words_known"] == pytest.approx(60.0)  # three of five; B has too few pairs to correlate
    assert many["words_avg"] == many["words_A"]
    assert "words_B" not in many
    with pytest.raises(ValueError, match="no pair"):
        word_similarity(lambda word: np.empty((0, 2)), source)


def test_a_word_of_several_tokens_is_the_mean_of_them(dictionary):
    both = sense_vectors(dictionary)("cat dog")
    assert both == pytest.approx(np.array([[(0.25 + 0.0) / 2, (0.75 + 2.0) / 2]]))
    assert sense_vectors(dictionary)("cat").shape == (2, 2)
    assert sense_vectors(dictionary)("cat sky").shape == (0, 2)


def test_the_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values, labels = rng.integers(0, 6, 12) / 5, rng.random(12) < 0.5
        found = ((values >= best_threshold(values, labels)) == labels).mean()
        tried = [((values >= bound) == labels).mean() for bound in (*np.unique(values), 9.0)]
        assert found == max(tried)


def test_words_in_context_are_told_apart_by_a_threshold_of_the_tuning_split(tmp_path):
    head = ("word", "sentence1", "sentence2", "index1", "index2", "label", "from_wordnet")
    # The made encoder gives a word the angle that stands behind it, so the cosine is known.
    write(tmp_path / "train.tsv", head, ("cat", "a cat0", "cat10 sat", 1, 0, 1, 0), ("cat", "cat0 x", "the cat80", 0, 1, 0, 0))
    write(
        tmp_path / "test.tsv",
        head,
        ("cat", "cat0", "b cat30", 0, 1, 1, 2),
        ("cat", "cat0", "cat60", 0, 0, 1, 0),  # 0.5 is under the threshold, (cos 10 + cos 80) / 2 = 0.58
        ("cat", "cat0", "cat40", 0, 0, 0, 0),
        ("cat", "cat0", "cat70", 0, 0, 0, 0),
    )

    def encode(texts, places):
        angles = [int(text[first:last].removeprefix("cat")) for text, (first, last) in zip(texts, places, strict=True)]
        return [[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in angles]

    assert WiCEvaluator(tmp_path)(encode) == {"wic": 50.0, "wic_new": pytest.approx(100 / 3)}
    assert WiCEvaluator(tmp_path, test="train")(encode)["wic"] == 100
    assert word_place("the old cat sat", 2) == (8, 11)
    assert "a cat0" in WiCEvaluator(tmp_path).texts()
    write(tmp_path / "test.tsv", ("word", "label"), ("cat", 1))
    with pytest.raises(ValueError, match="but not"):
        WiCEvaluator(tmp_path)


def test_the_state_of_a_word_is_the_mean_of_its_tokens(backbone_folder):
    teacher = TokenTeacher(backbone_folder, dtype="float32", max_length=8)
    texts = ["the old cat sat", "cat", "a dog ran on the old red house tree"]
    places = [(4, 11), (0, 3), (30, 35)]  # "old cat"; "cat"; a word beyond the limit
    found = word_states(teacher.tokenizer, teacher.states, batch_size=2)(texts, places)
    alone = [teacher.states([text])[0][0] for text in texts]
    assert found[0] == pytest.approx(alone[0][2:4].mean(0).numpy(), abs=1e-5)
    assert found[1] == pytest.approx(alone[1][1].numpy(), abs=1e-5)
    assert found[2] == pytest.approx(alone[2].mean(0).numpy(), abs=1e-5)


def test_state_errors_are_shares_of_the_variance_over_real_tokens():
    # The teacher says 0, 2 and, in another batch, 4: mean 2, variance 4 + 0 + 4. Padding holds what would show.
    def teacher(batch):
        one = len(batch) == 1
        states, mask = ([[[4.0], [90.0]]], [[1, 0]]) if one else ([[[0.0], [70.0]], [[2.0], [80.0]]], [[1, 0], [1, 0]])
        return torch.tensor(states), torch.tensor(mask)

    def states(batch):
        wanted, mask = teacher(batch)
        return wanted, torch.full_like(wanted, 2.0), wanted + 1, mask

    assert state_errors(states, teacher, ["a", "b", "c"], batch_size=2) == pytest.approx([0, 100, 100 * 3 / 8])


def test_classes_are_found_from_few_labels_and_from_all(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"{label} {i}", label) for label in ("x", "y") for i in range(30)]
    write(tmp_path / "made-train.tsv", ("text", "label"), *rows)
    write(tmp_path / "made-test.tsv", ("text", "label"), *((f"{text} t", label) for text, label in rows[::3]))
    write(tmp_path / "made-dev.tsv", ("text", "label"), ("x d", "y"))

    def encode(texts):
        return np.array([[3.0 if text[0] == "x" else -3.0, 0.0] for text in texts]) + rng.normal(size=(len(texts), 2))

    scores = ClassificationEvaluator(tmp_path, "made", draws=3)(encode)
    assert scores["made_full"] > 95
    assert scores["made_few"] > 90
    assert set(scores) == {"made_few", "made_few_std", "made_full"}
    assert ClassificationEvaluator(tmp_path, "made", draws=3)(lambda texts: np.zeros((len(texts), 2)))["made_full"] == 50
    assert ClassificationEvaluator(tmp_path, "made", "dev", draws=1)(encode)["made_full"] == 0
    read = []

    def still(texts):
        read.extend(texts)
        return np.array([[len(text), text[0] == "x"] for text in texts], float)

    every = ClassificationEvaluator(tmp_path, "made", draws=2, shots=3)(still)
    assert len(read) == 60 + 20
    read.clear()
    few = ClassificationEvaluator(tmp_path, "made", draws=2, shots=3, full=False)(still)
    assert few == {key: value for key, value in every.items() if key != "made_full"}
    assert 6 + 20 < len(read) <= 12 + 20
    with pytest.raises(FileNotFoundError, match=r"0 files other-train\.\*"):
        ClassificationEvaluator(tmp_path, "other")


def test_a_word_has_the_tokens_that_it_has_inside_a_text():
    class Pieces:
        """Knows a word behind a space as one token, and at the beginning of a text as two, or as a rare one."""

        all_special_ids = ()

        def __call__(self, text, add_special_tokens):
            return {"input_ids": {" cat": [3], "cat": [0, 1], " dog": [4], "dog": [2], " fox": [0, 1], "fox": [2]}[text]}

    counts = torch.tensor([5, 5, 1, 7, 9])
    known = SenseDictionary(torch.ones(5, 2), torch.arange(6), counts, {}, Pieces())
    assert [word_tokens(known, word) for word in ("cat", "dog", "fox")] == [[3], [4], [2]]


def test_statistics_count(dictionary):
    found = statistics(dictionary, ["cat dog sky", "mat"])
    assert found == {"mb": (12 * 2 + 8 * (len(dictionary.offsets) + 6)) / 1e6, "tokens": 3, "senses": 6, "without_sense": 25.0}


class Angles:
    """A teacher of two dimensions that knows the sense of "cat" by the word behind it."""

    def __init__(self, dictionary):
        self.dictionary, self.select, self.teacher = dictionary, "dot", self
        self.tokenizer = dictionary.tokenizer

    def read(self, batch):
        inputs = self.tokenizer(batch, padding=True, return_tensors="pt")
        first = torch.tensor([[1.0, 0.0] if "house" in text else [0.0, 1.0] for text in batch])
        return first[:, None].expand(-1, inputs["input_ids"].shape[1], -1), inputs["input_ids"], inputs["attention_mask"]


def test_purity_is_that_of_definitions_and_beside_it_what_chance_gives(dictionary):
    rows = [("cat", f"a cat house {word}", 1) for word in ("a", "on", "the", "red")]
    rows += [("cat", f"a cat {word}", 2) for word in ("a", "on", "the", "old house")]  # the last one has the wrong sense
    rows += [("dog", "a dog", 3), ("cat dog", "a cat dog", 4)]  # one definition; two tokens
    found = sense_purity(Angles(dictionary), rows, draws=200)
    assert (found["purity"], found["contexts"]) == (100 * 7 / 8, 8)
    # Five and three contexts, dealt at random to four of each: the mean of (max + max) over the 56 deals.
    deals = [(h, math.comb(4, h) * math.comb(4, 5 - h)) for h in range(1, 5)]
    mean = sum(ways * (max(h, 5 - h) + max(4 - h, h - 1)) for h, ways in deals) / sum(ways for _, ways in deals)
    assert found["purity_by_chance"] == pytest.approx(100 * mean / 8, abs=2)
    assert sense_purity(Angles(dictionary), rows[-2:]) == {}


# Looking into a dictionary


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    source = make_backbone(folder / "teacher", seed=5)
    teacher, texts = TokenTeacher(source, dtype="float32"), make_texts(300)
    found = build_senses(teacher, texts, folder / "states", k=3)
    found.save_pretrained(folder / "senses")
    (folder / "texts.txt").write_text("\n".join(texts))
    return folder, teacher, texts, found


def test_a_word_is_explained_by_its_contexts_and_neighbours(made, tmp_path):
    _, teacher, texts, dictionary = made
    found = explain("cat", dictionary, teacher, texts, contexts=2, neighbours=4, most=60)
    assert len(found.rows) == 3
    assert len(found.states) == 60 == sum(row["found"] for row in found.rows)
    token = dictionary.tokenizer.convert_tokens_to_ids("cat")
    source = SenseTeacher(teacher, dictionary)
    for row in found.rows:
        own = found.states[found.chosen == row["sense"]]
        sense = dictionary.of(token)[row["sense"]].numpy()
        if len(own):
            closest = min(np.linalg.norm(own - sense, axis=1))
            text = row["contexts"][0].replace("[cat]", "cat")
            whole = next(candidate for candidate in texts if text in candidate)
            states, ids, _ = source.teacher.read([whole])
            distances = (states[0][ids[0] == token] - torch.from_numpy(sense)).norm(dim=1)
            assert distances.min().item() == pytest.approx(closest, abs=1e-4)
        cosines = torch.cosine_similarity(dictionary.senses, dictionary.of(token)[row["sense"]][None])
        best = {}
        for other in range(len(dictionary.tokenizer)):
            first, last = int(dictionary.offsets[other]), int(dictionary.offsets[other + 1])
            if last > first and other != token and other not in dictionary.tokenizer.all_special_ids:
                best[dictionary.tokenizer.decode([other])] = cosines[first:last].max().item()
        assert row["neighbours"] == sorted(best, key=best.get, reverse=True)[:4]
    assert "| cat 0 " in found.table()
    found.draw(tmp_path / "cat.png")
    assert (tmp_path / "cat.png").stat().st_size > 5000
    alone = explain("cat", dictionary)
    assert [row["found"] for row in alone.rows] == [0, 0, 0]
    with pytest.raises(ValueError, match="occurs 0 times"):
        alone.draw(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"is \['cat', 'dog'\] to the dictionary's tokenizer, expected one token"):
        explain("cat dog", dictionary)


def test_the_terminal_explains_words(made, tmp_path):
    folder, _, _, _ = made
    run = CliRunner().invoke
    known = ["--teacher", str(folder / "teacher"), "--texts", str(folder / "texts.txt"), "--plot", str(tmp_path)]
    done = run(app, ["explain", str(folder / "senses"), "cat", "dog", *known])
    assert done.exit_code == 0, done.output
    assert "[cat]" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "dog.png"]
    assert run(app, ["explain", str(folder / "senses"), "cat", *known[:2]]).exit_code == 1
    other = make_backbone(tmp_path / "other", seed=6)
    assert run(app, ["explain", str(folder / "senses"), "cat", "--teacher", other, *known[2:]]).exit_code == 1
