# SPDX-License-Identifier: Apache-2.0
"""Translations of one corpus as the test of the others: `python benchmarks/by_corpus.py $DATA/parallel wesnoth outputs/ood`.

Sentences held out of the pairs' own corpora say little of other text, and the test must not be chosen on: this is between the
two. Reads eng-<code>.* with a column `corpus`; writes OUTPUT/pairs (what is not of that corpus) and OUTPUT/test.tsv, for the
flags --pairs and --tatoeba of recipes/lealla.py.
"""

import argparse
import csv
import random
from pathlib import Path

from hf_distill.data import load_texts, normal_form


def main() -> None:
    """Split every language by the column."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("corpus", help="what is tested on")
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=200, help="sentences a language; one with fewer is not tested")
    parser.add_argument("--words", type=int, default=4, help="of an English sentence of the test, at least")
    options = parser.parse_args()
    (options.output / "pairs").mkdir(parents=True)
    test = []
    for path in sorted(options.folder.glob("eng-*")):
        code = path.name.removeprefix("eng-").split(".")[0]
        train, apart = [], {}
        for row in load_texts(path):
            if row["corpus"] != options.corpus:
                train.append((row["english"], row["translation"]))
            elif len(row["english"].split()) >= options.words:
                apart.setdefault(normal_form(row["english"]), (code, row["translation"], row["english"]))
        if train:
            write(options.output / "pairs" / f"eng-{code}.tsv", [("english", "translation"), *train])
        apart = list({normal_form(row[1]): row for row in apart.values()}.values())
        if train and len(apart) >= options.count:
            test += random.Random(code).sample(apart, options.count)
    write(options.output / "test.tsv", [("language", "source", "english"), *test])
    print(f"{len(test)} sentences of {len({row[0] for row in test})} languages in {options.output / 'test.tsv'}")


def write(path: Path, rows: list[tuple[str, ...]]) -> None:
    """Write a table; no field holds tabs or line breaks."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, csv.excel_tab, quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
