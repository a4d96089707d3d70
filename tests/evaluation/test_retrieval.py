import gzip
import json
import math

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional

from hf_distill.evaluation.metrics import retrieval_measures as retrieval_measures_file
from hf_distill.evaluation.metrics.retrieval_measures import retrieval_measures
from hf_distill.evaluation.retrieval import ExactSearch, RetrievalData, RetrievalEvaluator


def vectors(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def make(documents=120, queries=5, relevant=2):
    """A set whose texts are "d<row>" and "q<row>"; encode() below gives each a vector by its name."""
    return RetrievalData(
        {f"d{i}": f"d{i}" for i in range(documents)},
        {f"q{i}": f"q{i}" for i in range(queries)},
        {f"q{i}": {f"d{i * relevant + j}": 1 + j for j in range(relevant)} for i in range(queries)},
    )


def encode(texts):
    tables = {"d": vectors(500, seed=1), "q": vectors(50, seed=2)}
    return torch.stack([tables[text[0]][int(text[1:])] for text in texts])


def naive(data, dim=None):
    """nDCG@10, MRR@10, recall@10, recall@100, MAP@100 from their definitions, over all cosines at once."""
    documents = functional.normalize(encode(data.documents.values())[:, :dim], dim=-1)
    sums = dict.fromkeys(("ndcg10", "mrr10", "recall10", "recall100", "map100"), 0.0)
    for query, judged in data.relevant.items():
        cosines = documents @ functional.normalize(encode([query])[0, :dim], dim=-1)
        order = [f"d{row}" for row in cosines.argsort(descending=True).tolist()]
        gains = [judged.get(document, 0) for document in order]
        best = sorted(judged.values(), reverse=True)

        def dcg(values):
            return sum(value / math.log2(rank + 2) for rank, value in enumerate(values[:10]))

        sums["ndcg10"] += dcg(gains) / dcg(best)
        hits = [rank for rank, gain in enumerate(gains) if gain]
        sums["mrr10"] += 1 / (hits[0] + 1) if hits[0] < 10 else 0
        sums["recall10"] += sum(rank < 10 for rank in hits) / len(judged)
        sums["recall100"] += sum(rank < 100 for rank in hits) / len(judged)
        sums["map100"] += sum((i + 1) / (rank + 1) for i, rank in enumerate(hits) if rank < 100) / len(judged)
    return {f"retrieval_{name}": 100 * value / len(data.relevant) for name, value in sums.items()}


@pytest.mark.parametrize("chunk", [7, 4096])
def test_scores_are_those_of_a_brute_force_search(chunk):
    data = make()
    scores = RetrievalEvaluator(data, dims=[3, 8, 99], chunk=chunk)(encode)
    assert {name: value for name, value in scores.items() if "@" not in name} == pytest.approx(naive(data))
    assert scores["retrieval_ndcg10@3"] == pytest.approx(naive(data, 3)["retrieval_ndcg10"])
    assert scores["retrieval_ndcg10@8"] == scores["retrieval_ndcg10"]
    assert "retrieval_ndcg10@99" not in scores
    assert scores["retrieval_recall100"] > scores["retrieval_recall10"] > 0


def test_a_small_collection_is_searched_whole():
    assert RetrievalEvaluator(make(12, 3))(encode) == pytest.approx(naive(make(12, 3)))


def test_search_keeps_the_best_whatever_the_chunks():
    queries, documents = vectors(4), vectors(50, seed=3)
    expected = (queries @ documents.T).topk(6)
    for sizes in ([50], [1] * 50, [3, 40, 7]):
        search = ExactSearch(queries, 6)
        for block in documents.split(sizes):
            search.add(block)
        assert torch.equal(search.rows, expected.indices)
        assert torch.allclose(search.scores, expected.values)


def test_the_interval_is_that_of_the_mean_over_queries():
    evaluator = RetrievalEvaluator(make(100, 40), name="dev")
    assert evaluator.intervals() == {}  # nothing was searched yet
    scores = evaluator(encode)
    data = make(100, 40)
    alone = [RetrievalData(data.documents, data.queries, {q: data.relevant[q]}) for q in data.relevant]
    values = np.array([naive(one)["retrieval_ndcg10"] for one in alone])
    assert scores["dev_ndcg10"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / len(values) ** 0.5
    expected = (values.mean() - half, values.mean() + half)
    assert evaluator.intervals() == {"dev_ndcg10": pytest.approx(expected, abs=0.2 * half)}


def test_vectors_that_exist_are_not_encoded_again():
    data, seen = make(), []

    def counted(texts):
        seen.extend(texts)
        return encode(texts)

    known = RetrievalEvaluator(data, documents=encode(data.documents.values()))(counted)
    assert seen == list(data.queries)
    assert known == pytest.approx(naive(data))


def test_each_side_is_named_to_the_encoder():
    def named(texts, prompt_name):
        assert all(text[0] == prompt_name[0] for text in texts)
        return encode(texts)

    assert RetrievalEvaluator(make(), prompt_names=("query", "document"))(named) == pytest.approx(naive(make()))


def test_a_document_with_the_id_of_the_query_is_not_found():
    data = RetrievalData({"1": "same", "2": "other"}, {"1": "same"}, {"1": {"2": 1}})
    table = {"same": [1.0, 0.0], "other": [0.5, 0.5]}
    scores = RetrievalEvaluator(data)(lambda texts: [table[text] for text in texts])
    assert scores["retrieval_mrr10"] == 100


def test_a_document_with_the_id_of_the_query_takes_no_place_from_the_hundredth():
    # Documents 1 to 149 in falling order of cosine to the query, which is document 0; the answer is the hundredth beside it.
    data = RetrievalData({str(i): str(i) for i in range(150)}, {"0": "0"}, {"0": {"100": 1}})
    scores = RetrievalEvaluator(data)(lambda texts: [[1.0, int(text) / 50] for text in texts])
    assert (scores["retrieval_recall100"], scores["retrieval_map100"]) == (100, pytest.approx(1))
    later = RetrievalData(data.documents, data.queries, {"0": {"101": 1}})
    assert RetrievalEvaluator(later)(lambda texts: [[1.0, int(text) / 50] for text in texts])["retrieval_recall100"] == 0


def write(folder, corpus, queries, qrels, split="test"):
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, corpus)).encode()))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines))
    return folder


