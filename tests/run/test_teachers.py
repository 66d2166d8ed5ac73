"""Teachers from the command line: who they are, whom they can teach, and every method that needs one on own data."""

import dataclasses
import json
import re
import shutil
import string

import jax
import numpy as np
import pytest
import tiny
from networks import unoptimised
from spies import watch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from whole_runs import lines

from sdjax.__main__ import main
from sdjax.cli.options import Choice
from sdjax.engine.policies import Environment
from sdjax.engine.tokens import FieldError
from sdjax.engine.train import models
from sdjax.methods.brts import brts
from sdjax.methods.gkd import gkd
from sdjax.methods.grpo import grpo
from sdjax.methods.opd import opd
from sdjax.methods.tessy import tessy
from sdjax.methods.trace import trace
from sdjax.models import pretrained
from sdjax.models.configs import from_hf
from sdjax.models.transformer import Transformer, initialise
from sdjax.run import teachers
from sdjax.run.settings import Settings
from sdjax.run.teachers import TeacherError
from sdjax.types import TEACHER, ByField, Example, Rollout, Task

TAKERS = tuple(teachers.takers().split(", "))
"""The methods that learn from another model."""


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


# ---- models, tokenizer and problems that are none of ours --------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def bytes_tokenizer():
    """A byte-level BPE of a few texts, with a chat template of its own."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [
        f"How much is {a} plus {b}? So, the answer is {a + b}. Wait, but then we are done."
        for a in range(9)
        for b in range(9)
    ]
    texts += [string.printable] * 20
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300))
    found = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    found.chat_template = TEMPLATE
    return found


def model_folder(folder, tokenizer, family, width, seed):
    """A random model of a family and width, as a folder."""
    fields = {
        "model_type": family,
        "vocab_size": 320,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    }
    config = from_hf(fields)
    params = jax.jit(initialise, static_argnums=0)(Transformer(config), jax.random.key(seed))
    pretrained.save(folder, config, jax.tree.map(np.asarray, params), tokenizer)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student, two teachers of other widths and families, and a file of problems."""
    folder, tokenizer = tmp_path_factory.mktemp("own"), bytes_tokenizer()
    model_folder(folder / "student", tokenizer, "qwen3", 32, 0)
    model_folder(folder / "first", tokenizer, "llama", 48, 1)
    model_folder(folder / "second", tokenizer, "qwen3", 64, 2)
    rows = [
        {
            "prompt": f"How much is {a} plus {b}?",
            "answer": str(a + b),
            "solution": f"{a} plus {b} is {a + b}. The answer is {a + b}.",
            "domain": "maths" if a % 2 else "code",
        }
        for a in range(6)
        for b in range(4)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SMALL = ("--steps", 2, "--prompts", 2, "--context", 256, "--completion", 12, "--rows", 8, "--evaluation", 0)
SMALL += ("--tokens-per-chunk", "None", "--save-every", 0, "--warmup", 0, "--lr", 1e-3)


def started(place, out, *more):
    """The metrics of a run of `own_data.py`."""
    files = ("--data", place / "problems.jsonl", "--model", place / "student", "--out", out)
    command = ("train", "experiments/own_data.py", *files, *SMALL, *more)
    assert main([str(part) for part in command]) == 0
    return lines(out)


def trained(metrics):
    """Whether every step changed the student."""
    return len(metrics) == 2 and all(line.get("trained") == 1.0 and np.isfinite(line["loss"]) for line in metrics)


# ---- runs ---------------------------------------------------------------------------------------------------------------

FEW = {
    "tessy": ("--method.tagger-rollouts", 2, "--method.end", "", "--method.chunk", 4),
    "minillm": ("--method.group-size", 2),
    "power_opd": ("--method.alpha", 0.1),  # fifth powers of a random model's probabilities are as good as nothing
}


def test_a_teacher_of_another_width_teaches_own_data(place, tmp_path):
    metrics = started(
        place, tmp_path / "run", "--method", "opd", "--teacher", place / "first", "--teacher-dtype", "bfloat16"
    )
    assert trained(metrics) and all(line["read_by_teacher"] == 1.0 for line in metrics)
    assert json.loads((tmp_path / "run" / "arguments.json").read_text())["teacher"] == str(place / "first")


def test_several_teachers_one_for_each_problem(place, tmp_path):
    several = f"maths={place / 'first'},code={place / 'second'}"
    metrics = started(
        place, tmp_path / "run", "--method", "gkd", "--teachers", several, "--teacher-field", "domain", "--prompts", 4
    )
    assert trained(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("method", TAKERS)
@pytest.mark.parametrize("who", ["teacher", "lesson"])
def test_every_method_that_needs_a_teacher_starts_on_own_data(place, tmp_path, method, who):
    given = ("--teacher", place / "first") if who == "teacher" else ("--lesson", "solution")
    metrics = started(place, tmp_path / "run", "--method", method, *given, *FEW.get(method, ()))
    # A text of random models may be unfit for tessy, whose batch is then empty.
    assert trained(metrics) or method == "tessy" and len(metrics) == 2


# ---- what is refused, before a model is loaded -----------------------------------------------------------------------------


def refused(capfd, place, *more):
    """The sentence with which a run on own data is refused, although its model does not exist."""
    files = ("--data", place / "problems.jsonl", "--model", "none/such-model", "--out", place / "never")
    assert main([str(part) for part in ("train", "experiments/own_data.py", *files, *more)]) == 2
    said = capfd.readouterr().err
    assert said.startswith("sdjax: ") and said.count("\n") == 1 and not (place / "never").exists(), said
    return said


@pytest.mark.parametrize("method", TAKERS)
def test_a_missing_teacher_is_named_with_the_options_that_would_do(place, capfd, method):
    said = refused(capfd, place, "--method", method)
    assert f"{method} needs a teacher: name one with --teacher" in said and "--lesson solution" in said


SEVERAL = ("--teachers", "maths=a/b,code=c/d", "--teacher-field")
SENTENCES = {
    ("--method", "grpo", "--teacher", "a/b"): f"grpo learns from no other model: .*take one of {', '.join(TAKERS)}",
    ("--method", "trace", "--teacher", "a/b"): "trace learns from no other model",
    ("--method", "trace", "--method.annotator", "teacher"): r"trace needs a teacher: .*of a server\)$",
    ("--method", "trace", "--method.annotator", "teacher", *SEVERAL, "domain"): "trace writes with one teacher",
    ("--method", "opd", "--teacher", "http://127.0.0.1:9/v1"): "http://127.0.0.1:9/v1 cannot be reached .*refused",
    ("--method", "grpo", "--lesson", "solution"): "grpo takes no lesson",
    (
        "--method",
        "opd",
        "--teacher",
        "a/b",
        "--method.teacher",
        "live",
    ): "--method.teacher live is a policy of opd's own",
    (
        "--method",
        "opd",
        "--method.teacher",
        "Qwen/Qwen3-8B",
    ): "expected live or initial; a model is named with --teacher",
    ("--method", "opd", "--teachers", "maths=a/b,code=c/d"): "--teachers needs --teacher-field: ",
    ("--method", "opd", "--teacher-field", "domain"): "--teacher-field needs --teachers: ",
    (
        "--method",
        "opd",
        "--teachers",
        "maths=a/b",
        "--teacher-field",
        "x",
    ): "--teachers maths=a/b: expected at least two",
    ("--method", "opd", "--teachers", "a/b,c/d", "--teacher-field", "x"): "expected at least two different names",
    ("--method", "opd", "--teachers", "live=a/b,code=c/d", "--teacher-field", "x"): "'live' is the name of a policy",
    ("--method", "opd", "--teacher", "a/b", *SEVERAL, "domain"): "give one or the other",
    ("--method", "tessy", *SEVERAL, "domain"): "tessy writes with one teacher",
    ("--method", "opd", *SEVERAL, "topic"): "example 'problems:2' has no field 'topic': .* teachers maths, code",
    ("--method", "opd", "--teachers", "maths=a/b,law=c/d", "--teacher-field", "domain"): "has domain='code'",
}


@pytest.mark.parametrize("given", SENTENCES, ids=lambda given: " ".join(given[2:]))
def test_teachers_that_cannot_be(place, capfd, given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load", lambda name: pytest.fail(f"{name} was loaded"))
        said = refused(capfd, place, *given)
    assert re.search(SENTENCES[given], said), said


def test_a_lesson_needs_a_solution(tmp_path, place, capfd):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n{"prompt": "1+2?", "answer": "3"}\n')
    said = refused(capfd, place, "--method", "opd", "--lesson", "solution", "--data", tmp_path / "bare.jsonl")
    assert "--lesson solution: no problem of bare has a solution" in said


# ---- what a method becomes ----------------------------------------------------------------------------------------------


def policies(method):
    """What the method's teacher view reads, and what it writes with."""
    return method.objectives[0].views["teacher"].policy, method.writers


def told(rollout, rollouts):
    return ({"role": "user", "content": "a lesson"},)


def test_an_external_teacher_reads_the_question_unless_it_shall_be_told():
    """The lesson of an experiment is for the student's own initial parameters."""
    opening = lambda **given: policies(Settings(**given).method(Choice(opd), told))
    assert opening() == ("initial", ()) and opening(teacher="a/b") == ("teacher", ())
    assert opening(teacher="a/b", lesson="solution") == ("teacher", ())
    view = lambda **given: Settings(**given).method(Choice(opd), told).objectives[0].views["teacher"]
    assert not view(teacher="a/b").per_rollout and view(teacher="a/b", lesson="solution").per_rollout
    assert policies(Settings(lesson="solution").method(Choice(opd)))[0] == "initial"
    marked = Settings(teacher="a/b").method(Choice(trace, {"annotator": "teacher"}))
    assert teachers.needed(marked) == {"teacher"}
    # Options of a command line are all there, most with their defaults; a plain factory does, too.
    assert policies(Settings(teacher="a/b").method(Choice(opd, {"teacher": None})))[0] == "teacher"
    assert policies(Settings(teacher="a/b").method(opd))[0] == "teacher"


def test_teachers_are_kept_and_compute_in_a_type_of_their_own(place):
    settings = Settings(model=str(place / "student"), teacher=str(place / "first"), teacher_dtype="bfloat16")
    task = Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity)
    some = settings.experiment(method=settings.method(opd), task=task)
    types = {jax.numpy.dtype(x.dtype).name for x in jax.tree.leaves(some.teachers["teacher"].params)}
    assert types == {"bfloat16"} and some.teachers["teacher"].config.width == 48
    networks = models(some)
    assert networks["teacher"].dtype == jax.numpy.bfloat16 and networks["live"].dtype == jax.numpy.float32


def test_a_teacher_over_the_students_vocabulary_writes_after_the_students_template(place, tmp_path):
    """One without a chat template, as base models are: the file's is for both."""
    bare = shutil.copytree(place / "first", tmp_path / "base")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    told = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in told.items() if k != "chat_template"}))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    settings = Settings(model=str(place / "student"), teacher=str(bare), chat_template=str(tmp_path / "chat.jinja"))
    task = Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity)
    some = settings.experiment(method=settings.method(opd), task=task)
    assert some.teachers["teacher"].tokenizer is some.student.tokenizer
    own = some.teachers["teacher"]
    pretrained.save(tmp_path / "other", own.config, own.params, tiny.tokenizer())  # for tessy, any vocabulary will do
    settings = dataclasses.replace(settings, teacher=str(tmp_path / "other"), chat_template="")
    written = settings.experiment(method=settings.method(tessy), task=task)
    assert written.teachers["teacher"].tokenizer.get_vocab() == tiny.tokenizer().get_vocab()


