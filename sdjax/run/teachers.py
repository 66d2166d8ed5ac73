"""Who teaches: from the names that a person gives to a method with its teachers, refused where that cannot work."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from sdjax import methods
from sdjax.collect.contexts import question, with_solution
from sdjax.collect.teachers import taught_by_field
from sdjax.engine.score import policies_of
from sdjax.engine.tokens import member_of
from sdjax.engine.train import all_views
from sdjax.errors import InputError
from sdjax.models import pretrained
from sdjax.models.pretrained import Pretrained
from sdjax.types import ByField, Messages, Method, Rollout, Task

TEACHER = "teacher"
"""The name by which methods know an external teacher."""


class TeacherError(InputError, ValueError):
    """A method and its teachers do not go together; the message says what would."""


@dataclasses.dataclass(frozen=True)
class Teachers:
    """Models by the name of their policy; with several, `field` is the example's field that names one of them.

    Raises: TeacherError.
    """

    models: Mapping[str, str]
    field: str = ""

    def __post_init__(self):
        own = sorted({"live", "initial", "student", TEACHER} & {*self.models}) if self.field else []
        if own:
            raise TeacherError(
                f"teachers: {own[0]!r} is the name of a policy of the methods: name this teacher otherwise"
            )


def chosen(teacher: str, teachers: str, field: str) -> Teachers:
    """The teachers of the options `--teacher`, `--teachers` and `--teacher-field`.  Raises `TeacherError`."""
    if teacher and (teachers or field):
        raise TeacherError("teacher is the only one, teachers are several with a teacher-field: give one or the other")
    if bool(teachers) != bool(field):
        missing = "teacher-field: the field of an example that names its teacher" if teachers else "teachers"
        raise TeacherError(f"{'teachers need' if teachers else 'teacher-field needs'} {missing}")
    if not teachers:
        return Teachers({TEACHER: teacher} if teacher else {})
    pairs = [pair.partition("=")[::2] for pair in teachers.split(",")]
    names = [name.strip() for name, _ in pairs]
    if len(pairs) < 2 or len({*names}) < len(names) or not all(name.strip() and model.strip() for name, model in pairs):
        raise TeacherError(f"teachers={teachers}: expected at least two different names, as math=MODEL,code=MODEL")
    return Teachers({name.strip(): model.strip() for name, model in pairs}, field)


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
    if told and "lesson" not in accepted:
        raise TeacherError(f"{name} takes no lesson: leave out --lesson solution")
    if teachers.models and TEACHER not in accepted:
        raise TeacherError(f"{name} learns from no other model: leave out the teacher, or take one of {takers()}")
    if teachers.models and given.get(TEACHER) not in (None, TEACHER):
        raise TeacherError(
            f"--method.teacher {given[TEACHER]} is a policy of {name}'s own: leave it out beside --teacher"
        )
    offered = (
        {"lesson": lesson or solution_lesson} if told else {} if teachers.models or not lesson else {"lesson": lesson}
    )
    if teachers.models:
        offered |= {} if given else {TEACHER: TEACHER}
        choice = dataclasses.replace(choice, options={**given, TEACHER: TEACHER}) if given else choice
    known = {key: value for key, value in offered.items() if key in accepted}
    return with_teachers(choice(**known), name, teachers)


def with_teachers(method: Method, name: str, teachers: Teachers) -> Method:
    """The method with every policy that it reads.  Raises `TeacherError` where one is missing; `name` is the method's."""
    missing = needed(method)
    if missing - {TEACHER}:
        raise TeacherError(
            f"--method.teacher {min(missing - {TEACHER})}: expected live or initial; a model is named with --teacher"
        )
    if missing and not teachers.models:
        raise TeacherError(
            f"{name} needs a teacher: name one with --teacher (a folder, a hub name, smollm2 or a .gguf file), or let "
            "the initial model teach, which then reads each problem's solution, with --lesson solution"
        )
    if not teachers.field:
        return method
    if not any(TEACHER in policies_of(view) for view in all_views(method).values()):
        raise TeacherError(f"{name} writes with one teacher: name it with --teacher")
    return taught_by_field(method, TEACHER, ByField(teachers.field, tuple(teachers.models)))


def needed(method: Method) -> set[str]:
    """The policies that a method reads or writes with and that are neither the live one nor a snapshot."""
    read = {policy for view in all_views(method).values() for policy in policies_of(view)}
    return (read | {*method.writers}) - {"live", *method.snapshots}


def takers() -> str:
    """The methods that learn from another model."""
    names = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
    factory = lambda name: getattr(importlib.import_module(f"sdjax.methods.{name}"), name)
    return ", ".join(name for name in names if TEACHER in inspect.signature(factory(name)).parameters)


def check_task(task: Task, teachers: Teachers, told: bool) -> None:
    """Raises where the problems lack what teachers need: a field that names one (`FieldError`), or any solution."""
    if told and not any(example.solution for example in task.train):
        raise TeacherError(f"--lesson solution: no problem of {task.name} has a solution")
    for example in task.train if teachers.field else ():
        member_of(example, ByField(teachers.field, tuple(teachers.models)))


def load(teachers: Teachers, dtype: Any = None) -> dict[str, Pretrained]:
    """The models by the name of their policy, kept in `dtype`.  Raises `ModelError`."""
    found = {}
    for name, model in teachers.models.items():
        whole = pretrained.load(model)
        found[name] = whole._replace(params=pretrained.kept_in(whole.params, dtype))
    return found
