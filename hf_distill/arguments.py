# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: our fields beside those of `TrainingArguments`, and flags or a YAML file made into them."""

import argparse
import difflib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from .licenses import require_license


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what distillation needs; these defaults differ from the host's.

    train_sampling_strategy is "group_by_length" (our sampler), remove_unused_columns is False (targets are looked up by
    the text), per_device_train_batch_size is 64, learning_rate 3e-4, warmup_steps 0.05 (of all steps), logging_steps 50,
    save_total_limit 2.
    """

    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Text columns of the data set, in order; all but label and score if not given."},
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Texts of one forward pass, for a batch beyond memory: computed in such parts, twice, and compared as a "
            "whole (gradient caching)."
        },
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "group_by_length (rows of similar length in a batch), random or sequential."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: targets are looked up by the text of a row."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Rows a batch on each device."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of linear warm-up; below 1: as a share of all steps."})
    logging_steps: float = field(
        default=50, metadata={"help": "Steps between two log lines; below 1: as a share of all steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep; the best one stays."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["texts"],
        metadata={"help": "What every batch holds that has a loss; leave it."},
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # there is nothing else, and the host refuses bf16 on a CPU that was not asked for
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # Read on one process and dealt out, the batches of a stream would have to be padded to one length.
            self.accelerator_config.dispatch_batches = False
        if self.remove_unused_columns:
            raise ValueError(
                "DistillationTrainingArguments: remove_unused_columns is True, expected False. The texts would be dropped "
                "before their targets are looked up. Leave it out."
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "DistillationTrainingArguments: train_sampling_strategy is 'batch_rebalance', expected group_by_length, "
                "random or sequential. It would move rows between steps, and a resumed run would see another order."
            )
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(
                f"DistillationTrainingArguments: mini_batch_size is {self.mini_batch_size}, expected 1 or more texts. The "
                "first step would fail. Leave it out to compute a batch at once."
            )

    def identity(self) -> dict[str, Any]:
        """Return the settings that the weights of a step depend on; how many steps there are to be is none of them."""
        names = ("seed", "data_seed", "train_sampling_strategy", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs")
        names += ("warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
        names += ("bf16", "fp16")
        rows = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        return {**{name: getattr(self, name) for name in names}, "rows_a_step": rows}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token out of training_args.bin, which lies in every checkpoint and is uploaded with it."""
        return {**self.__dict__, "hub_token": None}


