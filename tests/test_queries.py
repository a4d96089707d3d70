import json

import pytest
import torch
from conftest import WORDS, make_texts, make_tokenizer
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from hf_distill.queries import QueryGenerator, SpanQueries, generate_queries


@pytest.fixture(scope="session", params=["seq2seq", "causal"])
def generator_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    size = {
        "vocab_size": 5 + len(WORDS),
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if request.param == "seq2seq":
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        wide = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 1}
        model = BartForConditionalGeneration(BartConfig(**size, **layers, **wide))
    else:
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**size, **small))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def repeating(documents, seed):
    return [[document.upper() + "!"] for document in documents]


repeating.facts = {"model": "parrot"}


class Counting:
    """Queries whose making is counted; `die_at` raises before so many shards are done."""

    facts = {"model": "counting"}

    def __init__(self, die_at=None):
        self.shards, self.die_at = 0, die_at

    def __call__(self, documents, seed):
        if self.shards == self.die_at:
            raise KeyboardInterrupt
        self.shards += 1
        return [[f"about {document} {seed}", f"about {document[:3]}"] for document in documents]


def test_a_model_writes_new_lines_for_each_document(generator_folder, tmp_path):
    documents = make_texts(5)
    generator = QueryGenerator(generator_folder, per_document=3, batch_size=2, device="cpu", max_new_tokens=6)
    queries = generator(documents, 1)
    assert [len(found) for found in queries] == [3] * 5
    assert all(len(query.split()) <= 6 for found in queries for query in found)
    torch.manual_seed(5)
    drawn, _ = torch.rand(3), torch.manual_seed(5)
    assert generator(documents, 1) == queries
    assert torch.equal(torch.rand(3), drawn)  # whether shards are there already changes nothing that is drawn afterwards
    assert generator(documents, 2) != queries
    other = QueryGenerator(generator_folder, per_document=3, batch_size=2, device="cpu", max_new_tokens=6)
    assert other.facts == generator.facts
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    trained = QueryGenerator(str(tmp_path / "other"), per_document=3, batch_size=2, device="cpu", max_new_tokens=6)
    assert trained.facts["weights"] != generator.facts["weights"]


def test_what_a_causal_model_read_is_not_in_what_it_wrote(generator_folder):
    generator = QueryGenerator(
        generator_folder, "mat {document} rug", device="cpu", do_sample=False, top_p=None, max_new_tokens=4
    )
    alone, together = generator(["the cat"]), generator(["the cat", "a quick brown fox jumps over the lazy dog"])
    assert len(alone[0][0].split()) <= 4
    assert together[0] == alone[0]  # padding on the left changes nothing


def test_a_long_document_is_cut_so_that_what_follows_it_stays(generator_folder):
    generator = QueryGenerator(generator_folder, "the {document} query", max_length=8, device="cpu")
    prompt = generator._prompt("cat " * 50)
    assert prompt.startswith("the cat cat")
    assert prompt.endswith("cat query")
    assert len(generator.tokenizer(prompt)["input_ids"]) == 8


def test_sentences_are_taken_where_there_are_some_and_runs_of_words_elsewhere():
    spans = SpanQueries(per_document=2, words=(2, 3))
    long, short = "The cat sat here. A dog ran off! No.", "one two three four five"
    found = spans([long, short, "word"], 7)
    assert sorted(found[0]) == ["A dog ran off!", "The cat sat here."]
    assert all(run in short and 2 <= len(run.split()) <= 3 for run in found[1])
    assert found[2] == ["word", "word"]
    assert spans([short, long], 7) == [found[1], found[0]]  # of the document and the seed only
    assert any(spans([short], seed) != [found[1]] for seed in range(8))


def test_each_query_is_kept_once_with_its_first_document_and_copies_are_not(tmp_path):
    rows = generate_queries(["cat a", "cat b", "about cat"], Counting(), tmp_path, seed=3, shard_size=2)
    assert rows["query"] == ["about cat a 3", "about cat", "about cat b 3", "about about cat 4", "about abo"]
    assert rows["document"] == ["cat a", "cat a", "cat b", "about cat", "about cat"]
    with pytest.raises(ValueError, match="of 2 queries for 2 documents 2 repeat their document"):
        generate_queries(["cat a", "cat b"], repeating, tmp_path)


def test_what_was_interrupted_goes_on_and_ends_the_same(tmp_path):
    documents = [f"text {i}" for i in range(10)]
    whole = generate_queries(documents, Counting(), tmp_path / "a", shard_size=3)
    first = Counting(die_at=2)
    with pytest.raises(KeyboardInterrupt):
        generate_queries(documents, first, tmp_path / "b", shard_size=3)
    second = Counting()
    assert generate_queries(documents, second, tmp_path / "b", shard_size=3).to_dict() == whole.to_dict()
    assert (first.shards, second.shards) == (2, 2)


def test_other_documents_settings_or_seeds_never_reuse_a_shard(tmp_path):
    documents = ["text a", "text b"]
    for make, seed, expected in ((documents, 1, 1), (documents, 1, 0), (documents, 2, 1), (documents[:1], 1, 1)):
        counting = Counting()
        generate_queries(make, counting, tmp_path, seed=seed)
        assert counting.shards == expected
    other = Counting()
    other.facts = {"model": "another"}
    generate_queries(documents, other, tmp_path, seed=1)
    assert other.shards == 1
    files = sorted(tmp_path.glob("queries-*.json"))
    assert len(files) == 4
    assert all(isinstance(json.loads(path.read_text()), list) for path in files)


def test_a_prompt_without_the_document_is_refused(generator_folder):
    with pytest.raises(ValueError, match=r"the prompt is 'Write a query', expected \{document\} in it"):
        QueryGenerator(generator_folder, "Write a query")