CORPUS = [{"_id": "4", "title": "A title", "text": "and text"}, {"_id": "5", "title": "", "text": 'said "so'}]
QUERIES = [{"_id": "1", "text": "who"}, {"_id": "2", "text": "what"}]


def test_beir_folders_are_read_titles_before_texts_and_judged_queries_only(tmp_path):
    data = RetrievalData.load(write(tmp_path / "set", CORPUS, QUERIES, [(1, 4, 1), (1, 5, 0)], "dev"), "dev")
    assert data.documents == {"4": "A title and text", "5": 'said "so'}
    assert data.queries == {"1": "who"}
    assert data.relevant == {"1": {"4": 1, "5": 0}}
    with pytest.raises(FileNotFoundError, match=r"has no qrels/test.tsv \(or .gz\)"):
        RetrievalData.load(tmp_path / "set")


def test_ids_stay_as_they_are_written_and_a_table_without_a_heading_is_refused(tmp_path):
    corpus = [{"_id": key, "title": "", "text": key} for key in ("01", "1")]
    folder = write(tmp_path / "set", corpus, [{"_id": "007", "text": "who"}], [("007", "01", 1)])
    data = RetrievalData.load(folder)
    assert data.relevant == {"007": {"01": 1}}
    assert data.own_documents() is None
    [judgements] = folder.glob("qrels/*.tsv*")
    judgements.write_text("q 0 d 1\n")
    with pytest.raises(ValueError, match="expected query-id, corpus-id and score"):
        RetrievalData.load(folder)


