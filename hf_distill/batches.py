# SPDX-License-Identifier: Apache-2.0
"""From rows of texts to batches: tokenising, collating, and the order of rows, those of similar length together."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from .cross_encoder import pair
from .data import is_text, refuse_rows
from .teachers import Teacher


def tokenize(dataset: Dataset, tokenizer: Any, columns: list[str], max_length: int, read: list[str] | None = None) -> Dataset:
    """Return the data set with the text columns, `input_ids` (a list a column) and `length` (tokens of the longest).

    Args:
        dataset: Rows of texts.
        tokenizer: The student's.
        columns: The text columns.
        max_length: Longest text in tokens.
        read: The columns that the student reads; all if None.
    """
    read = columns if read is None else read

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        ids = [tokenizer(batch[column], truncation=True, max_length=max_length)["input_ids"] for column in read]
        rows = [list(row) for row in zip(*ids, strict=True)]
        return {"input_ids": rows, "length": [max(map(len, row)) for row in rows]}

    dataset = dataset.select_columns(columns)
    ids = {"input_ids": List(List(Value("int32"))), "length": Value("int32")}  # half of what a list becomes by itself
    return dataset.map(tokens, batched=True, desc="Tokenising", features=Features({**dataset.features, **ids}))


class DistillationCollator:
    """Rows -> one batch: all C columns of B rows as N = B * C texts, padded together, and their targets.

    Args:
        tokenizer: The student's.
        teacher: Where the targets come from.
        columns: The text columns.
        read: Those that the student reads; all if None.
        reranker: A teacher of pairs, for scores of the first column with each of the others.
        max_length: Longest text in tokens, for rows that are not tokenised yet (those of a stream: each process then
            tokenises its own rows only).
    """

    def __init__(
        self,
        tokenizer: Any,
        teacher: Teacher | None,
        columns: list[str],
        max_length: int | None = None,
        read: list[str] | None = None,
        reranker: Teacher | None = None,
    ) -> None:
        self.tokenizer, self.teacher, self.columns, self.max_length = tokenizer, teacher, columns, max_length
        self.read, self.reranker = columns if read is None else read, reranker
        # We pad ids that are there already; the advice to tokenise again would be wrong.
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids and attention_mask [N, T], texts [B, C]; targets [B, C, D] and scores [B, C - 1] with a teacher."""
        if "input_ids" in rows[0]:
            ids = [ids for row in rows for ids in row["input_ids"]]
        else:
            texts = [row[column] for row in rows for column in self.read]
            ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        texts = [[row[column] for column in self.columns] for row in rows]
        batch = {**batch, "texts": torch.tensor([[_number(text) for text in row] for row in texts])}
        if self.teacher is not None:
            # Never under the name `labels`: the Trainer would take it for a model's own loss.
            targets = self.teacher.targets(texts)
            batch |= targets if isinstance(targets, dict) else {"targets": targets}
        if self.reranker is not None:
            pairs = [pair(row[0], document) for row in texts for document in row[1:]]
            batch["scores"] = self.reranker.encode(pairs)[:, 0].reshape(len(rows), -1)
        return batch


def _number(text: str) -> int:
    """Return a number for a text, the same on every process; two texts of one batch share it with a chance of about 1e-13."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)


class LengthGroupedSampler(Sampler[int]):
    """All rows once, shuffled, so that rows of similar length stand in one batch.

    The order depends on seed and epoch only, so a resumed run sees what the uninterrupted one did (the host's sampler draws
    from the global random state, which a checkpoint does not restore at epoch 2). Rows are shuffled, cut into pools of
    `pool` blocks, sorted inside a pool, and the blocks shuffled again.

    Args:
        lengths: Tokens of each row.
        block_size: Rows of one optimizer step over all processes, so that the ranks get batches of equal length.
        seed: Of the order.
        pool: Blocks that are sorted together.
    """

    def __init__(self, lengths: Iterable[int], block_size: int, seed: int, pool: int = 50) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.block_size, self.seed, self.pool = block_size, seed, pool
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Accelerate calls this before each epoch, and on resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        blocks: list[torch.Tensor] = []
        for pool in order.split(self.block_size * self.pool):
            ranked = pool[torch.argsort(self.lengths[pool], stable=True)]
            blocks += ranked.split(self.block_size)
        # Only the last block may be short; were it earlier, all later batches would straddle two lengths.
        short = [blocks.pop()] if len(blocks[-1]) < self.block_size else []
        shuffled = [blocks[i] for i in torch.randperm(len(blocks), generator=generator)]
        for block in shuffled + short:
            yield from block.tolist()


class TextStream(IterableDataset):
    """The rows of a stream, those of similar length together; what it holds in memory is bounded.

    `pool` blocks of rows are read, sorted by the length of their texts, cut into blocks and the blocks shuffled, so the
    order depends on the stream, seed and pass only. A resumed run reads the stream again up to where it was: slower than
    going back to a saved place in it, but exact, also behind a shuffle buffer, whose content is saved nowhere.

    Each process reads the whole stream and takes its part of every batch, so that all of them have as many batches.

    Args:
        dataset: `datasets.IterableDataset`, shuffled (`.shuffle(seed=..., buffer_size=...)`) or not.
        columns: Its text columns.
        block_size: Rows of one optimizer step over all processes; None to keep the stream's own order.
        seed: Of the order.
        endless: Whether it begins again at its end, shuffled anew. The host takes such a stream for one epoch; it would
            resume the second pass of one that ends at a wrong place (transformers 5.23 counts max_steps as one pass).
        pool: Blocks that are sorted together.
    """

    def __init__(
        self, dataset: Any, columns: list[str], block_size: int | None, seed: int, endless: bool, pool: int = 50
    ) -> None:
        self.dataset, self.columns = dataset.select_columns(columns), columns
        self.block_size, self.seed, self.endless, self.pool = block_size, seed, endless, pool

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in count() if self.endless else [0]:
            self.dataset.set_epoch(number)
            rows = None
            for rows in self._pools(number):
                yield from rows
            if rows is None and (worker := get_worker_info()) and worker.id:
                return  # the stream has fewer files than the loader has workers
            if rows is None:
                raise ValueError("DistillationTrainer: the stream has no rows, expected texts to learn from.")

    def _pools(self, number: int) -> Iterator[list[dict[str, str]]]:
        """Yield the rows of one pass, ordered, some at a time."""
        stream, size = iter(self.dataset), self.block_size or 1
        generator, first = torch.Generator().manual_seed(self.seed + number), 0
        while pool := list(islice(stream, size * self.pool if self.block_size else 1)):
            for column in self.columns:
                refuse_rows(column, [first + i for i, row in enumerate(pool) if not is_text(row[column])])
            first += len(pool)
            pool.sort(key=lambda row: max(len(row[column]) for column in self.columns))
            blocks = [pool[start : start + size] for start in range(0, len(pool), size)]
            short = [blocks.pop()] if len(blocks[-1]) < size else []
            order = torch.randperm(len(blocks), generator=generator)
            yield list(chain.from_iterable([blocks[i] for i in order] + short))
