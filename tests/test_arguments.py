import inspect
import pickle
from dataclasses import dataclass, field, fields

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_distill import DistillationTrainingArguments, EncoderTeacher, StudentModel, parse_arguments
from hf_distill.arguments import TextArguments


@dataclass
class Named:
    name: str = field(metadata={"help": "It has no default."})
    size: int = 1


@pytest.fixture
def yaml_file(tmp_path):
    def write(content: str) -> str:
        (tmp_path / "run.yaml").write_text(content)
        return str(tmp_path / "run.yaml")

    return write


# Settings of the trainer


def test_defaults_differ_from_the_hosts_as_documented(tmp_path):
    args = DistillationTrainingArguments(output_dir=str(tmp_path))
    assert args.train_sampling_strategy == "group_by_length"
    assert args.remove_unused_columns is False
    assert args.per_device_train_batch_size == 64
    assert (args.learning_rate, args.warmup_steps, args.logging_steps, args.save_total_limit) == (3e-4, 0.05, 50, 2)
    assert args.label_names == ["texts"]
    assert args.text_columns is None
    assert args.get_warmup_steps(1000) == 50


def test_everything_else_is_as_in_the_host(tmp_path):
    ours, theirs = (cls(str(tmp_path)).to_dict() for cls in (DistillationTrainingArguments, TrainingArguments))
    own = {f.name for f in fields(DistillationTrainingArguments)} & set(DistillationTrainingArguments.__annotations__)
    different = {key for key in theirs if ours[key] != theirs[key]} - {"use_cpu", "dataloader_pin_memory"}
    assert different <= own | {"accelerator_config"}  # the two left out are the host's answer to there being no accelerator
    configs = [args["accelerator_config"] for args in (ours, theirs)]
    assert {key for key in configs[1] if configs[0][key] != configs[1][key]} == {"dispatch_batches"}


def test_dropping_the_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns is True, expected False"):
        DistillationTrainingArguments(str(tmp_path), remove_unused_columns=True)


def test_moving_rows_between_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'batch_rebalance', expected group_by_length, random or sequential"):
        DistillationTrainingArguments(str(tmp_path), train_sampling_strategy="batch_rebalance")
    for strategy in ("group_by_length", "random", "sequential"):
        DistillationTrainingArguments(str(tmp_path), train_sampling_strategy=strategy)


def test_bfloat16_works_where_there_is_only_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **options: False)
    args = DistillationTrainingArguments(str(tmp_path), bf16=True)
    assert args.use_cpu
    assert args.device == torch.device("cpu")


def test_an_accelerator_is_not_left_unused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **options: True)
    assert not DistillationTrainingArguments(str(tmp_path)).use_cpu


def test_the_token_is_in_no_saved_file(tmp_path):
    args = DistillationTrainingArguments(str(tmp_path), hub_token="hf_sEcReT", learning_rate=1e-3)
    torch.save(args, tmp_path / "training_args.bin")
    assert b"sEcReT" not in (tmp_path / "training_args.bin").read_bytes()
    assert b"sEcReT" not in pickle.dumps(args)
    assert args.hub_token == "hf_sEcReT"  # the run itself still has it
    opened = pickle.loads(pickle.dumps(args))
    assert opened.hub_token is None
    assert opened.learning_rate == 1e-3


