import json
import logging
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_backbone, make_texts, write_random
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoTokenizer

from hf_distill import DistillationTrainer, DistillationTrainingArguments, StudentModel, TeacherCache
from hf_distill.cli import _open
from hf_distill.layout import check_layout
from hf_distill.losses import SenseLoss, StateLoss, WeightedLoss
from hf_distill.multi_sense import MultiSenseStudent, _find
from hf_distill.sense_builder import _cluster, build_senses, markov_clusters, markov_senses
from hf_distill.senses import SenseDictionary
from hf_distill.token_teacher import SenseTeacher, TokenTeacher


@pytest.fixture(scope="module")
def teacher(backbone_folder):
    return TokenTeacher(backbone_folder, dtype="float32")


@pytest.fixture(scope="module")
def texts():
    return make_texts(200)


@pytest.fixture(scope="module")
def dictionary(teacher, texts, tmp_path_factory):
    return build_senses(teacher, texts, tmp_path_factory.mktemp("states"), k=4, cap=40)


def read(teacher, texts):
    """Return (states, ids, mask) of one batch."""
    states, mask = teacher.states(texts)
    ids = torch.zeros_like(mask)
    for row, tokens in enumerate(teacher.tokens(texts)):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
    return states, ids, mask


# The dictionary


@pytest.mark.parametrize("select", ["dot", "l2", "cos"])
def test_replacement_is_that_of_a_double_loop(teacher, dictionary, select):
    states, ids, mask = read(teacher, make_texts(9, seed=3))
    ids[0, 1] = 3  # a token without senses
    replaced, chosen = dictionary.lookup(states, ids, mask, select)
    kept = 0
    for row in range(len(ids)):
        for place in range(ids.shape[1]):
            senses, state = dictionary.of(int(ids[row, place])), states[row, place]
            if not mask[row, place] or not len(senses):
                assert torch.equal(replaced[row, place], state)
                assert chosen[row, place] == -1
                kept += 1
                continue
            fit = {
                "dot": senses @ state,
                "l2": -(senses - state).norm(dim=-1),
                "cos": torch.cosine_similarity(senses, state[None]),
            }[select]
            assert chosen[row, place] == fit.argmax()
            assert torch.equal(replaced[row, place], senses[fit.argmax()])
    assert kept > 1


def test_tokens_around_a_text_keep_their_states_and_all_others_their_senses(teacher, dictionary, tmp_path):
    states, ids, mask = read(teacher, make_texts(9, seed=3))
    special = torch.isin(ids, torch.tensor(teacher.tokenizer.all_special_ids)) & mask.bool()
    assert special.sum() == 2 * len(ids)
    apart = dictionary.without_special_tokens()
    (before, old), (after, new) = (made.lookup(states, ids, mask, "l2") for made in (dictionary, apart))
    assert torch.equal(after[special], states[special])
    assert (before[special] - states[special]).abs().max() > 1e-3
    assert torch.equal(after[~special], before[~special])
    assert torch.equal(new, old.masked_fill(special, -1))
    assert int(apart.counts.sum()) < int(dictionary.counts.sum())
    assert apart.digest != dictionary.digest
    apart.save_pretrained(tmp_path)
    opened = SenseDictionary.from_pretrained(tmp_path)
    assert (opened.digest, opened.facts["special_tokens"]) == (apart.digest, False)


def test_as_many_senses_as_states_leave_every_state_as_it_is(teacher, texts, tmp_path):
    whole = build_senses(teacher, texts, tmp_path, k=10**6, cap=10**6)
    states, ids, mask = read(teacher, texts[:20])
    replaced, _ = whole.lookup(states, ids, mask, "l2")
    assert (replaced - states).abs().max() < 2e-3  # states are kept in float16
    assert whole.counts.sum() == whole.facts["occurrences"]


