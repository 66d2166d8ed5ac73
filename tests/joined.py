"""What `test_processes.py` starts several times at once: agreement, divided work and two steps of a run."""

import json
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np

from sdjax.cli.options import Choice, load_experiment, method_factory
from sdjax.devices import processes, sharding
from sdjax.devices.processes import ProcessError
from sdjax.run.fit import fit


def refusal(action) -> str:
    try:
        action()
    except ProcessError as error:
        return str(error)
    return ""


def main(folder: str) -> None:
    processes.join()
    import jax

    own, count = jax.process_index(), jax.process_count()
    asked: list[int] = []
    squares = processes.divided(lambda x: asked.append(x) or {"square": x * x}, range(7))

    def fails():
        if own == count - 1:
            raise ProcessError("no")

    def first_fails():
        raise ProcessError("there is none")

    checks = {
        "everyone": processes.everyone({"process": own, "text": "ü" * 2000 * own})
        == [{"process": p, "text": "ü" * 2000 * p} for p in range(count)],
        "divided": squares == [{"square": x * x} for x in range(7)],
        "asked": asked,
        "by_first": processes.by_first(lambda: own) == 0,
        "by_each": refusal(lambda: processes.by_each(fails)),
        "first_fails": refusal(lambda: processes.by_first(first_fails)),
        "agree": refusal(lambda: processes.agree({"lr": own, "same": 1}, "arguments")),
    }
    module = load_experiment(str(Path(__file__).parent / "tiny_run.py"))
    method = Choice(method_factory("sdpo"), module.OPTIONS["sdpo"])
    result = fit(module.experiment(method=method, settings=replace(module.SETTINGS, smoke=True)), folder)
    found = [
        zlib.crc32(np.ascontiguousarray(x).tobytes()) for x in jax.tree.leaves(sharding.to_host(result.state.params))
    ]
    checks["parameters"] = len({*map(str, processes.everyone(found))}) == 1
    checks["state"] = int(result.state.step)
    Path(f"{folder}.{own}.json").write_text(json.dumps(checks))
    processes.leave()


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main(sys.argv[1])
