"""Training on queries and documents: inherited documents, two teachers, rerankers."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import make_texts, write_random
from datasets import Dataset
from tokenizers import processors
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_distill import (
    CrossEncoderTeacher,
    DistillationTrainer,
    DistillationTrainingArguments,
    PCAProjection,
    TeacherCache,
    TwoTowerTeacher,
)
from hf_distill.batches import DistillationCollator
from hf_distill.cross_encoder import DualPoolingTeacher, pair
from hf_distill.losses import ContrastiveLoss, DistillationLoss, EmbeddingMatching, ScoreDistillation, WeightedLoss
from hf_distill.teachers import Teacher


DOCUMENTS = ["positive", "negative"]


@pytest.fixture(scope="session")
def rows():
    texts = make_texts(72, seed=3)
    return Dataset.from_dict({"query": texts[:24], "positive": texts[24:48], "negative": texts[48:]})


@pytest.fixture
def everything(teacher, rows, tmp_path):
    cache = TeacherCache(teacher, tmp_path / "all", dtype="float32", batch_size=8)
    cache.add(*(rows[column] for column in rows.column_names))
    return cache


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory, backbone_folder):
    folder = tmp_path_factory.mktemp("reranker")
    return make_reranker(folder, backbone_folder)


def make_reranker(folder, backbone_folder, outputs=1):
    config = AutoConfig.from_pretrained(backbone_folder, num_labels=outputs)
    return write_random(folder, AutoModelForSequenceClassification, config, seed=5)


@pytest.fixture
def make(student, everything, rows, tmp_path):
    def build(output="run", **options):
        settings = {"per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        objects = ("model", "teacher", "loss", "reranker", "inherited_columns", "train_dataset", "eval_dataset", "evaluators")
        given = {key: options.pop(key) for key in objects if key in options}
        args = DistillationTrainingArguments(str(tmp_path / output), **{**settings, "use_cpu": True, **options})
        defaults = {"model": student, "teacher": everything, "loss": EmbeddingMatching(), "train_dataset": rows}
        return DistillationTrainer(args=args, **{**defaults, **given})

    return build


def batch_of(trainer, count=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


def parts(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


class Spy(DistillationLoss):
    """A loss that keeps what it was given."""

    parts = ("seen",)

    def __init__(self, output="embedding", needs=("targets",)):
        self.output, self.needs = output, needs

    def facts(self):
        return {"name": "Spy"}

    def of(self, outputs, batch):
        self.seen, self.batch = outputs[self.output], batch
        return {"seen": self.seen.square().mean()}

    def __call__(self, student, teacher):
        raise NotImplementedError


# Inherited documents


@pytest.mark.parametrize("inherited", [DOCUMENTS, ["negative"], ["positive"]])
def test_inherited_columns_are_the_teachers_vectors_and_the_student_never_reads_them(make, everything, rows, inherited):
    loss = Spy()
    trainer = make(loss=loss, inherited_columns=inherited)
    batch = batch_of(trainer)
    read = [column for column in rows.column_names if column not in inherited]
    assert len(batch["input_ids"]) == 4 * len(read)
    trainer.compute_loss(trainer.model, batch)
    for i, column in enumerate(rows.column_names):
        if column in inherited:
            expected = functional.normalize(everything.encode(rows[column][:4]), dim=-1)
        else:
            expected = torch.as_tensor(trainer.model.encode(rows[column][:4]))
        assert torch.allclose(loss.seen[:, i], expected, atol=1e-5), column
    gradient = torch.autograd.grad(loss.seen[:, 1:].sum(), trainer.model.projection.weight, allow_unused=True)[0]
    assert (gradient is None or not gradient.any()) == (inherited == DOCUMENTS)


def test_the_output_before_normalisation_keeps_the_length_of_the_teachers_vectors(make, everything, rows):
    projection = PCAProjection.fit(everything, dim=24)
    loss = Spy("projected")
    trainer = make(loss=loss, inherited_columns=DOCUMENTS, teacher=everything.project(projection))
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert torch.allclose(loss.seen[:, 1], projection(everything.encode(rows["positive"][:4])), atol=1e-5)


def test_training_on_inherited_documents_pulls_the_queries_and_reports_no_document_distance(make):
    loss = WeightedLoss([EmbeddingMatching(), ScoreDistillation(), ContrastiveLoss()])
    trainer = make(loss=loss, inherited_columns=DOCUMENTS, num_train_epochs=12, learning_rate=5e-3)
    trainer.train()
    assert parts(trainer, "loss_query")[-1] < 0.7 * parts(trainer, "loss_query")[0]
    assert parts(trainer, "loss_score")[-1] < parts(trainer, "loss_score")[0]
    assert max(parts(trainer, "loss_document")) < 1e-6
    assert len(parts(trainer, "loss_label")) == 36


def test_a_stream_reads_queries_only_too(make, rows):
    trainer = make(train_dataset=rows.to_iterable_dataset(), max_steps=2, inherited_columns=DOCUMENTS)
    batch = trainer.data_collator([rows[i] for i in range(4)])
    assert len(batch["input_ids"]) == 4
    assert batch["targets"].shape == (4, 3, 24)
    trainer.train()
    assert len(parts(trainer, "loss_query")) == 2


def test_evaluation_has_a_loss_with_inherited_columns(make, rows):
    trainer = make(inherited_columns=DOCUMENTS, eval_dataset=rows.select(range(8)))
    assert trainer.evaluate()["eval_loss"] > 0.1


def test_another_choice_of_inherited_columns_is_another_run(make):
    make(inherited_columns=DOCUMENTS, max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="inherited_columns"):
        make(inherited_columns=["negative"], max_steps=3).train(resume_from_checkpoint=True)


# Two teachers


class Constant(Teacher):
    def __init__(self, value, dim=24):
        self.name, self.value, self.dim, self.fingerprint = f"constant {value}", value, dim, {"value": value}
        self.asked = []

    def encode(self, texts, batch_size=64, show_progress_bar=None):
        self.asked += texts
        return torch.full((len(texts), self.dim), self.value)

    def require(self, texts):
        self.asked += texts


def test_queries_and_documents_have_a_teacher_each(make, rows):
    queries, documents = Constant(1.0), Constant(2.0)
    trainer = make(teacher=TwoTowerTeacher(queries, documents))
    assert queries.asked == list(rows["query"])
    assert documents.asked == [*rows["positive"], *rows["negative"]]
    assert batch_of(trainer)["targets"][..., 0].tolist() == [[1.0, 2.0, 2.0]] * 4
    assert trainer.run_facts["teacher"] == "constant 1.0 over constant 2.0"


def test_inherited_vectors_are_as_long_as_the_students_own(make):
    for output, length in (("embedding", 1.0), ("projected", 2.0 * 24**0.5)):
        loss = Spy(output)
        trainer = make(loss=loss, inherited_columns=DOCUMENTS, teacher=Constant(2.0))
        trainer.compute_loss(trainer.model, batch_of(trainer))
        assert torch.allclose(loss.seen[:, 1:].norm(dim=-1), torch.tensor(length))


def test_both_sides_go_through_a_projection(everything, rows):
    projection = PCAProjection.fit(everything, dim=5)
    teacher = TwoTowerTeacher(everything, everything).project(projection)
    row = [rows[column][0] for column in rows.column_names]
    assert torch.allclose(teacher.targets([row])[0], projection(everything.encode(row)))


def test_two_towers_encode_what_they_are_told(everything):
    teacher = TwoTowerTeacher(Constant(1.0), Constant(2.0))
    assert teacher.encode(["a"])[0, 0] == teacher.encode(["a"], prompt_name="query")[0, 0] == 1.0
    assert teacher.encode(["a"], prompt_name="document")[0, 0] == 2.0
    projected = teacher.project(PCAProjection.fit(everything, dim=5))
    assert torch.allclose(projected.encode(["a"], prompt_name="document"), 2 * projected.encode(["a"]))


def test_an_index_of_another_space_is_refused(everything):
    with pytest.raises(ValueError, match=r"have 24 dimensions, documents of constant 2.0 7, expected one space"):
        TwoTowerTeacher(everything, Constant(2.0, 7))


# Rerankers


def test_scores_are_those_of_the_model_on_both_texts(reranker_folder, rows):
    teacher = CrossEncoderTeacher(reranker_folder, device="cpu")
    found = teacher.score(rows["query"], rows["positive"], batch_size=5)
    for i in (0, 7, 23):
        inputs = teacher.tokenizer(rows["query"][i], rows["positive"][i], return_tensors="pt")
        assert teacher.model(**inputs).logits.item() == pytest.approx(found[i].item(), abs=1e-5)
    assert found.std() > 1e-3
    assert teacher.encode([]).shape == (0, 1)


def test_scores_are_cached_by_both_texts_and_reach_the_loss(reranker_folder, make, rows, tmp_path):
    live = CrossEncoderTeacher(reranker_folder, device="cpu")
    cache = TeacherCache(live, tmp_path / "scores", dtype="float32", batch_size=8)
    for column in DOCUMENTS:
        cache.add([pair(*sides) for sides in zip(rows["query"], rows[column], strict=True)])
    loss = Spy(needs=("scores",))
    trainer = make(loss=loss, teacher=None, reranker=TeacherCache.open(cache.folder))
    trainer.compute_loss(trainer.model, batch_of(trainer))
    expected = torch.stack([live.score(rows["query"][:4], rows[column][:4]) for column in DOCUMENTS], dim=1)
    assert torch.allclose(loss.batch["scores"], expected, atol=1e-5)
    assert "targets" not in loss.batch


def test_a_student_learns_a_rerankers_scores_without_another_teacher(reranker_folder, make, rows):
    reranker = CrossEncoderTeacher(reranker_folder, device="cpu")
    loss = WeightedLoss([ScoreDistillation(reranker=True), ContrastiveLoss()], {"label": 0.1})
    trainer = make(
        teacher=None, reranker=reranker, loss=loss, num_train_epochs=15, learning_rate=5e-3, eval_dataset=rows.select(range(8))
    )
    trainer.train()
    assert parts(trainer, "loss_score")[-1] < 0.5 * parts(trainer, "loss_score")[0]
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model()
    run = json.loads((Path(trainer.args.output_dir) / "distillation.json").read_text())
    assert (run["teacher"], run["reranker"]) == (None, reranker.name)


def test_one_of_several_outputs_must_be_named(tmp_path, backbone_folder, rows):
    folder = make_reranker(tmp_path / "two", backbone_folder, outputs=2)
    with pytest.raises(ValueError, match=r"has the outputs \{0: 'LABEL_0', 1: 'LABEL_1'\} and label is None"):
        CrossEncoderTeacher(folder)
    with pytest.raises(ValueError, match="label is 'entailment'"):
        CrossEncoderTeacher(folder, label="entailment")
    scores = [CrossEncoderTeacher(folder, label=label, device="cpu").score(rows["query"], rows["positive"]) for label in (0, 1)]
    named = CrossEncoderTeacher(folder, label="LABEL_1", device="cpu")
    assert torch.equal(named.score(rows["query"], rows["positive"]), scores[1])
    assert not torch.equal(scores[0], scores[1])
    assert named.fingerprint != CrossEncoderTeacher(folder, label=0).fingerprint


def test_what_is_no_reranker_or_no_pair_is_refused(backbone_folder, reranker_folder):
    with pytest.raises(ValueError, match="is missing 2 weights .*expected a whole reranker"):
        CrossEncoderTeacher(backbone_folder)
    with pytest.raises(ValueError, match="'a cat' is no pair"):
        CrossEncoderTeacher(reranker_folder).encode(["a cat"])
    with pytest.raises(ValueError, match=r"holds the character U\+001F"):
        pair("a\x1fb", "c")


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inherited_columns": ["query"]}, r"inherited columns are \['query'\], expected some of \['positive', 'negative'\]"),
        ({"inherited_columns": ["doc"]}, r"inherited columns are \['doc'\]"),
        ({"teacher": None}, r"EmbeddingMatching \(inherited columns: \[\]\) needs \['targets'\]"),
        ({"teacher": None, "loss": ContrastiveLoss(), "inherited_columns": DOCUMENTS}, r"needs \['targets'\]"),
        ({"loss": ScoreDistillation(reranker=True)}, r"needs \['scores'\]"),
        ({"reranker": Constant(1.0, 1)}, "there is a reranker, but EmbeddingMatching uses no scores"),
        ({"loss": Spy("last_hidden_state"), "inherited_columns": DOCUMENTS}, "A teacher's vector has no token states"),
        ({"teacher": Constant(1.0, 7)}, "the student gives 24 dimensions, the teacher constant 1.0 7"),
    ],
)
def test_runs_that_could_not_learn_what_they_say_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_pairs_without_a_score_are_found_before_the_first_step(reranker_folder, make, rows, tmp_path):
    cache = TeacherCache(CrossEncoderTeacher(reranker_folder), tmp_path / "scores", dtype="float32")
    cache.add([pair(*sides) for sides in zip(rows["query"], rows["positive"], strict=True)])
    with pytest.raises(ValueError, match="has no target for 24 of the texts"):
        make(teacher=None, reranker=cache, loss=ScoreDistillation(reranker=True))


def test_texts_of_a_batch_are_numbered_by_what_they_say(student, everything):
    collate = DistillationCollator(student.tokenizer, None, ["a", "b"], max_length=8)
    batch = collate([{"a": "the cat", "b": "the dog"}, {"a": "the sea", "b": "the dog"}, {"a": "the dog", "b": "the sky"}])
    (cat, dog), (sea, same), (again, sky) = batch["texts"].tolist()
    assert dog == same == again
    assert len({cat, dog, sea, sky}) == 4
    assert collate([{"a": "the dog", "b": "the fox"}])["texts"][0, 0] == dog  # another batch, or another process
    assert "targets" not in batch


@pytest.fixture
def pooled(reranker_folder):
    return CrossEncoderTeacher(reranker_folder, pooled=True)


def test_pooled_states_are_the_means_over_each_side_without_what_stands_between(pooled, reranker_folder, rows):
    queries, documents = rows["query"][:9], rows["positive"][:9]
    special = [(token, pooled.tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    layout = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", special)
    plain = CrossEncoderTeacher(reranker_folder)
    for teacher in (pooled, plain):
        teacher.tokenizer.backend_tokenizer.post_processor = layout
    found = pooled.encode([pair(*sides) for sides in zip(queries, documents, strict=True)])
    assert found.shape == (9, 1 + 2 * 16) == (9, pooled.dim)
    assert torch.allclose(found[:, 0], plain.score(queries, documents), atol=1e-5)
    for row, (query, document) in enumerate(zip(queries, documents, strict=True)):
        with torch.no_grad():
            inputs = pooled.tokenizer(query, document, return_tensors="pt")
            states = pooled.model.base_model(**inputs).last_hidden_state[0]
        first = len(pooled.tokenizer(query, add_special_tokens=False)["input_ids"])
        naive = torch.cat([states[1 : 1 + first].mean(0), states[2 + first : -1].mean(0)])
        assert torch.allclose(found[row, 1:], naive, atol=1e-5)


class Matching(Teacher):
    """Pairs whose score is the cosine of two hidden coordinates of their pooled states."""

    name, dim, fingerprint = "matching", 1 + 2 * 6, {"is": "matching"}

    def encode(self, texts, batch_size=64, show_progress_bar=None):
        sides = [[self._vector(text) for text in both.split("\x1f")] for both in texts]
        vectors = torch.stack([torch.cat(side) for side in sides])
        scores = functional.cosine_similarity(vectors[:, :2], vectors[:, 6:8])
        return torch.cat([3 * scores[:, None] - 1, vectors], dim=1)

    @staticmethod
    def _vector(text):
        return torch.randn(6, generator=torch.Generator().manual_seed(int(text[1:])))


def test_dual_pooling_finds_the_directions_that_the_score_is_made_of():
    rows = [[f"q{i}", f"d{1000 + 3 * i}", f"d{1001 + 3 * i}", f"d{1002 + 3 * i}"] for i in range(400)]
    dual = DualPoolingTeacher.fit(Matching(), rows, dim=4, steps=2000)
    assert dual.agreement > 0.95  # on queries that it was not fitted to
    targets = dual.targets(rows[:50])
    assert targets.shape == (50, 4, 4)
    assert torch.allclose(targets.norm(dim=-1), torch.ones(50, 4), atol=1e-5)
    # One query's vector here is the same with every document, so its target scores as the pair did.
    cosines = torch.einsum("bd,bcd->bc", targets[:, 0], targets[:, 1:]).flatten()
    scores = Matching().encode([pair(row[0], text) for row in rows[:50] for text in row[1:]])[:, 0]
    assert torch.corrcoef(torch.stack([cosines, scores]))[0, 1] > 0.95
    again = DualPoolingTeacher.fit(Matching(), rows, dim=4, steps=2000)
    assert again.fingerprint == dual.fingerprint
    assert torch.equal(again.targets(rows[:5]), targets[:5])
    assert DualPoolingTeacher.fit(Matching(), rows[::-1], dim=4, steps=1).fingerprint != dual.fingerprint


class Noise(Matching):
    """Pairs whose score has nothing to do with them."""

    def encode(self, texts, batch_size=64, show_progress_bar=None):
        chance = [int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) % 1000 / 500 - 1 for text in texts]
        return torch.cat([torch.tensor(chance)[:, None], super().encode(texts)[:, 1:]], dim=1)


def test_agreement_is_that_on_queries_which_were_not_fitted_to():
    rows = [[f"q{i}", f"d{1000 + 2 * i}", f"d{1001 + 2 * i}"] for i in range(60)]
    dual = DualPoolingTeacher.fit(Noise(), rows, dim=16, steps=600)
    known = [row for i, row in enumerate(rows) if i % 10 != 9]
    targets = dual.targets(known)
    cosines = torch.einsum("bd,bcd->bc", targets[:, 0], targets[:, 1:]).flatten()
    scores = Noise().encode([pair(row[0], text) for row in known for text in row[1:]])[:, 0]
    assert torch.corrcoef(torch.stack([cosines, scores]))[0, 1] > 0.7  # learned by heart
    assert dual.agreement < 0.6


def test_a_query_gets_the_mean_of_what_its_documents_made_of_it(pooled, rows):
    table = list(zip(*rows[:].values(), strict=True))
    dual = DualPoolingTeacher.fit(pooled, table, dim=8, steps=5)
    states = pooled.encode([pair(table[0][0], text) for text in table[0][1:]])
    maps = (dual.query_map, dual.document_map)
    sides = [
        functional.normalize(states[:, 1 + 16 * i : 17 + 16 * i] @ fitted[:-1] + fitted[-1], dim=-1)
        for i, fitted in enumerate(maps)
    ]
    assert not torch.allclose(sides[0][0], sides[0][1], atol=1e-4)
    expected = torch.stack([functional.normalize(sides[0].mean(0), dim=-1), *sides[1]])
    assert torch.allclose(dual.targets(table[:1])[0], expected, atol=1e-5)


def test_a_student_learns_dual_pooling_from_a_cache_of_pairs(pooled, make, rows, tmp_path):
    cache = TeacherCache(pooled, tmp_path / "pairs", dtype="float32", batch_size=8)
    cache.add(*([pair(q, d) for q, d in zip(rows["query"], rows[column], strict=True)] for column in DOCUMENTS))
    dual = DualPoolingTeacher.fit(cache, list(zip(*rows[:].values(), strict=True)), dim=24, steps=50)
    loss = WeightedLoss([EmbeddingMatching(), ScoreDistillation(reranker=True)])
    trainer = make(teacher=dual, reranker=cache, loss=loss, num_train_epochs=8, learning_rate=5e-3)
    assert trainer.run_facts["teacher"] == "reranker0, dual pooling"
    batch = batch_of(trainer)
    known = cache.encode([pair(*sides) for sides in zip(rows["query"][:4], rows["negative"][:4], strict=True)])
    assert torch.equal(batch["scores"][:, 1], known[:, 0])
    trainer.train()
    for part in ("loss_query", "loss_document"):
        first, *_, last = parts(trainer, part)
        assert last < first


def test_what_dual_pooling_can_not_do_is_refused(pooled, reranker_folder, rows, make, tmp_path):
    table = list(zip(*rows[:].values(), strict=True))
    with pytest.raises(ValueError, match="gives 1 numbers a pair, and there are 24 queries"):
        DualPoolingTeacher.fit(CrossEncoderTeacher(reranker_folder), table)
    with pytest.raises(ValueError, match="there are 9 queries"):
        DualPoolingTeacher.fit(pooled, table[:9])
    dual = DualPoolingTeacher.fit(pooled, table, dim=24, steps=1)
    with pytest.raises(ValueError, match="2 texts alone"):
        dual.encode(["a", "b"])
    cache = TeacherCache(pooled, tmp_path / "few", dtype="float32", batch_size=8)
    cache.add([pair(rows["query"][0], rows["positive"][0])])
    some = DualPoolingTeacher(cache, dual.query_map, dual.document_map, 1.0, "")
    with pytest.raises(ValueError, match="23 of the 24|lacks|has no"):
        make(teacher=some)
