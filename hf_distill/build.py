# SPDX-License-Identifier: Apache-2.0
"""Students beyond kept layers: thin and deep from scratch, and planned within a budget."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig
from transformers.utils import logging

from .student import StudentModel, load_safe


logger = logging.get_logger(__name__)

# LEALLA, Mao et al. 2023, https://huggingface.co/papers/2302.08387: hidden size, layers, heads, FFN size.
LEALLA_SHAPES = {"small": (128, 24, 8, 512), "base": (192, 24, 12, 768), "large": (256, 24, 8, 1024)}
_WIDTHS, _DEPTHS = (384, 320, 256, 192, 160, 128, 96, 64), (24, 12)


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


@torch.no_grad()
def start_embeddings(student: StudentModel, name: str) -> float:
    """Start the token embeddings from the first principal components of another model's; both share a tokenizer.

    Ours, not the paper's: LEALLA's students learn the table, nine tenths of their weights, from random values.

    Args:
        student: Its table [V, H] is replaced.
        name: Folder or Hub id of the other model, of H' >= H dimensions.

    Returns:
        The share of the table's variance that is kept, in [0, 1].

    Raises:
        ValueError: If the tokenizers differ (rows would be those of other tokens), or the model is thinner.
    """
    own, shared = student.backbone.get_input_embeddings().weight, AutoTokenizer.from_pretrained(name)
    table = load_safe(AutoModel, name).get_input_embeddings().weight.detach().float()[: len(own)]
    if table.shape[1] < own.shape[1]:
        raise ValueError(
            f"start_embeddings: {name} has {table.shape[1]} dimensions, the student {own.shape[1]}, expected as many or more. "
            "There are no main directions to fill the rest with. Take a wider model, or start at random "
            "(--start_embeddings false)."
        )
    if shared.get_vocab() != student.tokenizer.get_vocab() or len(table) < len(own):
        raise ValueError(
            f"start_embeddings: {name} has {len(shared)} tokens, expected the student's {len(student.tokenizer)}, the same "
            "ones. Rows would be those of other tokens. Start before the vocabulary is cut, from the model whose tokenizer "
            "it is."
        )
    table = table - table.mean(0)
    variances, components = torch.linalg.eigh(table.T @ table)  # ascending
    found = table @ components[:, -own.shape[1] :].flip(1)
    own.copy_(found * (student.config.initializer_range / found.std()))
    return float(variances[-own.shape[1] :].sum() / variances.sum())


@dataclass
class Plan:
    """A student within a budget: hidden_size, layers, heads, intermediate_size, vocabulary (tokens), parameters."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocabulary: int
    parameters: int


def plan(max_params: int, vocabulary: int, dim: int | None = None, positions: int = 512) -> Plan:
    """Return the largest student within a budget whose vocabulary still holds so many tokens: of 24 layers, or 12.

    Args:
        max_params: The budget, all weights counted.
        vocabulary: Tokens wanted (`vocabulary_for`); where not even the least student has room for them, as many as fit.
        dim: Width of the embedding; the student's own if None.
        positions: Longest input in tokens.

    Raises:
        ValueError: If the least student without any token is beyond the budget.
    """
    found, rest = [], 0
    for width, layers in product(_WIDTHS, _DEPTHS):
        ffn = 4 * width
        layer = 4 * (width * width + width) + 2 * width * ffn + ffn + width + 4 * width
        heads = width * width + width + width * (dim or width) + (dim or width)  # the backbone's pooler and ours
        rest = layers * layer + (positions + 2 + 2) * width + heads  # positions, types, norm
        kept = min((max_params - rest) // width, vocabulary)
        found.append(Plan(width, layers, width // (16 if width < 256 else 32), ffn, kept, rest + kept * width))
    whole = [one for one in found if one.vocabulary == vocabulary]
    best = max(whole, key=lambda one: one.parameters) if whole else found[-1]
    if best.vocabulary < 1:
        raise ValueError(
            f"plan: max_params is {max_params}, expected more than {rest}, which {best.layers} layers of {best.hidden_size} "
            "dimensions take. No token would fit beside them. Raise it."
        )
    table = best.vocabulary * best.hidden_size
    logger.info(
        f"Plan: {best.parameters / 1e6:.1f}M of {max_params / 1e6:.1f}M parameters: {best.layers} layers of {best.hidden_size} "
        f"dimensions ({(best.parameters - table) / 1e6:.1f}M), {best.vocabulary} of {vocabulary} tokens ({table / 1e6:.1f}M)."
    )
    return best
