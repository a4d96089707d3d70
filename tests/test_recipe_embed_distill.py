"""recipes/embed_distill.py from a collection to a card, on tiny models."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_texts
from datasets import Dataset
from safetensors.torch import save_file
from test_retrieval_training import make_reranker

from hf_distill import EncoderTeacher, PCAProjection, StudentModel
from hf_distill.cli import _evaluators, _open
from hf_distill.evaluation.tables import dimension_table


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def run(collection, backbone_folder, teacher_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))

    def start(*flags, output="out"):
        base = f"--collection {collection[0]} --teacher {teacher_folder} --backbone {backbone_folder} --layers 0 2 --dims 4"
        base += " --negatives 2 --per_device_train_batch_size 8 --num_train_epochs 6 --learning_rate 5e-3 --logging_steps 2"
        base += f" --disable_tqdm true --use_cpu true --bf16 false --attention eager --output_dir {tmp_path / output}"
        base += f" --cache_dir {tmp_path / 'caches'}"
        importlib.import_module("embed_distill").main([*base.split(), *flags])
        return json.loads((tmp_path / output / "results.json").read_text())

    return start


def test_queries_learn_to_search_the_teachers_index(run, collection, tmp_path, capsys):
    results = run("--spans", "2", "--num_train_epochs", "10")
    assert list(results["rows"]) == ["teacher", "untrained student", "student"]
    rows = {name: row["scores"] for name, row in results["rows"].items()}
    assert {"dev_ndcg10", "test_ndcg10", "test_mrr10", "test_recall100", "test_map100"} <= rows["student"].keys()
    assert rows["student"]["dev_ndcg10"] > rows["untrained student"]["dev_ndcg10"]
    assert results["data"]["columns"] == ["query", "positive", "negative_1", "negative_2"]
    assert (results["data"]["held_out"], results["data"]["documents"]) == (20, 200)
    assert (results["data"]["test_queries"], results["data"]["test_queries_with_trained_answers"]) == (50, 0)
    assert results["data"]["name"] == collection[0].name
    assert results["data"]["rows"] == results["data"]["queries"] > 250
    assert results["inherited_columns"] == ["positive", "negative_1", "negative_2"]
    lines = [line for line in results["log_history"] if "loss_query" in line]
    assert lines[-1]["loss_query"] < lines[0]["loss_query"]
    assert max(line["loss_document"] for line in lines) < 1e-6
    student = StudentModel.from_pretrained(tmp_path / "out")
    assert student.settings["document_encoder"] == {"name": results["teacher"], "revision": None, "prompt": ""}
    kinds = ["flat", "int8", "IVF", "IVF, int8", "HNSW", "binary, rescored"]  # 200 documents are too few for PQ
    assert list(results["index"]) == [f"{side}, {kind}" for side in ("teacher", "student 24-d") for kind in kinds]
    assert results["index"]["student 24-d, flat"]["ndcg"] == pytest.approx(rows["student"]["test_ndcg10"], abs=0.1)
    assert (tmp_path / "out" / "index.png").stat().st_size > 1000
    card = (tmp_path / "out" / "README.md").read_text()
    assert "student 24-d, int8" in card
    assert "(index.png)" in card
    assert f'documents = SentenceTransformer("{results["teacher"]}")' in card
    assert "test_ndcg10@4" not in rows["student"]  # of the teacher's whole space the first dimensions are no embedding
    assert "test nDCG@10" in card
    assert results["teacher"] in card
    log = [json.loads(line) for line in (tmp_path / "caches" / "test-evaluations.jsonl").read_text().splitlines()]
    assert [line["how"] for line in log] == ["exact search"] * 3 + ["index report, 2 spaces"]
    assert all(line["command"] == results["provenance"]["command"] for line in log)


@pytest.mark.parametrize("dim", [[], ["--dim", "8"]])
def test_the_lines_of_the_card_search_the_index_that_was_measured(run, teacher_folder, collection, tmp_path, dim):
    place = str(teacher_folder)
    run("--teacher_name", place, "--num_train_epochs", "1", *dim)
    card = (tmp_path / "out" / "README.md").read_text()
    [lines] = [block for block in card.split("```python\n")[1:] if "encode_document" in block]
    code = "from sentence_transformers import SentenceTransformer\n" + lines.split("```")[0]
    made = {}
    exec(
        code.replace('SentenceTransformer("out")', f'SentenceTransformer("{tmp_path / "out"}")').replace(  # noqa: S102
            'from_pretrained("out")', f'from_pretrained("{tmp_path / "out"}")'
        ),
        made,
    )
    assert made["scores"].shape == (1, 2)
    teacher, texts = EncoderTeacher(place, dtype="float32"), ["A cat sat on the mat.", "The sea is blue."]
    known = teacher.encode(texts)
    known = PCAProjection.from_pretrained(tmp_path / "out")(known) if dim else known
    asked = StudentModel.from_pretrained(tmp_path / "out").encode(["where is the cat"], convert_to_tensor=True)
    cosines = torch.nn.functional.cosine_similarity(asked, known)
    opened = _open(str(tmp_path / "out"), dtype="float32")  # as `hf-distill evaluate --retrieval` does
    assert torch.cosine_similarity(opened.encode(texts, prompt_name="document"), known).min() > 0.9999
    assert torch.cosine_similarity(opened.encode(["where is the cat"], prompt_name="query"), asked).min() > 0.9999
    [evaluator] = _evaluators(None, str(collection[0]), "test", [])
    assert evaluator(opened.encode)["retrieval_recall100"] > 20
    assert made["scores"][0] == pytest.approx(cosines.numpy(), abs=1e-4)


def test_a_teachers_own_prompts_are_put_before_queries_and_documents(run, teacher_folder, collection, tmp_path, monkeypatch):
    prompted = tmp_path / "prompted"
    shutil.copytree(teacher_folder, prompted)
    settings = prompted / "config_sentence_transformers.json"
    known = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps({**known, "prompts": {"query": "red ", "document": "blue "}}))
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(prompted), device="cpu")
    for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
        ours = EncoderTeacher(prompted, side=side).encode(["the sea"])
        assert torch.cosine_similarity(ours, torch.from_numpy(encode(["the sea"]))).item() > 0.9999
    assert EncoderTeacher(prompted).prompt == ""
    with pytest.raises(ValueError, match="side is 'passage', expected one of"):
        EncoderTeacher(prompted, side="passage")
    run("--teacher", str(prompted), "--num_train_epochs", "1")
    folders = {json.loads(path.read_text())["fingerprint"]["prompt"] for path in (tmp_path / "caches").glob("*/manifest.json")}
    assert folders == {"red ", "blue "}
    assert StudentModel.from_pretrained(tmp_path / "out").settings["document_encoder"]["prompt"] == "blue "


def test_config_and_card_name_the_commit_and_the_prompt_of_the_document_encoder(run, teacher_folder, tmp_path):
    commit = tmp_path / "hub" / "snapshots" / ("c0ffee" * 7)[:40]
    shutil.copytree(teacher_folder, commit)
    prompts = ["--query_prompt", "red ", "--document_prompt", "red "]
    run("--teacher", str(commit), "--teacher_name", "an/encoder", *prompts, "--num_train_epochs", "1")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["hf_distill"]["document_encoder"]
    assert saved == {"name": "an/encoder", "revision": commit.name, "prompt": "red "}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'documents = SentenceTransformer("an/encoder", revision="{commit.name}")' in card
    assert 'normalize_embeddings=True, prompt="red ")' in card


def test_both_towers_small_in_fewer_dimensions(run, tmp_path):
    results = run("--symmetric", "true", "--dim", "8", "--test_split", "", "--label_weight", "0", "--score_weight", "0")
    assert list(results["rows"]) == ["teacher", "teacher, PCA 8", "untrained student", "student"]
    assert results["rows"]["student"]["dim"] == 8
    spaces = dict.fromkeys(name.split(", ")[0] for name in results["index"])
    assert list(spaces) == ["teacher", "teacher 8-d", "student 8-d", "student 4-d"]
    assert results["index"]["teacher 8-d, flat"]["ndcg"] == pytest.approx(
        results["rows"]["teacher, PCA 8"]["scores"]["dev_ndcg10"], abs=0.1
    )
    scores = results["rows"]["student"]["scores"]
    assert results["index"]["student 8-d, flat"]["ndcg"] == pytest.approx(scores["dev_ndcg10"], abs=0.1)
    assert "dev_ndcg10@4" in scores
    assert "dev_ndcg10@4" not in results["rows"]["teacher"]["scores"]
    assert "dev nDCG@10 @4" in dimension_table(results)
    assert (tmp_path / "out" / "dimensions.png").stat().st_size > 1000
    assert "inherited_columns" not in results
    assert not any(name.startswith("test_") for name in scores)
    lines = [line for line in results["log_history"] if "loss_document" in line]
    assert lines[0]["loss_document"] > lines[-1]["loss_document"] > 0.01


@pytest.mark.parametrize("kind", ["npy", "safetensors", "faiss", "parquet"])
def test_an_index_that_exists_is_not_encoded_again(run, collection, teacher_folder, tmp_path, monkeypatch, kind):
    import faiss

    _, documents, queries = collection
    vectors = EncoderTeacher(teacher_folder).encode(documents)
    path = tmp_path / f"index.{kind}"
    if kind == "npy":
        np.save(path, vectors.numpy())
    elif kind == "safetensors":
        save_file({"embeddings": vectors}, path)
    elif kind == "parquet":
        Dataset.from_dict({"text": documents, "embedding": vectors.tolist()}).to_parquet(path)
    else:
        index = faiss.IndexFlatIP(24)
        index.add(vectors.numpy())
        faiss.write_index(index, str(path))
    plain = run("--num_train_epochs", "1", output="plain")
    seen, encode = [], EncoderTeacher.encode

    def counted(self, texts, *args, **kwargs):
        seen.extend(texts)
        return encode(self, texts, *args, **kwargs)

    if kind == "faiss":
        for kept in ("IndexIDMap", "IndexIDMap2"):
            named = getattr(faiss, kept)(faiss.IndexFlatIP(24))
            named.add_with_ids(vectors.numpy(), np.arange(len(vectors))[::-1].copy())
            faiss.write_index(named, str(tmp_path / "named.faiss"))
            with pytest.raises(ValueError, match="maps its vectors to ids of its own"):
                run("--document_embeddings", str(tmp_path / "named.faiss"), output=kept)
    monkeypatch.setattr(EncoderTeacher, "encode", counted)
    flags = ["--document_embeddings", str(path), "--num_train_epochs", "1", "--cache_dir", str(tmp_path / "others")]
    results = run(*flags, output="indexed")
    assert set(seen) == set(queries)
    scores = [result["rows"]["teacher"]["scores"] for result in (plain, results)]
    assert scores[0] == pytest.approx(scores[1], abs=1)  # float16 on disk, whole there


def test_more_queries_and_a_reranker(run, backbone_folder, tmp_path):
    reranker = make_reranker(tmp_path / "reranker", backbone_folder)
    flags = ["--spans", "1", "--reranker", reranker, "--num_train_epochs", "1", "--test_split", "", "--index_report", "false"]
    results = run(*flags, "--baselines", "false")
    assert list(results["rows"]) == ["student"]
    assert results["data"]["made_queries"] > 100
    assert results["reranker"] == "reranker"
    scores = [line["loss_score"] for line in results["log_history"] if "loss_score" in line]
    assert len(scores) > 3
    assert min(scores) > 0
    assert "index" not in results


@pytest.mark.parametrize(("temperature", "warned"), [(1e-4, False), (1e4, True)])
def test_scores_that_say_nothing_are_noticed(temperature, warned, backbone_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(RECIPES))
    texts = make_texts(60)
    rows = Dataset.from_dict({"query": texts[:20], "document": texts[20:40], "negative": texts[40:]})
    reranker = make_reranker(tmp_path / "reranker", backbone_folder)
    flags = {"reranker": reranker, "reranker_label": None, "dual_pooling": None, "score_temperature": temperature}
    recipe = SimpleNamespace(**flags, cache_dir=str(tmp_path))
    with caplog.at_level("WARNING", "hf_distill"):
        importlib.import_module("retrieval").open_reranker(recipe, rows)
    assert ("All documents would be about as good" in caplog.text) == warned


def test_both_towers_learn_what_a_rerankers_states_say(run, backbone_folder, tmp_path):
    reranker = make_reranker(tmp_path / "reranker", backbone_folder)
    flags = ["--reranker", reranker, "--dual_pooling", "8", "--symmetric", "true", "--label_weight", "0"]
    results = run(*flags, "--num_train_epochs", "2", "--index_report", "false")
    assert results["teacher"] == "reranker, dual pooling"
    assert results["rows"]["student"]["dim"] == results["dual_pooling"]["dim"] == 8
    assert -1 <= results["dual_pooling"]["agreement"] <= 1
    lines = [line for line in results["log_history"] if "loss_document" in line]
    assert {"loss_query", "loss_document", "loss_score"} <= lines[0].keys()
    assert lines[-1]["loss_document"] < lines[0]["loss_document"]


def test_queries_stand_beside_their_answers_and_made_ones_beside_their_documents(
    collection, teacher_folder, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(RECIPES))
    retrieval, arguments = importlib.import_module("retrieval"), importlib.import_module("embed_distill").EmbedDistillArguments
    options = {"collection": str(collection[0]), "teacher": [teacher_folder], "cache_dir": str(tmp_path)}
    recipe = arguments(spans=1, negatives=2, **options)
    collections = retrieval.open_collection(recipe)
    towers = retrieval.open_towers(recipe, collection[1])
    rows, facts = retrieval.rows(recipe, collections, towers, 1)
    given = set(collections.train.queries.values())
    made = [row for row in rows if row["query"] not in given]
    assert facts["made_queries"] >= len(made) > 80
    assert len(rows) >= len(made) + 70
    for row in rows:  # a query is its document without the last word, or a part of it
        assert row["query"] in row["positive"]
        assert row["query"] != row["positive"]
        assert len({row["positive"], row["negative_1"], row["negative_2"]}) == 3


def test_sentences_and_queries_of_a_model_are_both_made(collection, teacher_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    retrieval, arguments = importlib.import_module("retrieval"), importlib.import_module("embed_distill").EmbedDistillArguments

    class Writer:
        facts = {"writer": 1}

        def __init__(self, *told):
            assert told == ("a/model", "{document}", 1)

        def __call__(self, documents, seed):
            return [[f"what is {document}"] for document in documents]

    monkeypatch.setattr(retrieval, "QueryGenerator", Writer)
    options = {"cache_dir": str(tmp_path), "teacher": [teacher_folder]}
    made = [
        retrieval.more_queries(arguments(**given, **options), collection[1], 1)
        for given in ({"spans": 1}, {"generator": "a/model"}, {"spans": 1, "generator": "a/model"}, {})
    ]
    assert made[3] is None
    assert min(len(made[0]), len(made[1])) > 100
    assert made[2][:] == {column: [*made[0][column], *made[1][column]] for column in ("query", "document")}


def test_documents_are_encoded_as_the_index_was(run, backbone_folder, tmp_path):
    run("--teacher", str(backbone_folder), "--teacher_pooling", "cls", "--teacher_max_length", "4", "--num_train_epochs", "1",
        "--teacher_name", str(backbone_folder))  # fmt: skip
    texts = ["a red cat sat on the mat", "the sea is blue"]
    wanted = EncoderTeacher(backbone_folder, pooling="cls", max_length=4, dtype="float32").encode(texts)
    found = _open(str(tmp_path / "out"), dtype="float32").encode(texts, prompt_name="document")
    assert torch.cosine_similarity(found, wanted).min() > 0.9999


def test_a_sample_of_the_documents_keeps_all_answers(run):
    results = run("--max_documents", "60", "--max_queries", "20", "--num_train_epochs", "1")
    assert (results["data"]["documents"], results["data"]["held_out"]) == (60, 4)
    assert results["data"]["queries"] + results["data"]["leaked"] == 16


def test_queries_of_the_evaluation_are_left_out_of_the_training(run, collection, tmp_path):
    folder, documents, queries = collection
    other = tmp_path / "leaking"
    (other / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "qrels/test.tsv", "qrels/train.tsv"):
        (other / name).write_text((folder / name).read_text())
    rows = [{"_id": f"q{i}", "text": queries[145].upper() + "!" if i < 2 else text} for i, text in enumerate(queries)]
    (other / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = run("--collection", str(other), "--num_train_epochs", "1")
    assert results["data"]["leaked"] + results["data"]["queries"] == 80
    assert 0 < results["data"]["leaked"] <= 2  # those that were not split off for dev


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--document_embeddings", "INDEX"], r"holds \(199, 23, 1\), expected finite vectors"),
        (["--metric", "l1"], "metric is 'l1'"),
        (["--temperature", "0"], "temperatures are 0.0 and 1.0"),
        (["--negatives", "0"], "expected --negatives 1 or more"),
        (["--dual_pooling", "8"], "dual_pooling is 8, reranker None"),
        (["--dev_queries", "100"], "100 of 100 queries to split off"),
    ],
)
def test_wrong_input_is_refused_before_work(run, tmp_path, flags, message):
    np.save(tmp_path / "index.npy", np.ones((199, 23, 1), np.float32))
    flags = [str(tmp_path / "index.npy") if flag == "INDEX" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        run(*flags)
    assert not list(tmp_path.glob("caches/*/*.safetensors"))


def test_settings_of_other_recipes_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--texts", "some.txt")
    assert "unrecognized arguments: --texts" in capsys.readouterr().err


def test_an_index_of_another_length_width_or_order_is_refused(run, collection, teacher_folder, tmp_path):
    vectors = EncoderTeacher(teacher_folder).encode(collection[1]).numpy()
    np.save(tmp_path / "turned.npy", np.roll(vectors, 7, axis=0))
    with pytest.raises(ValueError, match=r"\d\d% of the training queries are closer"):
        run("--document_embeddings", str(tmp_path / "turned.npy"), output="turned")
    np.save(tmp_path / "index.npy", np.ones((199, 24), np.float32))
    with pytest.raises(ValueError, match="200 texts but 199 vectors"):
        run("--document_embeddings", str(tmp_path / "index.npy"))
    np.save(tmp_path / "wide.npy", np.ones((200, 25), np.float32))
    with pytest.raises(ValueError, match="expected one space"):
        run("--document_embeddings", str(tmp_path / "wide.npy"), output="wide")


def test_the_losses_that_weigh_nothing_are_not_there(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    make = importlib.import_module("embed_distill").EmbedDistillArguments
    assert make().loss().parts == ("query", "document", "score", "label")
    assert make(query_weight=0, document_weight=0, score_weight=0).loss().parts == ("label",)
    assert make(label_weight=0, score_weight=0, document_weight=0).loss().weights == {"query": 1.0, "document": 0}


def test_queries_made_of_one_document_are_compared_with_other_documents(run, monkeypatch):
    match = importlib.import_module("retrieval").require_match
    vectors = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    answers = [[row] for row in range(40) for _ in range(4)]
    queries = vectors[[row for (row,) in answers]] + 0.1
    match(queries, vectors, answers)
    match(queries[:4], vectors, answers[:4])  # one document: there is nothing to compare with
    with pytest.raises(ValueError, match="closer to their own answer"):
        match(queries, vectors[torch.randperm(40, generator=torch.Generator().manual_seed(1))], answers)
