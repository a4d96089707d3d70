import copy
import logging
import random

import pytest
import torch
from conftest import make_texts
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, BertConfig, BertTokenizer, Gemma3TextConfig, PreTrainedTokenizerFast, XLMRobertaConfig

from hf_distill import StudentModel
from hf_distill.build import narrow_embeddings
from hf_distill.layout import check_layout
from hf_distill.vocabulary import prune_vocabulary, vocabulary_for


PIECES = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] cat cats dog dogs hot hotdog ##s ##dog ##house sun sea".split()
LETTERS = sorted(set("acdeghnostuy"))
VOCABULARY = [*PIECES, *LETTERS, *(f"##{letter}" for letter in LETTERS if letter != "s")]


@pytest.fixture
def wordpiece(tmp_path):
    """Return a student with a WordPiece tokenizer whose special tokens do not stand first."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    BertTokenizer(tokenizer_object=tokenizer).save_pretrained(tmp_path / "backbone")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "backbone")
    return StudentModel.from_backbone(str(tmp_path / "backbone"), projection_dim=4, dropout=0.0)


def test_pruned_vocabulary_embeds_every_surviving_text_as_before(wordpiece, tmp_path):
    corpus = ["hotdog cat", "dogs", "the sun"]  # hotdog, cat, dogs, sun survive; "the" is spelt t ##h ##e
    texts = [*corpus, "cat [UNK] hotdog", "sun sun dogs cats"]  # the last: cats is cat ##s now
    before, ids = wordpiece.encode(texts), wordpiece.tokenizer(texts)["input_ids"]
    table = wordpiece.backbone.get_input_embeddings().weight.clone()
    report = prune_vocabulary(wordpiece, corpus)
    kept = wordpiece.tokenizer.convert_ids_to_tokens(range(report.kept))
    assert kept == [
        token for token in VOCABULARY if token not in ("[unused0]", "cats", "dog", "hot", "##dog", "##house", "sea")
    ]
    assert (report.of, report.coverage, report.whole_texts) == (len(VOCABULARY), 1.0, 1.0)
    assert report.parameters == 7 * 8
    new = wordpiece.tokenizer(texts)["input_ids"]
    words = [[kept[i] for i in row] for row in new]
    assert words[:4] == [[VOCABULARY[i] for i in row] for row in ids[:4]]
    assert words[4] == ["[CLS]", "sun", "sun", "dogs", "cat", "##s", "[SEP]"]
    assert torch.equal(wordpiece.backbone.get_input_embeddings().weight[new[0]], table[ids[0]])
    assert wordpiece.encode(texts)[:4] == pytest.approx(before[:4], abs=1e-6)
    wordpiece.save_pretrained(tmp_path / "student")
    check_layout(tmp_path / "student", ("hotdog cat", "the sun " * 30, "zebra"))
    opened = StudentModel.from_pretrained(tmp_path / "student")
    assert opened.config.vocab_size == report.kept
    assert opened.settings["vocabulary"]["kept"] == report.kept
    assert opened.encode(texts) == pytest.approx(wordpiece.encode(texts), abs=1e-6)


def test_a_table_that_scales_and_special_tokens_behind_all_others(tmp_path):
    """As Gemma's and ModernBERT's: the embedding keeps its class, and what is put around a text its new number."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(make_texts(200), trainer)
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    options = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(tmp_path / "gemma")
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=tokenizer.token_to_id("<pad>"),
        eos_token_id=[tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("<bos>")],
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "gemma")
    student = StudentModel.from_backbone(str(tmp_path / "gemma"), projection_dim=4)
    texts, kind = make_texts(300)[-3:], type(student.backbone.get_input_embeddings())
    before, words = student.encode(texts), [student.tokenizer.tokenize(text, add_special_tokens=True) for text in texts]
    assert kind is not torch.nn.Embedding
    report = prune_vocabulary(student, texts)
    assert 256 < report.kept < report.of
    assert [student.tokenizer.tokenize(text, add_special_tokens=True) for text in texts] == words
    assert (words[0][0], words[0][-1]) == ("<bos>", "<eos>")
    assert student.tokenizer.convert_ids_to_tokens(student.config.eos_token_id) == ["<eos>", "<bos>"]
    assert type(student.backbone.get_input_embeddings()) is kind
    assert student.encode(texts) == pytest.approx(before, abs=1e-6)
    student.save_pretrained(tmp_path / "student")
    assert StudentModel.from_pretrained(tmp_path / "student").encode(texts) == pytest.approx(before, abs=1e-6)


