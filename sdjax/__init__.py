"""On-policy self-distillation and RL post-training of language models, as pure functions in JAX.

The names below are what a method is composed of.  Each is loaded when it is first used: `import sdjax` starts no
device and loads neither jax, transformers nor orbax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers; `__getattr__` does it at run time
    from sdjax.collect.contexts import question as question
    from sdjax.collect.contexts import with_solution as with_solution
    from sdjax.collect.rollouts import attempts as attempts
    from sdjax.engine.policies import ema as ema
    from sdjax.engine.policies import frozen as frozen
    from sdjax.engine.train import Experiment as Experiment
    from sdjax.errors import InputError as InputError
    from sdjax.run.fit import fit as fit
    from sdjax.run.settings import Settings as Settings
    from sdjax.types import Example as Example
    from sdjax.types import Method as Method
    from sdjax.types import Objective as Objective
    from sdjax.types import Rollout as Rollout
    from sdjax.types import Term as Term
    from sdjax.types import View as View

_HOMES = {
    "types": ("Example", "Method", "Objective", "Rollout", "Term", "View"),
    "collect.contexts": ("question", "with_solution"),
    "collect.rollouts": ("attempts",),
    "engine.policies": ("ema", "frozen"),
    "engine.train": ("Experiment",),
    "errors": ("InputError",),
    "run.fit": ("fit",),
    "run.settings": ("Settings",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sdjax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
