# SPDX-License-Identifier: Apache-2.0
"""`hf-distill`: train and publish students, score and compare encoders, look into senses, from a terminal."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help=__doc__, pretty_exceptions_enable=False)
_OUT, _ERR = Console(), Console(stderr=True)
_TEXTS = "File (tsv/csv/jsonl/parquet/txt, gz too), folder or Hub data set; name:a,b takes its columns a and b."


def _command(function: Callable[..., None], **settings: Any) -> Callable[..., None]:
    """Register a command whose wrong input ends with its message, not with a traceback."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("hf_distill").setLevel(logging.INFO)
        try:
            function(*args, **kwargs)
        except (ValueError, OSError, ImportError, TypeError) as error:
            _ERR.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            sys.exit(1)

    return app.command(**settings)(run)


@partial(_command, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="hpd, embed_distill, lealla, multi_sense, or your own script.")],
    config: Annotated[str | None, typer.Option(help="YAML of flags: a file, or one of the recipe's by name.")] = None,
    accelerate_config: Annotated[
        str | None,
        typer.Option(
            "--accelerate_config", help="Of `accelerate launch`: a file, or one of cpu, multi_gpu, fsdp2, ... by name."
        ),
    ] = None,
) -> None:
    """Run a recipe under `accelerate launch`; flags of the recipe follow, and win over the YAML (all of them: `-- --help`).

    Example: `hf-distill train hpd --config hpd_mpnet --accelerate_config multi_gpu --output_dir outputs/mine`
    """
    # In a checkout the recipes lie beside the package, installed from a wheel inside it.
    home = next(path for path in (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes") if path.is_dir())

    def find(name: str, folder: str, suffix: str) -> str:
        if Path(name).is_file():
            return name
        known = {path.stem: path for path in sorted((home / folder).glob(f"*{suffix}"))}
        if not folder:  # what recipes share lies beside them
            known = {stem: path for stem, path in known.items() if "\ndef main(" in path.read_text(encoding="utf-8")}
        if name not in known:
            raise FileNotFoundError(f"train: {name} is neither a file nor one of {', '.join(known)}.")
        return str(known[name])

    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", find(accelerate_config, "accelerate", ".yaml")] if accelerate_config else []
    flags = ["--config", find(config, "configs", ".yaml")] if config else []
    environment = {**os.environ}
    if not accelerate_config:  # without one `accelerate launch` gives each process a single thread, also on a CPU
        import torch

        threads = max(1, (os.cpu_count() or 1) // max(1, torch.accelerator.device_count()))
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    done = subprocess.run([*launch, find(recipe, "", ".py"), *flags, *context.args], check=False, env=environment)
    if done.returncode:
        raise typer.Exit(done.returncode)


@_command
def cache(
    teacher: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    texts: Annotated[list[str], typer.Argument(help=_TEXTS)],
    folder: Annotated[Path, typer.Option(help="Where caches lie; each teacher with its settings gets a folder of its own.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the teacher.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text put before every text; as the teacher says if not given.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean, cls, last or pooler, without modules.json.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest input in tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision on disk: float16 or float32.")] = "float16",
    batch_size: Annotated[int, typer.Option(help="Texts of one teacher batch.")] = 64,
    int8: Annotated[bool, typer.Option(help="Hold the teacher in 8 bits (extra int8).")] = False,
    device_map: Annotated[str | None, typer.Option(help="auto: spread the teacher over all devices.")] = None,
) -> None:
    """Run a teacher over texts once and keep its vectors.

    Killed and called again, it goes on after the last finished shard. Under `torchrun` each process encodes its share.

    Example: `hf-distill cache sentence-transformers/all-mpnet-base-v2 my.jsonl pairs.tsv:anchor,positive --folder caches`
    """
    from .cache import TeacherCache, cache_folder
    from .data import load_texts, require_texts, split_source, text_columns
    from .teachers import EncoderTeacher

    columns = []
    for name, names in map(split_source, texts):
        dataset = load_texts(name)
        chosen = text_columns(dataset, names)
        require_texts(dataset, chosen)
        columns += [dataset[column] for column in chosen]
    live = EncoderTeacher(
        teacher, revision, prompt=prompt, pooling=pooling, max_length=max_length, int8=int8, device_map=device_map
    )
    store = TeacherCache(live, cache_folder(folder, live), dtype=dtype, batch_size=batch_size)
    new = store.add(*columns)
    _OUT.print(f"{new} new texts, {len(store)} in all, {store.dim} dimensions, in {store.folder}", highlight=False)


@_command
def evaluate(
    encoder: Annotated[str, typer.Argument(help="Any encoder: folder or Hub id.")],
    sts: Annotated[Path | None, typer.Option(help="Folder of STS files; see the README.")] = None,
    retrieval: Annotated[str | None, typer.Option(help="Folder or Hub id of a collection in BEIR's layout.")] = None,
    split: Annotated[str, typer.Option(help="Its judgements to score by.")] = "test",
    teacher: Annotated[str | None, typer.Option(help="Compare with this encoder on --texts (fidelity).")] = None,
    texts: Annotated[str | None, typer.Option(help=_TEXTS)] = None,
    max_texts: Annotated[int, typer.Option(help="How many of them, the first.")] = 2000,
    dim: Annotated[list[int] | None, typer.Option(help="Also score the first so many dimensions; may be repeated.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean, cls, last or pooler, without modules.json.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file, too.")] = None,
) -> None:
    """Score any encoder: STS sets, search, and how far it agrees with a teacher.

    Example: `hf-distill evaluate outputs/hpd --sts $DATA/sts --dim 32 --output scores.json`
    """
    from .evaluation.report import provenance, write_results
    from .evaluation.similarity import FidelityEvaluator
    from .teachers import EncoderTeacher

    if (teacher is None) != (texts is None) or (sts is None and retrieval is None and teacher is None):
        raise ValueError(
            f"evaluate: --sts is {sts}, --retrieval {retrieval}, --teacher {teacher}, --texts {texts}, expected --sts, "
            "--retrieval, or --teacher with --texts: one of these two alone scores nothing."
        )
    if output:  # not after the work
        if output.suffix != ".json":
            raise ValueError(f"evaluate: --output is {output}, expected a name that ends in .json.")
        output.parent.mkdir(parents=True, exist_ok=True)
    model = _open(encoder, pooling=pooling)
    evaluators = _evaluators(sts, retrieval, split, dim or [])
    if teacher and texts:
        held_out = _first_texts(texts, max_texts)
        evaluators.append(FidelityEvaluator(held_out, EncoderTeacher(teacher).encode(held_out), dim or []))
    scores = {name: value for evaluator in evaluators for name, value in evaluator(model.encode).items()}
    _show({"parameters": f"{model.num_parameters / 1e6:.1f}M", "dimensions": model.dim} | scores, f"{encoder}, times 100")
    if output:
        facts = {"encoder": model.name, "parameters": model.num_parameters, "dim": model.dim, "scores": scores}
        write_results(output.parent, {**facts, "provenance": provenance(None)}, output.stem)


@_command
def compare(
    encoders: Annotated[list[str], typer.Argument(help="Folders or Hub ids; the first is what the others are measured by.")],
    output: Annotated[Path, typer.Option(help="Folder for comparison.json and comparison.png.")],
    sts: Annotated[Path | None, typer.Option(help="Folder of STS files; see the README.")] = None,
    retrieval: Annotated[str | None, typer.Option(help="Folder or Hub id of a collection in BEIR's layout.")] = None,
    split: Annotated[str, typer.Option(help="Its judgements to score by.")] = "test",
    rounds: Annotated[int, typer.Option(help="How often the encoders take turns to be timed.")] = 5,
) -> None:
    """Put encoders side by side: scores with 95 % intervals, size, and speed in turns; as a table, JSON and a plot.

    All of them compute in float32: bfloat16 would favour the larger ones where the hardware multiplies it.

    Example: `hf-distill compare sentence-transformers/all-MiniLM-L6-v2 outputs/hpd --sts $DATA/sts --output outputs/compared`
    """
    from .evaluation.plots import draw_comparison
    from .evaluation.report import provenance, score_with_intervals, write_results
    from .evaluation.tables import comparison_cells, table
    from .evaluation.uncertainty import timings

    evaluators = _evaluators(sts, retrieval, split, [])
    if not evaluators or len(encoders) < 2:
        raise ValueError("compare: nothing to compare, expected two encoders or more, and --sts or --retrieval.")
    short = [Path(name).name for name in encoders]
    names = short if len(set(short)) == len(short) else encoders
    models = {name: _open(encoder, dtype="float32") for name, encoder in zip(names, encoders, strict=True)}
    texts = evaluators[0].texts()[:64]
    speeds = timings({name: model.encode for name, model in models.items()}, texts, rounds)
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        measured = score_with_intervals(evaluators, model.encode)
        rows[name] = {"parameters": model.num_parameters, "dim": model.dim, **measured, "speed": speeds[name]}
    shown = {name: comparison_cells(row) for name, row in rows.items()}
    output.mkdir(parents=True, exist_ok=True)
    write_results(output, {"rows": rows, "texts": len(texts), "provenance": provenance(None)}, "comparison")
    draw_comparison(output / "comparison.png", shown, next(iter(rows[names[0]]["intervals"])))
    _OUT.print(table(shown), highlight=False, soft_wrap=True)


def _open(name: str, **options: Any) -> Any:
    """Return an encoder: `encode(texts, prompt_name=None)`, name, num_parameters, dim.

    It puts its own prompts before queries and documents, speaks in senses if it has some, and leaves documents to the encoder
    that a query encoder names.
    """
    import torch

    from .hub import PROJECTION_FILE
    from .layout import open_student
    from .projection import PCAProjection
    from .teachers import EncoderTeacher, fetch

    folder = fetch(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").exists() else {}
    settings = config.get("hf_distill", {})
    if "senses" in settings:
        student = open_student(name).to("cuda" if torch.cuda.is_available() else "cpu")

        def speak(texts: list[str], prompt_name: str | None = None) -> Any:
            return student.encode(texts, prompt_name)

        return SimpleNamespace(name=name, encode=speak, num_parameters=student.num_parameters(), dim=student.dim)
    plain = EncoderTeacher(name, **options)
    sides: dict[str | None, Any] = {side: plain.with_prompt(plain.prompt_of(side)) for side in ("query", "document")}
    known = settings.get("document_encoder")
    if known:
        own = {key: known.get(key) for key in ("prompt", "pooling", "max_length")}
        sides["document"] = EncoderTeacher(known["name"], known["revision"], **{**options, **own})
        if (folder / PROJECTION_FILE).exists():
            sides["document"] = sides["document"].project(PCAProjection.from_pretrained(folder))

    def encode(texts: list[str], prompt_name: str | None = None) -> Any:
        return sides.get(prompt_name, plain).encode(texts)

    return SimpleNamespace(name=plain.name, encode=encode, num_parameters=plain.num_parameters, dim=plain.dim)


def _evaluators(sts: Path | None, retrieval: str | None, split: str, dims: list[int]) -> list[Any]:
    from .evaluation.similarity import STSEvaluator

    found: list[Any] = [STSEvaluator(sts, dims=dims)] if sts else []
    if retrieval:
        from .evaluation.retrieval import RetrievalData, RetrievalEvaluator

        found.append(RetrievalEvaluator(RetrievalData.load(retrieval, split), dims=dims, prompt_names=("query", "document")))
    return found


@_command
def inspect(
    student: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    check: Annotated[bool, typer.Option(help="Open it in all four ways and compare; this runs its own student.py.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the facts to this JSON file, too.")] = None,
) -> None:
    """Say what a student is: layers, head, parameters, teacher, loss, and whether every loader opens it the same.

    Example: `hf-distill inspect outputs/hpd --check`
    """
    from .hub import RUN_FILE
    from .layout import check_layout
    from .student import StudentModel
    from .teachers import fetch

    folder = fetch(student)
    model = StudentModel.from_pretrained(folder)
    settings, config = model.settings, model.config
    table = model.backbone.get_input_embeddings().weight.numel()
    head = sum(weight.numel() for weight in model.projection.parameters()) if model.projection else 0
    facts: dict[str, Any] = {
        "backbone": f"{type(model.backbone).__name__}, layers {settings['layers']} of {settings['base_model'] or 'its own'}",
        "hidden size": config.hidden_size,
        "pooling": settings["pooling"],
        "projection": f"{config.hidden_size} to {model.dim}, {settings['activation']}" if model.projection else "none",
        "normalised": settings["normalize"],
        "longest text": f"{settings['max_length']} tokens",
        "prompts": settings["prompts"],
        "parameters": f"{model.num_parameters() / 1e6:.2f}M (token table {table / 1e6:.2f}M, head {head})",
    }
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")) if (folder / RUN_FILE).exists() else {}
    facts |= {key: run[key] for key in ("teacher", "loss", "data") if key in run}
    if check:
        facts |= {f"through {loader}": found for loader, found in check_layout(folder).items()}
    _show(facts, student)
    if output:
        output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@_command
def card(
    student: Annotated[Path, typer.Argument(help="Folder of a student.")],
    name: Annotated[
        str | None, typer.Option(help="What it is called: the id of its repository; the folder's name if not.")
    ] = None,
) -> None:
    """Write a student's card again, from its results.json.

    Example: `hf-distill card outputs/hpd --name me/minilm-128`
    """
    from .card import write_card

    _OUT.print(f"{write_card(student, name or student.resolve().name)} is written.", highlight=False)


@_command
def push(
    student: Annotated[Path, typer.Argument(help="Folder of a student.")],
    name: Annotated[str, typer.Argument(help="Repository: user/name, or name alone for one of your own.")],
    private: Annotated[bool | None, typer.Option(help="Of a new repository; as your settings say if not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none.")] = None,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload student",
) -> None:
    """Publish a student with its card, results and plots, in one commit; log in first: `hf auth login`.

    A sense dictionary that lies beside it is published beside it.

    Every way to open it is compared before; one that gives other vectors ends the push. If the push fails, the repository is as
    it was, and the same command completes it.

    Example: `hf-distill push outputs/hpd me/minilm-128 --private`
    """
    from .card import write_card
    from .hub import publish, require_name
    from .layout import check_layout, publish_senses

    require_name(name)
    check_layout(student)
    write_card(student, name)
    publish_senses(student, name, private)
    publish(student, name, private=private, revision=revision, message=message)


@_command
def export(
    student: Annotated[Path, typer.Argument(help="Folder of a student; the files go into its onnx/.")],
    format: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    int8: Annotated[bool, typer.Option(help="Also with weights of 8 bits, and what that costs.")] = False,
    sts: Annotated[Path | None, typer.Option(help="Score each file on this folder of STS files; see the README.")] = None,
    texts: Annotated[str | None, typer.Option(help=f"Compare each file with the student on these. {_TEXTS}")] = None,
    max_texts: Annotated[int, typer.Option(help="How many of them, the first.")] = 2000,
) -> None:
    """Write a student as an ONNX graph (extra onnx), which onnxruntime and a tokenizer run alone; compared before it is kept.

    What was measured goes into results.json, from where `hf-distill card` takes it.

    Example: `hf-distill export outputs/hpd --format onnx --int8 --sts $DATA/sts`
    """
    from .evaluation.similarity import STSEvaluator
    from .export import export_onnx

    if format != "onnx":
        raise ValueError(f"export: format is {format!r}, expected 'onnx'.")
    evaluators = [STSEvaluator(sts)] if sts else []
    held_out = _first_texts(texts, max_texts) if texts else []
    for file, row in export_onnx(student, int8=int8, texts=held_out, evaluators=evaluators)["files"].items():
        cosines = {"smallest cosine": f"{row['cosine_min']:.6f}", "mean cosine": f"{row['cosine_mean']:.6f}"}
        _show({"MB": row["mb"], **cosines, **row["scores"]}, str(student / file))


@_command
def explain(
    dictionary: Annotated[str, typer.Argument(help="Sense dictionary: folder or Hub id.")],
    words: Annotated[list[str], typer.Argument(help="Words of one token each.")],
    teacher: Annotated[str | None, typer.Option(help="What it was made from, to see contexts: folder or Hub id.")] = None,
    texts: Annotated[str | None, typer.Option(help=_TEXTS)] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for a map of each word's contexts, <word>.png.")] = None,
) -> None:
    """Show the senses of words: how often each occurs, the words near it and, with a teacher and texts, its contexts.

    Example: `hf-distill explain senses bank --teacher sentence-transformers/all-MiniLM-L6-v2 --texts my.txt --plot maps`
    """
    from .data import load_texts, split_source, text_columns
    from .evaluation.explain import explain as explain_word
    from .senses import SenseDictionary
    from .token_teacher import TokenTeacher

    if (teacher is None) != (texts is None) or (plot and texts is None):
        raise ValueError("explain: contexts and maps need both --teacher and --texts. Give both.")
    found = SenseDictionary.from_pretrained(dictionary)
    live, rows = None, []
    if teacher and texts:
        made = found.facts.get("fingerprint") or {}
        options = {key: made[key] for key in ("layer", "bidirectional", "max_length", "dtype") if key in made}
        live = TokenTeacher(teacher, **options)
        name, names = split_source(texts)
        dataset = load_texts(name)
        rows = dataset[text_columns(dataset, names)[0]]
    for word in words:
        explained = explain_word(word, found, live, rows)
        table = Table("sense", "counted", "here", "near", "contexts", title=word, title_justify="left", show_lines=True)
        for row in explained.by_count():
            cells = (row["sense"], row["count"], row["found"], ", ".join(row["neighbours"]), "\n".join(row["contexts"]))
            table.add_row(*(escape(str(cell)) for cell in cells))
        _OUT.print(table)
        if plot:
            plot.mkdir(parents=True, exist_ok=True)
            explained.draw(plot / f"{word}.png")


def _first_texts(source: str, most: int) -> list[str]:
    from .data import load_texts, split_source, text_columns

    name, names = split_source(source)
    dataset = load_texts(name)
    return list(dict.fromkeys(dataset[text_columns(dataset, names)[0]]))[:most]


def _show(facts: dict[str, Any], title: str) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) and value > 1.01 else str(value))
    _OUT.print(table)


if __name__ == "__main__":
    app()