def test_the_lesson_is_the_solution_after_the_question():
    example = Example("x", ({"role": "user", "content": "1+1?"},), solution="It is 2.")
    told = teachers.solution_lesson(Rollout(example, (), (), "", 0), [])
    assert told[-1]["content"].startswith("1+1?") and "It is 2." in told[-1]["content"]
    bare = dataclasses.replace(example, solution=None)
    assert teachers.solution_lesson(Rollout(bare, (), (), "", 0), []) is None


def test_a_method_that_writes_with_its_teacher_writes_with_that_of_each_example(monkeypatch):
    settings = Settings(teachers="maths=a/b,code=c/d", teacher_field="domain")
    wanted = (ByField("domain", ("maths", "code")), ("maths", "code"))
    assert policies(settings.method(brts)) == wanted
    method = settings.method(Choice(gkd, {"seq_kd": True, "lmbda": 0.0}))
    assert policies(method) == wanted
    own = {name: tiny.policy(tiny.pretrained(seed).params) for seed, name in enumerate(("live", "maths", "code"))}
    fields, environment = ("code", "maths", "code"), Environment(own, tiny.parity)
    examples = [dataclasses.replace(e, meta={"domain": f}) for e, f in zip(tiny.TASK.train, fields, strict=False)]
    sampled, _ = watch(monkeypatch, environment)
    rows, _ = method.collect(environment, examples, jax.random.key(3), method.memory)
    assert all(r.source == TEACHER for r in rows) and {r.example.id for r in rows} == {e.id for e in examples}
    assert len({(r.group, r.example.id) for r in rows}) == 3 == len({r.group for r in rows})
    assert {some.who: [chat[-1] for chat in some.chats] for some in sampled} == {
        name: [e.prompt[-1] for e in examples if e.meta["domain"] == name] for name in ("maths", "code")
    }


def test_only_tessy_has_no_view_that_could_choose():
    task = Task("x", tiny.TASK.train, tiny.TASK.test, tiny.parity)
    several = teachers.chosen("", "maths=a/b,code=c/d", "domain")
    with pytest.raises(TeacherError, match="tessy writes with one teacher"):
        teachers.taught(tessy, several, None, told=False)
    with pytest.raises(FieldError, match="has no field 'domain'"):
        teachers.check_before_loading(task, several, told=False)
    assert teachers.needed(grpo()) == set() and teachers.needed(tessy()) == {"teacher"}
    assert teachers.needed(gkd()) == {"teacher"} and {"brts", "opd", "tessy", "vopd"} < {*TAKERS}
