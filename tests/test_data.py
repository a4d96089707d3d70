import gzip
import json
import random
import unicodedata

import pytest
from conftest import make_texts
from datasets import Dataset, IterableDataset

from hf_distill.data import (
    TrainingTexts,
    find_leaks,
    join_texts,
    load_texts,
    normal_form,
    require_texts,
    text_columns,
)


def write(path, content: str):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


# load_texts, join_texts

EXPECTED = [{"text": 'the "old house', "more": "é"}, {"text": "a, b", "more": "the sea"}]
CONTENT = {
    "tsv": 'text\tmore\nthe "old house\té\na, b\tthe sea\n',
    "csv": 'text,more\n"the ""old house",é\n"a, b",the sea\n',
    "jsonl": "\n".join(json.dumps(row) for row in EXPECTED),
    "json": json.dumps(EXPECTED),
}


@pytest.mark.parametrize("kind", [*CONTENT, "tsv.gz", "csv.gz", "jsonl.gz"])
def test_a_file_of_every_kind_gives_the_same_rows(kind, tmp_path):
    path = write(tmp_path / f"texts.{kind}", CONTENT[kind.removesuffix(".gz")])
    assert load_texts(path).to_list() == EXPECTED


def test_parquet_gives_the_same_rows(tmp_path):
    Dataset.from_list(EXPECTED).to_parquet(tmp_path / "texts.parquet")
    assert load_texts(str(tmp_path / "texts.parquet")).to_list() == EXPECTED


@pytest.mark.parametrize("kind", ["txt", "txt.gz"])
def test_a_text_file_has_a_text_a_line(kind, tmp_path):
    path = write(tmp_path / f"texts.{kind}", "the \"old house\na, b\tc\n'the sea'\n")
    assert load_texts(path).to_dict() == {"text": ['the "old house', "a, b\tc", "'the sea'"]}


def test_quotation_marks_in_tsv_swallow_no_rows(tmp_path):
    path = write(tmp_path / "texts.tsv", 'text\tscore\n"the sea\t1\nthe "sky\t2\nthe mat"\t3\n"a cat"\t4\n')
    assert load_texts(path)["text"][:] == ['"the sea', 'the "sky', 'the mat"', '"a cat"']


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_words_that_mean_missing_to_pandas_stay_texts(kind, tmp_path):
    words = ["null", "NA", "None", "nan", "a cat"]
    path = write(tmp_path / f"texts.{kind}", "\n".join(["text", *words]))
    assert load_texts(path)["text"][:] == words


def test_streaming_gives_the_same_rows(tmp_path):
    stream = load_texts(write(tmp_path / "texts.tsv", CONTENT["tsv"]), streaming=True)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == EXPECTED


def test_a_folder_gives_its_files_in_order_of_name_and_other_files_do_not_matter(tmp_path):
    for name in ("b.tsv", "a.tsv.gz", "README.md"):
        write(tmp_path / name, f"text\n{name}\n")
    assert load_texts(tmp_path)["text"][:] == ["a.tsv.gz", "b.tsv"]


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    write(tmp_path / "a.tsv", "text\na\n")
    write(tmp_path / "b.jsonl.gz", '{"text": "b"}')
    with pytest.raises(FileNotFoundError, match=r"holds files of 2 kinds \['jsonl', 'tsv'\].*Name one file"):
        load_texts(tmp_path)