@dataclass
class RecipeArguments:
    """What every recipe asks for beside `DistillationTrainingArguments`."""

    teacher: list[str] | None = field(
        default=None,
        metadata={"help": "Folder or Hub id; the embedded default if not given. Several are joined into one space."},
    )
    combine: str = field(default="concatenate", metadata={"help": "How several teachers are joined: concatenate or mean."})
    teacher_int8: bool = field(default=False, metadata={"help": "Hold the teacher in 8 bits (extra int8)."})
    teacher_device_map: str | None = field(
        default=None, metadata={"help": "auto: spread a teacher that is larger than one device over all of them."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_pooling: str | None = field(
        default=None, metadata={"help": "mean, cls, last or pooler, for a teacher without modules.json."}
    )
    teacher_max_length: int | None = field(
        default=None, metadata={"help": "Longest teacher input in tokens; as its repository says if not given."}
    )
    teacher_batch_size: int = field(
        default=64, metadata={"help": "Texts of one teacher batch; fixed when its cache is made. On a CPU 32 may be faster."}
    )
    teacher_name: str | None = field(default=None, metadata={"help": "What results and card call it, if not that."})
    teacher_license: str | None = field(default=None, metadata={"help": "Its licence, if its card does not name it."})
    backbone: str | None = field(default=None, metadata={"help": "What the student is made from: folder or Hub id."})
    backbone_name: str | None = field(default=None, metadata={"help": "What results and card call it, if not that."})
    layers: list[int] | None = field(default=None, metadata={"help": "Layers of it to keep, from 0; all if not given."})
    max_vocabulary: int | None = field(
        default=None,
        metadata={"help": "Cut the student's vocabulary to the most frequent tokens of the text, so many."},
    )
    embedding_dim: int | None = field(
        default=None, metadata={"help": "Narrow a BERT student's token table to so many dimensions, with a Linear behind it."}
    )
    from_scratch: list[int] | None = field(
        default=None,
        metadata={"help": "A student of random weights with the backbone's tokenizer: hidden size, layers, heads, FFN size."},
    )
    freeze_embeddings: bool = field(default=False, metadata={"help": "Leave the student's token embeddings as they are."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest student input in tokens; as much as it takes if not given."}
    )
    dropout: float | None = field(
        default=0.0, metadata={"help": "Dropout of the student in training; exact targets need none."}
    )
    attention: str | None = field(
        default=None, metadata={"help": "Attention kernel of the student: eager, sdpa, flash_attention_2, ..."}
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of LoRA adapters (extra peft); the whole student is trained if not given."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's scale: the adapter counts lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get adapters; all linear layers if not given."}
    )
    dims: list[int] = field(
        default_factory=lambda: [32, 64, 128], metadata={"help": "First dimensions of an embedding to score as well."}
    )
    split_seed: int = field(
        default=42,
        metadata={"help": "Decides what is held out of the data and sampled; --seed what is drawn in training."},
    )
    baselines: bool = field(
        default=True,
        metadata={"help": "Score what no training changes, too: teacher, untrained student; of several runs, one needs to."},
    )
    cache_dir: str = field(default="outputs/teacher-cache", metadata={"help": "Where teachers' vectors are kept."})
    texts_name: str | None = field(default=None, metadata={"help": "What results and card call the texts, if not as they are."})
    license: str | None = field(default=None, metadata={"help": "Licence id of the student, for its card."})
    language: str | None = field(default=None, metadata={"help": "Language code of the texts, for its card."})

    def __post_init__(self) -> None:
        students = ("layers", "from_scratch", "shape", "max_params")
        given = {name: value for name in students if (value := getattr(self, name, None)) is not None}
        if len(given) > 1:
            raise ValueError(
                f"{type(self).__name__}: {given} are given, expected one of them. They name different students, of which one "
                "would be made. Leave the others out, of the --config file, too."
            )
        for name, parts in (("from_scratch", "hidden size, layers, heads, FFN size"), ("back_translation", "there, back")):
            value = getattr(self, name, None)
            if value is not None and len(value) != len(parts.split(", ")):
                raise ValueError(f"{type(self).__name__}: {name} is {value}, expected {parts}: it can't be made of others.")
        for license in (self.license, self.teacher_license):  # not after hours
            require_license(license)

    def teacher_options(self) -> dict[str, Any]:
        """Return what `EncoderTeacher` takes beside the name."""
        options = {"revision": self.teacher_revision, "pooling": self.teacher_pooling}
        options |= {"max_length": self.teacher_max_length, "int8": self.teacher_int8}
        return {**options, "device_map": self.teacher_device_map}

    def student_options(self) -> dict[str, Any]:
        """Return what `StudentModel.from_backbone`, or `from_scratch`, takes in every recipe."""
        options = {"max_length": self.max_length, "dropout": self.dropout, "attn_implementation": self.attention}
        return options if self.from_scratch else {**options, "layers": self.layers}

    def peft_config(self) -> Any:
        """Return what `DistillationTrainer` takes as peft_config: None without `--lora_r`."""
        if self.lora_r is None:
            return None
        if importlib.util.find_spec("peft") is None:
            raise ImportError("--lora_r needs peft. Install it with: pip install 'hf_distill[peft]'")
        from peft import LoraConfig

        targets = self.lora_targets or "all-linear"
        return LoraConfig(r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, target_modules=targets)

    def identity(self) -> dict[str, Any]:
        """Return the settings that make it this run and no other."""
        # What is measured, where things lie and what they are called does not change what is trained.
        places = (
            "sts",
            "sts_dev",
            "teacher_batch_size",
            "dims",
            "cache_dir",
            "license",
            "language",
            "teacher_name",
            "teacher_license",
            "backbone_name",
            "texts_name",
            "words",
            "split",
            "all_labels",
            "explained",
            "index_report",
            "baselines",
        )
        return {key: value for key, value in asdict(self).items() if key not in places}


@dataclass
class TextArguments(RecipeArguments):
    """What a recipe on texts, or rows of texts, asks for beside."""

    texts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training text: a tsv/csv/jsonl/parquet/txt file (gz too), folder or Hub id; or 'gcide', the embedded "
            "default. Of several, each distinct text is taken once; name:a,b takes the columns a and b of one of them."
        },
    )
    texts_subset: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    max_texts: int | None = field(default=None, metadata={"help": "Train on a random sample of so many rows."})
    synonyms: int = field(
        default=0, metadata={"help": "Rounds of synonym replacement by WordNet (extra augment); each adds as many texts."}
    )
    back_translation: list[str] | None = field(
        default=None, metadata={"help": "Two translation models, there and back; adds as many texts."}
    )
    held_out: int = field(default=2000, metadata={"help": "Texts held out to measure fidelity on."})
    sts: str | None = field(
        default=None,
        metadata={
            "help": "Folder of STS files; adds scores to the table. Training texts that stand in it are left out; of the "
            "embedded text they always are."
        },
    )
    sts_dev: str | None = field(
        default=None,
        metadata={
            "help": "Folder with stsb-dev: adds the row that settings may be chosen by, of pairs that are in no test set of "
            "--sts, or of that folder. Training texts that stand in it are left out, too."
        },
    )


