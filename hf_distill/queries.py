# SPDX-License-Identifier: Apache-2.0
"""Queries made from documents, with a generating model or without one: more places where a query encoder meets its teacher."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from .processes import process_state
from .shards import write_whole
from .student import load_safe
from .teachers import weights_digest


logger = logging.get_logger(__name__)

Generator = Callable[[list[str], int], list[list[str]]]  # (documents, seed) -> queries of each


class QueryGenerator:
    """Queries from a generating model: doc2query's kind (sequence to sequence), or a language model with a prompt.

    Source: EmbedDistill, Kim et al. 2023, https://huggingface.co/papers/2301.12005, Section on query generation: embedding
    matching needs queries, not labels. The paper's own generator is another; doc2query: Nogueira et al. 2019,
    https://huggingface.co/papers/1904.08375.

    Args:
        name: Folder or Hub id; whether it is a causal model or sequence to sequence, its config says.
        prompt: What the model reads; {document} stands for the document.
        per_document: Queries a document.
        batch_size: Documents at a time.
        max_length: Longest prompt in tokens; the document is cut.
        device: None for a GPU where there is one.
        **generation: What `generate` takes; sampling with top_p 0.95 and 48 new tokens unless said otherwise.

    Raises:
        OSError: If there is no such model, or only pickled weights.
        ValueError: If the prompt has no place for the document: all documents would get the same queries.
    """

    def __init__(
        self,
        name: str,
        prompt: str = "{document}",
        per_document: int = 1,
        batch_size: int = 16,
        max_length: int = 384,
        device: str | torch.device | None = None,
        **generation: Any,
    ) -> None:
        if "{document}" not in prompt:
            raise ValueError(
                f"QueryGenerator: the prompt is {prompt!r}, expected {{document}} in it. All documents would get the same "
                "queries."
            )
        seq2seq = AutoConfig.from_pretrained(name).is_encoder_decoder
        self.model = load_safe(AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM, name).eval()
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        if not seq2seq:
            self.tokenizer.padding_side = "left"  # what is generated goes on at the right end
            self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.seq2seq, self.prompt, self.per_document = seq2seq, prompt, per_document
        self.batch_size, self.max_length = batch_size, max_length
        self.generation = {"do_sample": True, "top_p": 0.95, "max_new_tokens": 48, **generation}
        self.facts = {"model": name, "weights": weights_digest([self.model.state_dict()]), "prompt": prompt}
        self.facts |= {"per_document": per_document, "max_length": max_length, "batch_size": batch_size, **generation}

    @torch.no_grad()
    def __call__(self, documents: list[str], seed: int = 0) -> list[list[str]]:
        """Return the queries of each document, the first line of what the model writes; the seed decides what is sampled."""
        with torch.random.fork_rng():  # what is drawn elsewhere does not depend on how many shards are there already
            torch.manual_seed(seed)
            return self._sample(documents)

    def _sample(self, documents: list[str]) -> list[list[str]]:
        queries: list[list[str]] = []
        for start in range(0, len(documents), self.batch_size):
            prompts = [self._prompt(document) for document in documents[start : start + self.batch_size]]
            inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
            found = self.model.generate(**inputs, num_return_sequences=self.per_document, **self.generation)
            if not self.seq2seq:
                found = found[:, inputs["input_ids"].shape[1] :]
            lines = [text.strip().split("\n")[0] for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]
            queries += [lines[i : i + self.per_document] for i in range(0, len(lines), self.per_document)]
        return queries

    def _prompt(self, document: str) -> str:
        """Return the prompt around as much of the document as there is room for, so that what follows it stays."""
        room = self.max_length - len(self.tokenizer(self.prompt.format(document=""))["input_ids"])
        ids = self.tokenizer(document, add_special_tokens=False, truncation=True, max_length=max(room, 1))["input_ids"]
        return self.prompt.format(document=self.tokenizer.decode(ids, skip_special_tokens=True))


class SpanQueries:
    """Queries without a model: a sentence of the document, or, where it has one only, a run of its words.

    Args:
        per_document: Queries a document.
        words: Fewest and most words of a run.
    """

    def __init__(self, per_document: int = 1, words: tuple[int, int] = (4, 12)) -> None:
        self.per_document, self.words = per_document, words
        self.facts = {"model": None, "per_document": per_document, "words": list(words)}

    def __call__(self, documents: list[str], seed: int = 0) -> list[list[str]]:
        """Return the queries of each document; what is taken depends on the document and the seed only."""
        return [self._spans(document, seed) for document in documents]

    def _spans(self, document: str, seed: int) -> list[str]:
        rng = random.Random(hashlib.sha256(f"{seed} {document}".encode("utf-8", "surrogatepass")).digest())
        sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+", document) if len(part.split()) >= self.words[0]]
        if len(sentences) > 1:
            return rng.sample(sentences, min(self.per_document, len(sentences)))
        words, spans = document.split(), []
        for _ in range(self.per_document):
            length = min(rng.randint(*self.words), len(words))
            start = rng.randint(0, len(words) - length)
            spans.append(" ".join(words[start : start + length]))
        return spans


def generate_queries(
    documents: Sequence[str], generator: Any, folder: str | Path, seed: int = 42, shard_size: int = 512
) -> Dataset:
    """Return rows of a query and the document that it was made from.

    Each query stands there once, with the first document that gave it; empty ones, and those that repeat their document, are
    left out. The folder keeps finished shards: killed and called again, it goes on after them, and each process of a launch
    makes its share. What a shard holds depends on its documents, the generator and the seed only.

    Args:
        documents: Texts.
        generator: `QueryGenerator`, `SpanQueries`, or another callable (documents, seed) -> queries of each, with its settings
            in `facts`.
        folder: Where shards are kept.
        seed: Of what is sampled.
        shard_size: Documents a shard.

    Raises:
        ValueError: If the generator only repeats its documents: they would be matched as queries a second time, and nothing be
            learned of queries.
    """
    folder, state = Path(folder), process_state()
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.dumps({"generator": generator.facts, "seed": seed}, sort_keys=True, default=str)
    shards = [list(documents[start : start + shard_size]) for start in range(0, len(documents), shard_size)]
    paths = []
    for number, shard in enumerate(logging.tqdm(shards, desc="Queries", unit="shard", disable=not state.is_main_process)):
        digest = hashlib.sha256("\0".join([identity, str(number), *shard]).encode("utf-8", "surrogatepass")).hexdigest()
        paths.append(folder / f"queries-{digest[:20]}.json")
        if number % state.num_processes == state.process_index and not paths[-1].exists():
            found = generator(shard, seed + number)
            write_whole(paths[-1], json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    state.wait_for_everyone()
    rows: dict[str, str] = {}
    made = copies = 0
    for shard, path in zip(shards, paths, strict=True):
        for document, queries in zip(shard, json.loads(path.read_bytes()), strict=True):
            for query in map(str.strip, queries):
                made, copy = made + 1, _plain(query) == _plain(document)
                copies += copy
                if query and not copy:
                    rows.setdefault(query, document)
    if not rows:
        raise ValueError(
            f"generate_queries: of {made} queries for {len(documents)} documents {copies} repeat their document and the others "
            "are empty, expected queries. Matching them would teach documents again. Use another prompt or model."
        )
    logger.info(f"Queries: {len(rows)} of {made} are kept; {copies} repeat their document.")
    return Dataset.from_dict({"query": list(rows), "document": list(rows.values())})


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()
