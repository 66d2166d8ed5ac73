"""The shape of the code: floors, line budgets, documentation, and what every method module exports."""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from sdjax.cli import cards
from sdjax.types import Card, Method

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "sdjax").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py")) + sorted((ROOT / "tpu").rglob("*.py"))

FLOORS = (
    ("kernels/*", "errors", "ranges"),
    ("types", "devices/*"),
    ("models/*", "tasks/*"),
    ("engine/*",),
    ("collect/*",),
    ("samplers/*",),
    ("methods/*", "run/*"),
    ("cli/*", "study/*"),
    ("planning/*", "report/*"),
    ("__main__",),
)
"""A module imports from its own floor and from those before it; experiments and tpu stand above all."""

METHODS = sorted(p.stem for p in (ROOT / "sdjax" / "methods").glob("*.py") if p.stem != "__init__")


def name_of(path: Path) -> str:
    """`sdjax/tasks/splits.py` as `tasks/splits`; a package as its folder."""
    name = path.relative_to(ROOT / "sdjax").with_suffix("").as_posix()
    return name.removesuffix("/__init__")


def floor_of(name: str) -> int | None:
    """The floor of a module, by its own name or its folder's."""
    folder = name.split("/")[0] + "/*"
    return next((i for i, names in enumerate(FLOORS) if name in names or folder in names), None)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, as `tasks/splits`."""
    known = {name_of(p) for p in SOURCES}
    found = set()
    for dotted in imports(path):
        parts = dotted.split(".")
        if parts[0] != "sdjax" or dotted == "sdjax.__version__":
            continue
        longest = ("/".join(parts[1:end]) for end in range(len(parts), 1, -1))
        found |= {next((n for n in longest if n in known), "/".join(parts[1:2]))}
    return found


ids = lambda paths: [p.relative_to(ROOT).as_posix() for p in paths]
each_source = pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
each_method = pytest.mark.parametrize("name", METHODS)


# ---- floors -------------------------------------------------------------------------------------------------------


@each_source
def test_a_module_imports_from_its_own_floor_and_below(path):
    name = name_of(path)
    if name == "__init__":
        return
    assert floor_of(name) is not None, f"{name} stands on no floor: add it to FLOORS"
    above = {other for other in own_imports(path) if floor_of(other) is None or floor_of(other) > floor_of(name)}
    assert not above, f"{name} (floor {floor_of(name)}) imports {above}"


def test_the_walk_sees_imports_of_every_form(tmp_path):
    """The negative control."""
    path = tmp_path / "some.py"
    path.write_text(
        "import sdjax.run.fit\ndef f():\n    from sdjax.tasks import splits\n    from sdjax.engine.train import State\n"
    )
    assert own_imports(path) == {"run/fit", "tasks/splits", "engine/train"}
    assert floor_of("kernels/weights") < floor_of("engine/score") < floor_of("methods/grpo") < floor_of("__main__")
    assert floor_of("nothing") is None


def room_of(name: str) -> str:
    """The folder of a module, or the module itself where it stands alone."""
    return name.split("/")[0]


def arrows(modules: bool = False) -> dict[str, set[str]]:
    """Which rooms, or which modules, each of them imports from."""
    found = {}
    for path in SOURCES:
        here = name_of(path) if modules else room_of(name_of(path))
        there = {other if modules else room_of(other) for other in own_imports(path)}
        found.setdefault(here, set()).update(there - {here})
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead back to themselves, the first such way that is found; empty without one."""

    def search(way: list[str]) -> list[str]:
        for other in sorted(graph.get(way[-1], ())):
            if other in way:
                return [*way[way.index(other) :], other]
            if other not in done and (found := search([*way, other])):
                return found
        done.add(way[-1])
        return []

    done: set[str] = set()
    return next((found for name in sorted(graph) if name not in done and (found := search([name]))), [])


def test_no_room_and_no_module_leads_back_to_itself():
    assert not circle(arrows())
    assert not circle(arrows(modules=True))


def test_circles_are_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def house() -> str:
    """The rooms by floor, the roof first, each with its files and the rooms that it imports from."""
    lines, graph = [], arrows()
    for floor in reversed(range(len(FLOORS))):
        rooms = sorted({room_of(name_of(p)) for p in SOURCES if floor_of(name_of(p)) == floor})
        for room in rooms:
            files = sorted(p.name for p in SOURCES if room_of(name_of(p)) == room and p.name != "__init__.py")
            lines.append(f"{floor}  {room:10s} {' '.join(files)}")
            lines.append(f"   {'':10s} <- {' '.join(sorted(graph[room])) or 'nothing of its own'}")
    return "\n".join(lines)