@pytest.mark.parametrize("cls", [DistillationTrainingArguments, TextArguments])
def test_every_field_of_ours_has_help(cls, capsys):
    own = [f for f in fields(cls) if f.name in cls.__annotations__]
    assert len(own) >= 8
    assert [f.name for f in own if not f.metadata.get("help", "").strip()] == []
    with pytest.raises(SystemExit) as stop:
        parse_arguments(cls, argv=["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert [f.name for f in own if f"--{f.name}" not in shown] == []
    assert "YAML file of settings; flags win over it." in shown


def test_what_is_trained_tells_runs_apart_and_what_is_measured_does_not():
    same = TextArguments().identity()
    assert TextArguments(sts="sts", dims=[8], cache_dir="x", license="mit", language="en").identity() == same
    assert TextArguments(teacher_name="x", backbone_name="x", texts_name="x").identity() == same
    others = {
        "teacher": "x",
        "layers": [1],
        "max_length": 9,
        "texts": "x",
        "max_texts": 5,
        "held_out": 7,
        "dropout": 0.1,
    }
    for key, value in others.items():
        assert TextArguments(**{key: value}).identity() != same, key


def test_recipes_hand_on_what_models_are_made_from():
    recipe = TextArguments(
        teacher_revision="main",
        teacher_pooling="cls",
        teacher_max_length=9,
        teacher_int8=True,
        teacher_device_map="auto",
        layers=[1],
        max_length=7,
        dropout=0.25,
        attention="eager",
    )
    teacher = {"revision": "main", "pooling": "cls", "max_length": 9, "int8": True, "device_map": "auto"}
    student = {"layers": [1], "max_length": 7, "dropout": 0.25, "attn_implementation": "eager"}
    assert recipe.teacher_options() == teacher
    assert recipe.student_options() == student
    inspect.signature(EncoderTeacher).bind("name", **teacher)
    inspect.signature(StudentModel.from_backbone).bind("name", **student)


# Flags and files


def test_flags_become_fields_of_each_class(tmp_path):
    argv = [
        "--layers",
        "0",
        "2",
        "--output_dir",
        str(tmp_path),
        "--bf16",
        "--learning_rate",
        "2e-4",
        "--texts",
        "x.tsv",
    ]
    recipe, args = parse_arguments(TextArguments, DistillationTrainingArguments, argv=argv)
    assert isinstance(recipe, TextArguments)
    assert isinstance(args, DistillationTrainingArguments)
    assert (recipe.layers, recipe.texts, recipe.held_out) == ([0, 2], ["x.tsv"], 2000)
    assert (args.output_dir, args.bf16, args.learning_rate) == (str(tmp_path), True, 2e-4)


def test_without_argv_the_command_line_is_read(monkeypatch):
    monkeypatch.setattr("sys.argv", ["hpd.py", "--held_out", "7"])
    assert parse_arguments(TextArguments)[0].held_out == 7


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_values_come_from_the_file(form, yaml_file):
    path = yaml_file("texts: x.tsv\nlayers: 3\ndims: []\nheld_out: 9\nmax_length: null\ndropout: 0.25\n")
    (recipe,) = parse_arguments(TextArguments, argv=form.format(path).split())
    expected = TextArguments(texts=["x.tsv"], layers=[3], dims=[], held_out=9, dropout=0.25)
    assert recipe == expected


def test_flags_win_over_the_file_wherever_they_stand(yaml_file):
    path = yaml_file("held_out: 9\nlayers: [0, 3]\nmax_texts: 4\n")
    (recipe,) = parse_arguments(TextArguments, argv=["--held_out", "5", "--config", path, "--layers", "1"])
    assert (recipe.held_out, recipe.layers, recipe.max_texts) == (5, [1], 4)


def test_the_file_wins_over_the_recipes_defaults(yaml_file):
    path = yaml_file("held_out: 9\n")
    (recipe,) = parse_arguments(TextArguments, argv=["--config", path], held_out=1, max_texts=3)
    assert (recipe.held_out, recipe.max_texts) == (9, 3)
    (recipe,) = parse_arguments(TextArguments, argv=[], held_out=1)
    assert recipe.held_out == 1


def test_numbers_that_yaml_reads_as_strings_become_numbers(yaml_file, tmp_path):
    path = yaml_file(f"learning_rate: 1e-4\nbf16: true\nnum_train_epochs: 3\noutput_dir: {tmp_path}\n")
    (args,) = parse_arguments(DistillationTrainingArguments, argv=["--config", path])
    assert args.learning_rate == 1e-4
    assert isinstance(args.learning_rate, float)
    assert args.bf16 is True
    assert args.num_train_epochs == 3


def test_a_value_of_the_wrong_type_is_refused(yaml_file, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(TextArguments, argv=["--config", yaml_file("held_out: many\n")])
    assert "argument --held_out" in capsys.readouterr().err


def test_an_empty_file_changes_nothing(yaml_file):
    assert parse_arguments(TextArguments, argv=["--config", yaml_file("# nothing\n")]) == (TextArguments(),)


def test_an_unknown_key_is_refused_with_a_suggestion(yaml_file):
    with pytest.raises(ValueError, match=r"run\.yaml has the key 'held_uot', .* Did you mean 'held_out'\?"):
        parse_arguments(TextArguments, argv=["--config", yaml_file("held_uot: 9\n")])
    with pytest.raises(ValueError, match="the key 'qqqqqq', .* See --help"):
        parse_arguments(TextArguments, argv=["--config", yaml_file("qqqqqq: 9\n")])


def test_a_key_of_another_recipe_is_unknown(yaml_file):
    with pytest.raises(ValueError, match="the key 'learning_rate'"):
        parse_arguments(TextArguments, argv=["--config", yaml_file("learning_rate: 1e-4\n")])


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(TextArguments, argv=["--held_uot", "9"])
    assert stop.value.code == 2
    assert "--held_uot" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--conf", "--held_o"])
def test_an_abbreviated_flag_is_refused(flag, yaml_file, capsys):
    # A file named by --conf would be ignored, and a token given as --hub_tok be published in results.json.
    value = yaml_file("held_out: 9\n") if flag == "--conf" else "9"
    with pytest.raises(SystemExit):
        parse_arguments(TextArguments, argv=[flag, value])
    assert flag in capsys.readouterr().err


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml is not there"):
        parse_arguments(TextArguments, argv=["--config", str(tmp_path / "nowhere.yaml")])


def test_a_required_flag_may_stand_in_the_file(yaml_file, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Named, argv=[])
    assert "--name" in capsys.readouterr().err
    assert parse_arguments(Named, argv=["--config", yaml_file("name: x\n"), "--size", "3"]) == (Named("x", 3),)


def test_flags_are_those_of_the_host(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--max_grad_norm", "0.5", "--eval_strategy", "no", "--seed", "3"]
    (args,) = parse_arguments(DistillationTrainingArguments, argv=argv)
    (expected,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(argv)
    assert args.to_dict() == expected.to_dict()


def test_what_a_step_depends_on_is_told_and_how_many_there_are_is_not(tmp_path):
    plain = DistillationTrainingArguments(str(tmp_path)).identity()
    assert (plain["seed"], plain["learning_rate"], plain["rows_a_step"]) == (42, 3e-4, 64)
    same = {"max_steps": 9, "num_train_epochs": 7, "logging_steps": 3, "mini_batch_size": 8, "save_steps": 5}
    same |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    assert DistillationTrainingArguments(str(tmp_path), **same).identity() == plain
    for name, value in {"data_seed": 1, "lr_scheduler_type": "cosine", "warmup_steps": 9, "optim": "sgd", "bf16": True}.items():
        assert DistillationTrainingArguments(str(tmp_path), **{name: value}).identity() != plain


@pytest.mark.parametrize("given", [{"from_scratch": [128, 8]}, {"back_translation": ["there"]}])
def test_lists_of_another_length_are_refused_before_the_work(given):
    with pytest.raises(ValueError, match=rf"{next(iter(given))} is \[.*\], expected (hidden size, layers|there, back)"):
        TextArguments(**given)
