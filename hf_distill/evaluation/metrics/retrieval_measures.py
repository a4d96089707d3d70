# SPDX-License-Identifier: Apache-2.0
"""Ranking measures of a search, as an `evaluate.Metric` (self-contained, as its loader wants)."""

import datasets
import evaluate
import ir_measures


MEASURES = {"ndcg10": "nDCG@10", "mrr10": "RR@10", "recall10": "R@10", "recall100": "R@100", "map100": "AP@100"}


def retrieval_measures(
    run: dict[str, dict[str, float]], relevant: dict[str, dict[str, int]], measures: dict[str, str] = MEASURES
) -> dict[str, float]:
    """Return the mean of each measure over the queries, times 100; arguments and errors as those of `query_measures`."""
    found = query_measures(run, relevant, measures)
    return {name: sum(values.values()) / len(relevant) for name, values in found.items()}


def query_measures(
    run: dict[str, dict[str, float]], relevant: dict[str, dict[str, int]], measures: dict[str, str] = MEASURES
) -> dict[str, dict[str, float]]:
    """Return measure -> query -> its value, times 100, as trec_eval computes it (through ir-measures).

    Args:
        run: Query id -> document id -> score, higher is better. A judged query that is not in it counts 0.
        relevant: Query id -> document id -> relevance, an integer > 0 for a relevant document.
        measures: Our name -> ir-measures' ("nDCG@10").

    Raises:
        ValueError: If the run holds a query that nobody judged: it would be left out of the mean without a word.
    """
    unknown = sorted(run.keys() - relevant.keys())
    if unknown:
        raise ValueError(
            f"retrieval_measures: {len(unknown)} queries of the run have no judgement ({unknown[:3]}), expected one for each. "
            "The mean would be over the others. Leave them out of the run, or add their judgements."
        )
    parsed = {name: ir_measures.parse_measure(measure) for name, measure in measures.items()}
    found = {name: dict.fromkeys(relevant, 0.0) for name in measures}
    for value in ir_measures.iter_calc(list(parsed.values()), relevant, run):
        name = next(name for name, measure in parsed.items() if measure == value.measure)
        found[name][value.query_id] = 100 * value.value
    return found


class RetrievalMeasures(evaluate.Metric):
    """compute(predictions=[{query, documents, scores}], references=[{query, documents, relevance}]) -> the five measures."""

    def _info(self) -> evaluate.MetricInfo:
        text, texts = datasets.Value("string"), datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="nDCG@10, MRR@10, recall@10, recall@100 and MAP@100 (times 100) of ranked documents.",
            citation="MacAvaney, Macdonald and Ounis, Streamlining Evaluation with ir-measures, ECIR 2022",
            inputs_description="A row a query: its id, document ids, and their scores (found) or relevance (judged).",
            features=datasets.Features(
                {
                    "predictions": {"query": text, "documents": texts, "scores": datasets.Sequence(datasets.Value("float32"))},
                    "references": {"query": text, "documents": texts, "relevance": datasets.Sequence(datasets.Value("int32"))},
                }
            ),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        run = {row["query"]: dict(zip(row["documents"], row["scores"], strict=True)) for row in predictions}
        judged = {row["query"]: dict(zip(row["documents"], row["relevance"], strict=True)) for row in references}
        return retrieval_measures(run, judged)
