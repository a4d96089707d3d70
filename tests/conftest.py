# SPDX-License-Identifier: Apache-2.0
"""Tiny models made in memory; no network, no GPU. Every fixture folder is as a real one on the Hub would be."""

import atexit
import json
import os
import shutil
import tempfile


# Before the first import: a call to the Hub fails at once, and nothing of the user's cache is read or written.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-distill-tests-")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The defaults back off for minutes.
os.environ |= {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}

import random

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
from transformers.utils import logging


atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
disable_progress_bars()
logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny matrices: a second thread only waits

WORDS = "a cat dog sat ran on the mat rug tree quick brown fox jumps over lazy sea sky blue red old new house".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
_SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
BACKBONES = {
    "bert": _SIZE,
    "mpnet": _SIZE,
    "roberta": {**_SIZE, "max_position_embeddings": 42},
    "xlm-roberta": {**_SIZE, "max_position_embeddings": 42},
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
    "modernbert": {**_SIZE, "global_attn_every_n_layers": 2, "local_attention": 8},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", words["<s>"]), ("</s>", words["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_backbone(folder, kind: str = "bert", seed: int = 0, **changes) -> str:
    """Write a random tiny encoder with its tokenizer, as `AutoModel` opens it; weights large enough to tell texts apart."""
    options = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 40, "pad_token_id": 0}
    return write_random(folder, AutoModel, AutoConfig.for_model(kind, **{**options, **BACKBONES[kind], **changes}), seed)


def write_random(folder, auto_class, config, seed: int) -> str:
    """Write a model of random weights and the tiny tokenizer."""
    torch.manual_seed(seed)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_texts(count: int, seed: int = 0, longest: int = 14) -> list[str]:
    """Return distinct sentences of 2 to `longest` words."""
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(rng.choices(WORDS, k=rng.randint(2, longest)))] = None
    return list(texts)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> str:
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> str:
    """A teacher of 24 dimensions in sentence-transformers' layout: Transformer, mean Pooling, Dense with tanh, Normalize."""
    from hf_distill import StudentModel

    folder = tmp_path_factory.mktemp("teacher")
    source = make_backbone(tmp_path_factory.mktemp("teacher-backbone"), seed=7)
    torch.manual_seed(7)
    model = StudentModel.from_backbone(source, projection_dim=24, activation="tanh")
    with torch.no_grad():
        model.projection.weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(96)


@pytest.fixture
def dataset(texts) -> Dataset:
    return Dataset.from_dict({"text": texts})


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    from hf_distill import EncoderTeacher

    return EncoderTeacher(teacher_folder, dtype="float32", device="cpu")


@pytest.fixture
def cache(teacher, texts, tmp_path):
    from hf_distill import TeacherCache

    cache = TeacherCache(teacher, tmp_path / "cache", dtype="float32", shard_size=20, batch_size=8)
    cache.add(texts)
    return cache


@pytest.fixture
def student(backbone_folder):
    from hf_distill import StudentModel

    torch.manual_seed(0)
    return StudentModel.from_backbone(backbone_folder, projection_dim=24, dropout=0.0)


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """200 documents; 100 training and 50 test queries, each its document without the last word."""
    folder = tmp_path_factory.mktemp("collection")
    documents = [text for text in make_texts(400, seed=11, longest=12) if len(text.split()) > 5][:200]
    queries = [text.rsplit(" ", 1)[0] for text in documents[:150]]
    assert (len(documents), len(set(queries))) == (200, 150)
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(documents))
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(queries))
    )
    for split, rows in (("train", range(100)), ("test", range(100, 150))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder, documents, queries


@pytest.fixture
def hub(request, monkeypatch):
    """A server of the Hub's protocol that this process talks to, as far as it asks for its address anew; see hub_server."""
    from hub_server import HubServer

    with HubServer(xet=getattr(request, "param", True)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not server.xet)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        yield server


@pytest.fixture
def word_tests(tmp_path):
    """Return a folder of texts, and of every test that the recipe takes, made of other texts."""
    texts = make_texts(400)
    (tmp_path / "texts.txt").write_text("\n".join(texts[:250]))
    fresh = [text for text in texts[250:] if "cat" in text.split()]
    assert len(fresh) > 24
    rows = [("word", "sentence1", "sentence2", "index1", "index2", "label")]
    places = [(text, text.split(" ").index("cat")) for text in fresh]
    rows += [("cat", a, b, i, j, n % 2) for n, ((a, i), (b, j)) in enumerate(zip(places[:12], places[12:24], strict=True))]
    (tmp_path / "wic").mkdir()
    for split, own in (("train", rows[:7]), ("test", rows[:1] + rows[7:]), ("dev", rows[:5])):
        (tmp_path / "wic" / f"{split}.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in own))
    (tmp_path / "classes").mkdir()
    for split, own in (("train", texts[300:360]), ("test", texts[360:400])):
        lines = ["text\tlabel", *(f"{text}\t{'cat' in text}" for text in own)]
        (tmp_path / "classes" / f"made-{split}.tsv").write_text("\n".join(lines) + "\n")
    pairs = [("cat", "dog", 3), ("mat", "rug", 9), ("fox", "dog", 6), ("sea", "sky", 5), ("red", "blue", 8)]
    lines = ["word1\tword2\tscore\tset", *(f"{a}\t{b}\t{score}\tmade" for a, b, score in pairs)]
    (tmp_path / "words.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path
