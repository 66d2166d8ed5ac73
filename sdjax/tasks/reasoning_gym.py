"""Procedural tasks with verifiers: the families of the reasoning-gym library."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.tasks import maths
from sdjax.tasks.answers import marks
from sdjax.tasks.bounded import Judge, note_out_of_time
from sdjax.tasks.completions import split
from sdjax.tasks.errors import TaskError
from sdjax.tasks.judging import from_threads, reads_answers
from sdjax.tasks.splits import question_key
from sdjax.types import Example, Messages, Task, Verdict

READ_AS_LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Families whose own verifier passes the answer to `eval`."""

READ_AS_FORMULAS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Families whose own verifier passes the answer to sympy's `parse_expr`, which evaluates it and may never end."""

TAKES_ANYTHING = frozenset({"game_of_life_halting"})
"""Families whose own verifier accepts any text; here the answers are compared instead."""

HASH_SEEDED = frozenset(
    {"codeio", "intermediate_integration", "isomorphic_strings", "knight_swap"}
    | {"list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Families that iterate over sets of texts: their problems change with `PYTHONHASHSEED`, whatever the seed."""

_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt", "Abs", "pi"}
)
_LITERAL = re.compile(r"[\w\s,.;:'\"\[\]{}|/#\\-]*")


# ---- tasks --------------------------------------------------------------------------------------------------------


def reasoning_gym(
    family: str,
    *,
    size: int,
    test_size: int,
    seed: int = 0,
    partial_credit: bool = False,
    reveal_answer: bool = False,
    remark: marks.Remark = marks.direction,
    extract: marks.Extract | None = None,
    **family_options: Any,
) -> Task:
    """Any family of reasoning-gym: `size` train and `test_size` test problems, all questions distinct.

    The reward is the family's own `score_answer` of the extracted answer: 1 where that is 1, else 0, or the score
    itself with `partial_credit` (families give crumbs: 0.01 for any text, 0.5 for "10" where "0" is right).  `extract`
    takes a completion without its thinking and returns the answer or `None`; by default `marks.numeric_answer` where the correct answer is
    a number, else `marks.stated_answer`.  `remark` words the feedback of a wrong answer; the correct answer is named
    only with `reveal_answer`.  The test problems depend on the seed and `test_size`, not on `size` (acre excepted).

    Raises: `TaskError` for an unknown family or option, a value the family refuses, or fewer distinct problems than
    asked for.
    Source: reasoning-gym, github.com/open-thought/reasoning-gym.
    """
    _check_sizes(size=size, test_size=test_size)
    draws = 20 * (size + test_size) + 1000
    dataset = _dataset(family, seed, draws, family_options)
    entries = _distinct_entries(dataset, family, size + test_size, draws)
    examples = [_example(entry, family, seed) for entry in entries]
    known = {(example.id, example.answer): entry for example, entry in zip(examples, entries, strict=True)}

    @reads_answers
    def verify(example: Example, text: str) -> Verdict:
        entry = known.get((example.id, example.answer))
        if entry is None:
            raise TaskError(f"Example {example.id!r} is not of this {family} task; verify it with the task it is from.")
        answer = _extracted(text, example.answer, extract)
        score = 0.0 if answer is None else _score(dataset, family, family_options, answer, entry)
        if score >= 1.0:
            return Verdict(1.0)
        feedback = marks.remark_on(
            answer, example.answer, fixed=example.feedback, remark=remark, reveal_answer=reveal_answer
        )
        return Verdict(score if partial_credit else 0.0, feedback)

    if family in READ_AS_FORMULAS:
        verify = from_threads(verify)
    return Task(family, tuple(examples[test_size:]), tuple(examples[:test_size]), verify)


def chain_sum(
    *,
    terms: tuple[int, int] = (2, 2),
    digits: tuple[int, int] = (1, 1),
    train_size: int,
    test_size: int,
    seed: int = 0,
    **options: Any,
) -> Task:
    """Sums and differences of `terms` (least, most) numbers of `digits` (least, most) digits, with worked solutions.

    "State the final answer to the following arithmetic problem: 4 + 3 =".  Two one-digit terms make 200 distinct
    problems in all.  `options` are those of `reasoning_gym`.  Raises: `TaskError` as `reasoning_gym`.
    """
    ranges = {"min_terms": terms[0], "max_terms": terms[1], "min_digits": digits[0], "max_digits": digits[1]}
    return reasoning_gym("chain_sum", size=train_size, test_size=test_size, seed=seed, **ranges, **options)


def worked_demonstrations(
    source: Task | Sequence[Example], n: int, *, example: Example | None = None, seed: int = 0
) -> Messages:
    """`n` solved problems as `2 n` chat turns (user, assistant), from the train examples that have a solution.

    Never `example` itself nor another with its question; the same ones for all other examples, so that a shared prefix
    stays shared.  Raises: `TaskError` if there are too few.
    """
    if n < 0:
        raise TaskError(f"{n} demonstrations were asked for; give a number that is not negative.")
    solved = [each for each in (source.train if isinstance(source, Task) else source) if each.solution]
    order = random.Random(seed).sample(solved, len(solved))
    own = None if example is None else question_key(example.prompt)
    chosen = [each for each in order[: n + 1] if question_key(each.prompt) != own][:n]
    if len(chosen) < n:  # the question occurs more than once, or there are not enough
        chosen = [each for each in order if question_key(each.prompt) != own][:n]
    if len(chosen) < n:
        raise TaskError(
            f"{n} demonstrations were asked for, but only {len(chosen)} other train examples have a solution."
        )
    return tuple(turn for each in chosen for turn in (each.prompt[-1], {"role": "assistant", "content": each.solution}))


def chain_sum_solution(expression: str) -> str:
    """The steps of a sum, one per line, then the answer: of "4 - 1 - 7" "4 - 1 = 3", "3 - 7 = -4", "The answer is -4.".

    Raises: `ValueError` for anything but whole numbers and `+`, `-`, with a space between.
    """
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join([*lines, f"The answer is {total}."])


# ---- drawing problems ---------------------------------------------------------------------------------------------


@functools.cache
def _families() -> Mapping[str, tuple[type, type]]:
    """The library's table: name -> (dataset class, config class).  Imported late: it takes seconds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import reasoning_gym  # noqa: F401  (fills the table)
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise TaskError(f"This task needs reasoning-gym ({error}); install it: pip install reasoning-gym.") from error
    return DATASETS


def _dataset(family: str, seed: int, draws: int, options: Mapping[str, Any]) -> Any:
    """The family's generator of `draws` problems; they are made when asked for, except by acre and list_functions."""
    if family not in _families():
        holding = [name for name in sorted(_families()) if family and family in name]
        nearest = holding[:3] or difflib.get_close_matches(family, _families(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(sorted(_families()))}."
        raise TaskError(f"reasoning-gym has no family {family!r}; {hint}")
    make_dataset, make_config = _families()[family]
    known = {field.name for field in dataclasses.fields(make_config)} - {"seed", "size"}
    for name in options:
        if name not in known:
            raise TaskError(f"{family} has no option {name!r}; it has {', '.join(sorted(known)) or 'none'}.")
    if family in HASH_SEEDED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        warnings.warn(f"The problems of {family} differ from process to process; set PYTHONHASHSEED=0.", stacklevel=3)
    # Item i of seed s is item 0 of seed s + i: neighbouring seeds would share nearly all problems.
    spread = random.Random(seed).randrange(2**31)
    try:
        return make_dataset(make_config(seed=spread, size=draws, **options))
    except (AssertionError, TypeError, ValueError, KeyError, FileNotFoundError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "its defaults"
        raise TaskError(f"{family} refuses {given}: {error or type(error).__name__}.") from error


def _distinct_entries(dataset: Any, family: str, count: int, draws: int) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for index in range(draws):
        if len(entries) == count:
            break
        try:
            entry = dataset[index]
        except Exception as error:  # whatever the family trips over
            raise TaskError(f"{family} failed to make problem {index} with these options: {error}.") from error
        entries.setdefault(question_key(_prompt(entry)), entry | {"index": index})
    if len(entries) < count:
        raise TaskError(
            f"{family} gave only {len(entries)} distinct questions in {draws} draws, {count} were asked for; "
            "ask for fewer or widen its options."
        )
    return list(entries.values())


def _example(entry: Mapping[str, Any], family: str, seed: int) -> Example:
    return Example(
        id=f"{family}-{seed}-{entry['index']}",
        prompt=_prompt(entry),
        answer="" if entry["answer"] is None else str(entry["answer"]),
        solution=_solution(entry),
        meta={"family": family, "index": entry["index"]},
    )


def _prompt(entry: Mapping[str, Any]) -> Messages:
    return ({"role": "user", "content": entry["question"]},)


def _solution(entry: Mapping[str, Any]) -> str | None:
    """A worked solution where the family has one: most have an answer only."""
    metadata = entry["metadata"]
    if metadata.get("source_dataset") == "chain_sum":
        return chain_sum_solution(metadata["expression"])
    if "answer_cot" in metadata:
        return re.sub(r"####\s*(.*?)\s*$", r"The answer is \1.", metadata["answer_cot"])
    return None


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise TaskError(f"{name} is {value!r}, but must be a whole number that is not negative.")


# ---- judging ------------------------------------------------------------------------------------------------------


def _extracted(text: str, correct: str, extract: marks.Extract | None) -> str | None:
    text = split(text).answer
    if extract is not None:
        return extract(text)
    if marks.parse_number(correct) is not None:
        return marks.numeric_answer(text)
    return marks.stated_answer(text, lines=correct.count("\n") + 1 if correct else 0)


def _score(dataset: Any, family: str, options: Mapping[str, Any], answer: str, entry: Mapping[str, Any]) -> float:
    """The family's own score in [0, 1]; 0 for an answer it trips over or that is not safe to show it."""
    if family in TAKES_ANYTHING:
        return float(answer.casefold() == entry["answer"].casefold())
    if not _safe(family, answer):
        return 0.0
    # The full stop may be the sentence's or the answer's.
    return max(_family_score(dataset, family, options, form, entry) for form in {answer, answer.removesuffix(".")})


def _family_score(
    dataset: Any, family: str, options: Mapping[str, Any], answer: str, entry: Mapping[str, Any]
) -> float:
    if family in READ_AS_FORMULAS:
        score = _judge(family).score(*json.loads(json.dumps([family, options, answer, entry], default=str)))
        if score is None:
            note_out_of_time()
            return 0.0
    else:
        score = 0.0
        with contextlib.suppress(Exception):  # several families raise on answers of an unexpected form
            score = float(dataset.score_answer(answer, entry))
    return min(max(score, 0.0), 1.0)


@functools.cache
def _judge(family: str) -> Judge:
    """One process for each family that needs one."""
    return Judge("family_score", [family, {}, "1", {"answer": "1", "metadata": {}}])


def _safe(family: str, answer: str) -> bool:
    """Whether the family may see the answer: some evaluate it as Python, and a model may write any Python."""
    if family in READ_AS_LITERALS:
        return len(answer) < 5000 and bool(_LITERAL.fullmatch(answer)) and not re.search(r"\b(for|lambda|if)\b", answer)
    return family not in READ_AS_FORMULAS or _is_formula(answer)


def _is_formula(answer: str) -> bool:
    """Numbers, letters and known functions: nothing by which Python would do more than calculate."""
    names = re.findall(r"[^\W\d]\w+", answer)
    # `Integral` is not among the functions: "Integral(f, x)" would pass for the integral of f.
    # An attribute, a text, a subscript, a keyword argument: no formula needs them.
    odd = re.search(r"__|[^\W\d]\s*\.|[)]\s*\.|['\"\[\]{}:;=@\\!<>%&|~]", answer)
    return set(names) <= _FUNCTIONS and not odd and not maths.costly(answer)