def test_the_unlikeliest_token_stays_for_unknown_characters_are_weighed_by_it(tmp_path):
    pieces = [("<unk>", 0), ("<pad>", 0), ("a", -30.0), ("ax", -1.0), ("xy", -45.0), ("zz", -100.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0)), pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=1
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    student = StudentModel.from_backbone(str(tmp_path))
    assert student.tokenizer.tokenize("axy") == ["a", "xy"]  # y alone is unknown: ax y is 75 less likely by zz, 20 more by xy
    prune_vocabulary(student, ["axy", "ax"])
    assert student.tokenizer.tokenize("axy") == ["a", "xy"]


def test_the_most_frequent_tokens_are_kept(wordpiece):
    always = len(VOCABULARY) - len([t for t in PIECES if t not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s")])
    corpus = iter(["sun sun sea", "sun dog", "", "sea sun dog", "dog dog dog cat"])  # read once
    report = prune_vocabulary(wordpiece, corpus, max_tokens=always + 2)
    assert report.kept == always + 2
    words = wordpiece.tokenizer.get_vocab()
    assert {"sun", "dog"} <= words.keys()
    assert not {"sea", "cat"} & words.keys()
    assert report.coverage == pytest.approx(9 / 12)
    assert report.whole_texts == 2 / 5


def test_what_a_narrow_table_saves_is_as_narrow(wordpiece):
    whole = wordpiece.num_parameters()
    narrow = narrow_embeddings(wordpiece, 4)
    before = narrow.num_parameters()
    assert before < whole
    report = prune_vocabulary(narrow, ["sun sea dog"])
    assert report.parameters == before - narrow.num_parameters() == 4 * (report.of - report.kept) > 0


def test_too_small_a_vocabulary_is_refused(wordpiece):
    with pytest.raises(ValueError, match=r"max_tokens is 3, expected at least \d+, the special tokens and single"):
        prune_vocabulary(wordpiece, ["sun"], max_tokens=3)


def test_other_tokenizers_are_refused(student):
    with pytest.raises(ValueError, match="the tokenizer is WordLevel, expected WordPiece, Unigram or BPE"):
        prune_vocabulary(student, make_texts(3))


# Unigram and BPE

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SYLLABLES = "ka ri to mu ne so hi wa lu pe".split()


def sentences(count, seed, words=400):
    """Return texts of made words, some much more frequent than others."""
    rng = random.Random(0)
    known = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(words)]
    rng = random.Random(seed)
    return [" ".join(known[int(len(known) * rng.random() ** 3)] for _ in range(rng.randint(2, 9))) for _ in range(count)]


@pytest.fixture(params=["Unigram", "BPE"])
def subwords(request, tmp_path):
    """Return a student with a tokenizer trained on made words, as XLM-R's or a byte-level one."""
    if request.param == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(2000, 1), trainer)
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), around]) if request.param == "BPE" else around
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(tmp_path / "backbone")  # fmt: skip
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size() + 3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=66, pad_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "backbone")
    student = StudentModel.from_backbone(str(tmp_path / "backbone"), projection_dim=4, dropout=0.0)
    assert type(student.tokenizer.backend_tokenizer.model).__name__ == request.param
    return student