@pytest.mark.parametrize(
    ("name", "judgements"),
    [("mteb/tiny", ("mteb/tiny", "default", "dev")), ("BeIR/tiny", ("BeIR/tiny-qrels", None, "dev"))],
)
def test_both_layouts_of_the_hub_are_read(monkeypatch, name, judgements):
    parts = {
        (name, "corpus", "corpus"): [{"_id": "d0", "title": "", "text": "a"}, {"_id": "d1", "title": "T", "text": "b"}],
        (name, "queries", "queries"): [{"_id": "q0", "text": "c"}],
        judgements: [{"query-id": "q0", "corpus-id": "d1", "score": 1}],
    }
    monkeypatch.setattr("hf_distill.evaluation.retrieval.load_texts", lambda *what: Dataset.from_list(parts.pop(what)))
    data = RetrievalData.load(name, "dev")
    assert (data.documents, data.queries) == ({"d0": "a", "d1": "T b"}, {"q0": "c"})
    assert data.relevant == {"q0": {"d1": 1}}
    assert parts == {}


@pytest.mark.parametrize(
    ("corpus", "queries", "qrels", "message"),
    [
        (CORPUS, QUERIES, [(1, 4, 1), (9, 4, 1)], r"1 judged queries that are not there \(9\)"),
        (CORPUS, QUERIES, [(1, 4, 1), (1, 7, 1)], r"1 judged documents that are not there \(7\)"),
        (CORPUS, QUERIES, [(1, 4, 1), (2, 4, 0)], r"1 queries without a relevant document \(2\)"),
        ([*CORPUS, {"_id": "6", "title": " ", "text": ""}], QUERIES, [(1, 4, 1)], r"1 empty documents \(6\)"),
        (CORPUS, [{"_id": "1", "text": " "}], [(1, 4, 1)], r"1 empty queries \(1\)"),
        ([*CORPUS, CORPUS[0]], QUERIES, [(1, 4, 1)], r"corpus of .* has 1 ids that stand there twice \(4\)"),
        (CORPUS, [*QUERIES, QUERIES[1]], [(1, 4, 1)], r"queries of .* has 1 ids that stand there twice \(2\)"),
        (CORPUS, QUERIES, [(1, 4, 1), (1, 4, 2)], "judges document 4 for query 1 twice, and differently"),
    ],
)
def test_sets_that_do_not_fit_together_are_refused(tmp_path, corpus, queries, qrels, message):
    with pytest.raises(ValueError, match=message):
        RetrievalData.load(write(tmp_path / "set", corpus, queries, qrels))


def test_no_judgements_are_refused():
    with pytest.raises(ValueError, match="no judgements"):
        RetrievalData({"1": "a"}, {"1": "b"}, {})


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.zeros(119, 8), "119 vectors .* for 120 documents"),
        (torch.full((120, 8), float("nan")), r"\(finite: False\)"),
    ],
)
def test_an_index_of_other_documents_is_refused(documents, message):
    with pytest.raises(ValueError, match=message):
        RetrievalEvaluator(make(), documents=documents)


def test_an_index_of_another_space_is_refused():
    with pytest.raises(ValueError, match="queries have 8 dimensions, documents 7"):
        RetrievalEvaluator(make(), documents=torch.ones(120, 7))(encode)


def test_the_metric_loads_from_its_file_and_agrees():
    metric = evaluate.load(retrieval_measures_file.__file__)
    run = {"1": {"a": 0.9, "b": 0.8, "c": 0.1}, "2": {"a": 0.3, "b": 0.7}}
    relevant = {"1": {"b": 1}, "2": {"b": 2, "c": 1}, "3": {"a": 1}}
    found = metric.compute(
        predictions=[{"query": q, "documents": list(row), "scores": list(row.values())} for q, row in run.items()]
        + [{"query": "3", "documents": [], "scores": []}],
        references=[{"query": q, "documents": list(row), "relevance": list(row.values())} for q, row in relevant.items()],
    )
    assert found["mrr10"] == pytest.approx(100 * (1 / 2 + 1 + 0) / 3)  # the third query found nothing
    assert found["recall10"] == pytest.approx(100 * (1 + 1 / 2 + 0) / 3)
    assert found == pytest.approx(retrieval_measures(run, relevant))


def test_a_run_of_queries_that_nobody_judged_is_refused():
    with pytest.raises(ValueError, match=r"1 queries of the run have no judgement \(\['2'\]\)"):
        retrieval_measures({"1": {"a": 1.0}, "2": {"a": 1.0}}, {"1": {"a": 1}})
