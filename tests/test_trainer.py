import json
from pathlib import Path

import pytest
import torch
from conftest import make_texts
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_distill import (
    DistillationTrainer,
    DistillationTrainingArguments,
    HPDLoss,
    PCAProjection,
    StudentModel,
    TeacherCache,
    WeightedLoss,
)
from hf_distill import trainer as trainer_module
from hf_distill.batches import LengthGroupedSampler, TextStream
from hf_distill.layout import check_layout
from hf_distill.losses import AdditiveMarginSoftmax, FeatureDistillation, LogitDistillation, SimilarityLoss
from hf_distill.runs import claim_output_dir, last_checkpoint
from hf_distill.teachers import Teacher


def make_student(folder, dropout=0.0, dim=24):
    torch.manual_seed(0)
    return StudentModel.from_backbone(folder, projection_dim=dim, dropout=dropout)


@pytest.fixture
def make(backbone_folder, cache, dataset, tmp_path):
    """Return a trainer on the tiny things; keywords of the arguments, or model, teacher, evaluators, ..."""

    def build(output="run", dropout=0.0, **options):
        objects = ("model", "teacher", "loss", "evaluators", "train_dataset", "eval_dataset", "callbacks", "peft_config")
        given = {key: options.pop(key) for key in objects if key in options}
        settings = {"per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        args = DistillationTrainingArguments(str(tmp_path / output), **{**settings, "use_cpu": True, **options})
        defaults = {"model": None, "teacher": cache, "loss": HPDLoss(), "train_dataset": dataset}
        given = {**defaults, **given}
        given["model"] = given["model"] or make_student(backbone_folder, dropout)
        return DistillationTrainer(args=args, **given)

    return build


def losses(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert len(a) > 10
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


class Steps(TrainerCallback):
    """Records the steps that are really taken, and what the weights were before the first."""

    def __init__(self):
        self.steps, self.before = [], None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = weights(model) if self.before is None else self.before
        self.steps.append(state.global_step)


def test_every_trainable_weight_moves_and_the_teacher_does_not(make, teacher, texts):
    before, targets = None, teacher.encode(texts)
    trainer = make(max_steps=3, teacher=teacher, learning_rate=1e-2, train_sampling_strategy="random")
    before = weights(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad or "embeddings" in name, name
    assert torch.equal(teacher.encode(texts), targets)


def test_loss_falls_and_its_parts_and_the_padding_are_logged(make):
    trainer = make(num_train_epochs=6, learning_rate=3e-3)
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    assert losses(trainer, "loss_mse") == pytest.approx(losses(trainer), rel=1e-5)
    assert len(losses(trainer, "padding")) == 6 * 12
    assert all(0 <= share < 0.5 for share in losses(trainer, "padding"))


def test_length_grouping_is_the_default_and_saves_padding(make):
    grouped, random = make("a"), make("b", train_sampling_strategy="random")
    for trainer in (grouped, random):
        trainer.train()
    assert isinstance(grouped._get_train_sampler(), LengthGroupedSampler)
    means = [sum(losses(t, "padding")) / len(losses(t, "padding")) for t in (grouped, random)]
    assert means[0] < 0.3 * means[1]


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_batch_of_four_equals_two_accumulated_batches_of_two(strategy, make):
    whole = make("a", per_device_train_batch_size=4, max_steps=6, train_sampling_strategy=strategy)
    split = make(
        "b",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        train_sampling_strategy=strategy,
    )
    for trainer in (whole, split):
        trainer.train()
    assert len(losses(whole)) == 6
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(split, "grad_norm") == pytest.approx(losses(whole, "grad_norm"), rel=1e-3)
    assert losses(split, "loss_mse") == pytest.approx(losses(whole, "loss_mse"), rel=1e-4)


def test_a_column_named_labels_does_not_scale_the_loss_twice(make, cache):
    """The host takes a batch with `labels` for one whose loss is already scaled for accumulation: gradients double."""
    runs = []
    for name, size, steps in (("a", 4, 1), ("b", 2, 2)):
        trainer = make(name, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3)
        collate = trainer.data_collator
        trainer.data_collator = lambda rows, collate=collate: {**collate(rows), "labels": torch.zeros(len(rows)).long()}
        trainer.train()
        runs.append(losses(trainer, "grad_norm"))
    assert len(runs[0]) == 3
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)


def test_a_full_precision_cache_on_the_same_batches_is_the_live_teacher(make, teacher, texts, tmp_path):
    cache = TeacherCache(teacher, tmp_path / "same", dtype="float32", shard_size=8, batch_size=8)
    cache.add(texts)
    half = TeacherCache(teacher, tmp_path / "half", shard_size=8, batch_size=8)
    half.add(texts)
    live, cached, rounded = (
        make(name, teacher=source, max_steps=12, train_sampling_strategy="sequential")
        for name, source in (("a", teacher), ("b", cache), ("c", half))
    )
    for trainer in (live, cached, rounded):
        trainer.train()
    assert losses(cached) == losses(live)
    assert_equal(weights(cached.model), weights(live.model))
    assert losses(rounded) != losses(live)
    assert losses(rounded) == pytest.approx(losses(live), rel=1e-3)


def test_resumed_from_the_middle_of_epoch_two_equals_uninterrupted(make, backbone_folder):
    options = {
        "dropout": 0.2,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 6,
        "save_total_limit": None,
    }
    whole = make("whole", **options)
    whole.train()
    assert whole.state.global_step == 36
    watch = Steps()
    torch.manual_seed(99)
    other = StudentModel.from_backbone(backbone_folder, projection_dim=24, dropout=0.2)  # another random head
    resumed = make("whole", model=other, callbacks=[watch], **options)
    checkpoint = Path(whole.args.output_dir) / "checkpoint-18"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert watch.steps == list(range(18, 36))
    assert_equal(watch.before, weights(StudentModel.from_pretrained(checkpoint)))
    assert_equal(weights(resumed.model), weights(whole.model))
    assert losses(resumed)[-18:] == losses(whole)[-18:]


def test_killed_save_is_not_taken_for_a_checkpoint(make):
    trainer = make(max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    (folder / "checkpoint-4" / "trainer_state.json").unlink()  # it is written last
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert last_checkpoint(folder / "nowhere") is None


def falling_scores(scores):
    values = iter(scores)
    return lambda encode: {"quality": next(values), "width": encode(["a cat"]).shape[1]}


KEEP_BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
KEEP_BEST |= {"metric_for_best_model": "quality", "learning_rate": 1e-2}


def test_evaluators_choose_the_best_model(make):
    trainer = make(
        evaluators=[falling_scores([1.0, 9.0, 3.0])],
        num_train_epochs=3,
        **KEEP_BEST,
    )
    trainer.train()
    assert [line["eval_quality"] for line in trainer.state.log_history if "eval_quality" in line] == [1, 9, 3]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-24")
    best, last = (StudentModel.from_pretrained(f"{trainer.args.output_dir}/checkpoint-{n}") for n in (24, 36))
    assert_equal(weights(trainer.model), weights(best))
    assert not torch.equal(best.projection.weight, last.projection.weight)


def test_evaluators_stop_early(make):
    trainer = make(
        evaluators=[falling_scores([5.0, 4.0, 3.0, 2.0])],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        num_train_epochs=9,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_quality",
    )
    trainer.train()
    assert trainer.state.epoch == 3


def test_evaluation_set_and_evaluators_together(make, texts):
    trainer = make(eval_dataset=Dataset.from_dict({"text": texts[:10]}), evaluators=[falling_scores([1.0])])
    metrics = trainer.evaluate()
    student, teacher = trainer.model.eval(), trainer.teacher
    inputs = student.tokenizer(texts[:10], padding=True, return_tensors="pt")
    expected = HPDLoss()(student(**inputs).projected[:, None], teacher.encode(texts[:10])[:, None])["mse"].item()
    # eval_loss is the mean over batches of 8 and 2, as the host weighs them by rows
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert (metrics["eval_quality"], metrics["eval_width"]) == (1.0, 24)


def test_of_several_sets_each_has_its_loss_and_evaluators_run_once_for_all(make, texts):
    parts = {name: Dataset.from_dict({"text": texts[a : a + 8]}) for name, a in (("first", 0), ("second", 8))}
    evaluator = falling_scores([1.0, 9.0, 3.0])
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make(eval_dataset=parts, evaluators=[evaluator], callbacks=[stop], num_train_epochs=9, **KEEP_BEST)
    trainer.train()
    assert [line["eval_quality"] for line in trainer.state.log_history if "eval_quality" in line] == [1, 9, 3]
    assert trainer.state.epoch == 3  # a worse one has ended it
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-24")
    found = [set(line) & {"eval_first_loss", "eval_second_loss", "eval_first_quality"} for line in trainer.state.log_history]
    assert [found.count({f"eval_{name}_loss"}) for name in parts] == [3, 3]
    assert sum(map(len, found)) == 6


def test_texts_are_predicted_as_they_are_evaluated(make, texts):
    given = Dataset.from_dict({"text": texts[:10]})
    trainer = make()
    assert trainer.predict(given).metrics["test_loss"] == pytest.approx(trainer.evaluate(given)["eval_loss"], rel=1e-6)


def test_evaluation_alone_on_named_and_on_given_sets(make, texts):
    parts = {name: Dataset.from_dict({"text": texts[a : a + 8]}) for name, a in (("first", 0), ("second", 8))}
    trainer = make(train_dataset=None, eval_dataset=parts)
    metrics = trainer.evaluate()
    assert metrics["eval_second_loss"] == pytest.approx(trainer.evaluate(parts["second"])["eval_loss"], rel=1e-6)
    assert metrics["eval_first_loss"] != metrics["eval_second_loss"]


def test_pairs_of_columns(make, cache, texts):
    pairs = Dataset.from_dict({"anchor": texts[:48], "positive": texts[48:], "score": [0.5] * 48})
    seen = []

    class Shapes(HPDLoss):
        def __call__(self, student, teacher):
            seen.append((tuple(student.shape), tuple(teacher.shape)))
            assert torch.allclose(teacher[0, 1], cache.encode([pairs["positive"][0]])[0], atol=1e-6)
            return super().__call__(student, teacher)

    trainer = make(train_dataset=pairs, loss=Shapes(), max_steps=1, train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.columns == ["anchor", "positive"]
    assert seen == [((8, 2, 24), (8, 2, 24))]


def test_every_part_of_a_weighted_sum_is_logged_and_they_add_up(make):
    class Toward(HPDLoss):
        output, parts = "embedding", ("direction",)

        def __call__(self, student, teacher):
            return {"direction": super().__call__(student, teacher)["mse"]}

    trainer = make(loss=WeightedLoss([HPDLoss(), Toward()], {"direction": 0.25}), max_steps=4)
    alone = make("b", loss=HPDLoss(), max_steps=1)
    trainer.train()
    alone.train()
    mse, direction = losses(trainer, "loss_mse"), losses(trainer, "loss_direction")
    assert len(direction) == 4
    assert [a + b for a, b in zip(mse, direction, strict=True)] == pytest.approx(losses(trainer), rel=1e-5)
    assert mse[0] == pytest.approx(losses(alone)[0], rel=1e-6)
    assert 0 < direction[0] < mse[0] + 1


def stream_of(texts, **shuffle):
    stream = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=3)
    return stream.shuffle(seed=5, **shuffle) if shuffle else stream


def test_a_stream_without_an_end_to_the_training_is_refused(make, texts):
    with pytest.raises(ValueError, match=r"stream and max_steps is -1.*Set max_steps"):
        make(train_dataset=stream_of(texts))


def test_a_stream_is_trained_on_like_the_same_rows(make, texts):
    order = [row["text"] for row in stream_of(texts, buffer_size=20)]
    assert order != texts
    options = {"max_steps": 12, "train_sampling_strategy": "sequential"}
    streamed = make("a", train_dataset=stream_of(texts, buffer_size=20), **options)
    listed = make("b", train_dataset=Dataset.from_dict({"text": order}), **options)
    for trainer in (streamed, listed):
        trainer.train()
    assert len(losses(streamed)) == 12
    assert losses(streamed) == losses(listed)
    assert_equal(weights(streamed.model), weights(listed.model))


def test_a_stream_is_grouped_inside_a_bounded_buffer():
    read = []

    def rows():
        for text in make_texts(1000, seed=2):
            read.append(text)
            yield {"text": text}

    stream = TextStream(IterableDataset.from_generator(rows), ["text"], block_size=8, seed=0, endless=True, pool=5)
    seen = iter(stream)
    first = [next(seen)["text"] for _ in range(8)]
    assert len(read) == 40
    assert max(map(len, first)) - min(map(len, first)) < 15
    rest = [next(seen)["text"] for _ in range(992)]
    assert sorted(first + rest) == sorted(make_texts(1000, seed=2))
    second = [next(seen)["text"] for _ in range(1000)]
    assert sorted(second) == sorted(first + rest)
    assert second != first + rest


def test_every_pass_of_a_stream_is_shuffled_anew(texts):
    rows = iter(TextStream(stream_of(texts, buffer_size=20), ["text"], block_size=None, seed=0, endless=True))
    first, second = ([next(rows)["text"] for _ in texts] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second


def test_a_stream_without_rows_is_refused_and_not_waited_for():
    stream = TextStream(stream_of(["a", "b", "c"]).filter(lambda row: False), ["text"], block_size=8, seed=0, endless=True)
    with pytest.raises(ValueError, match="the stream has no rows"):
        next(iter(stream))


@pytest.mark.parametrize("bad", [" ", None])
def test_a_text_that_is_missing_in_a_stream_is_named_by_its_row(bad, texts):
    rows = [*texts[:50], bad, *texts[50:]]
    stream = Dataset.from_dict({"text": rows}).to_iterable_dataset()
    for block in (None, 8):
        with pytest.raises(ValueError, match=r"column 'text' has 1 empty or missing texts, in rows 50, expected none"):
            list(TextStream(stream, ["text"], block_size=block, seed=0, endless=False, pool=5))


def test_workers_without_a_file_of_the_stream_read_nothing(texts):
    one = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    stream = TextStream(one, ["text"], block_size=8, seed=0, endless=False)
    read = [row["text"] for batch in DataLoader(stream, batch_size=4, num_workers=2, collate_fn=list) for row in batch]
    assert sorted(read) == sorted(texts)
    assert len(read) > 50
    none = TextStream(stream_of(texts).filter(lambda row: False), ["text"], block_size=8, seed=0, endless=True)
    with pytest.raises(ValueError, match="the stream has no rows"):
        list(DataLoader(none, batch_size=4, num_workers=2, collate_fn=list))


def test_a_stream_goes_on_in_epoch_two_where_it_was(make, texts):
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 5, "dropout": 0.2, "save_total_limit": None}
    whole = make("whole", train_dataset=stream_of(texts, buffer_size=30), **options)
    whole.train()
    assert whole.state.global_step == 20  # 12 steps are an epoch
    watch = Steps()
    resumed = make("whole", train_dataset=stream_of(texts, buffer_size=30), callbacks=[watch], **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-15")
    assert watch.steps == list(range(15, 20))
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    assert_equal(weights(resumed.model), weights(whole.model))


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, **options})


def test_lora_trains_adapters_and_the_head_and_nothing_else(make):
    trainer = make(peft_config=lora(), max_steps=3, learning_rate=1e-2)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert changed == trainable
    assert {"lora_" in name or "projection.modules_to_save" in name for name in trainable} == {True}
    assert sum("projection" in name for name in trainable) == 2
    assert sum("lora_B" in name for name in trainable) == 3 * 6  # every linear layer of the backbone, the pooler's not


def test_lora_checkpoints_are_adapters_and_resume_exactly(make, backbone_folder):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 6, "save_total_limit": None, "dropout": 0.1}
    whole = make("whole", peft_config=lora(), **options)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-18"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    torch.manual_seed(99)
    other = StudentModel.from_backbone(backbone_folder, projection_dim=24, dropout=0.1)
    watch = Steps()
    resumed = make("whole", model=other, peft_config=lora(), callbacks=[watch], **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert watch.steps == list(range(18, 24))
    saved = load_file(checkpoint / "adapter_model.safetensors")
    trained = [key for key, parameter in resumed.model.named_parameters() if parameter.requires_grad]
    assert all(
        torch.equal(watch.before[key], saved[key.replace(".default", "").replace("modules_to_save.", "")]) for key in trained
    )
    assert len(saved) == len(trained)
    assert losses(resumed)[-6:] == losses(whole)[-6:]
    assert all(torch.equal(resumed.model.get_parameter(key), whole.model.get_parameter(key)) for key in trained)


def test_lora_is_merged_before_it_is_published(make, texts):
    trainer = make(peft_config=lora(), max_steps=6, learning_rate=1e-2, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    assert not list(folder.glob("adapter_*"))
    found = check_layout(folder)
    assert len(found) == 3
    opened = StudentModel.from_pretrained(folder)
    assert opened.encode(texts) == pytest.approx(trainer.student.encode(texts), abs=1e-5)
    assert opened.num_parameters() == make("b").model.num_parameters()
    untrained = make("c").model.encode(texts)
    assert abs(opened.encode(texts) - untrained).max() > 0.01
    assert not list((folder / "checkpoint-6").glob("modules.json"))  # training went on from the adapter


def test_lora_keeps_the_best_model(make):
    trainer = make(
        peft_config=lora(),
        evaluators=[falling_scores([9.0, 1.0])],
        num_train_epochs=2,
        **KEEP_BEST,
    )
    trainer.train()
    best, last = (load_file(f"{trainer.args.output_dir}/checkpoint-{n}/adapter_model.safetensors") for n in (12, 24))
    key = "base_model.model.projection.weight"
    assert torch.equal(trainer.student.projection.modules_to_save["default"].weight, best[key])
    assert not torch.equal(best[key], last[key])


def test_lora_that_matches_nothing_is_refused(make):
    with pytest.raises(ValueError, match=r"'q_proj'.*do not fit BertModel.*'dense', 'key', 'query', 'value'"):
        make(peft_config=lora(target_modules=["q_proj"]))


def test_checkpoints_and_the_final_folder_are_whole_students(make, cache, backbone_folder):
    projection = PCAProjection.fit(cache, 8)
    student = make_student(backbone_folder, dim=8)
    trainer = make(model=student, teacher=cache.project(projection), max_steps=2, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    for folder in (Path(trainer.args.output_dir), Path(trainer.args.output_dir) / "checkpoint-2"):
        check_layout(folder)
        assert PCAProjection.from_pretrained(folder).fingerprint == projection.fingerprint
        run = json.loads((folder / "distillation.json").read_text())
        assert run["teacher"] == "teacher0"
        assert run["teacher_fingerprint"]["projection"]["dim"] == 8


@pytest.mark.slow
def test_trained_in_bf16_it_encodes_as_whoever_opens_it_and_trains_on_in_bf16(make, texts, tmp_path):
    trainer = make(bf16=True, num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    rounding = vars(trainer.student)["forward"]
    opened = StudentModel.from_pretrained(tmp_path / "run")
    assert (trainer.student.encode(texts) == opened.encode(texts)).all()
    assert vars(trainer.student)["forward"] is rounding
    inputs = opened.tokenizer(texts[:1], return_tensors="pt")
    assert (trainer.student.eval()(**inputs).projected - opened.eval()(**inputs).projected).abs().max() > 1e-4


def test_compiled_and_bf16_training(make):
    for options in ({"bf16": True}, {"torch_compile": True}):
        trainer = make(next(iter(options)), max_steps=3, learning_rate=1e-2, save_strategy="epoch", **options)
        trainer.train()
        assert len(losses(trainer)) == 3
        check_layout(Path(trainer.args.output_dir) / "checkpoint-3")


# Refusals


def test_misspelt_column(make, dataset):
    with pytest.raises(ValueError, match=r"column 'txet' is not in the data set, expected one of \['text'\]. Did you"):
        make(text_columns=["txet"])


def test_empty_data_set(make, dataset):
    with pytest.raises(ValueError, match="the data set has no rows"):
        make(train_dataset=dataset.select([]))


def test_empty_texts_are_named(make, texts):
    rows = [*texts[:3], "", *texts[3:5], None]
    with pytest.raises(ValueError, match="column 'text' has 2 empty or missing texts, in rows 3, 6, expected none"):
        make(train_dataset=Dataset.from_dict({"text": rows}))


def test_texts_without_target(make, texts):
    with pytest.raises(ValueError, match=r"no target for 1 of the texts.*'never cached'"):
        make(train_dataset=Dataset.from_dict({"text": [*texts, "never cached"]}))


def test_damaged_cache_is_refused_before_the_first_step(make, cache):
    path = sorted(cache.folder.glob("add*"))[2]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="is damaged"):
        make(teacher=TeacherCache.open(cache.folder))


def test_other_width_than_the_teacher(make, backbone_folder):
    with pytest.raises(ValueError, match="student gives 8 dimensions, the teacher teacher0 24.*projection_dim=24"):
        make(model=make_student(backbone_folder, dim=8))


def test_folder_with_an_earlier_run(make):
    make(max_steps=2, save_strategy="epoch").train()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run.*resume_from_checkpoint=True"):
        make(max_steps=2).train()


def test_resume_without_a_checkpoint(make):
    with pytest.raises(ValueError, match="holds no checkpoint, expected one to go on from"):
        make(max_steps=2).train(resume_from_checkpoint=True)


def test_resume_of_another_run(make, teacher, cache):
    make(max_steps=2, save_strategy="epoch").train()
    with pytest.raises(ValueError, match=r"holds another run \(loss.normalize: False there, True now\)"):
        make(max_steps=4, loss=HPDLoss(normalize=True)).train(resume_from_checkpoint=True)
    for name, value in (("seed", 7), ("learning_rate", 1e-5), ("per_device_train_batch_size", 4), ("weight_decay", 0.5)):
        with pytest.raises(ValueError, match=rf"holds another run \(training.{'rows_a_step' if 'batch' in name else name}: "):
            make(max_steps=2, **{name: value}).train(resume_from_checkpoint=True)
    longer = make(max_steps=4)
    longer.train(resume_from_checkpoint=True)
    assert (longer.resumed_at, longer.state.global_step) == (2, 4)


def test_claimed_folder(tmp_path, student):
    claim_output_dir(tmp_path / "a", {"settings": {"dim": 8}})
    claim_output_dir(tmp_path / "a", {"settings": {"dim": 8}})
    with pytest.raises(ValueError, match=r"holds another run \(settings.dim: 8 there, 9 now\)"):
        claim_output_dir(tmp_path / "a", {"settings": {"dim": 9}})
    student.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="holds a model that is not of this run"):
        claim_output_dir(tmp_path / "b", {"settings": {}})
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't be written"):
        claim_output_dir(tmp_path / "file" / "c", {})


def test_what_a_folder_says_of_its_run_is_whole_whenever_it_is_read(tmp_path, monkeypatch):
    claim_output_dir(tmp_path, {"settings": {"dim": 8}})
    known, synced = (tmp_path / "distillation.json").read_text(), []

    def full(file):  # a disk, or a launch that is killed, before the new file is there
        synced.append((tmp_path / "distillation.json").read_text())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_distill.shards.os.fsync", full)
    with pytest.raises(OSError, match="can't be written .*No space left on device.*another --output_dir"):
        claim_output_dir(tmp_path, {"settings": {"dim": 8}})
    assert synced == [known] == [(tmp_path / "distillation.json").read_text()]
    assert [path.name for path in tmp_path.iterdir()] == ["distillation.json"]


class NaNAfter(Teacher):
    """A live teacher that gives NaN for one text."""

    name, dim, fingerprint = "nan", 24, {}

    def __init__(self, bad):
        self.bad = bad

    def encode(self, texts, batch_size=64, show_progress_bar=None):
        return torch.stack([torch.full((24,), float("nan") if text == self.bad else 0.1) for text in texts])


def test_nan_stops_training_and_keeps_the_last_good_checkpoint(make, texts):
    trainer = make(teacher=NaNAfter(texts[50]), train_sampling_strategy="sequential", save_strategy="steps", save_steps=2)
    with pytest.raises(FloatingPointError, match=r"at step 6 the loss is .*nan.*targets finite: False"):
        trainer.train()
    checkpoint = last_checkpoint(trainer.args.output_dir)
    assert checkpoint.endswith("checkpoint-6")
    kept = StudentModel.from_pretrained(checkpoint)
    assert all(torch.isfinite(value).all() for value in kept.state_dict().values())


def test_what_was_measured_of_other_weights_goes_with_them(make):
    trainer = make(num_train_epochs=1, save_strategy="epoch")
    folder = Path(trainer.args.output_dir)
    (folder / "onnx").mkdir(parents=True)
    for name in ("results.json", "training.png", "onnx/model.onnx", "mine.png"):
        (folder / name).write_bytes(b"{}")
    trainer.train()
    last = trainer.state.global_step
    assert {path.name for path in folder.iterdir()} == {"mine.png", f"checkpoint-{last}"}
    (folder / "results.json").write_text("{}")
    trainer.train(resume_from_checkpoint=True)  # there is nothing left to do
    assert trainer.state.global_step == last == trainer.resumed_at
    assert (folder / "results.json").exists()


def test_one_row_a_batch_is_refused_where_rows_are_compared(make):
    make(per_device_train_batch_size=2, loss=WeightedLoss([HPDLoss(), SimilarityLoss()]))  # one column is enough
    with pytest.raises(ValueError, match="a batch is 1 row of"):
        make(per_device_train_batch_size=1, loss=WeightedLoss([HPDLoss(), SimilarityLoss()]))


def test_adapters_on_weights_in_pieces_are_refused(make, monkeypatch):
    monkeypatch.setattr("hf_distill.trainer.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr("hf_distill.trainer.open_repository", lambda name, **_: made.append(name) or name)
    made = []
    make(push_to_hub=True, hub_token="t")
    assert len(made) == 1
    with pytest.raises(ValueError, match=r"adapters, and weights spread over devices \(FSDP, ZeRO-3\)"):
        make(
            push_to_hub=True, hub_token="t", peft_config=LoraConfig(target_modules="all-linear", modules_to_save=["projection"])
        )
    assert len(made) == 1


@pytest.mark.parametrize("peft", [False, True])
def test_pushes_of_checkpoints_are_whole_and_hold_no_token(make, hub, tmp_path, peft):
    trainer = make(
        max_steps=2,
        save_strategy="steps",
        push_to_hub=True,
        hub_model_id="alice/pushed",
        hub_strategy="checkpoint" if peft else "every_save",
        hub_always_push=True,
        hub_token="hf_alice",
        hub_private_repo=True,
        save_steps=1,
        **({"peft_config": LoraConfig(target_modules="all-linear", modules_to_save=["projection"])} if peft else {}),
    )
    assert hub.store.repos["models", "alice/pushed"].private  # made before the training
    trainer.train()
    trainer._finish_current_push()
    repo = hub.store.repos["models", "alice/pushed"]
    titles = [commit.title for commit in repo.history("main")]
    assert titles == ["Training in progress, step 2", "Training in progress, step 1", "initial commit"]
    for number, commit in enumerate(repo.history("main")[:2]):
        files = hub.files("alice/pushed", commit.sha)
        for path, data in files.items():
            (tmp_path / str(number) / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(number) / path).write_bytes(data)
        check_layout(tmp_path / str(number))
        names = {path.rsplit("/")[-1] for path in files}
        assert {"modules.json", "student.py", "tokenizer.json", "distillation.json", "README.md"} <= names
        assert ("last-checkpoint/adapter_config.json" in files) == peft
        assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} & ({*files} if peft else names)
        assert not [path for path, data in files.items() if b"hf_alice" in data or str(tmp_path.parents[1]).encode() in data]
    assert not [p for p in Path(trainer.args.output_dir).rglob("*") if p.is_file() and b"hf_alice" in p.read_bytes()]
    assert not list(Path(trainer.args.output_dir).glob("_push*"))
    assert trainer.args.hub_token == "hf_alice"
    assert trainer.push_to_hub() == f"{hub.url}/alice/pushed"
    assert "teacher0" in hub.files("alice/pushed")["README.md"].decode()


def test_a_push_in_the_background_that_fails_is_heard_of_and_the_last_one_makes_up_for_it(make, hub, caplog):
    options = {"push_to_hub": True, "hub_model_id": "alice/late", "hub_strategy": "every_save", "hub_token": "hf_alice"}
    trainer = make(max_steps=1, save_strategy="steps", save_steps=1, **options)
    with hub.fail("POST", "/preupload/", 403, times=9) as fault:
        trainer.train()
        trainer._finish_current_push()
    assert fault.fired
    assert "step 1 was not pushed, the training goes on" in caplog.text
    assert hub.files("alice/late") == {}
    trainer.push_to_hub()
    assert "modules.json" in hub.files("alice/late")


@pytest.mark.parametrize(("name", "message"), [("bob/theirs", "may not write to bob/theirs"), ("a/b/c", "is no name of a")])
def test_a_repository_that_may_not_be_written_to_is_found_out_before_training(make, hub, name, message):
    with pytest.raises((PermissionError, ValueError), match=message):
        make(push_to_hub=True, hub_model_id=name, hub_token="hf_alice")


@pytest.mark.slow
def test_hyperparameter_search(make, backbone_folder, tmp_path):
    made = []

    def model_init(trial):
        made.append(trial)
        return make_student(backbone_folder)

    args = DistillationTrainingArguments(
        str(tmp_path / "search"),
        max_steps=4,
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=4,
        report_to="none",
    )
    like = make("unused")
    trainer = DistillationTrainer(
        args=args,
        model_init=model_init,
        teacher=like.teacher,
        loss=HPDLoss(),
        train_dataset=Dataset.from_dict({"text": make_texts(96)}),
        evaluators=[lambda encode: {"size": float(abs(encode(["a cat"])).sum())}],
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-4, 1e-2])},
        compute_objective=lambda metrics: metrics["eval_size"],
        direction="maximize",
        n_trials=3,
        backend="optuna",
    )
    assert best.hyperparameters["learning_rate"] in (1e-4, 1e-2)
    assert trainer.run_facts["training"]["learning_rate"] == trainer.args.learning_rate != 3e-4  # the last trial's
    assert [trial is None for trial in made[:2]] == [True, True]  # ours and the host's, before the search
    assert len([trial for trial in made if trial is not None]) == 3