def test_a_file_of_unknown_kind_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kinds \['None'\], expected one of .*'parquet'"):
        load_texts(write(tmp_path / "texts.docx", "text"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds files of 0 kinds"):
        load_texts(tmp_path / "empty")


@pytest.mark.parametrize("name", ["nobody/there-is-no-such-set", "texts.tsv"])
def test_what_is_nowhere_is_refused_with_the_remedy(name):
    message = f"load_texts: {name} is neither .*hf download --repo-type dataset {name}"
    with pytest.raises(FileNotFoundError, match=message):
        load_texts(name)


def test_a_data_set_of_the_hub_is_asked_for_by_subset_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr("hf_distill.data.load_dataset", lambda *args, **options: asked.append((args, options)))
    load_texts("org/texts", "pair", "validation", streaming=True)
    load_texts("org/texts")
    assert asked == [
        (("org/texts", "pair"), {"split": "validation", "streaming": True}),
        (("org/texts", None), {"split": "train", "streaming": False}),
    ]


# Columns and texts


def test_label_and_score_are_left_out_and_the_order_stays():
    columns = ("score", "b", "label", "a", "scores", "labels")
    assert text_columns(Dataset.from_dict({name: ["x"] for name in columns})) == ["b", "a"]


def test_named_columns_are_taken_in_the_order_named():
    dataset = Dataset.from_dict({"a": ["x"], "b": ["x"], "label": ["x"], "id": [1]})
    assert text_columns(dataset, ["label", "a"]) == ["label", "a"]


def test_a_stream_without_features_is_asked_for_its_first_row():
    stream = IterableDataset.from_generator(lambda: iter([{"text": "a cat", "score": 1.0}]))
    assert stream.column_names is None
    assert text_columns(stream) == ["text"]


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ({"sentence1": ["x"]}, ["sentense1"], r"'sentense1' is not in the data set.*Did you mean 'sentence1'\?"),
        ({"text": ["x"]}, ["zzz"], r"'zzz' is not in the data set, expected one of \['text'\]\. Set text_columns"),
        ({"a": ["x"], "id": [3], "b": ["x"]}, None, r"'id' is of type Value\('int64'\).*--text_columns a b$"),
        ({"a": [["x"]]}, None, "'a' is of type List.*expected strings"),
        ({"label": ["x"], "score": [1.0]}, None, r"only \['label', 'score'\], expected a text column"),
    ],
)
def test_columns_that_are_no_text_are_refused(columns, names, message):
    with pytest.raises(ValueError, match=message):
        text_columns(Dataset.from_dict(columns), names)


def test_empty_and_missing_texts_are_refused_with_their_rows():
    texts = ["a cat"] * 1500
    dataset = Dataset.from_dict({"a": texts, "b": texts})
    require_texts(dataset, ["a", "b"])
    for row, value in ((2, ""), (7, None), (1203, " \n")):
        texts[row] = value
    dataset = Dataset.from_dict({"a": ["a cat"] * 1500, "b": texts})
    require_texts(dataset, ["a"])
    with pytest.raises(ValueError, match=r"column 'b' has 3 empty or missing texts, in rows 2, 7, 1203, expected none"):
        require_texts(dataset, ["a", "b"])


def test_of_many_empty_texts_ten_rows_are_named():
    with pytest.raises(ValueError, match="has 12 empty .* rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 …,"):
        require_texts(Dataset.from_dict({"text": [""] * 12}), ["text"])


def test_a_data_set_without_rows_is_refused():
    with pytest.raises(ValueError, match="has no rows"):
        require_texts(Dataset.from_dict({"text": []}), ["text"])


# Leaks


@pytest.mark.parametrize(
    "text",
    ["the old house", "The Old House.", "the  old\thouse", "“The old-house”!", "THE_OLD HOUSE?", "theold house"],
)
def test_case_punctuation_and_white_space_do_not_hide_a_leak(text):
    assert normal_form(text) == "theoldhouse"
    assert find_leaks(Dataset.from_dict({"text": ["a cat", text]}), ["text"], ["The old house!"]) == ([1], [text])


def test_every_column_is_searched_for_leaks_and_a_row_is_named_once():
    dataset = Dataset.from_dict({"a": ["cat", "dog", "sea", "?!"], "b": ["Mat.", "sky", "Cat", ""]})
    rows, texts = find_leaks(dataset, ["a", "b"], ["cat", "MAT", "...", ""])
    assert rows == [0, 2]
    assert texts == ["cat", "Mat.", "Cat"]
    assert find_leaks(dataset, ["b"], ["dog"]) == ([], [])