def test_the_house_can_be_printed():
    assert "kernels    advantages.py" in house() and house().startswith(f"{len(FLOORS) - 1}  __main__")


def test_nothing_below_the_experiments_imports_them():
    for path in SOURCES:
        assert not {name for name in imports(path) if name.split(".")[0] in ("experiments", "tpu", "tests")}


def test_kernels_import_arrays_and_one_another_only():
    allowed = {"__future__", "chex", "collections", "functools", "jax", "math", "numpy", "sdjax", "typing"}
    for path in (p for p in SOURCES if p.parent.name == "kernels"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path.name


def test_only_the_transformer_and_its_parts_import_linen():
    users = [name_of(p) for p in SOURCES + EXPERIMENTS if any("flax.linen" in name for name in imports(p))]
    assert users == [
        f"models/{part}"
        for part in ("blocks", "delta", "experts", "mlp", "per_layer_inputs", "primitives", "transformer")
    ]


def methods_inside(name: str) -> set[str]:
    """The methods that a method is made from."""
    found = own_imports(ROOT / "sdjax" / "methods" / f"{name}.py")
    return {other.removeprefix("methods/") for other in found if other.startswith("methods/")}


@each_method
def test_a_method_that_others_are_made_from_is_made_from_none(name):
    """One step from any method to the parts it consists of."""
    chains = {base: methods_inside(base) for base in methods_inside(name) if methods_inside(base)}
    assert not chains


# ---- methods ------------------------------------------------------------------------------------------------------

MOST_LINES = 90


def code_lines(path: Path) -> int:
    """Lines with code: without blank lines, comments, docstrings and the card."""
    spared = set()
    for node in ast.walk(tree_of(path)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            spared |= set(range(body[0].lineno, body[0].end_lineno + 1))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CARD":
            spared |= set(range(node.lineno, node.end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in layout | {tokenize.ENCODING}]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - spared)


@each_method
def test_a_method_is_short(name):
    assert code_lines(ROOT / "sdjax" / "methods" / f"{name}.py") <= MOST_LINES


def test_lines_of_code_are_counted_without_words(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        '"""Says\n\nmuch."""\n\nCARD = f(\n    1,\n)\n# a remark\n\ndef f(x):\n    """More."""\n    return x\n'
    )
    assert code_lines(path) == 2


@each_method
def test_a_method_module_exports_its_card_and_a_factory_of_its_own_name(name):
    module = importlib.import_module(f"sdjax.methods.{name}")
    assert isinstance(module.CARD, Card)
    assert all(getattr(module.CARD, field) for field in ("paper", "equation", "student", "teacher", "reduction"))
    factory = getattr(module, name)
    for parameter in inspect.signature(factory).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{name}({parameter.name}) is not a keyword argument"
        assert parameter.default is not parameter.empty, f"{name}({parameter.name}) has no default"
    method = factory()
    assert isinstance(method, Method) and callable(method.collect) and method.objectives
    assert module.CARD.arxiv == "" or re.fullmatch(r"\d{4}\.\d{5}", module.CARD.arxiv)


@each_method
def test_the_table_names_every_method(name):
    assert f"`{name}`" in (ROOT / "sdjax" / "methods" / "README.md").read_text(encoding="utf-8")


@each_method
def test_every_option_of_a_method_has_a_text(name):
    """What `sdjax methods NAME` and `sdjax train ... --help` say of it."""
    said = cards.describe(name)["options"]
    assert said and not [option for option, what in said.items() if not what["help"].strip()]


# ---- kernels --------------------------------------------------------------------------------------------------------

FOR_PEOPLE = ("sequence_mean_of", "token_sum")
"""Reducers that no method takes by default: for a method's option `reduce`, and named in cards."""


def used_names(tree: ast.Module, without: ast.FunctionDef | None = None) -> set[str]:
    """Names that a module mentions in code, import lines and one function left out."""
    inside = set() if without is None else {id(n) for n in ast.walk(without)}
    nodes = [n for n in ast.walk(tree) if id(n) not in inside]
    found = {n.id for n in nodes if isinstance(n, ast.Name)}
    return found | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def without_user(kernels: dict[Path, ast.Module], others: list[ast.Module]) -> list[str]:
    """Public functions of kernels that neither another module nor another function of their own uses."""
    trees = [*kernels.values(), *others]
    is_public = lambda node: isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    public = [(tree, node) for tree in kernels.values() for node in tree.body if is_public(node)]
    users = lambda own, f: (used_names(t, f if t is own else None) for t in trees)
    return [f.name for own, f in public if not any(f.name in names for names in users(own, f))]


def test_every_public_kernel_has_a_user():
    kernels = {p: tree_of(p) for p in SOURCES if p.parent.name == "kernels"}
    found = without_user(kernels, [tree_of(p) for p in SOURCES if p not in kernels])
    assert sorted(found) == sorted(FOR_PEOPLE)


def test_a_kernel_without_a_user_is_seen():
    kernel = ast.parse("def used():\n    return used()\ndef unused():\n    return unused()\n")
    other = ast.parse("from kernels import unused\nx = used()\n")
    assert without_user({Path("k"): kernel}, [other]) == ["unused"]


# ---- words --------------------------------------------------------------------------------------------------------


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes at the top of a module that say nothing about themselves."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    return [n.name for n in nodes if not ast.get_docstring(n)]


@each_source
def test_every_module_and_every_public_name_has_a_docstring(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree) or not tree.body, "the module has none"
    assert not undocumented(tree)


def test_missing_docstrings_are_seen():
    tree = ast.parse('def said():\n    """Yes."""\ndef silent(): ...\nclass Silent: ...\ndef _own(): ...\n')
    assert undocumented(tree) == ["silent", "Silent"]


MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|work|tmp|mnt|data|opt|var|scratch|workspace)(?:/|\b)")


def tracked_text() -> list[Path]:
    folders = ("sdjax", "experiments", "tests", "tpu", ".ci")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    return [
        p
        for p in files
        if p.suffix in (".py", ".md", ".toml", ".sh", ".yaml", ".yml", "") and p.name not in ("LICENSE", ".git")
    ]


def test_no_file_names_a_place_on_one_machine():
    found = {}
    for path in tracked_text():
        if path != Path(__file__) and MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="ignore")):
            found[path.relative_to(ROOT).as_posix()] = MACHINE_PATH.search(path.read_text(encoding="utf-8")).group()
    assert not found


