"""Tools: calls in the form of every template, bad calls that give an error to read, arithmetic without eval, Python in the sandbox."""

import time

import pytest
import talks

from sdjax.tasks import judging, maths
from sdjax.tasks.errors import TaskError
from sdjax.tasks.tools import tool as tools
from sdjax.tasks.tools.calculator import CALCULATOR, calculated
from sdjax.tasks.tools.calls import answer_in, calls_in, style_of
from sdjax.tasks.tools.interpreter import interpreter
from sdjax.tasks.tools.tool import CallError, Tool, called, check_tools, checked
from sdjax.tasks.tools.world import ERROR, NO_ANSWER, with_tools
from sdjax.tasks.worlds import in_world
from sdjax.types import Example, Step, Task, World

# ---- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (talks.QWEN3, "hermes"),
        (talks.LLAMA3, "llama3"),
        (talks.GPT_OSS, "harmony"),
        ("[TOOL_CALLS]", "mistral"),
        ("{{ messages }}", "hermes"),
    ],
)
def test_the_form_of_calls_is_the_templates(template, style):
    assert style_of(template) == style


ONE = ("calculator", {"expression": "1+2"})
READ = [
    ("hermes", 'So.\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+2"}}\n</tool_call>', [ONE]),
    ("hermes", '<tool_call>{"name": "calculator", "arguments": {"expression": "1+2"}}</tool_call>' * 2, [ONE, ONE]),
    ("hermes", '<tool_call>{"name": "calculator", "arguments": {"expression": "1+2"}}', [ONE]),
    ("hermes", '<think><tool_call>{"name": "x"}</tool_call></think>3', []),
    ("hermes", '<think>never ends <tool_call>{"name": "x"}</tool_call>', []),
    ("hermes", "The answer is 3.", []),
    (
        "hermes",
        "<tool_call>\n<function=calculator>\n<parameter=expression>\n1+2\n</parameter>\n</function>\n</tool_call>",
        [ONE],
    ),
    ("llama3", '{"name": "calculator", "parameters": {"expression": "1+2"}}', [ONE]),
    ("llama3", '<|python_tag|>{"name": "calculator", "parameters": {"expression": "1+2"}}', [ONE]),
    (
        "llama3",
        '{"name": "calculator", "parameters": {"expression": "1+2"}}; {"name": "f", "parameters": {}}',
        [ONE, ("f", {})],
    ),
    ("llama3", '<function=calculator>{"expression": "1+2"}</function>', [ONE]),
    ("llama3", "<|python_tag|>print(1)", [("python", {"code": "print(1)"})]),
    ("llama3", "The set {1, 2} has two elements.", []),
    ("llama3", '{"answer": 3}', []),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.calculator "  # noqa: ISC004
        '<|constrain|>json<|message|>{"expression": "1+2"}',
        [ONE],
    ),
    ("harmony", ' to=functions.calculator<|channel|>commentary json<|message|>{"expression": "1+2"}<|call|>', [ONE]),
    ("harmony", "<|channel|>final<|message|>3", []),
    ("mistral", '[TOOL_CALLS][{"name": "calculator", "arguments": {"expression": "1+2"}}]', [ONE]),
    ("mistral", '[TOOL_CALLS]calculator[ARGS]{"expression": "1+2"}', [ONE]),
    ("mistral", "3", []),
]


@pytest.mark.parametrize(("style", "text", "wanted"), READ)
def test_calls_are_read(style, text, wanted):
    found = calls_in(text, style)
    assert [(call.name, call.arguments) for call in found] == wanted
    assert not any(call.problem for call in found)


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("hermes", "<tool_call>{'name': 'calculator'}</tool_call>"),
        ("hermes", "<tool_call>[1]</tool_call>"),
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("llama3", '{"name": "calculator", "parameters": {"expression"'),
        ("harmony", "<|channel|>commentary to=functions.calculator<|message|>{oops"),
        ("mistral", "[TOOL_CALLS] nothing"),
    ],
)
def test_a_broken_call_says_what_is_wrong(style, text):
    (call,) = calls_in(text, style)
    assert call.problem.startswith(("the call is not valid JSON", "a call must be a JSON object"))


