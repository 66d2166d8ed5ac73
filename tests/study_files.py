"""Experiment files that are run for themselves, not by `sdjax train`: experiments/degrade and experiments/referee."""

import importlib.util
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(folder, name):
    """The module of `experiments/FOLDER/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