def test_the_sample_depends_on_neither_order_nor_repetition_and_is_the_smallest_hashes(teacher, texts, dictionary, tmp_path):
    other = build_senses(teacher, [*texts[::-1], *texts[:50]], tmp_path, k=4, cap=40)
    assert torch.equal(other.offsets, dictionary.offsets)
    assert torch.equal(other.counts, dictionary.counts)
    assert torch.allclose(other.senses, dictionary.senses, atol=1e-4)
    tokens = np.concatenate(teacher.tokens(texts))
    for token in range(len(teacher.tokenizer)):
        occurrences, found = int((tokens == token).sum()), int(dictionary.offsets[token + 1] - dictionary.offsets[token])
        held = dictionary.counts[dictionary.offsets[token] : dictionary.offsets[token + 1]].sum().item()
        assert held == min(occurrences, 40)
        assert found == min(occurrences, 4)


def test_killed_half_way_it_goes_on_after_whole_blocks(teacher, texts, dictionary, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.sense_builder._NUMBERS", 50 * teacher.dim)
    calls = []

    class Dying(TokenTeacher):
        def __init__(self):
            self.__dict__.update(teacher.__dict__)

        def states(self, batch):
            calls.append(len(batch))
            if len(calls) == 6:
                raise KeyboardInterrupt
            return teacher.states(batch)

    with pytest.raises(KeyboardInterrupt):
        build_senses(Dying(), texts, tmp_path, k=4, cap=40, batch_size=16)
    finished = len(list(tmp_path.glob("states-*.safetensors")))
    assert finished == 1
    before = len(calls)
    found = build_senses(Dying(), texts, tmp_path, k=4, cap=40, batch_size=16)
    assert len(list(tmp_path.glob("states-*.safetensors"))) == 4
    assert len(calls) - before <= 12  # three blocks of at most four batches
    assert torch.equal(found.counts, dictionary.counts)
    assert torch.allclose(found.senses, dictionary.senses, atol=1e-4)


def test_what_a_block_keeps_depends_on_those_before_it(teacher, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.sense_builder._NUMBERS", 100 * teacher.dim)
    build_senses(teacher, texts, tmp_path / "a", k=4, cap=10)
    other = make_texts(100, seed=9, longest=4) + texts[100:]
    found = build_senses(teacher, other, tmp_path / "a", k=4, cap=10)
    fresh = build_senses(teacher, other, tmp_path / "b", k=4, cap=10)
    assert torch.equal(found.counts, fresh.counts)
    assert torch.equal(found.senses, fresh.senses)
    assert len(list((tmp_path / "a").glob("states-*.safetensors"))) == 4


def test_asked_again_it_neither_reads_nor_clusters(teacher, texts, dictionary, tmp_path, monkeypatch):
    first = build_senses(teacher, texts, tmp_path, k=4, cap=40)
    monkeypatch.setattr(TokenTeacher, "read", None)
    monkeypatch.setattr("hf_distill.sense_builder._cluster", None)
    assert build_senses(teacher, texts, tmp_path, k=4, cap=40).digest == first.digest == dictionary.digest
    with pytest.raises(TypeError, match="not callable"):
        build_senses(teacher, texts, tmp_path, k=5, cap=40)


def test_a_layer_beyond_float16_is_refused_at_once(teacher, texts, tmp_path):
    class Large(TokenTeacher):
        def __init__(self):
            self.__dict__.update(teacher.__dict__)

        def states(self, batch):
            states, mask = teacher.states(batch)
            return 1e6 * states, mask

    with pytest.raises(ValueError, match="is not finite in float16"):
        build_senses(Large(), texts, tmp_path)


def test_it_is_a_repository_of_its_own(dictionary, tmp_path):
    dictionary.save_pretrained(tmp_path)
    again = SenseDictionary.from_pretrained(tmp_path)
    assert again.facts == dictionary.facts
    assert torch.equal(again.offsets, dictionary.offsets)
    assert torch.equal(again.counts, dictionary.counts)
    assert torch.equal(again.senses, dictionary.senses)
    tensors = load_file(tmp_path / "senses.safetensors")
    save_file(tensors, tmp_path / "senses.safetensors")
    with pytest.raises(ValueError, match="facts None, expected"):
        SenseDictionary.from_pretrained(tmp_path)
    (tmp_path / "senses.safetensors").unlink()
    (tmp_path / "senses.pkl").write_bytes(b"x")
    with pytest.raises(OSError, match="senses.safetensors"):
        SenseDictionary.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_refused(dictionary):
    for change in (
        {"offsets": dictionary.offsets + 1},
        {"counts": dictionary.counts[:-1]},
        {"senses": dictionary.senses * torch.nan},
    ):
        parts = {"senses": dictionary.senses, "offsets": dictionary.offsets, "counts": dictionary.counts, **change}
        with pytest.raises(ValueError, match="Tokens would get the senses of others"):
            SenseDictionary(**parts, facts={}, tokenizer=None)


def test_markov_clustering_finds_what_lies_apart_and_the_rule_counts_it():
    rng = np.random.default_rng(0)
    states = np.concatenate([10 * np.eye(8)[i] + 0.05 * rng.normal(size=(20, 8)) for i in range(6)])
    assert markov_clusters(states) == 6
    assert (markov_senses(states, few=1), markov_senses(states), markov_senses(states[:3])) == (1, 5, 5)


def test_clusters_are_those_of_k_means_and_few_states_stay_raw():
    rng = np.random.default_rng(0)
    states = np.concatenate([10 * np.eye(8)[i] + 0.05 * rng.normal(size=(20 + i, 8)) for i in range(3)]).astype(np.float32)
    centroids, counts = _cluster(states, 3, 1)
    order = np.argsort(-centroids[:, 0] - 2 * centroids[:, 1])
    assert sorted(counts.tolist()) == [20, 21, 22]
    for place, row in enumerate([1, 0, 2]):
        own = states[20 * row + sum(range(row)) :][: 20 + row]
        assert np.allclose(centroids[order[place]], own.mean(0), rtol=1e-3, atol=1e-4)  # float16, as they are saved
    again = np.concatenate([states[:3], states[:3]])
    centroids, counts = _cluster(again, 3, 1)
    assert np.array_equal(centroids, np.unique(states[:3], axis=0).astype(np.float16))
    assert counts.tolist() == [2, 2, 2]
    assert len(_cluster(states, lambda found: len(found) // 10, 1)[0]) == 6


def rule_of_two(states):
    return 2


def test_a_rule_is_known_by_its_name_and_settings(teacher, texts, tmp_path):
    named = build_senses(teacher, texts, tmp_path, k=rule_of_two, cap=40)
    assert named.most == 2
    assert named.facts["rule"].endswith("test_senses.rule_of_two")
    few, more = (build_senses(teacher, texts, tmp_path, k=partial(markov_senses, few=few), cap=40) for few in (2, 7))
    assert few.most < more.most
    assert "'few': 7" in more.facts["rule"]
    for rule in (lambda states: 6, partial(lambda states, few: 6, few=1)):
        with pytest.raises(ValueError, match="expected a function of a module"):
            build_senses(teacher, texts, tmp_path, k=rule, cap=40)


def test_more_senses_than_states_are_refused_or_warned_of(teacher, texts, tmp_path, caplog):
    with pytest.raises(ValueError, match="k is 41, cap 40"):
        build_senses(teacher, texts, tmp_path, k=41, cap=40)
    build_senses(teacher, texts, tmp_path, k=4, cap=40)
    assert "states have in common" not in caplog.text
    build_senses(teacher, texts, tmp_path, k=40, cap=40)  # whether a token occurs more often is not known
    assert "states have in common" not in caplog.text
    build_senses(teacher, texts[:3], tmp_path, k=4, cap=40)
    assert "of the tokens occur no more than 4 times" in caplog.text


def test_texts_count_once_and_a_bad_one_is_named_by_its_row(teacher, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.sense_builder._NUMBERS", 50 * teacher.dim)
    twice = [*texts[:30], *texts[:30], *texts[:120]]  # in a block, and in several
    assert build_senses(teacher, twice, tmp_path, k=2).facts["texts"] == len(set(texts[:120]))
    with pytest.raises(ValueError, match="row 87 is ' '"):
        build_senses(teacher, [*twice[:87], " "], tmp_path / "other", k=2)


def test_the_gradient_keeps_no_candidates_and_is_the_same_in_parts(teacher, dictionary, monkeypatch):
    states, ids, mask = read(teacher, make_texts(9, seed=3))
    found, kept = [], []
    for numbers in (10**9, 3 * dictionary.most * dictionary.dim):
        monkeypatch.setattr("hf_distill.senses._NUMBERS_CPU", numbers)
        leaf = states.clone().requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            scores = dictionary.all_scores(leaf, ids, mask, "l2")
        torch.softmax(scores[scores[..., 0] > -torch.inf], -1).square().sum().backward()
        found.append((scores.detach(), leaf.grad))
        kept.append(max(saved))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert max(kept) < int(mask.sum()) * dictionary.most * dictionary.dim


# Teachers of tokens


def test_a_model_that_reads_from_left_to_right_whatever_is_asked_is_refused(tmp_path):
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=28, hidden_size=16, num_layers=1, attention_types=[[["global"], 1]], num_heads=2,
        intermediate_size=32, max_position_embeddings=40,
    )  # fmt: skip
    source = write_random(tmp_path / "model", AutoModel, config, seed=4)
    assert TokenTeacher(source, dtype="float32").dim == 16
    with pytest.raises(ValueError, match=r"\(GPTNeoModel\) reads from left to right although bidirectional is True"):
        TokenTeacher(source, dtype="float32", bidirectional=True)


def test_a_model_without_a_longest_input_is_asked_for_one(tmp_path):
    config = AutoConfig.for_model("bloom", vocab_size=28, hidden_size=16, n_layer=1, n_head=2)
    source = write_random(tmp_path / "model", AutoModel, config, seed=4)
    told = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(told.read_text())
    told.write_text(json.dumps({key: value for key, value in settings.items() if key != "model_max_length"}))
    for make in (TokenTeacher, MultiSenseStudent.from_backbone):
        with pytest.raises(ValueError, match="neither BloomModel nor its tokenizer has a longest input"):
            make(str(source))
    assert TokenTeacher(source, max_length=9).max_length == 9
    assert MultiSenseStudent.from_backbone(str(source), max_length=9).settings["max_length"] == 9


def test_states_are_those_of_the_layer_asked_for(backbone_folder, texts):
    last, first = (TokenTeacher(backbone_folder, layer=layer, dtype="float32") for layer in (-1, 1))
    inputs = last.tokenizer(texts[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = last.model(**inputs, output_hidden_states=True).hidden_states
    assert torch.allclose(last.states(texts[:3])[0], hidden[-1], atol=1e-6)
    assert torch.allclose(first.states(texts[:3])[0], hidden[1], atol=1e-6)
    with pytest.raises(ValueError, match="layer is 4 of 3"):
        TokenTeacher(backbone_folder, layer=4)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_language_model_sees_both_sides_if_asked(kind, texts, tmp_path):
    options = {"num_key_value_heads": 1, "pad_token_id": 0, **({"head_dim": 8} if kind == "gemma3_text" else {})}
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(kind, vocab_size=28, max_position_embeddings=40, **sizes, **options)
    source = write_random(tmp_path / "model", AutoModel, config, seed=4)
    one, both = "a cat sat on the mat", "a cat sat on the rug"
    changed = {}
    for bidirectional in (False, True):
        teacher = TokenTeacher(source, dtype="float32", bidirectional=bidirectional)
        changed[bidirectional] = (teacher.states([one])[0] - teacher.states([both])[0]).abs().amax(-1)[0, :5]
    assert changed[False].max() == 0
    assert changed[True].min() > 1e-3
    dictionary = build_senses(teacher, texts, tmp_path / "states", k=3)
    dictionary.save_pretrained(tmp_path / "senses")
    student = MultiSenseStudent.from_backbone(source, layers=[0, 1], bidirectional=True)
    student.attach(dictionary, tmp_path / "senses")
    student.save_pretrained(tmp_path / "student")
    again = MultiSenseStudent.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        states = [again(**again.tokenizer(text, return_tensors="pt")).states[0, :5] for text in (one, both)]
    assert (states[0] - states[1]).abs().amax(-1).min() > 1e-3
    assert again.encode(texts[:9]) == pytest.approx(student.encode(texts[:9]), abs=1e-6)


def test_senses_are_cached_exactly(teacher, dictionary, texts, tmp_path):
    live = SenseTeacher(teacher, dictionary)
    cache = TeacherCache(live, tmp_path)
    cache.add(texts)
    found = cache.encode(texts)
    assert torch.equal(found, live.encode(texts))
    states, ids, mask = read(teacher, texts[:8])
    _, chosen = dictionary.lookup(states, ids, mask)
    assert torch.equal(found[:8, : chosen.shape[1]].long(), chosen)
    assert (found[:8, chosen.shape[1] :] == -1).all()
    other = SenseTeacher(teacher, dictionary, select="cos")
    with pytest.raises(ValueError, match="select"):
        TeacherCache(other, tmp_path)


def test_a_dictionary_of_another_layer_is_refused(backbone_folder, dictionary):
    with pytest.raises(ValueError, match="the dictionary was made from .* expected one teacher"):
        SenseTeacher(TokenTeacher(backbone_folder, layer=1, dtype="float32"), dictionary)


# The student


@pytest.fixture
def student(dictionary, tmp_path):
    torch.manual_seed(0)
    dictionary.save_pretrained(tmp_path / "dictionary")
    source = make_backbone(tmp_path / "backbone", seed=3, hidden_size=8)
    student = MultiSenseStudent.from_backbone(source, projection_dim=16, layers=[0, 2], dropout=0.0)
    student.attach(dictionary, tmp_path / "dictionary")
    return student


@pytest.fixture
def train(student, texts, tmp_path):
    def run(teacher, loss, **options):
        settings = {"per_device_train_batch_size": 16, "learning_rate": 5e-3, "logging_steps": 13, "num_train_epochs": 6}
        settings |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options}
        args = DistillationTrainingArguments(str(tmp_path / "out"), **settings)
        data = Dataset.from_dict({"text": texts})
        trainer = DistillationTrainer(
            model=student, args=args, train_dataset=data, eval_dataset=data.select(range(20)), teacher=teacher, loss=loss
        )
        trainer.train()
        return trainer

    return run


def test_a_student_learns_the_teachers_senses_and_opens_everywhere(train, student, teacher, dictionary, texts, tmp_path):
    cache = TeacherCache(SenseTeacher(teacher, dictionary), tmp_path / "cache")
    cache.add(texts)
    before = dictionary.senses.clone()
    trainer = train(cache, SenseLoss(), num_train_epochs=20)
    log = [line for line in trainer.state.log_history if "loss_sense" in line]
    assert log[-1]["sense_accuracy"] > log[0]["sense_accuracy"] + 0.1
    assert log[-1]["loss"] == pytest.approx(log[-1]["loss_sense"], abs=1e-3)  # the accuracy is not summed
    assert trainer.evaluate()["eval_loss"] < log[0]["loss"]
    assert torch.equal(dictionary.senses, before)
    assert not any("senses" in name for name in student.state_dict())
    trainer.save_model()
    found = check_layout(tmp_path / "out", ("a cat sat", "the old house " * 40))
    assert found["AutoModel(trust_remote_code=True)"] > 0.99999
    again = MultiSenseStudent.from_pretrained(tmp_path / "out")
    assert again.encode(texts[:9]) == pytest.approx(student.encode(texts[:9]), abs=1e-6)
    plain = StudentModel.from_pretrained(tmp_path / "out")
    assert plain.encode(texts[:9]) == pytest.approx(student.encode(texts[:9], replace=False), abs=1e-6)
    assert abs(again.encode(texts[:9]) - again.encode(texts[:9], replace=False)).max() > 1e-3
    assert not list((tmp_path / "out").glob("*senses.safetensors"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "multi_sense.MultiSenseStudent"
    assert config["hf_distill"]["senses"]["select"] == "l2"


def test_a_live_teacher_gives_more_beside_the_senses(train, teacher, dictionary):
    live = SenseTeacher(teacher, dictionary, beside=("sense_scores", "states"))
    loss = WeightedLoss([SenseLoss(0.05, soft=True), StateLoss()], {"state": 0.5})
    trainer = train(live, loss)
    log = [line for line in trainer.state.log_history if "loss_state" in line]
    assert {"loss_sense", "loss_state", "sense_accuracy"} <= log[-1].keys()
    assert log[-1]["loss_state"] < log[0]["loss_state"]
    assert log[-1]["loss_sense"] < log[0]["loss_sense"]
    assert trainer.evaluate()["eval_loss"] < log[0]["loss"]


def test_states_alone_are_learned_from_a_teacher_of_tokens(train, teacher):
    log = [line for line in train(teacher, StateLoss()).state.log_history if "loss_state" in line]
    assert log[-1]["loss_state"] < log[0]["loss_state"]


def test_the_teacher_as_its_own_student_has_every_sense_right(teacher, dictionary, backbone_folder, texts, tmp_path):
    student = MultiSenseStudent.from_backbone(backbone_folder, dropout=0.0)
    dictionary.save_pretrained(tmp_path)
    student.attach(dictionary, tmp_path)
    inputs = student.tokenizer(texts[:16], padding=True, return_tensors="pt")
    output = student.train()(**inputs)
    chosen = SenseTeacher(teacher, dictionary).encode(texts[:16])
    found = SenseLoss()(output.sense_scores[:, None], chosen[:, None])
    assert found["sense_accuracy"].item() == 1


def test_longer_neighbours_in_the_batch_leave_a_texts_loss_as_it_is(student, teacher, dictionary, texts):
    short, long = sorted(texts, key=len)[0], sorted(texts, key=len)[-1]
    chosen = SenseTeacher(teacher, dictionary).encode([short])[:, None]
    found = []
    for batch in ([short], [short, long]):
        inputs = student.tokenizer(batch, padding=True, return_tensors="pt")
        scores = student.eval()(**inputs).sense_scores
        found.append((scores.shape[1], SenseLoss()(scores[:1, None], chosen)["sense"].item()))
    assert found[0][0] < found[1][0]  # padded
    assert found[0][1] > 0.1
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)


def test_states_of_zero_know_nothing_the_loss_is_ln_k(teacher, texts, tmp_path):
    dictionary = build_senses(teacher, texts[:30], tmp_path, k=8)  # rare tokens have fewer
    states, ids, mask = read(teacher, texts[:8])
    chosen = SenseTeacher(teacher, dictionary).encode(texts[:8])[:, None]
    scores = dictionary.all_scores(torch.zeros_like(states), ids, mask, "dot")
    number = dictionary.offsets.diff()[ids[mask.bool()]]
    assert number.unique().numel() > 1
    wanted = number[number > 0].double().log().mean().item()
    assert SenseLoss()(scores[:, None], chosen)["sense"].item() == pytest.approx(wanted, abs=1e-5)


def test_students_that_do_not_fit_the_dictionary_are_refused(dictionary, backbone_folder, tmp_path):
    wide = MultiSenseStudent.from_backbone(backbone_folder, projection_dim=8)
    with pytest.raises(ValueError, match="have 8 dimensions, the senses 16"):
        wide.attach(dictionary, tmp_path)
    with pytest.raises(ValueError, match="reads 20 tokens, the teacher 40, .* Make both with max_length=20"):
        MultiSenseStudent.from_backbone(backbone_folder, max_length=20).attach(dictionary, tmp_path)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        MultiSenseStudent.from_backbone(backbone_folder, projection_dim=16, activation="tanh")
    other = MultiSenseStudent.from_backbone(backbone_folder, projection_dim=16)
    other.tokenizer.add_tokens(["zebra"])
    bare = MultiSenseStudent.from_backbone(backbone_folder)
    bare.tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A")
    with pytest.raises(ValueError, match=r"differently: \['<s>'\] and \['<unk>'\] at place 0"):
        bare.attach(dictionary, tmp_path)
    with pytest.raises(ValueError, match="number tokens differently: None and 'zebra' at 28"):
        other.attach(dictionary, tmp_path)


def test_a_student_of_another_dictionary_than_its_teachers_is_not_trained(train, student, teacher, dictionary):
    apart = dictionary.without_special_tokens()
    with pytest.raises(ValueError, match=f"dictionary {dictionary.digest}, the teacher .* that of digest {apart.digest}"):
        train(SenseTeacher(teacher, apart), SenseLoss())
    student.attach(apart, "../apart")
    trainer = train(SenseTeacher(teacher, apart), SenseLoss(), num_train_epochs=1)
    assert trainer.state.global_step > 0
    del student.settings["senses"]
    with pytest.raises(ValueError, match="the student speaks the sense dictionary None"):
        train(SenseTeacher(teacher, apart), SenseLoss())


def test_scores_that_are_not_numbers_are_the_losss_matter_and_not_the_tokenizers():
    scores, chosen = torch.tensor([[[[1.0, torch.nan, 0.0], [2.0, 1.0, 0.0]]]]), torch.tensor([[[1, 0]]])
    assert SenseLoss()(scores, chosen)["sense"].isnan()
    scores[..., 1] = -torch.inf
    with pytest.raises(ValueError, match="a sense for a token that the student has no score for"):
        SenseLoss()(scores, chosen)


def test_states_are_not_learned_from_senses(train, teacher, dictionary, tmp_path):
    cache = TeacherCache(SenseTeacher(teacher, dictionary), tmp_path / "cache")
    cache.add(make_texts(200))
    with pytest.raises(ValueError, match=r"^StateLoss: the teacher gives \(16, 1, 40\), expected states"):
        train(cache, StateLoss())


def test_vectors_in_place_of_tokens_have_no_senses(student):
    vectors = torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="input_ids is None, expected the tokens"):
        student.eval()(inputs_embeds=vectors)
    student.replace = False
    assert student(inputs_embeds=vectors).states.shape == (1, 3, 16)


def test_another_dictionary_in_its_place_is_refused(student, teacher, dictionary, texts, tmp_path):
    student.save_pretrained(tmp_path / "student")
    build_senses(teacher, texts, tmp_path / "states", k=2).save_pretrained(tmp_path / "dictionary")
    with pytest.raises(ValueError, match=f"expected {dictionary.digest}, that of the training"):
        MultiSenseStudent.from_pretrained(tmp_path / "student")


def test_a_name_is_found_beside_the_student_in_folders_and_on_the_hub(tmp_path):
    for folder in ("out/checkpoint-3", "senses"):
        (tmp_path / folder).mkdir(parents=True)
    beside = tmp_path / "out" / ".." / "senses"
    assert _find(tmp_path / "out", "../senses") == str(beside)
    assert _find(str(tmp_path / "out" / "checkpoint-3"), "../senses") == str(beside)
    assert _find("someone/student", "../senses") == "someone/senses"
    assert _find("someone/student", "other/senses") == _find(tmp_path / "out", "other/senses") == "other/senses"
    for repository, found in (("models--someone--student", "someone/senses"), ("models--student", "senses")):
        fetched = tmp_path / repository / "snapshots" / "c0ffee"
        fetched.mkdir(parents=True)
        assert _find(fetched, "../senses") == found
    (tmp_path / "copy" / "out").mkdir(parents=True)
    with pytest.raises(OSError, match=r"is not at .*copy/out/\.\./senses, expected it there"):
        _find(tmp_path / "copy" / "out", "../senses")


def test_places_count_from_the_first_token_whatever_the_tokenizer_pads(backbone_folder, dictionary, tmp_path):
    source = shutil.copytree(backbone_folder, tmp_path / "left")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    assert AutoTokenizer.from_pretrained(source).padding_side == "left"
    teacher, student = TokenTeacher(source, dtype="float32"), MultiSenseStudent.from_backbone(str(source), dropout=0.0)
    dictionary.save_pretrained(tmp_path / "senses")
    student.attach(dictionary, "../senses")
    student.save_pretrained(tmp_path / "student")
    texts = ["a cat", "a cat sat on the mat"]
    states, mask = teacher.states(texts)
    for model in (student, MultiSenseStudent.from_pretrained(tmp_path / "student")):
        found = model.eval()(**model.tokenizer(texts, padding=True, return_tensors="pt")).states
        assert torch.allclose(found[mask.bool()], states[mask.bool()], atol=1e-5)


def test_progress_is_said(teacher, texts, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_distill"):
        build_senses(teacher, texts, tmp_path, k=2)
    assert "200 texts" in caplog.text


def test_the_terminal_puts_a_students_prompts_before_its_texts(student, tmp_path):
    student.settings["prompts"]["query"] = "the red "
    student.save_pretrained(tmp_path / "student")
    opened, wanted = _open(str(tmp_path / "student")), student.encode(["cat"], "query")
    assert np.allclose(opened.encode(["cat"], prompt_name="query"), wanted, atol=1e-5)
    assert np.abs(opened.encode(["cat"], prompt_name="document") - wanted).max() > 1e-3
