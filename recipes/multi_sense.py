# SPDX-License-Identifier: Apache-2.0
"""Multi-sense (arXiv 2504.06036): a sense dictionary, and a student that speaks it. Flags: --help, --config file.yaml."""

from dataclasses import dataclass, field

from inputs import begin, training_texts
from words import EndTasks, both_states, dictionary_facts, explain_words, open_dictionary, open_senses, open_token_teacher

from hf_distill.arguments import TextArguments
from hf_distill.evaluation.similarity import FidelityEvaluator
from hf_distill.losses import SenseLoss, StateLoss, WeightedLoss
from hf_distill.multi_sense import MultiSenseStudent
from hf_distill.runs import last_checkpoint
from hf_distill.senses import SELECTIONS
from hf_distill.token_teacher import SenseTeacher
from hf_distill.trainer import DistillationTrainer


@dataclass
class MultiSenseArguments(TextArguments):
    """What is multi-sense's own."""

    senses: str | None = field(default=None, metadata={"help": "A dictionary that exists: folder or Hub id; else one is made."})
    dim: int | None = field(default=None, metadata={"help": "The teacher's width, for a student of another; else none."})
    k: int = field(default=50, metadata={"help": "Senses a token; a token with fewer states keeps them."})
    cap: int = field(default=1000, metadata={"help": "Occurrences a token that are clustered at most."})
    special_tokens: bool | None = field(default=None, metadata={"help": "Senses of [CLS] and the like; not made, unless true."})
    select: str = field(default="l2", metadata={"help": "How a sense is chosen: l2 (nearest), cos, dot (the paper's code)."})
    teacher_layer: int | None = field(default=None, metadata={"help": "Whose states; the last's (-1), or those of --senses."})
    bidirectional: bool = field(default=False, metadata={"help": "Let a causal teacher see both sides, as LLM2Vec."})
    sense_weight: float = field(default=1.0, metadata={"help": "Weight of the senses; 0 leaves the part out."})
    state_weight: float = field(default=0.0, metadata={"help": "Weight of the mean squared error of states (live teacher)."})
    soft: bool = field(default=False, metadata={"help": "Learn the teacher's distribution over senses, not its choice (live)."})
    temperature: float = field(default=1.0, metadata={"help": "What scores of senses are divided by."})
    explained: list[str] | None = field(default=None, metadata={"help": "Words whose senses to show, in <output>/explained."})
    words: str | None = field(default=None, metadata={"help": "Table of word similarity: word1, word2, score, set."})
    wic: str | None = field(default=None, metadata={"help": "Folder of Word-in-Context: train, dev, test."})
    classification: str | None = field(default=None, metadata={"help": "Folder of <name>-train and <name>-test: text, label."})
    all_labels: bool = field(default=True, metadata={"help": "Classify with all labels, too, beside 8 texts a label."})
    split: str = field(default="test", metadata={"help": "Of the last two, what is scored: test, or dev to choose on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in SELECTIONS or self.k < 1 or self.cap < self.k:
            raise ValueError(
                f"multi_sense: select is {self.select!r}, k is {self.k}, cap {self.cap}, expected one of {SELECTIONS}, and "
                "from 1 to cap senses a token."
            )

    def loss(self) -> WeightedLoss:
        """Return the weighted parts; what has weight 0 is not computed."""
        losses = [SenseLoss(self.temperature, self.soft)] if self.sense_weight else []
        losses += [StateLoss()] if self.state_weight else []
        weights = {"sense": self.sense_weight, "state": self.state_weight}
        return WeightedLoss(losses, {part: weights[part] for loss in losses for part in loss.parts})


def main(argv: list[str] | None = None) -> None:
    """Build the dictionary, train the student on the teacher's senses, measure both with and without them."""
    recipe, args, report = begin("multi_sense", SenseLoss.paper, MultiSenseArguments, argv)
    tasks = EndTasks(recipe, report)
    texts = training_texts(recipe, args, tasks.seen)

    options = {**recipe.student_options(), "projection_dim": recipe.dim, "bidirectional": recipe.bidirectional}
    student = MultiSenseStudent.from_backbone(recipe.backbone, **options)
    student.settings["base_model"] = recipe.backbone_name or student.settings["base_model"]
    teacher = open_token_teacher(recipe, student)
    student.require_space(teacher.tokenizer, teacher.dim, teacher.max_length)
    size = student.num_parameters()
    with report.timed("dictionary"):
        dictionary, place = open_dictionary(recipe, args, teacher, texts)
    student.attach(dictionary, place, select=recipe.select)
    student.scored_in_training = bool(recipe.sense_weight)
    live = SenseTeacher(teacher, dictionary, recipe.select)
    with report.timed("caching"):
        senses = open_senses(recipe, teacher, dictionary, texts)

    with report.timed("evaluation"):
        report.evaluators.insert(0, FidelityEvaluator(texts.held_out, teacher.encode(texts.held_out), recipe.dims))
        tasks.taught = (teacher.states, texts.held_out)
        if recipe.baselines:
            tasks.add(["teacher", "teacher, replaced"], live.states, teacher, teacher.num_parameters)
            tasks.add(["untrained student", "untrained student, replaced"], both_states(student), student, size)

    given = {"train_dataset": texts.train, "teacher": senses, "loss": recipe.loss(), "peft_config": recipe.peft_config()}
    trainer = DistillationTrainer(model=student, args=args, **given)
    with report.timed("training"):
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir) or args.resume_from_checkpoint)
    trainer.save_model()
    with report.timed("evaluation"):
        tasks.add(["student, without senses", "student"], both_states(student), student, size)
    facts = dictionary_facts(recipe, live, student, texts.held_out)
    explain_words(recipe, args, live, texts.all())
    print(report.finish(trainer, recipe, texts.facts(recipe.texts_name), **facts))
    trainer.end()


if __name__ == "__main__":
    main()
