import pytest
import torch
from conftest import make_texts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertTokenizer

from hf_distill import StudentModel
from hf_distill.build import from_scratch, prune_vocabulary
from hf_distill.layout import check_layout


def test_a_student_from_scratch_has_the_shape_asked_for_and_opens_everywhere(backbone_folder, tmp_path):
    student = from_scratch(backbone_folder, 8, 4, 2, 24, projection_dim=5, dropout=0.0, max_length=30)
    vocabulary = len(student.tokenizer)
    layer = 4 * (8 * 8 + 8) + (8 * 24 + 24) + (24 * 8 + 8) + 2 * 16
    pooler, embeddings = 8 * 8 + 8, (vocabulary + 512 + 2) * 8 + 16
    assert student.num_parameters() == 4 * layer + embeddings + pooler + 8 * 5 + 5
    assert (student.dim, student.settings["max_length"], student.settings["base_model"]) == (5, 30, None)
    student.save_pretrained(tmp_path)
    check_layout(tmp_path, ("a cat sat", "the old house " * 40))
    assert torch.equal(StudentModel.from_pretrained(tmp_path).projection.weight, student.projection.weight)


def test_heads_that_do_not_divide_the_width(backbone_folder):
    with pytest.raises(ValueError, match="3 heads for 8 dimensions"):
        from_scratch(backbone_folder, 8, 1, 3, 8)


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


def test_the_most_frequent_tokens_are_kept(wordpiece):
    always = len(VOCABULARY) - len([t for t in PIECES if t not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s")])
    report = prune_vocabulary(wordpiece, ["sun sun sea", "sea sun dog", "dog dog dog cat"], max_tokens=always + 2)
    assert report.kept == always + 2
    words = wordpiece.tokenizer.get_vocab()
    assert {"sun", "dog"} <= words.keys()
    assert not {"sea", "cat"} & words.keys()
    assert report.coverage == pytest.approx(7 / 10)
    assert report.whole_texts == 0


def test_too_small_a_vocabulary_is_refused(wordpiece):
    with pytest.raises(ValueError, match=r"max_tokens is 3, expected at least \d+, the special tokens and single"):
        prune_vocabulary(wordpiece, ["sun"], max_tokens=3)


def test_other_tokenizers_are_refused(student):
    with pytest.raises(ValueError, match="the tokenizer is WordLevel, expected WordPiece"):
        prune_vocabulary(student, make_texts(3))
