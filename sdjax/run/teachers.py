"""Who teaches: from the names that a person gives to a method with its teachers, refused where that cannot work."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdjax import methods
from sdjax.collect.contexts import question, with_solution
from sdjax.collect.teachers import taught_by_field
from sdjax.devices import processes
from sdjax.devices.http_json import KEY, check_reachable, check_url
from sdjax.engine.score import policies_of
from sdjax.engine.tokens import member_of
from sdjax.engine.train import all_views
from sdjax.engine.vocabulary import same_vocabulary
from sdjax.errors import InputError
from sdjax.models import pretrained
from sdjax.models.pretrained import Pretrained
from sdjax.samplers.scorers import Engine, scored_by, scoring_server
from sdjax.types import ByField, Messages, Method, Rollout, Task, View

TEACHER = "teacher"
"""The name by which methods know an external teacher."""


class TeacherError(InputError, ValueError):
    """A method and its teachers do not go together; the message says what would."""


@dataclasses.dataclass(frozen=True)
class Teachers:
    """Models by the name of their policy; with several, `field` is the example's field that names one of them.

    A model is what `sdjax.models.pretrained.opened` opens, or the address of a server; all of them are one or the other.
    Servers are of the kind `engine` and serve a model of the name `served`.

    Raises: TeacherError, EngineError.
    """

    models: Mapping[str, str]
    field: str = ""
    engine: Engine = "vllm"
    served: str = "default"

    @property
    def remote(self) -> bool:
        """Whether servers teach."""
        return any(is_address(model) for model in self.models.values())

    def __post_init__(self):
        if self.remote:
            local = [model for model in self.models.values() if not is_address(model)]
            if local:
                raise TeacherError(
                    f"--teachers: {local[0]} is a model and others are servers: all must be one or the other"
                )
            for model in self.models.values():
                check_url(model)
        own = sorted({"live", "initial", "student", TEACHER} & {*self.models}) if self.field else []
        if own:
            raise TeacherError(
                f"--teachers: {own[0]!r} is the name of a policy of the methods: name this teacher otherwise"
            )


def is_address(model: str) -> bool:
    """Whether a teacher's name is the address of a server."""
    return model.startswith(("http://", "https://"))


def chosen(teacher: str, teachers: str, field: str, **server: Any) -> Teachers:
    """The teachers of the options `--teacher`, `--teachers` and `--teacher-field`.  Raises `TeacherError`."""
    if teacher and (teachers or field):
        raise TeacherError("--teacher names one model, --teachers several with --teacher-field: give one or the other")
    if teachers and not field:
        raise TeacherError("--teachers needs --teacher-field: the field of a problem that names its teacher")
    if field and not teachers:
        raise TeacherError("--teacher-field needs --teachers: the models that it names")
    if not teachers:
        return Teachers({TEACHER: teacher} if teacher else {}, **server)
    pairs = [pair.partition("=")[::2] for pair in teachers.split(",")]
    names = [name.strip() for name, _ in pairs]
    if len(pairs) < 2 or len({*names}) < len(names) or not all(name.strip() and model.strip() for name, model in pairs):
        raise TeacherError(f"--teachers {teachers}: expected at least two different names, as math=MODEL,code=MODEL")
    return Teachers({name.strip(): model.strip() for name, model in pairs}, field, **server)


def solution_lesson(rollout: Rollout, rollouts: list[Rollout]) -> Messages | None:
    """The question and the example's solution; nothing to say about an example without one."""
    example = rollout.example
    return None if example.solution is None else with_solution(question(example), example.solution)


def taught(choice: Callable[..., Method], teachers: Teachers, lesson: Callable | None, told: bool) -> Method:
    """The method that `choice` makes, with these teachers.

    Args:
      choice: a factory, or the `method` argument of an experiment.
      lesson: what the experiment tells a teacher.  An external teacher reads the question alone, unless `told`: then it,
        or the student's initial parameters where no teacher is named, read the lesson (without one: the solution).

    Raises: TeacherError where the method has no teacher, or needs one, or cannot have these.
    """
    factory, given = getattr(choice, "factory", choice), dict(getattr(choice, "options", {}))
    name, accepted = getattr(factory, "__name__", "the method"), inspect.signature(factory).parameters
    check_options(name, accepted, given.get(TEACHER), teachers, told)
    own = lesson or solution_lesson if told else None if teachers.models else lesson
    offered = {"lesson": own} if own and "lesson" in accepted else {}
    named = {TEACHER: TEACHER} if teachers.models and TEACHER in accepted else {}

    def made(**changes: Any) -> Method:
        options = {**named, **changes}
        if given:
            return dataclasses.replace(choice, options={**given, **options})(**offered)
        return choice(**offered, **options)

    method = made()
    check_needs(method, name, teachers, "lesson" in accepted)
    if teachers.remote:
        check_server(method, name, made, [key for key in ENOUGH if key in accepted])
        return taught_by_servers(method, teachers)
    if teachers.field:
        return taught_by_field(method, TEACHER, ByField(teachers.field, tuple(teachers.models)))
    return method