def test_vowel_signs_and_tones_tell_words_apart_and_accents_are_one_however_they_are_written():
    hindi = ["मैं जाता हूँ।", "मैं जाती हूँ।", "वह जाता है।", "वह जाती है।", "वे जाते हैं।", "वह जाते है।"]
    assert len(set(map(normal_form, hindi))) == len(hindi)
    assert find_leaks(Dataset.from_dict({"text": hindi}), ["text"], ["वह जाता है"]) == ([2], ["वह जाता है।"])
    assert normal_form("มา") != normal_form("ม้า")
    composed, apart = (unicodedata.normalize(form, "Café!") for form in ("NFC", "NFD"))
    assert composed != apart
    assert normal_form(composed) == normal_form(apart) == "café" != normal_form("Cafe!")


@pytest.mark.parametrize("text", ["straße", "été", "猫が座る", "кошка 42"])
def test_other_scripts_are_compared_too(text):
    dataset = Dataset.from_dict({"text": ["a cat", f"{text.upper()}。"]})
    assert find_leaks(dataset, ["text"], [text])[0] == [1]
    assert find_leaks(dataset, ["text"], [text + " dog"])[0] == []


# Splits


def test_a_split_is_a_partition_of_what_does_not_leak():
    texts = make_texts(200)
    dataset = Dataset.from_dict({"text": [*texts, "A leaking text."], "score": [0.0] * 201})
    split = TrainingTexts.split(dataset, held_out=30, leaks_from=["a LEAKING text", "not here"])
    assert split.columns == split.train.column_names == ["text"]
    assert split.leaked == ["A leaking text."]
    assert len(split.held_out) == 30
    assert sorted([*split.train["text"], *split.held_out]) == sorted(texts)
    assert split.train["text"][:] != [text for text in texts if text not in split.held_out]  # shuffled


def test_at_most_a_fifth_is_held_out():
    split = TrainingTexts.split(Dataset.from_dict({"text": make_texts(50)}))
    assert (len(split.held_out), len(split.train)) == (10, 40)
    assert TrainingTexts.split(Dataset.from_dict({"text": make_texts(50)}), held_out=0).held_out == []


@pytest.mark.parametrize("seed", range(3))
def test_held_out_texts_are_in_no_other_row_and_no_other_column(seed):
    rng = random.Random(seed)
    words = ["cat", "Cat!", "dog", "sea", "sky", "mat", "rug", "tree"]
    columns = {name: [f"{rng.choice(words)} {rng.choice(words)}" for _ in range(120)] for name in ("a", "b")}
    split = TrainingTexts.split(Dataset.from_dict(columns), held_out=10, seed=seed)
    held_out = {normal_form(text) for text in split.held_out}
    assert len(split.held_out) == len(set(split.held_out)) > 5
    assert set(split.held_out) <= set(columns["a"])
    assert len(split.train) > 0
    assert not held_out & {normal_form(text) for text in split.all()}


def test_held_out_texts_without_a_letter_are_in_no_other_row_either():
    split = TrainingTexts.split(Dataset.from_dict({"text": ["😀 😀", "…"] * 20 + make_texts(10)}), held_out=10)
    assert {"😀 😀", "…"} & set(split.held_out)
    assert not set(split.held_out) & set(split.all())


def test_a_leaking_column_drops_the_whole_row():
    dataset = Dataset.from_dict({"a": [f"cat {i}" for i in range(10)], "b": [f"dog {i}" for i in range(10)]})
    split = TrainingTexts.split(dataset, held_out=0, leaks_from=["Dog 3", "cat 5"])
    assert sorted(split.train["a"]) == [f"cat {i}" for i in range(10) if i not in (3, 5)]
    assert sorted(split.leaked) == ["cat 5", "dog 3"]


