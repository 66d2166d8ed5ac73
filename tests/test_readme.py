"""What the README says is true: the method that it shows trains, its table is the cards', its tree the files."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tiny

from sdjax.cli import cards, options
from sdjax.engine import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL).group(1).strip()


def test_the_methods_table_is_made_from_the_cards():
    # To renew it: sdjax methods --markdown
    assert section("methods") == cards.table([cards.describe(name) for name in options.method_names()])


def test_the_method_that_the_readme_shows_is_complete_and_trains():
    code = re.search(r"```python\n# my_method.py\n(.*?)```", README, re.DOTALL).group(1)
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


def test_every_module_stands_in_the_file_tree():
    tree = README.split("## What is where")[1].split("```")[1]
    for path in sorted((ROOT / "sdjax").glob("*.py")) + sorted((ROOT / "sdjax" / "kernels").glob("*.py")):
        assert path.name == "__init__.py" or path.name in tree, path


def test_every_named_command_and_file_exists():
    for name in re.findall(r"experiments/\w+\.py", README):
        assert (ROOT / name).is_file(), name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert target in targets, target
