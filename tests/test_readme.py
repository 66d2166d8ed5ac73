"""What the READMEs say is true: the method shown trains, tables are made from cards, trees name the files that are there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from sdjax.cli import cards, options
from sdjax.engine import train

ROOT = Path(__file__).parents[1]
READMES = [
    ROOT / "README.md",
    *(p for f in ("sdjax", "experiments", "tpu") for p in sorted((ROOT / f).rglob("README.md"))),
]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_first_page_is_read_in_five_minutes():
    assert len(text_of("README.md").splitlines()) <= 150


def test_the_methods_table_is_made_from_the_cards():
    # To renew it: sdjax methods --markdown
    found = re.search(r"<!-- methods -->\n(.*?)<!-- /methods -->", text_of("sdjax/methods/README.md"), re.DOTALL)
    assert found.group(1).strip() == cards.table([cards.describe(name) for name in options.method_names()])


def test_the_method_that_the_readme_shows_is_complete_and_trains():
    code = re.search(r"```python\n# my_method.py\n(.*?)```", text_of("README.md"), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    scope = {}
    exec(code, scope)
    method = scope["cautious"](group_size=2)
    environment = tiny.environment(method)
    rollouts, _ = method.collect(environment, list(tiny.TASK.train[:2]), jax.random.key(0), None)
    batch = tiny.collected(method, rollouts)
    update = train.make_update(
        method.objectives[0], {"live": tiny.model(), "teacher": tiny.model()}, optax.adam(1e-3), tiny.SHAPES
    )
    params = jax.tree.map(jnp.array, tiny.pretrained().params)
    opt_state = optax.adam(1e-3).init(params)
    losses = []
    for step in range(16):
        params, opt_state, outcome = update(
            params, opt_state, {"teacher": tiny.pretrained().params}, batch, jnp.int32(step)
        )
        losses.append(float(outcome.terms["kl"]))
    assert losses[-1] < 0.5 * losses[0]


KINDS = (".py", ".css", ".js", ".html")


def files_of_tree():
    """The files that the tree of `sdjax/README.md` names, each with its folder."""
    found, folder = set(), ""
    for line in text_of("sdjax/README.md").split("```")[1].splitlines()[2:]:
        indent, names = len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0].split()
        if indent == 2:
            folder = names[0] if names[0].endswith("/") else ""
        if indent <= 4:
            found |= {folder + name for name in names if name.endswith(KINDS)}
    return found


def test_the_tree_names_every_file_and_no_other():
    there = {p.relative_to(ROOT / "sdjax").as_posix() for p in (ROOT / "sdjax").rglob("*") if p.is_file()}
    there = {n for n in there if n.endswith(KINDS) and not n.startswith("methods/") and not n.endswith("/__init__.py")}
    assert files_of_tree() == there


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_file_command_and_target_that_is_named_exists(path):
    said = path.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/])(?:experiments|tests|tpu|sdjax)/[\w/]+\.(?:py|sh|yaml|md)\b", said):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", said):
        assert (path.parent / link).exists(), link
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", said, re.MULTILINE):
        assert target in targets, target
    for module in re.findall(r"^(?:from|import) (sdjax[\w.]*)", said, re.MULTILINE):
        stem = ROOT / module.replace(".", "/")
        assert stem.is_dir() or stem.with_suffix(".py").is_file(), module