def test_a_sample_is_random_and_leaves_what_is_held_out_as_it_is():
    dataset = Dataset.from_dict({"text": make_texts(200)})
    whole = TrainingTexts.split(dataset, held_out=20)
    sample = TrainingTexts.split(dataset, held_out=20, max_texts=60)
    assert sample.held_out == whole.held_out
    assert len(sample.train) == 60
    rows = sorted(dataset["text"][:].index(text) for text in sample.train["text"])
    assert len(set(rows)) == 60
    assert rows[-1] > 150
    assert rows[:3] != [0, 1, 2]
    assert len(TrainingTexts.split(dataset, held_out=20, max_texts=10_000).train) == 180


def test_the_same_seed_gives_the_same_split():
    dataset = Dataset.from_dict({"text": make_texts(100)})
    one, two, other = (TrainingTexts.split(dataset, held_out=20, max_texts=50, seed=seed) for seed in (1, 1, 2))
    assert one.held_out == two.held_out
    assert one.train["text"][:] == two.train["text"][:]
    assert one.facts(None)["sha256"] == two.facts(None)["sha256"] != other.facts(None)["sha256"]
    assert one.held_out != other.held_out


def test_a_split_checks_columns_and_texts():
    dataset = Dataset.from_dict({"text": ["a cat", " "]})
    with pytest.raises(ValueError, match=r"1 empty or missing texts, in rows 1"):
        TrainingTexts.split(dataset)
    with pytest.raises(ValueError, match="'txt' is not in the data set"):
        TrainingTexts.split(dataset, ["txt"])


def test_facts_count_what_was_kept_and_what_was_not():
    texts = make_texts(40)
    split = TrainingTexts.split(Dataset.from_dict({"text": texts, "more": texts}), ["text"], 5, leaks_from=texts[:3])
    facts = split.facts("some texts")
    digest = facts.pop("sha256")
    assert facts == {"name": "some texts", "rows": 32, "columns": ["text"], "held_out": 5, "leaked": 3}
    assert len(digest) == 64


def test_all_texts_come_column_after_column():
    split = TrainingTexts(Dataset.from_dict({"a": ["x", "y"], "b": ["z", "x"]}), ["a", "b"], [], [], None)
    assert list(split.all()) == ["x", "y", "z", "x"]
    assert [column[:] for column in split.text_columns()] == [["x", "y"], ["z", "x"]]


def test_the_digest_tells_where_a_text_ends():
    def digest(*texts):
        return TrainingTexts(Dataset.from_dict({"text": texts}), ["text"], [], [], None).facts(None)["sha256"]

    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab", "c") == digest("ab", "c") != digest("c", "ab")


def test_joined_texts_are_distinct_and_in_order():
    one = Dataset.from_dict({"text": ["a", "b ", "a"], "label": [1, 2, 3]})
    two = Dataset.from_dict({"x": ["b", "c"], "y": ["d", "a"], "z": ["e", "f"]})
    joined = join_texts([(one, None), (two, ["y", "x"])])
    assert joined.to_dict() == {"text": ["a", "b", "d", "c"]}
    with pytest.raises(ValueError, match="column 'w' is not in the data set"):
        join_texts([(one, None), (two, ["w"])])
    with pytest.raises(ValueError, match="'text' has 1 empty or missing texts, in rows 1"):
        join_texts([(Dataset.from_dict({"text": ["a", " "]}), None)])


def test_a_vocabulary_is_counted_on_all_texts_but_those_of_an_evaluation_set():
    texts = [f"text {i}" for i in range(40)]
    split = TrainingTexts.split(Dataset.from_dict({"text": texts}), held_out=5, max_texts=10, leaks_from=["Text 7!"])
    assert (len(split.train), len(split.held_out), split.leaked) == (10, 5, ["text 7"])
    assert sorted(split.corpus()) == sorted(set(texts) - {"text 7"})
    more = split.extended(["another text", split.held_out[0]])
    assert sorted(more.corpus()) == sorted({*texts, "another text"} - {"text 7"})
    assert len(list(more.all())) == 11
