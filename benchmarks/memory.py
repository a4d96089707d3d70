# SPDX-License-Identifier: Apache-2.0
"""Peak memory of caching, of training and of building senses, and the time of `import hf_distill`: `make bench`.

Each is measured in a fresh process. Text is real (GCIDE, read from a file as a user's would be), the models are small and
random, for what grows with the number of texts (keys, index, targets of 384 dimensions, tokenised rows) does not depend on
them, and shapes are kept equal (at most 32 tokens). Writes recipes/results/memory.json.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


RECIPES = Path(__file__).parents[1] / "recipes"


def make_models(folder: Path) -> None:
    """Write a random encoder, a student's backbone and a teacher of 384 dimensions, with a real tokenizer."""
    import torch
    from demo import teacher_folder
    from transformers import AutoTokenizer, BertConfig, BertModel

    from hf_distill import StudentModel

    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=30522, **size)).save_pretrained(folder / "backbone")
    AutoTokenizer.from_pretrained(teacher_folder()).save_pretrained(folder / "backbone")
    StudentModel.from_backbone(str(folder / "backbone"), projection_dim=384, max_length=32).save_pretrained(folder / "teacher")


def work(what: str, folder: Path, count: int) -> None:
    """Do one of the jobs and print its peak resident set in MB."""
    from hf_distill import (
        DistillationTrainer,
        DistillationTrainingArguments,
        EncoderTeacher,
        HPDLoss,
        PCAProjection,
        StudentModel,
        TeacherCache,
    )
    from hf_distill.data import load_texts

    texts = load_texts(folder / f"{count}.jsonl")
    cache = TeacherCache(EncoderTeacher(folder / "teacher", dtype="float32", device="cpu"), folder / f"cache-{count}")
    stated = {}
    if what == "caching":
        cache.add(texts["text"])
    elif what == "building senses":
        from hf_distill.sense_builder import build_senses
        from hf_distill.shards import read_tensor
        from hf_distill.token_teacher import TokenTeacher

        teacher = TokenTeacher(folder / "backbone", max_length=32, dtype="float32", device="cpu")
        dictionary = build_senses(teacher, texts["text"], folder / f"senses-{count}")
        kept = sum(len(read_tensor(path, "ids")) for path in (folder / f"senses-{count}").glob("states-*.safetensors"))
        whole = sum(tensor.nbytes for tensor in (dictionary.senses, dictionary.offsets, dictionary.counts))
        group = min(256e6, 4 * kept * teacher.dim)
        stated = {"stated_mb": (80 * kept + 4 * whole + group) / 1e6}  # by its docstring, what grows with the texts
    else:
        student = StudentModel.from_backbone(str(folder / "backbone"), projection_dim=128, max_length=32, dropout=0.0)
        teacher = cache.project(PCAProjection.fit(cache, 128))
        args = DistillationTrainingArguments(
            str(folder / f"run-{count}"),
            per_device_train_batch_size=256,
            num_train_epochs=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        DistillationTrainer(model=student, args=args, train_dataset=texts, teacher=teacher, loss=HPDLoss()).train()
    # Not getrusage: what it calls this process's peak begins with that of the process that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = {key: int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 1024 for key in ("VmHWM", "RssAnon", "RssFile")}
    print(json.dumps({"peak_mb": found["VmHWM"], "at_end": found, **stated}))


def main() -> None:
    """Run each job at each size in a fresh process, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 150_000])
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(RECIPES))
    if options.work:
        work(options.work[0], Path(options.work[1]), int(options.work[2]))
        return
    from demo import gcide_texts

    from hf_distill.evaluation.report import provenance, write_results
    from hf_distill.evaluation.tables import table

    rows: dict[str, dict[str, float]] = {"caching": {}, "training": {}, "building senses": {}}
    stated: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        texts = gcide_texts().shuffle(seed=0)
        for count in options.sizes:
            texts.select(range(count)).to_json(folder / f"{count}.jsonl")
        for what in rows:
            for count in options.sizes:
                command = [sys.executable, __file__, "--work", what, name, str(count)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                measured = json.loads(done.stdout.strip().splitlines()[-1])
                rows[what][f"{count} texts, MB"] = measured["peak_mb"]
                stated += [measured["stated_mb"]] if "stated_mb" in measured else []
    for row in rows.values():
        values = list(row.values())
        row["difference, MB"] = values[-1] - values[0]
    rows["building senses"]["stated, MB"] = stated[-1] - stated[0]
    imports = []
    for _ in range(5):
        script = "import time; t = time.perf_counter(); import hf_distill; print(time.perf_counter() - t)"
        imports.append(float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout))
        time.sleep(0.1)
    result = {"peak_memory": rows, "import_s": statistics.median(imports), "provenance": provenance(seed=0)}
    write_results(RECIPES / "results", result, "memory")
    print(table(rows, "peak resident memory"))
    print(f"import hf_distill: {result['import_s'] * 1000:.1f} ms (median of 5 fresh processes)")


if __name__ == "__main__":
    main()
