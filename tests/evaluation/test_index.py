import numpy as np
import pytest
import torch
from torch.nn import functional

from hf_distill.evaluation.index import KINDS, Space, _build, _without_own, index_report
from hf_distill.evaluation.plots import draw_index
from hf_distill.evaluation.tables import index_table


def vectors(count, dim=16, seed=0):
    """Clusters, as texts have: 40 centres with noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=torch.Generator().manual_seed(99))
    return centres[torch.arange(count) % 40] + 0.3 * torch.randn(count, dim, generator=generator)


@pytest.fixture(scope="module")
def texts():
    documents, queries = vectors(2000), vectors(30, seed=1)
    cosines = functional.normalize(queries, dim=-1) @ functional.normalize(documents, dim=-1).T
    return documents, queries, cosines


@pytest.fixture(scope="module")
def report(texts):
    documents, queries, cosines = texts
    relevant = cosines.topk(2).indices[:, 1:].tolist()  # the second nearest answers
    spaces = {"teacher": Space(documents, queries), "half": Space(documents[:, :8], queries[:, :8], ["int8", "flat"])}
    return index_report(spaces, relevant, rounds=2, single=5)


def test_every_kind_of_every_space_has_a_row(report):
    assert list(report) == [*(f"teacher, {kind}" for kind in KINDS), "half, int8", "half, flat"]
    assert all(np.isfinite(value) for row in report.values() for value in row.values())
    assert {row["dim"] for name, row in report.items() if name.startswith("half")} == {8}


def test_flat_index_is_exact(report):
    row = report["teacher, flat"]
    assert row["overlap"] == 100
    assert row["recall"] == 100  # the second nearest is among the ten
    assert row["ndcg"] == pytest.approx(100 / np.log2(3))
    assert (row["times_smaller"], row["times_faster"], row["times_faster_batch"]) == (1, 1, 1)


def test_memory_is_what_the_kind_says(report):
    sizes = {name: row["mb_per_million"] for name, row in report.items()}
    assert sizes["teacher, flat"] == pytest.approx(16 * 4, rel=0.01)
    assert sizes["half, flat"] == pytest.approx(8 * 4, rel=0.01)
    assert sizes["teacher, int8"] == pytest.approx(16, rel=0.02)
    assert sizes["half, int8"] == pytest.approx(8, rel=0.03)
    assert sizes["teacher, binary, rescored"] == 2
    assert report["teacher, binary, rescored"]["times_smaller"] == pytest.approx(32, rel=0.01)
    assert sizes["teacher, PQ"] < sizes["teacher, int8"]
    assert sizes["teacher, HNSW"] > sizes["teacher, IVF"] > sizes["teacher, flat"]


@pytest.mark.parametrize(("dim", "width"), [(16, 2), (20, 2), (23, 1), (100, 10)])
def test_product_quantisation_takes_an_eighth_of_the_dimensions_or_a_divisor_below(dim, width):
    documents = np.random.default_rng(0).normal(size=(2000, dim)).astype(np.float32)
    search, size = _build(documents, KINDS["PQ"])
    assert size == pytest.approx(2000 * width + 256 * dim * 4, rel=0.02)  # a byte a part, and 256 centroids of each
    assert (search(documents[:5], 1) >= 0).all()


def test_overlap_is_with_the_first_index(report, texts):
    documents, queries, cosines = texts
    exact = cosines.topk(10).indices
    half = functional.normalize(queries[:, :8], dim=-1) @ functional.normalize(documents[:, :8], dim=-1).T
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(half.topk(10).indices.tolist(), exact.tolist(), strict=True)]
    assert report["half, flat"]["overlap"] == pytest.approx(100 * np.mean(shared))
    assert 10 < report["half, flat"]["overlap"] < 95


def test_approximate_kinds_find_most(report):
    assert report["teacher, int8"]["overlap"] > 90
    assert report["teacher, HNSW"]["overlap"] > 90
    assert report["teacher, IVF"]["overlap"] > 60


def test_signs_are_rescored_with_the_queries_floats(texts):
    documents, queries, _ = texts
    rows = index_report({"a": Space(documents, queries, ["flat", "binary, rescored"])}, [[0]] * 30, rounds=1, single=1)
    hamming = ((documents > 0)[None] ^ (queries > 0)[:, None]).sum(-1)
    plain = [
        len(set(a) & set(b)) / 10
        for a, b in zip(hamming.topk(10, largest=False).indices.tolist(), texts[2].topk(10).indices.tolist(), strict=True)
    ]
    assert rows["a, binary, rescored"]["overlap"] > 100 * np.mean(plain)


def test_an_index_agrees_with_itself_where_there_are_fewer_documents_than_places(texts):
    spaces = {"few": Space(texts[0][:6], texts[1], ["flat", "int8"])}
    rows = index_report(spaces, [[0]] * len(texts[1]), k=10, rounds=1, single=1)
    assert rows["few, flat"]["overlap"] == rows["few, int8"]["overlap"] == 100


def test_a_querys_own_document_is_never_found_for_it(texts):
    documents, queries, _ = texts
    own = [*range(5), *[None] * (len(queries) - 5)]
    asked = torch.cat([documents[:5], queries[5:]])  # the first five stand in the collection
    spaces, relevant = {"a": Space(documents, asked, ["flat"])}, [[row if row is not None else 0] for row in own]
    [row] = index_report(spaces, relevant, rounds=1, single=1, own=own).values()
    [counted] = index_report(spaces, relevant, rounds=1, single=1).values()
    assert counted["recall"] - row["recall"] == pytest.approx(100 * 5 / len(own))
    cosines = functional.normalize(asked, dim=-1) @ functional.normalize(documents, dim=-1).T
    cosines[range(5), range(5)] = -2
    space = spaces["a"]
    ranked = (space.queries @ space.documents.T).argsort(1)[:, ::-1]
    found = _without_own(ranked[:, :11], own, 10)
    assert np.array_equal(found, cosines.topk(10).indices.numpy())


def test_table_and_picture(report, tmp_path):
    text = index_table({"index": report})
    assert len(text.splitlines()) == 2 + len(report)
    assert "× smaller" in text
    draw_index(tmp_path / "index.png", report)
    assert (tmp_path / "index.png").stat().st_size > 10_000


def test_spaces_of_other_texts_are_refused(texts):
    documents, queries, _ = texts
    spaces = {"a": Space(documents, queries), "b": Space(documents[1:], queries)}
    with pytest.raises(ValueError, match=r"\{'a': \(2000, 30\), 'b': \(1999, 30\)\}, judged queries 30"):
        index_report(spaces, [[0]] * 30)
    with pytest.raises(ValueError, match="judged queries 29"):
        index_report({"a": spaces["a"]}, [[0]] * 29)