@pytest.mark.slow
def test_activation_checkpointing_computes_the_same(make):
    runs = [make(name, max_steps=4, activation_checkpointing=on) for name, on in (("a", False), ("b", True))]
    for trainer in runs:
        trainer.train()
    assert runs[1].model.is_activation_checkpointing
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)
    assert losses(runs[0], "grad_norm") == pytest.approx(losses(runs[1], "grad_norm"), rel=1e-5)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_made_smaller(make):
    sizes = []

    class Full(HPDLoss):
        def __call__(self, student, teacher):
            sizes.append(len(student))
            if len(student) > 6:
                raise RuntimeError("CUDA out of memory.")
            return super().__call__(student, teacher)

    trainer = make(loss=Full(), num_train_epochs=1, auto_find_batch_size=True)
    trainer.train()
    assert sizes[:3] == [8, 7, 6]
    assert set(sizes[3:]) == {6}
    assert trainer.state.global_step == 16


# Losses that compare the texts of a batch, and training-only heads


@pytest.fixture
def translate(make, backbone_folder, texts):
    """Return a trainer of pairs; the student's embeddings are half as wide as the teacher's."""

    def start(loss=None, head=24, **options):
        student = options.pop("model", None)
        if student is None:
            student = make_student(backbone_folder, dim=12)
            if head:
                student.add_training_head(head)
        loss = loss or WeightedLoss([AdditiveMarginSoftmax(), FeatureDistillation(), LogitDistillation()], {"logit": 10.0})
        rows = Dataset.from_dict({"source": texts[:48], "target": texts[48:]})
        return make(model=student, loss=loss, train_dataset=rows, **{"logging_steps": 1, "num_train_epochs": 3, **options})

    return start