def test_gpt_oss_answers_on_its_final_channel():
    text = "<|channel|>analysis<|message|>Not 4.<|end|><|start|>assistant<|channel|>final<|message|>It is 3."
    assert answer_in("analysisNot 4.assistantfinalIt is 3.", text, "harmony") == "It is 3."
    assert answer_in("said", "said", "harmony") == answer_in("said", "other", "hermes") == "said"


# ---- the calculator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(12 + 3.5) * 4 =", "62"),
        ("2^10", "1024"),
        ("-7 // 2", "-4"),
        ("1/3", "0.333333333333"),
        ("3 × 4 ÷ 6", "2"),
        ("sqrt(16) - round(2.6)", "1"),
        ("-" * 400 + "1", "1"),
        ("max(3, 10 % 4)", "3"),
    ],
)
def test_arithmetic(expression, value):
    assert calculated(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "().__class__",
        "9**9**9**9",
        "2**100000",
        "factorial(5)",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "'a' * 3",
        "True + 1",
        "1j * 1j",
        "(-8) ** 0.5",
        "1/0",
        "1e400",
        "exp(1000)",
        "round(1, ndigits=2)",
        "max",
        "(" * 400,
        "1" * 501,
        "10**1000 * 10**1000",
        "round(1.5, 2, 3)",
        "\x00",
        "",
    ],
)
def test_what_is_no_arithmetic_is_refused_at_once(expression):
    started = time.perf_counter()
    with pytest.raises(CallError):
        calculated(expression)
    assert time.perf_counter() - started < 2


# ---- bad calls ----------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer"},
        "kind": {"enum": ["a", "b"]},
        "names": {"type": "array", "items": {"type": "string"}},
        "maybe": {"type": ["number", "null"]},
    },
    "required": ["count"],
}
FUNCTION = Tool("function", "Does it.", SCHEMA, lambda arguments: f"did {arguments['count']}")


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({}, "the argument 'count' is missing"),
        ({"count": "1"}, "the argument 'count' must be integer, not a string"),
        ({"count": True}, "the argument 'count' must be integer, not a boolean"),
        ({"count": 1.5}, "the argument 'count' must be integer, not a number"),
        ({"count": 1, "kind": "c"}, "must be one of a, b"),
        ({"count": 1, "names": ["x", 1]}, "an item of function: the argument 'names' must be string"),
        ({"count": 1, "maybe": "x"}, "must be number or null"),
        ({"count": 1, "other": 1}, "function has no argument 'other'; it has count, kind, names, maybe"),
        ([1], "the arguments must be a JSON object, not an array"),
        ("{", "the arguments are not a JSON object"),
        (None, "the arguments must be a JSON object, not null"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, wrong):
    with pytest.raises(CallError, match=wrong.replace("[", r"\[")):
        checked(FUNCTION, arguments)


def test_good_arguments_are_taken():
    assert called([FUNCTION], "function", {"count": 3, "maybe": None, "names": ["x"], "kind": "a"}) == "did 3"
    assert called([FUNCTION], "function", '{"count": 4}') == "did 4"
    with pytest.raises(CallError, match="there is no tool 'functon'; there are function; did you mean function"):
        called([FUNCTION], "functon", {})


def test_a_tool_that_fails_hangs_or_talks_too_much_is_an_observation():
    def fails(arguments):
        raise KeyError("inside")

    failing, hanging = FUNCTION._replace(run=fails), FUNCTION._replace(run=lambda _: time.sleep(60), seconds=0.1)
    with pytest.raises(CallError, match="function failed: KeyError: 'inside'"):
        called([failing], "function", {"count": 1})
    started = time.perf_counter()
    with pytest.raises(CallError, match=r"function gave no answer within 0.1 seconds"):
        called([hanging], "function", {"count": 1})
    assert time.perf_counter() - started < 5
    long = called([FUNCTION._replace(run=lambda _: "x" * 10_000)], "function", {"count": 1})
    assert len(long) < tools.LONGEST + 100 and "8000 characters are left out" in long