def test_places_on_one_machine_are_seen():
    assert MACHINE_PATH.search("open('/home/me/x')") and MACHINE_PATH.search("cd /tmp/runs")
    assert not MACHINE_PATH.search("runs/tmp/x and https://x.org/data/y and a/b/home/c")


# ---- sizes --------------------------------------------------------------------------------------------------------

LONGEST_FUNCTION, LONGEST_FILE = 80, 350


def long_functions(tree: ast.Module) -> list[str]:
    """Functions of more than `LONGEST_FUNCTION` lines; docstrings do not count."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    said = lambda node: len((ast.get_docstring(node) or "").splitlines())
    return [node.name for node in nodes if node.end_lineno - node.lineno + 1 - said(node) > LONGEST_FUNCTION]


@pytest.mark.parametrize("path", SOURCES + EXPERIMENTS, ids=ids(SOURCES + EXPERIMENTS))
def test_functions_and_files_are_read_in_one_sitting(path):
    assert not long_functions(tree_of(path))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_long_functions_are_seen():
    body = "    x = 1\n"
    assert long_functions(ast.parse("def f():\n" + body * 80)) == ["f"]
    assert not long_functions(ast.parse("def f():\n" + body * 79))


# ---- what an import loads -------------------------------------------------------------------------------------------

HEAVY = ("jax", "flax", "optax", "orbax", "transformers", "tokenizers", "numpy", "tyro")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, sdjax; assert sdjax.__version__; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {name.split(".")[0] for name in shown.split()} & {*HEAVY}


def test_the_names_of_the_package_are_where_it_says():
    import sdjax

    for name, home in sdjax._HOME.items():
        assert getattr(sdjax, name) is getattr(importlib.import_module(f"sdjax.{home}"), name)
        assert name in dir(sdjax)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sdjax.nothing  # noqa: B018
    stated = [n for n in ast.walk(tree_of(ROOT / "sdjax" / "__init__.py")) if isinstance(n, ast.ImportFrom)]
    assert {a.name for n in stated for a in n.names} - {"annotations", "TYPE_CHECKING", "Any"} == {*sdjax._HOME}


# ---- errors -------------------------------------------------------------------------------------------------------


def error_classes() -> dict[str, list[str]]:
    """The error classes that the package defines, with the names of their bases."""
    nodes = [n for path in SOURCES for n in ast.walk(tree_of(path)) if isinstance(n, ast.ClassDef)]
    return {n.name: [ast.unparse(base) for base in n.bases] for n in nodes if n.name.endswith("Error")}


def test_every_error_derives_from_the_one_root():
    found = error_classes()
    assert len(found) > 10
    assert {name for name, bases in found.items() if "InputError" not in bases} == {"InputError"}


if __name__ == "__main__":
    print(house())