def test_texts_whose_tokens_survive_are_tokenised_and_embedded_as_before(subwords, tmp_path):
    texts = [*sentences(300, 3), "ka ☃ ri", "Ünder", ""]
    whole, words = subwords.tokenizer, subwords.tokenizer.convert_ids_to_tokens
    before = [words(ids) for ids in whole(texts)["input_ids"]]
    vectors = subwords.encode(texts)
    report = prune_vocabulary(subwords, sentences(200, 2, words=150), max_tokens=int(0.95 * len(whole)))
    kept = set(subwords.tokenizer.get_vocab())
    assert len(kept) == report.kept < report.of == len(whole)
    survive = [i for i, tokens in enumerate(before) if set(tokens) <= kept]
    assert 50 < len(survive) < 300  # neither all nor none
    after = [subwords.tokenizer.convert_ids_to_tokens(ids) for ids in subwords.tokenizer(texts)["input_ids"]]
    assert [after[i] for i in survive] == [before[i] for i in survive]
    assert subwords.encode(texts)[survive] == pytest.approx(vectors[survive], abs=1e-6)
    assert not any("<unk>" in now and "<unk>" not in then for now, then in zip(after, before, strict=True))
    assert [whole.decode(whole(text)["input_ids"]) for text in texts[:50]] == [
        subwords.tokenizer.decode(subwords.tokenizer(text)["input_ids"]) for text in texts[:50]
    ]
    subwords.save_pretrained(tmp_path / "student")
    check_layout(tmp_path / "student", (texts[0], texts[1] * 30, "☃"))


def test_a_small_language_keeps_its_tokens_beside_a_large_one_and_poor_ones_are_named(subwords, caplog):
    large, small = ["kari tomu kari tomu"] * 500 + ["neso"] * 3, ["luka peri"] * 3
    tokens = {name: subwords.tokenizer(texts[0], add_special_tokens=False)["input_ids"] for name, texts in
              {"large": large, "small": small}.items()}  # fmt: skip
    assert not set(tokens["large"]) & set(tokens["small"])
    languages = ["large"] * len(large) + ["small"] * len(small)
    with caplog.at_level(logging.WARNING, "hf_distill"):
        report = prune_vocabulary(copy.deepcopy(subwords), large + small, languages=languages)
        assert report.languages == {"large": 1.0, "small": 1.0}
        assert "less than" not in caplog.text
        least = prune_vocabulary(copy.deepcopy(subwords), []).kept
        room = least + (3 if type(subwords.tokenizer.backend_tokenizer.model).__name__ == "Unigram" else 9)
        report = prune_vocabulary(subwords, large + small, room, languages)
    (poor, share), (_, other) = sorted(report.languages.items(), key=lambda item: item[1])
    assert share < 0.9 < 0.99 < other
    assert f"less than 90 % of {poor} {100 * share:.1f} %. Such text" in caplog.text
    assert subwords.settings["vocabulary"]["languages"] == report.languages


def test_frequencies_are_relative_to_a_language(subwords):
    large, small = ["kari"] * 500 + ["tomu"] * 100, ["luka"] * 3
    other = copy.deepcopy(subwords)
    least = prune_vocabulary(copy.deepcopy(subwords), []).kept
    room = least + (2 if type(subwords.tokenizer.backend_tokenizer.model).__name__ == "Unigram" else 6)  # merges come along
    alone = prune_vocabulary(subwords, large + small, max_tokens=room)
    beside = prune_vocabulary(other, large + small, room, ["large"] * 600 + ["small"] * 3)
    assert alone.coverage > beside.coverage
    assert beside.languages["small"] > 0.5


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.999])
def test_so_many_tokens_cover_what_is_asked_for_and_fewer_do_not(subwords, coverage):
    texts, whole = sentences(300, 2), subwords.tokenizer
    number = vocabulary_for(whole, texts, coverage=coverage)
    report = prune_vocabulary(copy.deepcopy(subwords), texts, number)
    assert report.coverage >= coverage
    assert report.kept == number
    always = prune_vocabulary(copy.deepcopy(subwords), []).kept
    room = number - (1 if type(whole.backend_tokenizer.model).__name__ == "Unigram" else 3)  # the last one, with its parts
    if room >= always:
        assert prune_vocabulary(subwords, texts, room).coverage < coverage
