# SPDX-License-Identifier: Apache-2.0
"""The student that speaks in senses: its token states are replaced by those of a dictionary before they are pooled.

This file is published beside the weights, with student.py and senses.py.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .senses import SELECTIONS, SenseDictionary, require_same_tokens
from .student import StudentModel, StudentOutput, pool


@dataclass
class MultiSenseOutput(StudentOutput):
    """What `MultiSenseStudent.forward` returns beside `StudentOutput`.

    states: [N, T, D], token states in the teacher's space, before replacement. sense_scores: [N, T, K], how well each sense
    of each token fits, -inf for none; None where nothing is replaced.
    """

    states: Tensor | None = None
    sense_scores: Tensor | None = None


class MultiSenseStudent(StudentModel):
    """A student whose token states, led to the teacher's width by its Linear, are replaced by senses, then pooled.

    Source: Wang et al. 2025, https://huggingface.co/papers/2504.06036.

    The dictionary lies in a repository of its own, which `config.hf_distill["senses"]` names: `from_pretrained` and
    `AutoModel(trust_remote_code=True)` fetch it. sentence-transformers without remote code, and plain `AutoModel`, know of
    none: they give the embedding without replacement, as `encode(..., replace=False)` does here.
    """

    _files = ("student.py", "senses.py", "multi_sense.py")
    _published_as = "multi_sense.MultiSenseStudent"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        if self.settings["activation"] != "identity":
            raise ValueError(
                f"MultiSenseStudent: activation is {self.settings['activation']!r}, expected identity. The Linear acts on "
                "tokens here and on their mean in sentence-transformers; only a linear map gives both the same."
            )
        self.dictionary: SenseDictionary | None = None
        self.replace = True
        self.scored_in_training = True  # False spares a loss that does not look at the scores their cost

    @classmethod
    def from_backbone(cls, name: str, *, bidirectional: bool = False, **options: Any) -> "MultiSenseStudent":
        """Make a student from a pretrained encoder or language model; see `StudentModel.from_backbone`.

        Args:
            name: Folder or Hub id.
            bidirectional: Let a causal model see both sides, as `TokenTeacher` of that name does; kept in config.json.
            **options: As there.
        """
        student = super().from_backbone(name, **options)
        student.tokenizer.pad_token = student.tokenizer.pad_token or student.tokenizer.eos_token
        student.tokenizer.padding_side = "right"  # as the teacher's: a token's place is counted from the first
        if bidirectional:
            student.config.is_causal = student.backbone.config.is_causal = False
        return student

    def attach(self, dictionary: SenseDictionary, name: str | Path, revision: str | None = None, select: str = "l2") -> None:
        """Let the student speak a dictionary's senses.

        Args:
            dictionary: Of the teacher's tokenizer, which must be the student's, too.
            name: Where it is found again: Hub id, or folder; "../name" stands beside the student, in a folder as on the Hub.
            revision: Its branch, tag or commit on the Hub.
            select: How a sense is chosen: "l2" (the nearest sense; best on dev), "cos", or "dot" (the paper's code).

        Raises:
            ValueError: If tokenizers or widths differ, or there is no such selection.
        """
        fingerprint = dictionary.facts.get("fingerprint") or {}
        self.require_space(dictionary.tokenizer, dictionary.dim, fingerprint.get("max_length", self.settings["max_length"]))
        if select not in SELECTIONS:
            raise ValueError(f"MultiSenseStudent: select is {select!r}, expected one of {SELECTIONS}.")
        self.settings["senses"] = {"name": str(name), "revision": revision, "select": select, "digest": dictionary.digest}
        self.dictionary = dictionary

    def require_space(self, tokenizer: Any, dim: int, max_length: int) -> None:
        """Raise unless a teacher's senses can replace the student's states: the same tokens, of the same width.

        Raises:
            ValueError: If not; the first token that differs is named.
        """
        require_same_tokens(tokenizer, self.tokenizer)
        if dim != self.dim:
            raise ValueError(
                f"MultiSenseStudent: the student's states have {self.dim} dimensions, the senses {dim}, expected as many. None "
                f"would fit. Make it with projection_dim={dim}."
            )
        own = self.settings["max_length"]
        if max_length != own:
            raise ValueError(
                f"MultiSenseStudent: the student reads {own} tokens, the teacher {max_length}, expected as many. Where one "
                f"text ends, the other has a word. Make both with max_length={min(own, max_length)}."
            )

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a student and the dictionary that it names; see `StudentModel.from_pretrained`.

        Raises:
            OSError: If the dictionary is not there: without it the student is another model than was measured.
            ValueError: If it is another than the student was trained with.
        """
        found = super().from_pretrained(name, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        known = model.settings.get("senses")
        if known is not None:
            place = _find(name, known["name"])
            hub_options = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
            dictionary = SenseDictionary.from_pretrained(place, revision=known["revision"], **hub_options)
            if dictionary.digest != known["digest"] and not Path(place).is_dir():  # published over; it is still there
                with contextlib.suppress(OSError):
                    dictionary = SenseDictionary.from_pretrained(place, revision=known["digest"], **hub_options)
            if dictionary.digest != known["digest"]:
                raise ValueError(
                    f"MultiSenseStudent: the dictionary in {place} has digest {dictionary.digest}, expected {known['digest']}, "
                    f"that of the training of {name}. Its states would be replaced by other senses. Put the dictionary that "
                    "belongs to it there."
                )
            model.tokenizer.padding_side = "right"
            model.attach(dictionary, known["name"], known["revision"], known["select"])
        return found

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> MultiSenseOutput:
        """Embed N tokenised texts; see `StudentModel.forward`."""
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        hidden = output.last_hidden_state
        mask = (
            torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device) if attention_mask is None else attention_mask
        )
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.float() if self.dtype == torch.float32 else hidden
            states = states if self.projection is None else self.projection(states)
            found = MultiSenseOutput(**output, states=states)
            if self.dictionary is None or not (self.scored_in_training if self.training else self.replace):
                return found
            if input_ids is None:
                raise ValueError(
                    "MultiSenseStudent: input_ids is None, expected the tokens: senses are theirs. Give them, or set "
                    "student.replace = False."
                )
            scores = self.dictionary.all_scores(states, input_ids, mask, self.settings["senses"]["select"])
            found["sense_scores"] = scores
            if not self.training:
                replaced, _ = self.dictionary.take(states, input_ids, scores)
                found["projected"] = pool(replaced, mask, self.settings["pooling"])
                unit = self.settings["normalize"]
                found["embedding"] = nn.functional.normalize(found["projected"], dim=-1) if unit else found["projected"]
        return found

    def encode(self, texts: str | list[str], *args: Any, replace: bool = True, **kwargs: Any) -> Any:
        """Return embeddings; see `StudentModel.encode`.

        Args:
            texts: One text or N texts.
            *args: As there.
            replace: Whether token states are replaced by senses before they are pooled.
            **kwargs: As there.
        """
        before, self.replace = self.replace, replace
        try:
            return super().encode(texts, *args, **kwargs)
        finally:
            self.replace = before


def _find(student: Any, name: str) -> str:
    """Return where a student's dictionary is: a folder, counted from the student's, or an id on the Hub, beside it or whole.

    Raises:
        OSError: If it should lie beside a folder, and does not.
    """
    here, beside = Path(student), name.removeprefix("../")
    if not here.is_dir():
        return f"{here.parent}/{beside}" if name != beside else name
    place = (here.parent if here.name.startswith("checkpoint-") else here) / name  # a checkpoint lies one folder deeper
    if place.is_dir():
        return str(place)
    if name == beside and not name.startswith(("/", ".")):
        return name
    if here.parent.name == "snapshots":  # of the Hub's cache: models--owner--name/snapshots/commit
        return "/".join([*here.parents[1].name.split("--")[1:-1], beside])
    raise OSError(
        f"MultiSenseStudent: the sense dictionary of {here} is not at {place}, expected it there: the student names it {name}. "
        "Without it the student would be another model than was measured. Copy it there."
    )
