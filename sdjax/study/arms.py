"""Studies: arms that are run once, what they measured in files, and what a policy does."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.collect.contexts import question
from sdjax.collect.diagnostics import epistemic_count, per_thousand
from sdjax.engine import policies
from sdjax.engine.generate import Sampling, first
from sdjax.engine.policies import Policy
from sdjax.engine.train import Experiment, models
from sdjax.run.fit import fit
from sdjax.run.measuring.evaluate import by_cap
from sdjax.run.storage import checkpoint
from sdjax.run.storage.places import replace_text
from sdjax.types import Example, Messages, Method, Verdict

# ---- arms ---------------------------------------------------------------------------------------------------------


def key_of(arguments: Mapping[str, Any]) -> str:
    """A short hash of arguments, the same whatever their order."""
    return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:12]


def arm(
    folder: str | Path, name: str, arguments: Mapping[str, Any], run: Callable[[Path], Mapping[str, Any]]
) -> dict[str, Any]:
    """What an arm of a study measured: read from its file if it was run before, else `run(its own folder)`.

    The file is `NAME-HASH.json` with arguments and seconds beside the result; other arguments make another file.  The
    arm's own folder, `NAME-HASH/`, is where an interrupted run is resumed from.
    """
    folder = Path(folder)
    path = folder / f"{name}-{key_of(arguments)}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result = run(path.with_suffix(""))
    seconds = round(time.perf_counter() - started, 1)
    text = json.dumps({"name": name, "arguments": arguments, "seconds": seconds, "result": result}, indent=1)
    replace_text(path, text)
    return json.loads(text)["result"]


def every_seed(
    folder: str | Path,
    name: str,
    arms: Iterable[str],
    seeds: int,
    prepared: Callable[[str, int], tuple[Mapping[str, Any], Callable[[Path], Any]]],
) -> dict[str, list[Any]]:
    """What every arm measured with every seed, `{arm: [result of each seed]}`; all arms of a seed before the next seed.

    `prepared(arm, seed)` gives the arguments and the run of `arm`.
    """
    found: dict[str, list[Any]] = {own: [] for own in arms}
    for seed, own in itertools.product(range(seeds), found):
        found[own].append(arm(folder, name, *prepared(own, seed)))
    return found


def trained(
    experiment: Experiment,
    folder: Path,
    probe: Callable[[Policy], Mapping[str, Any]],
    every: int,
    arguments: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """What `probe(live policy)` says before, every `every` steps of, and after a run: rows that begin with `step`.

    `every` 0 is after the run only.  A run that was interrupted is resumed; what was measured before is kept with its
    checkpoints.  `arguments` are what `sdjax report` knows the run by; it finds the rows among the evaluations.
    """
    experiment = watched(experiment, probe, every)
    result = fit(experiment, folder, resume=(folder / "arguments.json").exists(), arguments=arguments)
    if result.interrupted:
        raise KeyboardInterrupt(f"{folder.name} was interrupted: run the same command again")
    student = experiment.student
    network, shapes = models(experiment)["live"], experiment.shapes
    live = Policy(network, result.state.params, student.tokenizer, shapes, origin=student.origin)
    seen = checkpoint.restore(folder / "checkpoints", result.state)[1]["memory"]["probes"]
    rows = [*seen, {"step": experiment.steps, **probe(live)}]
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": row["step"], "evaluation": flat(row)}) + "\n" for row in rows)
    return rows


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under one name each, `{"in_domain": {"length": 9}}` as `length_in_domain`, without its step."""
    nested = {
        f"{what}_{name}": n for name, some in row.items() if isinstance(some, Mapping) for what, n in some.items()
    }
    return {n: x for n, x in row.items() if n != "step" and not isinstance(x, Mapping)} | nested


def watched(experiment: Experiment, probe: Callable[[Policy], Mapping[str, Any]], every: int) -> Experiment:
    """The experiment with `probe(live policy)` called before every `every`-th batch, kept in the method's memory."""
    method: Method = experiment.method

    def collect(environment, examples, key, memory):
        step, probes = memory["step"], memory["probes"]
        if every and step % every == 0:
            probes = [*probes, {"step": step, **probe(environment.live)}]
        rollouts, own = method.collect(environment, examples, key, memory["own"])
        return rollouts, {"step": step + 1, "probes": probes, "own": own}

    memory = {"step": 0, "probes": [], "own": method.memory}
    return dataclasses.replace(experiment, method=method._replace(collect=collect, memory=memory))


# ---- what a policy does -------------------------------------------------------------------------------------------


def behaviour(
    policy: Policy,
    examples: Sequence[Example],
    verify: Callable[[Example, str], Verdict],
    key: Array,
    *,
    n: int = 1,
    context: Callable[[Example], Messages] = question,
    sampling: Sampling | None = None,
    choose: Callable = first,
) -> dict[str, float]:
    """Accuracy, also by cap, length in tokens, epistemic count and density per 1,000 tokens, the share finished, and how many
    answers these are of.

    Means over `n` samples of every example; `context` is what the policy reads.
    """
    written = policies.sample(policy, [context(e) for e in examples], key, n=n, sampling=sampling, choose=choose)
    rows = [(e, s) for e, some in zip(examples, written, strict=True) for s in some]
    lengths, hedges = [len(s.tokens) for _, s in rows], sum(epistemic_count(s.text) for _, s in rows)
    tokens, right = sum(lengths), [verify(e, s.text).reward >= 0.5 for e, s in rows]
    return {
        "accuracy": float(np.mean(right)),
        **by_cap(lengths, right, policy.shapes.completion),
        "length": tokens / len(rows),
        "epistemic": hedges / len(rows),
        "density": per_thousand(hedges, tokens),
        "finished": float(np.mean([s.finished for _, s in rows])),
        "answers": len(rows),
    }


def forbidding(tokens: Sequence[int]) -> Callable[[Array, Array], Array]:
    """A `choose` for the sampler under which these tokens are never drawn."""
    tokens = tuple(tokens)

    def choose(logits: Array, keys: Array) -> Array:
        return logits[0].at[:, jnp.asarray(tokens)].set(jnp.finfo(jnp.float32).min)

    return choose
