# SPDX-License-Identifier: Apache-2.0
"""Students beyond kept layers: from scratch, and with a vocabulary cut to what a corpus uses."""

from typing import Any

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
