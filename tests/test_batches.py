import random

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset

from hf_distill.batches import DistillationCollator, LengthGroupedSampler, tokenize
from hf_distill.teachers import Teacher


# Ids of make_tokenizer: <pad> 0, <s> 1, </s> 2, <unk> 3; a 5, cat 6, dog 7, sat 8.
ROWS = {"first": ["a cat", "dog"], "second": ["a dog sat", "a whale"], "score": [0.5, 1.0]}


def test_one_column_is_tokenized():
    found = tokenize(Dataset.from_dict(ROWS), make_tokenizer(), ["first"], 40)
    assert found.to_dict() == {
        "first": ["a cat", "dog"],
        "input_ids": [[[1, 5, 6, 2]], [[1, 7, 2]]],
        "length": [4, 3],
    }


def test_two_columns_are_tokenized_side_by_side_and_the_longer_counts():
    found = tokenize(Dataset.from_dict(ROWS), make_tokenizer(), ["first", "second"], 40)
    assert found["input_ids"][:] == [[[1, 5, 6, 2], [1, 5, 7, 8, 2]], [[1, 7, 2], [1, 5, 3, 2]]]
    assert found["length"][:] == [5, 4]
    assert found.column_names == ["first", "second", "input_ids", "length"]


def test_long_texts_are_cut():
    found = tokenize(Dataset.from_dict(ROWS), make_tokenizer(), ["second"], 4)
    assert found["input_ids"][:] == [[[1, 5, 7, 2]], [[1, 5, 3, 2]]]
    assert found["length"][:] == [4, 4]


class ListedTeacher(Teacher):
    dim = 2
    vectors = {"a cat": [1.0, 2.0], "dog": [3.0, 4.0], "a dog sat": [5.0, 6.0], "a whale": [7.0, 8.0]}

    def encode(self, texts):
        return torch.tensor([self.vectors[text] for text in texts])


def test_a_batch_holds_all_columns_row_by_row_with_their_targets():
    tokenizer = make_tokenizer()
    rows = tokenize(Dataset.from_dict(ROWS), tokenizer, ["first", "second"], 40).to_list()
    batch = DistillationCollator(tokenizer, ListedTeacher(), ["first", "second"])(rows)
    assert len(set(batch.pop("texts").flatten().tolist())) == 4
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 5, 6, 2, 0], [1, 5, 7, 8, 2], [1, 7, 2, 0, 0], [1, 5, 3, 2, 0]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
        "targets": [[[1, 2], [5, 6]], [[3, 4], [7, 8]]],
    }


def test_a_batch_of_one_column_keeps_the_axis_of_columns():
    tokenizer = make_tokenizer()
    rows = tokenize(Dataset.from_dict(ROWS), tokenizer, ["second"], 40).to_list()
    batch = DistillationCollator(tokenizer, ListedTeacher(), ["second"])(rows)
    assert batch["targets"].tolist() == [[[5, 6]], [[7, 8]]]
    assert batch["input_ids"].tolist() == [[1, 5, 7, 8, 2], [1, 5, 3, 2, 0]]


def test_rows_of_a_stream_are_tokenized_when_they_are_batched():
    teacher, tokenizer, columns = ListedTeacher(), make_tokenizer(), ["text"]
    rows = [{"text": "a dog sat"}, {"text": "a cat"}]
    late = DistillationCollator(tokenizer, teacher, columns, max_length=4)(rows)
    early = DistillationCollator(tokenizer, teacher, columns)(
        tokenize(Dataset.from_list(rows), tokenizer, columns, 4).to_list()
    )
    assert early["input_ids"].shape == (2, 4)
    assert all(torch.equal(late[key], early[key]) for key in early)


# Order


def in_blocks(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def padding(lengths, order, size):
    blocks = [[lengths[i] for i in block] for block in in_blocks(order, size)]
    return 1 - sum(map(sum, blocks)) / sum(len(block) * max(block) for block in blocks)


@pytest.mark.parametrize(("rows", "block", "pool"), [(103, 8, 50), (103, 8, 2), (64, 8, 3), (5, 8, 50), (1, 1, 1), (9, 1, 4)])
def test_every_row_comes_exactly_once(rows, block, pool):
    sampler = LengthGroupedSampler([i % 7 for i in range(rows)], block, seed=3, pool=pool)
    assert len(sampler) == rows
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(rows))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    def order(seed, epoch):
        sampler = LengthGroupedSampler(list(range(200)), 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = order(1, 0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global state
    torch.manual_seed(5)
    assert order(1, 0) == first
    assert order(1, 1) != first
    assert order(7, 0) != first
    sampler = LengthGroupedSampler(list(range(200)), 8, 1)
    list(sampler)
    assert list(sampler) == first  # reading it once does not move it on


@pytest.mark.parametrize("seed", range(4))
def test_only_the_last_block_is_short(seed):
    rng = random.Random(seed)
    lengths = rng.sample(range(103), 103)  # each length once, so a whole block is 8 lengths in a row
    blocks = in_blocks([lengths[i] for i in LengthGroupedSampler(lengths, 8, seed)], 8)
    assert [len(block) for block in blocks] == [8] * 12 + [7]
    assert all(max(block) - min(block) == len(block) - 1 for block in blocks)


def test_there_is_much_less_padding_than_in_random_order():
    rng = random.Random(0)
    lengths = [min(256, int(rng.lognormvariate(3, 0.8)) + 2) for _ in range(4000)]
    grouped = padding(lengths, list(LengthGroupedSampler(lengths, 16, 0)), 16)
    at_random = padding(lengths, rng.sample(range(4000), 4000), 16)
    assert at_random > 0.5
    assert grouped < at_random / 5


def test_blocks_are_shuffled_and_hold_other_rows_in_another_epoch():
    lengths = [i // 4 for i in range(4000)]
    sampler = LengthGroupedSampler(lengths, 16, 0, pool=20)
    blocks = in_blocks(list(sampler), 16)
    means = [sum(lengths[i] for i in block) / 16 for block in blocks]
    rises = sum(a < b for a, b in zip(means, means[1:], strict=False))
    assert 0.3 < rises / len(means) < 0.7  # from short to long, almost all would be rises
    sampler.set_epoch(1)
    assert not {frozenset(block) for block in blocks} & {frozenset(block) for block in in_blocks(list(sampler), 16)}