def test_translations_are_learned_with_every_part_and_the_head_is_not_published(translate):
    trainer = translate(num_train_epochs=10, learning_rate=5e-3, logging_strategy="epoch", save_strategy="epoch")
    before = weights(trainer.student)
    trainer.train()
    assert all(not torch.equal(before[key], value) for key, value in weights(trainer.student).items() if "pooler" not in key)
    assert len(losses(trainer, "loss_logit")) == 10
    for part in ("ams", "feature"):  # translations at random have no cosines that all three could agree on
        found = losses(trainer, f"loss_{part}")
        assert found[-1] < found[0]
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    assert (Path(last_checkpoint(folder)) / "training_head.safetensors").exists()
    assert not (folder / "training_head.safetensors").exists()
    again = StudentModel.from_pretrained(folder)
    assert not [key for key in again.state_dict() if "training_head" in key]
    check_layout(folder)


def test_cosines_of_a_wider_teacher_are_learned_without_a_head(translate):
    trainer = translate(LogitDistillation(), head=None, num_train_epochs=10, learning_rate=5e-3, logging_strategy="epoch")
    trainer.train()
    found = losses(trainer, "loss_logit")
    assert found[-1] < 0.8 * found[0]


def test_a_head_is_resumed_as_it_was(translate, backbone_folder):
    whole = translate(max_steps=12, save_strategy="steps", save_steps=4, save_total_limit=None)
    whole.train()
    folder = Path(whole.args.output_dir)
    torch.manual_seed(5)
    other = make_student(backbone_folder, dim=12)
    other.add_training_head(24)
    resumed = translate(model=other, max_steps=12, save_strategy="steps", save_steps=4, save_total_limit=None)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert resumed.resumed_at == 4
    assert losses(resumed)[-8:] == losses(whole)[-8:]
    assert_equal(weights(resumed.student), weights(whole.student))