@dataclass
class RetrievalArguments(RecipeArguments):
    """What a recipe on queries and documents asks for beside."""

    symmetric: bool = field(default=False, metadata={"help": "Both towers small; else documents keep the teacher's vectors."})
    dim: int | None = field(default=None, metadata={"help": "Reduce the teacher's space to so many dimensions by PCA (HPD)."})
    collection: str | None = field(
        default=None, metadata={"help": "Folder or Hub id in BEIR's layout; the embedded default if not given."}
    )
    max_documents: int | None = field(
        default=None, metadata={"help": "Search a random sample of so many documents; those that answer a query stay."}
    )
    max_queries: int | None = field(
        default=None, metadata={"help": "A random sample of so many queries of each split, for a short run."}
    )
    train_split: str = field(default="train", metadata={"help": "Judgements to train on."})
    test_split: str | None = field(default="test", metadata={"help": "Judgements to report; '' for none."})
    dev_queries: int | None = field(
        default=None, metadata={"help": "Training queries held out to choose by; a fifth of them if not given."}
    )
    query_prompt: str | None = field(default=None, metadata={"help": "Text before every query of the teacher."})
    document_prompt: str | None = field(default=None, metadata={"help": "Text before every document of the teacher."})
    document_embeddings: str | None = field(
        default=None,
        metadata={"help": "The teacher's vectors of the collection, in its order, if there are: .npy, .safetensors or .faiss."},
    )
    negatives: int = field(default=4, metadata={"help": "Hard negatives a query, found by the teacher."})
    negative_margin: float = field(
        default=0.05, metadata={"help": "How much lower than the answer's a negative's cosine is, so that it is no answer."}
    )
    spans: int = field(default=0, metadata={"help": "More queries: so many sentences, or runs of words, of each document."})
    generator: str | None = field(default=None, metadata={"help": "More queries: a model that writes them."})
    generator_prompt: str = field(default="{document}", metadata={"help": "What it reads."})
    generated: int = field(default=1, metadata={"help": "Queries it writes for each document."})
    reranker: str | None = field(default=None, metadata={"help": "A cross-encoder whose scores are distilled."})
    reranker_label: str | None = field(default=None, metadata={"help": "Which of its outputs is the score, if it has several."})
    dual_pooling: int | None = field(
        default=None, metadata={"help": "Match vectors of so many dimensions, made from the reranker's states; symmetric."}
    )
    index_report: bool = field(
        default=True, metadata={"help": "Measure kinds of index over the documents, in memory: size, speed, quality."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_pooling and not (self.reranker and self.symmetric and not self.dim):
            raise ValueError(
                f"RetrievalArguments: dual_pooling is {self.dual_pooling}, reranker {self.reranker}, symmetric "
                f"{self.symmetric}, dim {self.dim}, expected a reranker, both towers small and no dim. States of pairs make "
                "no index to search or to reduce."
            )


@dataclass
class TranslationArguments(RecipeArguments):
    """What a recipe on translations asks for beside."""

    pairs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Translations: a folder of eng-deu.tsv.gz and the like, deu=file or deu=Hub id (@configuration and "
            ":english,german for its columns), deu=english.txt,german.txt of equal lines, or a table with a column `language`."
        },
    )
    languages: list[str] | None = field(default=None, metadata={"help": "Codes to train on; all that are there if not given."})
    max_pairs: int | None = field(default=None, metadata={"help": "At most so many pairs of a language, drawn at random."})
    language_temperature: float = field(
        default=1.0, metadata={"help": "Shares of languages are n^(1/temperature): above 1, small ones are repeated."}
    )
    held_out: int = field(
        default=100, metadata={"help": "English sentences a language held out, with all their translations, to choose by."}
    )
    tatoeba: str | None = field(
        default=None, metadata={"help": "Test: a table of language, source, english, or a folder in LASER's layout."}
    )
    teacher_prompt: str | None = field(default=None, metadata={"help": "Text before every sentence of the teacher."})
    anchor: bool | None = field(
        default=None,
        metadata={
            "help": "The teacher knows English only: both sides learn what it says of the English one. If not given: so with "
            "the embedded teacher."
        },
    )
    shape: str | None = field(
        default=None,
        metadata={
            "help": "small, base or large: the paper's students, with the backbone's tokenizer. Small if nothing else says "
            "what the student is: --layers (the backbone's own), --max_params, --from_scratch."
        },
    )
    max_params: str | None = field(
        default=None, metadata={"help": "In place of a shape: the widest thin, deep student of so many weights: 20M, 20000000."}
    )
    coverage: float = field(
        default=0.995, metadata={"help": "Share of the corpus's tokens that a planned student keeps, the mean over languages."}
    )
    start_embeddings: bool = field(
        default=True, metadata={"help": "Start a student from scratch with the main directions of the backbone's embeddings."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.coverage <= 1:
            raise ValueError(
                f"TranslationArguments: coverage is {self.coverage}, expected a share, above 0 and at most 1. Of the "
                "vocabulary all that is used, or nothing, would be kept. 99.5 % is 0.995."
            )
        if self.max_params is not None:
            number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMB]?)", str(self.max_params))
            if not number:
                raise ValueError(
                    f"TranslationArguments: max_params is {self.max_params!r}, expected a number of weights: 20M or 20000000."
                )
            planned = [name for name in ("max_vocabulary", "embedding_dim") if getattr(self, name) is not None]
            if planned:
                raise ValueError(
                    f"TranslationArguments: {planned} beside max_params {self.max_params}, expected neither. The plan chooses "
                    "width and vocabulary, and these would be lost. Leave them out."
                )
            self.max_params = int(float(number[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[number[2]])


def parse_arguments(*classes: type, argv: Sequence[str] | None = None, **defaults: Any) -> tuple[Any, ...]:
    """Return an instance of each dataclass from flags and `--config file.yaml`; flags win over the file.

    Args:
        *classes: Dataclasses whose fields are the flags.
        argv: Flags; None for those of the command line.
        **defaults: Values that differ from the dataclasses' own.

    Raises:
        ValueError: If a key of the file is no field. It would be ignored, and the run be another than the file says.
        FileNotFoundError: If the file is not there.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # An abbreviated flag would be taken for another one as soon as a paper adds a longer name.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="YAML file of settings; flags win over it.")
    config = first.parse_known_args(argv)[0].config
    parser = HfArgumentParser(classes, allow_abbrev=False, parents=[first])
    parser.set_defaults(**defaults)
    if config:
        if not Path(config).is_file():
            raise FileNotFoundError(f"--config: {config} is not there, expected a YAML file of settings.")
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        known = {f.name for cls in classes for f in fields(cls)}
        for key in settings:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                raise ValueError(
                    f"--config: {config} has the key {key!r}, which is no setting of this recipe."
                    + (f" Did you mean {close[0]!r}?" if close else " See --help for all of them.")
                )
        for action in parser._actions:  # a value from the file satisfies a required flag
            action.required = action.required and action.dest not in settings
            value = settings.get(action.dest)
            if action.nargs == "+" and value is not None and not isinstance(value, list):  # the only one, without a list
                settings[action.dest] = [value]
        parser.set_defaults(**settings)
    namespace = vars(parser.parse_args(argv))
    return tuple(cls(**{f.name: namespace[f.name] for f in fields(cls) if f.init}) for cls in classes)
