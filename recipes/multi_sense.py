# SPDX-License-Identifier: Apache-2.0
"""Multi-sense (arXiv 2504.06036): a sense dictionary, and a student that speaks it. Flags: --help, --config file.yaml."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from inputs import begin, sts_evaluators, training_texts
from words import dictionary_facts, open_dictionary, open_senses, sentence_evaluators, word_scores

from hf_distill.arguments import TextArguments
from hf_distill.evaluation.word_sense import WiCEvaluator, statistics
from hf_distill.losses import SenseLoss, StateLoss, WeightedLoss
from hf_distill.multi_sense import MultiSenseStudent
from hf_distill.student import encode_sorted, pool
from hf_distill.token_teacher import TokenTeacher
from hf_distill.trainer import DistillationTrainer, last_checkpoint


@dataclass
class MultiSenseArguments(TextArguments):
    """What is multi-sense's own."""

    senses: str | None = field(default=None, metadata={"help": "A dictionary that exists: folder or Hub id; else one is made."})
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
    torch.manual_seed(args.seed)
    student = MultiSenseStudent.from_backbone(recipe.backbone, **recipe.student_options(), projection_dim=recipe.projection(teacher))
    student.settings["base_model"] = recipe.backbone_name or student.settings["base_model"]
    student.attach(dictionary, recipe.senses or folder, select=recipe.select)
    with report.timed("caching"):
        senses = open_senses(recipe, teacher, dictionary, texts)

    def replaced(batch: list[str]) -> torch.Tensor:
        states, ids, mask = senses_of.read(batch)
        return dictionary.lookup(states, ids, mask, recipe.select)[0]

    raise NotImplementedError


if __name__ == "__main__":
    main()
