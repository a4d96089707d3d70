# SPDX-License-Identifier: Apache-2.0
"""The trainer: targets -> student -> loss -> named parts -> logs; and save, resume, push."""

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, HubStrategy, get_last_checkpoint
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .adapters import add_adapter, merged, student_of
from .arguments import DistillationTrainingArguments
from .batches import DistillationCollator, LengthGroupedSampler, TextStream, tokenize
from .card import write_card
from .cross_encoder import pair
from .data import require_texts, text_columns
from .hub import MEASURED, NOT_PUBLISHED, open_repository, publish
from .layout import check_layout, publish_senses
from .licenses import strictest
from .losses import DistillationLoss
from .processes import Evaluator, gather_rows, require_same, require_strategy, score
from .runs import copy_checkpoint, plain, require_same_run, write_run
from .student import TRAINING_HEAD, StudentModel
from .teachers import ProjectedTeacher, Teacher


logger = logging.get_logger(__name__)

# What a batch holds that is for the loss, not for the student.
_TAUGHT = ("targets", "scores", "texts", "senses", "sense_scores", "states")


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` whose targets are a teacher's vectors.

    Args:
        model: The student; every learned head is part of it.
        args: Settings; all of `TrainingArguments` work as they do there.
        train_dataset: `datasets.Dataset` or `IterableDataset` of texts. Columns in order: one text, pairs, or n-tuples;
            `label` and `score` are left out.
        eval_dataset: The same, for eval_loss.
        teacher: A `TeacherCache`, the same projected (`cache.project(projection)`), or a live teacher. None if the loss needs
            no vectors.
        loss: A `DistillationLoss`; each of its parts is logged as loss_<part>.
        reranker: A `CrossEncoderTeacher`, or its cache, for losses that need scores: of the first column, the query, with each
            of the others.
        inherited_columns: Columns whose embeddings are the teacher's own, which the student never reads: the documents of an
            index that stays as it is (EmbedDistill's asymmetric student).
        evaluators: Callables that take `encode(texts) -> [N, D]` and return named scores. They run at each evaluation and
            their scores, as eval_<name>, reach load_best_model_at_end, early stopping and callbacks.
        peft_config: A `peft.LoraConfig` or another: adapters and heads are trained, nothing else. Checkpoints are adapters;
            `save_model()` and pushes hold the student with them merged in. With model_init call `add_adapter` there.
        **trainer_options: Whatever else `Trainer` takes (callbacks, optimizers, compute_metrics, ...).

    Raises:
        ValueError: Before the first step, if columns, texts, dimensions, or the texts of teacher and data do not fit.
    """

    # The loss is a mean over its batch, whatever the student's forward accepts: without this, accumulation over k
    # batches would multiply the gradient by k (transformers >= 5.19).
    loss_is_scaled_for_ga = False
    _tag_names = ("hf_distill", "knowledge-distillation")

    def __init__(
        self,
        model: StudentModel | None = None,
        args: DistillationTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        teacher: Teacher | None,
        loss: DistillationLoss,
        reranker: Teacher | None = None,
        inherited_columns: Sequence[str] = (),
        evaluators: Sequence[Evaluator] = (),
        peft_config: Any = None,
        **trainer_options: Any,
    ) -> None:
        args = DistillationTrainingArguments() if args is None else args
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        self.teacher, self.loss, self.evaluators, self.reranker = teacher, loss, list(evaluators), reranker
        self.resumed_at = 0  # the step that the last call of train() began with
        self._in_background = ThreadPoolExecutor(1)  # pushes, one after another
        first = model if model is not None else _first_model(trainer_options["model_init"])
        student, self._adapts = student_of(first), not isinstance(first, StudentModel)
        _require_teachers(student, loss, teacher, reranker, inherited_columns)
        tokenizer = trainer_options.pop("processing_class", None) or student.tokenizer
        given = [part for part in (train_dataset, eval_dataset) if part is not None]
        self.columns = text_columns(_first(given[0]), args.text_columns) if given else []
        self.inherited = _require_columns(self.columns, inherited_columns)
        if self.columns:
            loss.require_batch(args.train_batch_size * args.world_size, len(self.columns))
        self._digest: str | None = None
        eval_parts = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        eval_parts = {name: self._prepare(part, student, tokenizer, args) for name, part in eval_parts.items()}
        train_dataset = self._prepare(train_dataset, student, tokenizer, args, training=True)
        eval_dataset = eval_parts if isinstance(eval_dataset, dict) else eval_parts["eval"]
        if eval_dataset is None and self.evaluators:
            eval_dataset = []  # the host refuses eval_strategy without a data set; evaluators need none
        longest = student.settings["max_length"]
        collator = DistillationCollator(tokenizer, teacher, self.columns, longest, self.read, reranker)
        trainer_options.setdefault("data_collator", collator)
        self._sums: dict[str, Tensor] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **trainer_options,
        )
        self._facts = self._describe_run(first)
        require_same(self.run_facts)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and refuse what it would not do as asked, before a repository of the Hub is made."""
        super().create_accelerator_and_postprocess()
        require_strategy(self.accelerator.state)
        if self._adapts and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "DistillationTrainer: adapters, and weights spread over devices (FSDP, ZeRO-3), expected whole weights to "
                "merge the adapters into. What is saved would hold pieces. Use DDP or ZeRO-2, or train all weights."
            )

    def _prepare(self, dataset: Any, student: StudentModel, tokenizer: Any, args: Any, training: bool = False) -> Any:
        if dataset is None:
            return None
        text_columns(dataset, self.columns)
        if isinstance(dataset, datasets.IterableDataset):
            if training and args.max_steps <= 0:
                raise ValueError(
                    f"DistillationTrainer: the training data are a stream and max_steps is {args.max_steps}, expected how many "
                    "steps to take. A stream has no length: the learning rate's schedule would have no end. Set max_steps."
                )
            block = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            grouped = training and args.train_sampling_strategy == "group_by_length"
            seed = args.seed if args.data_seed is None else args.data_seed
            return TextStream(dataset, self.columns, block if grouped else None, seed, endless=training)
        digest = require_texts(dataset, self.columns)
        self._digest = digest if training else self._digest
        if self.teacher is not None:
            self.teacher.require_columns([dataset[column] for column in self.columns])
        if self.reranker is not None:
            for column in self.columns[1:]:
                self.reranker.require(map(pair, dataset[self.columns[0]], dataset[column]))
        return tokenize(dataset, tokenizer, self.columns, student.settings["max_length"], self.read)

    @property
    def run_facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on from, as plain JSON; settings as they are now: a search sets them."""
        return {**self._facts, "training": plain(self.args.identity())}

    def _describe_run(self, model: nn.Module) -> dict[str, Any]:
        """Return what is trained on what, toward what, as plain JSON."""
        rows = len(self.train_dataset) if isinstance(self.train_dataset, datasets.Dataset) else None
        facts = {
            "teacher": self.teacher.name if self.teacher else None,
            "teacher_fingerprint": self.teacher.fingerprint if self.teacher else None,
            "teacher_license": strictest(one.license for one in (self.teacher, self.reranker) if one),
            "loss": self.loss.facts(),
            "student": student_of(model).settings,
            "adapter": None if isinstance(model, StudentModel) else _adapter_facts(model),
            "data": {"rows": rows, "columns": self.columns, "sha256": self._digest},
        }
        if self.reranker is not None:
            facts |= {"reranker": self.reranker.name, "reranker_fingerprint": self.reranker.fingerprint}
        if self.inherited:
            facts["inherited_columns"] = self.inherited
        return plain(facts)

    @property
    def read(self) -> list[str]:
        """The text columns that the student reads."""
        return [column for column in self.columns if column not in self.inherited]

    @property
    def student(self) -> StudentModel:
        """The student inside whatever wraps it (DDP, compilation, PEFT)."""
        return student_of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train; see `Trainer.train`.

        What an earlier run measured in the folder (results.json, plots, onnx/) goes, once the weights are others.

        Raises:
            ValueError: If the output folder, or the checkpoint to resume from, holds another run: its checkpoints would be
                mixed with this one's, or its weights trained toward other targets.
            FloatingPointError: If the loss is not finite; the last checkpoint stays.
        """
        folder = Path(self.args.output_dir)
        self.resumed_at = 0
        if resume_from_checkpoint:
            found = get_last_checkpoint(str(folder)) if resume_from_checkpoint is True else resume_from_checkpoint
            if found is None:
                raise ValueError(
                    f"DistillationTrainer: {folder} holds no checkpoint, expected one to go on from. Leave "
                    "resume_from_checkpoint out to begin."
                )
            require_same_run(Path(found), self.run_facts)
            state = Path(found) / "trainer_state.json"
            self.resumed_at = json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.exists() else 0
        elif any(folder.glob("checkpoint-*")):
            raise ValueError(
                f"DistillationTrainer: {folder} holds checkpoints of an earlier run, expected a new folder. They would be "
                "mixed with this run's. Pass resume_from_checkpoint=True to go on with it, or another output_dir, or delete it."
            )
        done = super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
        if self.is_world_process_zero() and self.state.global_step > self.resumed_at:
            for stale in (*MEASURED, "onnx"):  # of an earlier run in this folder, and other weights
                shutil.rmtree(folder / stale) if (folder / stale).is_dir() else (folder / stale).unlink(missing_ok=True)
        return done

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Private hook, checked on transformers 5.23: the host's own length grouping breaks exact resume.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, TextStream):
            return None  # it has an order of its own
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, datasets.Dataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        block = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        # That column alone: a formatted slice of the whole table would convert every row's tokens, too.
        lengths = dataset.select_columns([args.length_column_name]).with_format("numpy")[:][args.length_column_name]
        return LengthGroupedSampler(lengths, block, seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum of the loss's parts, a mean over the batch."""
        inputs = dict(inputs)
        batch = {name: inputs.pop(name) for name in _TAUGHT if name in inputs}
        outputs = self._forward(model, inputs)
        fields = {name: self._columns_of(outputs[name], name, batch) for name in self.loss.outputs}
        if self.loss.in_batch:
            fields, batch = gather_rows(fields), gather_rows(batch)
        parts = self.loss.of(fields, batch)
        loss = torch.stack([value for name, value in parts.items() if name not in self.loss.monitored]).sum()
        if not torch.isfinite(loss):
            finite = all(bool(torch.isfinite(value).all()) for value in batch.values())
            raise FloatingPointError(
                f"DistillationTrainer: at step {self.state.global_step} the loss is "
                f"{ {name: value.item() for name, value in parts.items()} }, expected finite numbers (targets finite: "
                f"{finite}). The student's weights would become NaN. The last checkpoint in "
                f"{self.args.output_dir} is from before; lower the learning rate, or check the targets."
            )
        if model.training:
            mask = inputs["attention_mask"]
            logged = {name if name in self.loss.monitored else f"loss_{name}": value for name, value in parts.items()}
            self._add({name: value.detach() for name, value in logged.items()})
            self._add({"padding": 1 - mask.sum() / mask.numel()})
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """Return the student's output of the whole batch, with the activations of `mini_batch_size` texts in memory."""
        size = self.args.mini_batch_size
        if size is None or not model.training:
            return model(**inputs)
        # Gradient caching (Gao et al. 2021, https://huggingface.co/papers/2101.06983): embeddings first, in parts, then the
        # loss of all of them, then each part once more, for its gradient.
        parts: dict[str, list[Tensor]] = {name: [] for name in self.loss.outputs}

        def embed(*values: Tensor) -> Any:
            return model(**dict(zip(inputs, values, strict=True)))

        for block in zip(*(value.split(size) for value in inputs.values()), strict=True):
            # By place: of tensors given by name torch does not find the device, whose random state dropout needs again.
            output = recompute(embed, *block, use_reentrant=False)
            for name, found in parts.items():
                found.append(output[name])  # the rest of it, states of all tokens, goes
        return {name: torch.cat(found) for name, found in parts.items()}

    def _columns_of(self, value: Tensor, name: str, batch: dict[str, Tensor]) -> Tensor:
        """Return a field of the student's output as [B, C, ...]; inherited columns are the teacher's."""
        value = value.float()
        value = value.reshape(len(batch["texts"]), len(self.read), *value.shape[1:])  # [N] -> [B, columns that are read]
        if not self.inherited:
            return value
        known = batch["targets"].to(value)
        if name == "embedding" and self.student.settings["normalize"]:
            known = nn.functional.normalize(known, dim=-1)
        own = iter(value.unbind(1))
        return torch.stack([known[:, i] if c in self.inherited else next(own) for i, c in enumerate(self.columns)], dim=1)

    def _add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            # [sum, count] stays on the device: no synchronisation until it is logged.
            self._sums[name] = self._sums.get(name, 0) + torch.stack([value.float(), torch.ones_like(value.float())])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; a training line also holds each part of the loss and the share of padding in the batches since the last."""
        if "loss" in logs:
            for name, value in self._sums.items():
                total, count = self.accelerator.reduce(value, "sum").tolist()
                logs[name] = total / count
            self._sums = {}
        super().log(logs, *args, **kwargs)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the host's loader, or nothing to load when there are only evaluators."""
        if self.eval_dataset == [] and not eval_dataset:
            return []
        return super().get_eval_dataloader(self._tokenized(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the host's loader, of texts as `predict` is given them."""
        return super().get_test_dataloader(self._tokenized(test_dataset))

    def _tokenized(self, dataset: Any) -> Any:
        if not isinstance(dataset, datasets.Dataset) or "input_ids" in dataset.column_names:
            return dataset
        return self._prepare(dataset, self.student, self.processing_class, self.args)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate; see `Trainer.evaluate`. Of several sets each has its loss, and evaluators run once, for all of them."""
        parts = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(parts, dict) or not self.evaluators:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        evaluators, self.evaluators = self.evaluators, []
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.evaluators = evaluators
        scores = {f"{metric_key_prefix}_{name}": value for name, value in score(evaluators, self.student.encode).items()}
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return {**metrics, **scores}

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Run the host's loop, if there is an evaluation set, and each evaluator once, on the main process."""
        if dataloader == []:
            output = EvalLoopOutput(predictions=None, label_ids=None, metrics={}, num_samples=0)
        else:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        scores = score(self.evaluators, self.student.encode)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
            weights = model.state_dict() if state_dict is None else state_dict
            head = {key: value.contiguous() for key, value in weights.items() if key.startswith("training_head.")}
            if checkpoint and head:
                save_file(head, folder / TRAINING_HEAD)
            if not isinstance(model, StudentModel) and not checkpoint:
                for adapter in folder.glob("adapter_*"):
                    adapter.unlink()
                merged(model).save_pretrained(folder)
            write_run(folder, self.run_facts)
            if isinstance(self.teacher, ProjectedTeacher) and _in_its_space(self.loss, self.inherited):
                self.teacher.projection.save_pretrained(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        # Private hook, checked on transformers 5.23. trainer_state.json is written next, by the main process alone: without
        # this wait it could stand beside a random state that another process has not written yet.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Private hook, checked on transformers 5.23. The root file of a checkpoint has the plain backbone's keys and the
        # projection lies in 2_Dense/, so the host's load_state_dict(strict=False) would load nothing and say nothing.
        model = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        if self.is_fsdp_enabled or not isinstance(model, StudentModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            model.load_folder(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # Private hook, checked on transformers 5.23, for the same reason.
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that is pushed to, if there is none: what may not be written to is found out before training."""
        if self.is_world_process_zero():
            args = self.args
            name = args.hub_model_id or Path(args.output_dir).resolve().name
            private = args.hub_private_repo if private is None else private
            self.hub_model_id = open_repository(name, private=private, token=token or args.hub_token)
            self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Private hook, checked on transformers 5.23: the host's list of files leaves out 2_Dense, modules.json, student.py; its
        # uploads read files that the next save writes, and nobody hears of those that fail.
        args, model = self.args, self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        stage = Path(args.output_dir) / f"_push-{self.state.global_step}"
        shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
        if not isinstance(model, StudentModel):
            self._save(str(stage))  # the checkpoint holds an adapter, the repository the student
        else:
            shutil.copytree(checkpoint_folder, stage, ignore=shutil.ignore_patterns(*NOT_PUBLISHED), dirs_exist_ok=True)
        self.create_model_card(stage)
        also = {}
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            kept = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            also = {kept: stage / "_checkpoint"}
            copy_checkpoint(checkpoint_folder, also[kept])
        message = f"Training in progress, step {self.state.global_step}"
        options = {"revision": args.hub_revision, "token": args.hub_token, "message": message, "also": also}

        def push() -> None:
            try:
                publish(stage, self.hub_model_id, **options)
            except Exception as error:  # the last push tries again, and raises
                logger.warning(f"DistillationTrainer: step {message.split()[-1]} was not pushed, the training goes on. {error}")
            shutil.rmtree(stage)

        job = self._in_background.submit(push)
        if running:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def create_model_card(self, folder: str | Path | None = None, **kwargs: Any) -> None:
        """Write README.md: from results.json where the run has one, else from what the trainer knows."""
        if self.is_world_process_zero():
            output = Path(self.args.output_dir)
            write_card(folder or output, self.hub_model_id or output.resolve().name, self.run_facts)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push student, card, results and plots in one commit; a student whose loaders disagree is not published.

        A sense dictionary that lies beside the student is published beside it, before.

        Args:
            commit_message: Its title.
            blocking: Whether to wait for it; a future is returned otherwise.
            token: Of the Hub, in place of args.hub_token.
            revision: Branch, in place of args.hub_revision; made if there is none.
            private: Whether a new repository is private, in place of args.hub_private_repo.
            **kwargs: Of `Trainer.push_to_hub`; the card knows them already.

        Returns:
            The address of the repository's page.

        Raises:
            ValueError: If the four loaders do not give the same vectors, or the Hub refuses the card.
            OSError: As `publish` says; the branch is as it was, and run again, it completes.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        check_layout(self.args.output_dir)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.create_model_card()
        self._finish_current_push()
        private, token = self.args.hub_private_repo if private is None else private, token or self.args.hub_token
        publish_senses(self.args.output_dir, self.hub_model_id, private, token)
        options = {"revision": revision or self.args.hub_revision, "token": token}
        push = partial(publish, self.args.output_dir, self.hub_model_id, **options, message=commit_message)
        return push() if blocking else self._in_background.submit(push)

    def end(self) -> None:
        """Publish the folder as it is at the end of a run, with what was measured, if that was asked for; leave the launch."""
        if self.args.push_to_hub:
            self.push_to_hub("End of the run")
        super().end()


def _adapter_facts(model: Any) -> dict[str, Any]:
    return {**model.active_peft_config.to_dict(), "base_model_name_or_path": None}  # a folder of this machine, maybe


def _first_model(model_init: Callable[..., Any]) -> Any:
    """Return what model_init makes; the host, too, hands it a trial only if it takes one."""
    return model_init(None) if inspect.signature(model_init).parameters else model_init()


def _first(dataset: Any) -> Any:
    return next(iter(dataset.values())) if isinstance(dataset, dict) else dataset


def _require_columns(columns: list[str], inherited: Sequence[str]) -> list[str]:
    wrong = [name for name in inherited if name not in columns[1:]]
    if columns and wrong:
        raise ValueError(
            f"DistillationTrainer: the inherited columns are {list(inherited)}, expected some of {columns[1:]}, those after "
            "the first. The student has to read the queries, and a name that is no column would be read after all."
        )
    return list(inherited)


def _require_teachers(
    student: StudentModel, loss: DistillationLoss, teacher: Teacher | None, reranker: Teacher | None, inherited: Sequence[str]
) -> None:
    given = {"targets": teacher, "scores": reranker}
    needed = [*loss.needs, *(["targets"] if inherited else [])]
    missing = sorted({name for name in needed if given[name] is None})
    if missing:
        raise ValueError(
            f"DistillationTrainer: {type(loss).__name__} (inherited columns: {list(inherited)}) needs {missing}, and there is "
            "no teacher for that, expected teacher=... for targets, its vectors, and reranker=... for scores."
        )
    if reranker is not None and "scores" not in loss.needs:
        raise ValueError(
            f"DistillationTrainer: there is a reranker, but {type(loss).__name__} uses no scores. It would be paid for and not "
            "heard. Use ScoreDistillation(reranker=True), or leave it out."
        )
    head = student.training_head
    width = None if head is None else head.out_features
    wanted = teacher.dim if "feature" in loss.outputs else None
    if width != wanted:
        raise ValueError(
            f"DistillationTrainer: the student's training-only head gives {width} dimensions, {type(loss).__name__} compares "
            f"{wanted} of the teacher with them, expected as many (None for no head). The head would learn nothing, or nothing "
            "be learned through it. Call student.add_training_head(teacher.dim) if, and only if, the loss looks at `feature`."
        )
    digest = (student.settings.get("senses") or {}).get("digest")
    if "sense_scores" in loss.outputs and digest != teacher.fingerprint.get("dictionary"):
        raise ValueError(
            f"DistillationTrainer: the student speaks the sense dictionary {digest}, the teacher {teacher.name} that of digest "
            f"{teacher.fingerprint.get('dictionary')}, expected the same. Senses would be numbered otherwise, and noise be "
            "learned. Call student.attach(dictionary, name) with the SenseTeacher's dictionary."
        )
    if _in_its_space(loss, inherited) and teacher.dim != student.dim:
        raise ValueError(
            f"DistillationTrainer: the student gives {student.dim} dimensions, the teacher {teacher.name} {teacher.dim}, "
            f"expected as many. Make the student with projection_dim={teacher.dim}, or reduce the teacher: "
            f"cache.project(PCAProjection.fit(cache, dim={student.dim}))."
        )
    if inherited and set(loss.outputs) - {"embedding", "projected"}:
        raise ValueError(
            f"DistillationTrainer: {type(loss).__name__} looks at {list(loss.outputs)}, but the columns {list(inherited)} are "
            "inherited, expected embeddings. A teacher's vector has no token states. Let the student read them."
        )


def _in_its_space(loss: Any, inherited: Any) -> bool:
    """Return whether a student's embeddings come to lie in the teacher's space: not behind a head, or by cosines alone."""
    return bool({*loss.as_wide, *(["embedding"] if inherited else [])} - {"feature"})
