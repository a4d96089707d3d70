# SPDX-License-Identifier: Apache-2.0
"""Students beyond kept layers: from scratch, and with a vocabulary cut to what a corpus uses."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig
from transformers.utils import logging

from .student import StudentModel


logger = logging.get_logger(__name__)


def from_scratch(
    tokenizer: str, hidden_size: int, layers: int, heads: int, intermediate_size: int, **settings: Any
) -> StudentModel:
    """Make a student of random weights: a BERT encoder of the given shape, e.g. thin and deep as LEALLA's.

    Args:
        tokenizer: Folder or Hub id of a model whose tokenizer it shares.
        hidden_size: H.
        layers: Their number.
        heads: Attention heads; they divide hidden_size.
        intermediate_size: Width of the feed-forward layers.
        **settings: pooling, projection_dim, ... as `StudentModel.from_backbone` takes them, and attn_implementation.

    Raises:
        ValueError: If the heads do not divide hidden_size.
    """
    if hidden_size % heads:
        raise ValueError(
            f"from_scratch: {heads} heads for {hidden_size} dimensions, expected a divisor: heads are of one width."
        )
    shared = AutoTokenizer.from_pretrained(tokenizer)
    config = BertConfig(
        vocab_size=len(shared),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        pad_token_id=shared.pad_token_id,
        attn_implementation=settings.pop("attn_implementation", None),
    )
    model = StudentModel.from_parts(AutoModel.from_config(config), shared, layers=list(range(layers)), **settings)
    logger.info(f"StudentModel: from scratch, {layers} layers, {model.num_parameters() / 1e6:.1f}M parameters.")
    return model


@dataclass
class Pruned:
    """What `prune_vocabulary` kept.

    kept, of: Tokens. parameters: Weights saved. coverage: Share of the corpus's tokens that survive, in [0, 1].
    whole_texts: Share of its texts that are tokenised as before, in [0, 1].
    """

    kept: int
    of: int
    parameters: int
    coverage: float
    whole_texts: float


def prune_vocabulary(student: StudentModel, texts: Iterable[str], max_tokens: int | None = None) -> Pruned:
    """Cut a student's WordPiece vocabulary, in place, to the tokens that a corpus uses.

    Special tokens and all single characters stay, so a word whose token went is spelt with shorter ones and none becomes
    unknown that was not. A text all of whose tokens survive is tokenised exactly as before: WordPiece takes the longest match
    from the left, and the longest of all is still the longest of those that are left.

    Args:
        student: Its token embeddings and tokenizer are replaced, its other weights stay.
        texts: The corpus; read once for counting and once for coverage, so a list or data set column, not a generator.
        max_tokens: Keep at most so many, the most frequent ones; None for all that are used.

    Raises:
        ValueError: If the tokenizer is not WordPiece (shorter pieces would not be found the same way), or max_tokens leaves no
            room for special tokens and characters.
    """
    tokenizer = student.tokenizer
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["model"]["type"] != "WordPiece":
            raise ValueError(
                f"prune_vocabulary: the tokenizer is {content['model']['type']}, expected WordPiece. Texts would be cut "
                "otherwise than the embeddings were trained for. Keep the whole vocabulary."
            )
        vocabulary: dict[str, int] = content["model"]["vocab"]
        counts: Counter[int] = Counter()
        for batch in _batches(texts):
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                counts.update(ids)
        prefix = content["model"]["continuing_subword_prefix"]
        always = {token["id"] for token in content["added_tokens"]}
        always |= {i for token, i in vocabulary.items() if len(token.removeprefix(prefix)) == 1}
        if max_tokens is not None and max_tokens < len(always):
            raise ValueError(
                f"prune_vocabulary: max_tokens is {max_tokens}, expected at least {len(always)}, the special tokens and single "
                "characters. Words would become unknown. Raise it."
            )
        room = None if max_tokens is None else max_tokens - len(always)
        used = sorted((i for i in counts if i not in always), key=lambda i: (-counts[i], i))[:room]
        keep = sorted(always | set(used))
        place = {old: new for new, old in enumerate(keep)}
        content["model"]["vocab"] = {token: place[i] for token, i in vocabulary.items() if i in place}
        for token in content["added_tokens"]:
            token["id"] = place[token["id"]]
        _renumber(content["post_processor"], place)
        if content["padding"]:
            content["padding"]["pad_id"] = place[content["padding"]["pad_id"]]
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        pruned = AutoTokenizer.from_pretrained(folder)
    _keep_rows(student, keep, place)
    pruned.model_max_length = tokenizer.model_max_length
    student.tokenizer = pruned
    whole = total = 0
    for batch in _batches(texts):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            whole, total = whole + all(i in place for i in ids), total + 1
    saved = (len(vocabulary) - len(keep)) * student.config.hidden_size
    covered = sum(count for i, count in counts.items() if i in place) / max(counts.total(), 1)
    report = Pruned(len(keep), len(vocabulary), saved, covered, whole / max(total, 1))
    student.settings["vocabulary"] = asdict(report)
    logger.info(
        f"StudentModel: {report.kept} of {report.of} tokens kept, {saved / 1e6:.1f}M parameters saved; they are "
        f"{100 * covered:.2f} % of the corpus, {100 * report.whole_texts:.1f} % of its texts are tokenised as before."
    )
    return report


def _batches(texts: Iterable[str], size: int = 1000) -> Iterable[list[str]]:
    rows = iter(texts)
    while batch := list(islice(rows, size)):
        yield batch


def _renumber(processor: dict[str, Any] | None, place: dict[int, int]) -> None:
    """Give the special tokens that are put around a text their new ids."""
    kind = None if processor is None else processor["type"]
    if kind == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [place[i] for i in token["ids"]]
    elif kind == "BertProcessing":
        for side in ("sep", "cls"):
            processor[side][1] = place[processor[side][1]]
    elif kind is not None:
        raise ValueError(f"prune_vocabulary: the tokenizer's post-processor is {kind}, expected that of a BERT tokenizer.")


@torch.no_grad()
def _keep_rows(student: StudentModel, keep: list[int], place: dict[int, int]) -> None:
    old = student.backbone.get_input_embeddings()
    padding = None if old.padding_idx is None else place[old.padding_idx]
    new = nn.Embedding(len(keep), old.embedding_dim, padding, device=old.weight.device, dtype=old.weight.dtype)
    new.weight.copy_(old.weight[keep])
    student.backbone.set_input_embeddings(new)
    for config in {id(c): c for c in (student.config, student.backbone.config)}.values():
        config.vocab_size = len(keep)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
            if getattr(config, name, None) is not None:
                setattr(config, name, place.get(getattr(config, name)))