def check_options(name: str, accepted: Mapping, given: str | None, teachers: Teachers, told: bool) -> None:
    """Raises `TeacherError` where options of the method `name` and those of teachers contradict one another."""
    if told and "lesson" not in accepted:
        raise TeacherError(f"{name} takes no lesson: leave out --lesson solution")
    if teachers.models and given not in (None, TEACHER):
        raise TeacherError(f"--method.teacher {given} is a policy of {name}'s own: leave it out beside --teacher")


def check_needs(method: Method, name: str, teachers: Teachers, told: bool) -> None:
    """Raises `TeacherError` where a policy is missing, is of no use, or cannot be several; `told`: it may have a lesson."""
    missing = needed(method)
    if missing - {TEACHER}:
        raise TeacherError(
            f"--method.teacher {min(missing - {TEACHER})}: expected live or initial; a model is named with --teacher"
        )
    if teachers.models and not missing:
        raise TeacherError(f"{name} learns from no other model: leave out the teacher, or take one of {takers()}")
    if missing and not teachers.models:
        itself = ", or let the initial model teach, which then reads each problem's solution, with --lesson solution"
        raise TeacherError(
            f"{name} needs a teacher: name one with --teacher (a folder, a hub name, smollm2, a .gguf file or the "
            f"address of a server){itself if told else ''}"
        )
    if teachers.field and not readers(method):
        raise TeacherError(f"{name} writes with one teacher: name it with --teacher")


def readers(method: Method) -> list[View]:
    """The views that read the external teacher."""
    return [view for view in all_views(method).values() if TEACHER in policies_of(view)]


ENOUGH = {"top_k": 20, "full_vocabulary": False, "baseline": "none", "seq_kd": False}
"""Values of options with which methods may need no more of a teacher than a server gives."""


def check_server(method: Method, name: str, made: Callable[..., Method], options: Sequence[str]) -> None:
    """Raises `TeacherError`, with the option that would do, where a server gives too little for the method."""
    enough = lambda some: (
        readers(some) and TEACHER not in some.writers and all(view.entries is not None for view in readers(some))
    )
    if enough(method):
        return
    hints = [f"--method.{key.replace('_', '-')} {ENOUGH[key]}" for key in options if enough(made(**{key: ENOUGH[key]}))]
    why = "writes with its teacher" if TEACHER in method.writers else "reads whole distributions of its teacher"
    raise TeacherError(
        f"{name} {why}, and a server gives the log-probabilities of a text and of its likeliest tokens only: "
        f"{'take ' + ' or '.join(hints) if hints else 'name a model as its teacher'}"
    )


def taught_by_servers(method: Method, teachers: Teachers) -> Method:
    """The method whose rollouts servers score."""
    key = os.environ.get(KEY)
    server = lambda url: scoring_server(url, teachers.served, teachers.engine, api_key=key)
    return scored_by(method, TEACHER, {name: server(url) for name, url in teachers.models.items()}, teachers.field)


def needed(method: Method) -> set[str]:
    """The policies that a method reads or writes with and that are neither the live one nor a snapshot."""
    read = {policy for view in all_views(method).values() for policy in policies_of(view)}
    return (read | {*method.writers}) - {"live", *method.snapshots}


def takers() -> str:
    """The methods that learn from another model."""
    names = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
    factory = lambda name: getattr(importlib.import_module(f"sdjax.methods.{name}"), name)
    return ", ".join(name for name in names if TEACHER in inspect.signature(factory(name)).parameters)


def check_before_loading(task: Task, teachers: Teachers, told: bool) -> None:
    """Raises where the problems lack a field that names a teacher (`FieldError`) or any solution, or a server is not up."""
    if told and not any(example.solution for example in task.train):
        raise TeacherError(f"--lesson solution: no problem of {task.name} has a solution")
    for example in task.train if teachers.field else ():
        member_of(example, ByField(teachers.field, tuple(teachers.models)))
    for url in teachers.models.values() if teachers.remote else ():
        processes.by_first(lambda url=url: check_reachable(url))


def load(
    teachers: Teachers, student: Pretrained, *, dtype: Any = None, chat_template: str | None = None
) -> dict[str, Pretrained]:
    """The models by the name of their policy, kept in `dtype`; none where servers teach.  Raises `ModelError`.

    A teacher over the student's vocabulary gets the student's tokenizer: it then writes after the chat template, with
    the options, that it scores after.
    """
    found = {}
    for name, model in ({} if teachers.remote else teachers.models).items():
        whole = pretrained.opened(model, chat_template=chat_template)
        shared = same_vocabulary(whole.tokenizer, student.tokenizer)
        tokenizer = student.tokenizer if shared else whole.tokenizer
        found[name] = whole._replace(params=pretrained.kept_in(whole.params, dtype), tokenizer=tokenizer)
    return found
