# SPDX-License-Identifier: Apache-2.0
"""Students beyond kept layers: thin and deep from scratch, and planned within a budget."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, ElectraConfig
from transformers.utils import logging

from .projection import least_squares
from .student import StudentModel, load_safe


logger = logging.get_logger(__name__)

# LEALLA, Mao et al. 2023, https://huggingface.co/papers/2302.08387: hidden size, layers, heads, FFN size.
LEALLA_SHAPES = {"small": (128, 24, 8, 512), "base": (192, 24, 12, 768), "large": (256, 24, 8, 1024)}
_FACTS = ("vocabulary", "embeddings_of")  # what a student's settings say of its table, for its card
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
        ValueError: If the heads do not divide hidden_size, or the tokenizer has no token to pad with.
    """
    if hidden_size % heads:
        raise ValueError(
            f"from_scratch: {heads} heads for {hidden_size} dimensions, expected a divisor: heads are of one width."
        )
    shared = AutoTokenizer.from_pretrained(tokenizer)
    shared.padding_side = "right"  # or a token's place, and so the embedding, would depend on the batch
    padding = shared.pad_token_id  # of a token of its own, whose row learns nothing
    shared.pad_token = shared.pad_token or shared.eos_token
    if shared.pad_token is None:
        raise ValueError(
            f"from_scratch: the tokenizer of {tokenizer} has neither a padding nor an end token, expected one. Texts of "
            "different lengths make no batch. Set its pad_token and save it."
        )
    config = BertConfig(
        vocab_size=len(shared),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        pad_token_id=padding,
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
    student.settings["embeddings_of"] = Path(name).name if Path(name).is_dir() else name
    return float(variances[-own.shape[1] :].sum() / variances.sum())


@torch.no_grad()
def narrow_embeddings(student: StudentModel, dim: int) -> StudentModel:
    """Return the student with a token table of `dim` dimensions and a Linear to its width: an ELECTRA of the same layers.

    Of a student of many languages, nine tenths of the weights are its token table. The narrow one starts as the main
    directions of the whole one and the Linear by least squares, so that the first layer is given what it was given before,
    as nearly as so many dimensions can.

    Source: factorised embeddings, Lan et al. 2019 (ALBERT), https://huggingface.co/papers/1909.11942; here in the layout of
    ELECTRA, which every loader knows.

    Args:
        student: Of BERT's architecture, V tokens and width H; its vocabulary is cut before.
        dim: Width of the table [V, dim], below H.

    Raises:
        ValueError: If the student is of another architecture, or the table would not be narrower.
    """
    wide, width = student.backbone, student.config.hidden_size
    if student.config.model_type != "bert" or not 1 < dim < width:
        raise ValueError(
            f"narrow_embeddings: the student is of type {student.config.model_type} with a table of {width} dimensions, to be "
            f"{dim}, expected a BERT and fewer dimensions than before. Its layers would not fit an ELECTRA's. Keep the table, "
            "and cut its tokens (--max_vocabulary)."
        )
    kept = {key: value for key, value in wide.config.to_diff_dict().items() if key in ElectraConfig().to_dict()}
    kept |= {"embedding_size": dim, "model_type": "electra", "architectures": None, "hidden_size": width}
    narrow = AutoModel.from_config(ElectraConfig(**kept, attn_implementation=wide.config._attn_implementation))
    narrow.encoder.load_state_dict(wide.encoder.state_dict())

    # A layer norm takes a row's own mean away, so neither side of the Linear can hold it: it goes at once, and dim - 1
    # directions are turned into the space without it.
    tables = [wide.embeddings.word_embeddings, wide.embeddings.position_embeddings, wide.embeddings.token_type_embeddings]
    rows = [table.weight - table.weight.mean(1, keepdim=True) for table in tables]
    words = rows[0] + rows[2][0]
    main = torch.linalg.eigh(words.T @ words)[1].flip(1)[:, : dim - 1]  # [H, dim - 1]
    turn = torch.linalg.qr(torch.cat([torch.ones(dim, 1), torch.eye(dim)[:, 1:]], 1))[0][:, 1:]  # [dim, dim - 1]
    own = narrow.embeddings
    for table, row in zip((own.word_embeddings, own.position_embeddings, own.token_type_embeddings), rows, strict=True):
        table.weight.copy_(row @ main @ turn.T)

    tokens = torch.arange(len(rows[0]))[None]
    places = tokens % min(len(rows[1]), 64)  # each token at one place, as short texts have them
    before, after = (model.embeddings.eval()(tokens, position_ids=places)[0] for model in (wide, narrow))
    weight, bias = least_squares(after, before)
    narrow.embeddings_project.weight.copy_(weight)
    narrow.embeddings_project.bias.copy_(bias)
    lost = (before - after @ weight.T - bias).square().sum() / (before - before.mean(0)).square().sum()

    facts = {"embedding_dim": dim, **{key: student.settings[key] for key in _FACTS if key in student.settings}}
    settings = {key: value for key, value in student.settings.items() if key not in facts}
    model = StudentModel.from_parts(narrow, student.tokenizer, **settings)
    model.settings |= facts
    if student.projection is not None:
        model.projection.load_state_dict(student.projection.state_dict())
    logger.info(
        f"StudentModel: a token table of {dim} dimensions in place of {width}, {model.num_parameters() / 1e6:.1f}M parameters; "
        f"{100 * (1 - lost):.1f} % of what the first layer is given is kept."
    )
    return model


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
