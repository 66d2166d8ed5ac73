"""What to do with an accelerator that is there for a quarter of an hour: `python tests/on_accelerator.py OUT [PART ...]`.

In at most eight minutes, each part in a process of its own with a limit of time, what it says in OUT/PART.txt:

  tests   `pytest -m accelerator`: families, methods, the sampler and a resumed run beside the CPU; what it lacks is skipped
  suite   `sdjax bench --suite`: a step of a small model in both types beside the device's ceilings
  large   `sdjax bench` of Qwen3-1.7B's shape, 8 x 8 x 2048, bfloat16, with a profile of one update
  torch   the same two ceilings by torch, where it is installed

On a CPU the same parts run in small sizes.  OUT/summary.json says how each part ended; a part that took too long is ended,
and the others go on.  The exit status is 1 if a part failed.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOTAL = 480
"""Seconds of all parts together."""

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
"""GPUs add up gradients of embeddings in any order otherwise: a resumed run would differ in the last bits."""

TORCH = """
import json, time, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
size, turns = (8192, 16) if device == "cuda" else (2048, 1)
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
def seconds(rows, matrix):
    times = []
    for _ in range(6):
        wait(); start = time.perf_counter()
        for _ in range(turns):
            rows @ matrix
        wait(); times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]
found = {"torch": torch.__version__, "device": device}
for name in ("float32", "bfloat16"):
    matrix = torch.ones(size, size, dtype=getattr(torch, name), device=device)
    found[f"{name} product GFLOP/s"] = turns * 2 * size**3 / seconds(matrix, matrix) / 1e9
    found[f"{name} bandwidth GB/s"] = turns * matrix.nbytes / seconds(matrix[:16], matrix) / 1e9
print(json.dumps(found, indent=1))
"""


def parts(out: Path, accelerated: bool) -> dict[str, tuple[list[str], int]]:
    """Commands of all parts, and how many seconds each may take."""
    python = [sys.executable, "-m"]
    step = [
        "--prompts",
        "8",
        "--group",
        "8",
        "--completion",
        "2048",
        "--rollout-rows",
        "8",
        "--tokens-per-chunk",
        "2048",
    ]
    model = ["--model", "random:qwen3-1.7b", "--rows-per-chunk", "8"]
    if not accelerated:
        step = [
            "--prompts",
            "1",
            "--group",
            "2",
            "--completion",
            "8",
            "--rollout-rows",
            "1",
            "--tokens-per-chunk",
            "16",
        ]
        model = ["--model", "random:smollm2-135m", "--rows-per-chunk", "1"]
    large = [*python, "sdjax", "bench", *model, *step, "--repeats", "1", "--bf16", "--scan"]
    found = {
        "large": ([*large, "--profile", str(out / "profile")], 200),
        "suite": ([*python, "sdjax", "bench", "--suite", "--out", str(out / "bench.json")], 100),
        "tests": ([*python, "pytest", "-q", "-m", "accelerator", "-rs", f"--junitxml={out / 'tests.xml'}"], 200),
    }
    if accelerated and importlib.util.find_spec("xdist"):
        found["tests"][0].extend(["-n", "4"])  # most of the time is compiling
    if not accelerated:
        found["suite"][0].extend([*model, *step, "--scan"])
    if importlib.util.find_spec("torch"):
        found["torch"] = ([sys.executable, "-c", TORCH], 30)
    return found


def device() -> str:
    """The platform that jax finds, asked in a process that does not keep the device."""
    code = "import jax; print(jax.devices()[0].platform)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]


def run(command: list[str], out: Path, seconds: float) -> dict[str, float | str]:
    """Runs a part; how it ended and how long it took."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC if '-m' in command and 'pytest' in command else ''}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags.strip()}
    if "-n" in command:  # several processes share the device
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.parent / "programs"))
    started = time.monotonic()
    with out.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, timeout=seconds, check=False
            )
            ended = "done" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {seconds:.0f} s"
    return {"ended": ended, "seconds": round(time.monotonic() - started, 1)}


def main(where: str, *chosen: str) -> int:
    """Runs the chosen parts, or all, and writes what came of them after each."""
    out, started = Path(where).resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    platform = device()
    there = parts(out, platform != "cpu")
    if unknown := [name for name in chosen if name not in there]:
        print(f"there is no part {unknown[0]}: expected some of {', '.join(there)}", file=sys.stderr)
        return 2
    summary: dict[str, object] = {"platform": platform}
    for name in chosen or there:
        command, most = there[name]
        left = TOTAL - (time.monotonic() - started) if platform != "cpu" else float("inf")
        summary[name] = run(command, out / f"{name}.txt", min(most, left) if platform != "cpu" else 3600)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(name, summary[name], flush=True)
    return int(any(part["ended"] != "done" for part in summary.values() if isinstance(part, dict)))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
