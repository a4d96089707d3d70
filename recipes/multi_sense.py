# SPDX-License-Identifier: Apache-2.0
"""Multi-sense (arXiv 2504.06036): a sense dictionary, and a student that speaks it. Flags: --help, --config file.yaml."""

from dataclasses import dataclass, field
from pathlib import Path

from inputs import begin, sts_evaluators, training_texts
from words import (
    States,
    dictionary_facts,
    encoder_of,
    open_dictionary,
    open_senses,
    sentence_evaluators,
    states_of,
    word_encoder,
)  # fmt: skip

from hf_distill.arguments import TextArguments
from hf_distill.evaluation.word_sense import WiCEvaluator, statistics
from hf_distill.losses import SenseLoss, StateLoss, WeightedLoss
from hf_distill.multi_sense import MultiSenseStudent
from hf_distill.token_teacher import SenseTeacher, TokenTeacher
from hf_distill.trainer import DistillationTrainer, last_checkpoint


@dataclass
class MultiSenseArguments(TextArguments):
    """What is multi-sense's own."""

    senses: str | None = field(default=None, metadata={"help": "A dictionary that exists: folder or Hub id; else one is made."})
    dim: int | None = field(default=None, metadata={"help": "The teacher's width, for a student of another; else none."})
    k: int = field(default=20, metadata={"help": "Senses a token; rare tokens keep their states."})
    cap: int = field(default=1000, metadata={"help": "Occurrences a token that are clustered at most."})
    select: str = field(default="dot", metadata={"help": "How a sense is chosen: dot (the paper's code), l2 or cos."})
    teacher_layer: int = field(default=-1, metadata={"help": "Whose states; -1 is the last."})
    bidirectional: bool = field(default=False, metadata={"help": "Let a causal teacher see both sides, as LLM2Vec."})
    sense_weight: float = field(default=1.0, metadata={"help": "Weight of the senses; 0 leaves the part out."})
    state_weight: float = field(default=0.0, metadata={"help": "Weight of the mean squared error of states (live teacher)."})
    soft: bool = field(default=False, metadata={"help": "Learn the teacher's distribution over senses, not its choice (live)."})
    temperature: float = field(default=1.0, metadata={"help": "What scores of senses are divided by."})
    wic: str | None = field(default=None, metadata={"help": "Folder of Word-in-Context: train, dev, test."})
    wic_test: str = field(default="test", metadata={"help": "Its split to score: test, or dev to choose on."})
    words: str | None = field(default=None, metadata={"help": "Table of word similarity: word1, word2, score, set."})
    classification: str | None = field(default=None, metadata={"help": "Folder of <name>-train and <name>-test: text, label."})

    def loss(self) -> WeightedLoss:
        """Return the weighted parts; what has weight 0 is not computed."""
        losses = [SenseLoss(self.temperature, self.soft)] if self.sense_weight else []
        losses += [StateLoss()] if self.state_weight else []
        weights = {"sense": self.sense_weight, "state": self.state_weight}
        return WeightedLoss(losses, {part: weights[part] for loss in losses for part in loss.parts})


def main(argv: list[str] | None = None) -> None:
    """Build the dictionary, train the student on the teacher's senses, measure both with and without them."""
    recipe, args, report = begin("multi_sense", SenseLoss.paper, MultiSenseArguments, argv)
    report.evaluators = [*sts_evaluators(recipe), *sentence_evaluators(recipe)]
    wic = WiCEvaluator(recipe.wic, test=recipe.wic_test) if recipe.wic else None
    seen = [text for evaluator in [*report.evaluators, *([wic] if wic else [])] for text in evaluator.texts()]
    texts = training_texts(recipe, args, seen)

    options = {"layer": recipe.teacher_layer, "bidirectional": recipe.bidirectional, "max_length": recipe.teacher_max_length}
    teacher = TokenTeacher(recipe.teacher[0], recipe.teacher_revision, **options)
    teacher.name = recipe.teacher_name or teacher.name
    folder = Path(args.output_dir) / "senses"
    with report.timed("dictionary"):
        dictionary = open_dictionary(recipe, teacher, texts, folder, args.seed)
    student = MultiSenseStudent.from_backbone(recipe.backbone, **recipe.student_options(), projection_dim=recipe.dim)
    student.settings["base_model"] = recipe.backbone_name or student.settings["base_model"]
    student.attach(dictionary, recipe.senses or folder, select=recipe.select)
    with report.timed("caching"):
        senses = open_senses(recipe, teacher, dictionary, texts)
    plain = SenseTeacher(teacher, dictionary, recipe.select)

    def add(name: str, states: States, parameters: int) -> None:
        report.add(name, encoder_of(states), parameters, teacher.dim, prefixes=False)
        scores = report.rows[name]["scores"]
        scores |= wic(word_encoder(teacher.tokenizer, states)) if wic else {}
        ends = [value for key, value in scores.items() if key.startswith("sts_") and "avg" not in key and "dev" not in key]
        ends += [scores[key] for key in ("wic", "sst2_few", "trec_few") if key in scores]
        scores |= {"end_avg": sum(ends) / len(ends)} if ends else {}

    with report.timed("evaluation"):
        add("teacher", teacher.states, teacher.num_parameters)
        add("teacher, replaced", plain.replaced, teacher.num_parameters)
        add("untrained student", states_of(student, replace=False), student.num_parameters())

    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=texts.train,
        teacher=senses,
        loss=recipe.loss(),
        peft_config=recipe.peft_config(),
    )
    with report.timed("training"):
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.save_model()
    with report.timed("evaluation"):
        add("student, without senses", states_of(trainer.student, replace=False), student.num_parameters())
        add("student", states_of(trainer.student, replace=True), student.num_parameters())
    facts = {
        "dictionary": {**dictionary.facts, **statistics(dictionary, texts.held_out)},
        **dictionary_facts(recipe, dictionary),
    }
    print(report.finish(trainer, recipe, texts.facts(recipe.texts_name), **facts))
    trainer.end()


if __name__ == "__main__":
    main()
