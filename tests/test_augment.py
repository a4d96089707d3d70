import nltk
import pytest
import torch
from conftest import make_texts, make_tokenizer
from datasets import Dataset
from transformers import BartConfig, BartForConditionalGeneration

from hf_distill.augment import BackTranslation, SynonymReplacement, augment
from hf_distill.data import TrainingTexts


class Sense:
    def __init__(self, *names):
        self.names = names

    def lemma_names(self):
        return list(self.names)


class WordNet:
    """As nltk's reader answers; its data are not on PyPI."""

    def ensure_loaded(self):
        pass

    def synsets(self, word):
        return SENSES.get(word, [])


SENSES = {
    "car": [Sense("car", "auto", "motor_car", "automobile"), Sense("car", "gondola")],
    "cars": [Sense("car", "auto")],  # WordNet finds the base form
    "quick": [Sense("fast", "Quick", "speedy")],
    "stone": [Sense("stone")],
}


@pytest.fixture
def synonyms(monkeypatch):
    monkeypatch.setattr("nltk.corpus.wordnet", WordNet())
    return lambda **options: SynonymReplacement(**{"share": 1.0, **options})


def test_words_become_synonyms_of_their_first_sense(synonyms):
    seen = {synonyms(seed=seed)(["Quick car, cars & stone car2!"])[0] for seed in range(40)}
    assert seen == {f"{a} {b}, cars & stone car2!" for a in ("Fast", "Speedy") for b in ("auto", "automobile")}


def test_a_share_of_the_words(synonyms):
    text = " ".join(["car"] * 4000)
    assert 0.27 < synonyms(share=0.3)([text])[0].count("auto") / 4000 < 0.33


def test_what_becomes_of_a_text_depends_on_text_round_and_seed_only(synonyms):
    texts = [f"car quick car {i}" for i in range(30)]
    change = synonyms(share=0.5)
    assert change(texts) == synonyms(share=0.5)(texts)
    assert change(texts[::-1]) == change(texts)[::-1]
    assert change(texts, 1) != change(texts, 0)
    assert synonyms(share=0.5, seed=1)(texts) != change(texts)


def test_without_wordnet_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"needs WordNet: python -m nltk.downloader wordnet"):
        SynonymReplacement()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf_distill\[augment\]'"):
        SynonymReplacement()


def test_back_translation_runs_any_two_models(tmp_path):
    tokenizer = make_tokenizer()
    for name, seed in (("there", 0), ("back", 1)):
        torch.manual_seed(seed)
        config = BartConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2, init_std=1.0,
        )  # fmt: skip
        BartForConditionalGeneration(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    change = BackTranslation(str(tmp_path / "there"), str(tmp_path / "back"), batch_size=4, device="cpu", max_new_tokens=6)
    texts = make_texts(9)
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    found = change(texts)
    assert torch.equal(torch.rand(2), wanted)  # what the run draws afterwards is its own
    assert len(found) == 9
    assert len(set(found)) > 1
    one = tokenizer(texts[:1], return_tensors="pt")
    for _, model in change._ways:
        ids = model.generate(**one, max_new_tokens=6)
        one = tokenizer(tokenizer.batch_decode(ids, skip_special_tokens=True), return_tensors="pt")
    assert found[0] == tokenizer.batch_decode(ids, skip_special_tokens=True)[0]


def test_every_new_text_once_and_none_that_was_there():
    def shout(texts, number):
        return [text.upper() + "!" * number for text in texts]

    assert augment(["a", "b", "B"], [(shout, 2)]) == ["A", "A!", "B!"]
    assert augment(["a"], []) == []


def test_new_texts_are_checked_for_leaks_and_held_out_texts():
    texts = TrainingTexts.split(Dataset.from_dict({"text": make_texts(50)}), held_out=5, leaks_from=[])
    more = texts.extended(["new one", f"{texts.held_out[0]}!", "From the TEST", "new two"], leaks_from=["from the test."])
    assert more.train["text"][-2:] == ["new one", "new two"]
    assert len(more.train) == len(texts.train) + 2
    pairs = TrainingTexts.split(Dataset.from_dict({"a": make_texts(9), "b": make_texts(9)}), held_out=1)
    with pytest.raises(ValueError, match=r"columns \['a', 'b'\], expected one"):
        pairs.extended(["x"])