def test_a_batch_in_parts_has_the_gradient_of_the_whole(translate, monkeypatch):
    plain, parts = translate(output="plain"), translate(output="parts", mini_batch_size=5)
    calls, again, given = [], [], []
    parts.student.register_forward_hook(lambda *_: calls.append(_[2]["embedding"].shape[0]))
    parts.student.backbone.embeddings.register_forward_pre_hook(lambda *_: again.append(1))
    original = trainer_module.recompute

    def recompute(function, *tensors, **options):
        given.append(len(tensors))  # of these alone torch keeps the random state of their device
        return original(function, *tensors, **options)

    monkeypatch.setattr(trainer_module, "recompute", recompute)
    for trainer in (plain, parts):
        trainer.train()
    assert set(calls) == {5, 1}  # 16 texts: three parts of five, and one
    assert set(given) == {2} or set(given) == {3}  # ids and mask, with or without types
    assert len(again) == 2 * len(given)  # each part once more, for its gradient: nothing was kept
    assert losses(parts) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(parts, "grad_norm") == pytest.approx(losses(plain, "grad_norm"), rel=1e-4)


def test_heads_that_do_not_fit_the_loss_are_refused(translate):
    for head, loss in ((None, None), (23, None), (24, AdditiveMarginSoftmax())):
        with pytest.raises(ValueError, match=r"training-only head gives .* expected as many"):
            translate(head=head, loss=loss)