@pytest.mark.parametrize(
    ("some", "wrong"),
    [
        ([CALCULATOR, CALCULATOR], "there are 2 tools with the name 'calculator'"),
        ([FUNCTION._replace(parameters={"type": "string"})], "tool 'function': its parameters must be a schema"),
        ([FUNCTION._replace(parameters={**SCHEMA, "required": ["x"]})], "the required parameter 'x'"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(some, wrong):
    with pytest.raises(TaskError, match=wrong):
        check_tools(some)


# ---- worlds ---------------------------------------------------------------------------------------------------------------

EXAMPLE = Example("sum", ({"role": "user", "content": "What is 1 + 2?"},), answer="3")
TASK = Task("sums", (EXAMPLE,), (), maths.verify)


def turn(text):
    return {"role": "assistant", "content": text, "raw": text}


def step(task, *texts):
    messages = list(task.train[0].prompt)
    for text in texts[:-1]:
        messages += [turn(text), {"role": "tool", "content": "?"}]
    return task.world.step(task.train[0], (*messages, turn(texts[-1])))


CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "1+2"}}</tool_call>'


def test_a_turn_with_calls_is_answered_and_one_without_is_judged():
    task = with_tools(TASK, [CALCULATOR], style="hermes", described=True, turns=3)
    said = step(task, CALL)
    assert said.messages == ({"role": "tool", "name": "calculator", "content": "3"},) and not said.done
    assert said.measures == {"tool_calls": 1.0, "tool_errors": 0.0}
    right, wrong = step(task, CALL, "The answer is 3."), step(task, "The answer is 4.")
    assert (right.reward, right.done, right.feedback) == (1.0, True, None)
    assert (wrong.reward, wrong.done, bool(wrong.feedback)) == (0.0, True, True)
    assert step(task, CALL, CALL, CALL) == Step((), 0.0, True, NO_ANSWER)
    bad = step(task, CALL.replace("calculator", "oracle") + "<tool_call>{</tool_call>")
    assert [m["content"].startswith(ERROR) for m in bad.messages] == [True, True] and bad.measures["tool_errors"] == 2
    assert judging.marked_from_threads(task.world.step)


def test_tools_are_described_where_the_template_does_not():
    task = with_tools(TASK, [CALCULATOR], style="hermes", described=True)
    system, user = task.train[0].prompt
    assert '"name": "calculator"' in system["content"] and user == EXAMPLE.prompt[0]
    assert with_tools(TASK, [CALCULATOR], style="hermes", described=False).train[0].prompt == EXAMPLE.prompt
    own = TASK._replace(train=(Example("s", ({"role": "system", "content": "Be brief."}, *EXAMPLE.prompt)),))
    assert (
        with_tools(own, [CALCULATOR], style="hermes", described=True)
        .train[0]
        .prompt[0]["content"]
        .startswith("Be brief.\n\n")
    )


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ((), "is not a list of turns"),
        (({"role": "assistant", "content": "x"},), "ends with the turn of 'assistant'"),
        (({"role": "user", "content": "x", "state": {1, 2}},), "JSON cannot hold"),
    ],
)
def test_a_beginning_that_cannot_be_used_names_its_example(messages, wrong):
    with pytest.raises(TaskError, match=f"example 'sum': the world begins with a chat that.*{wrong}"):
        in_world(TASK, World(lambda e: messages, lambda e, m: Step()))


def test_python_runs_in_the_sandbox():
    python = [interpreter(limits=interpreter.__kwdefaults__["limits"]._replace(seconds=1))]
    run = lambda code: called(python, "python", {"code": code})
    assert run("print(sum(range(10)))") == "45"
    assert run("x = 1") == "(the program printed nothing)"
    with pytest.raises(CallError, match="ZeroDivisionError"):
        run("print('before'); 1 / 0")
    with pytest.raises(CallError, match="ended after 1 seconds"):
        run("while True: pass")
    with pytest.raises(CallError, match=r"(?i)permission|denied|error"):
        run("print(open(chr(47) + 'etc/passwd').read())")
