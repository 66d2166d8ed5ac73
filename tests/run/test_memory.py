"""A run fits the memory there is: what is chosen, when nothing is compiled, what is refused, and that it changes no number."""

import dataclasses
import json

import jax
import optax
import psutil
import pytest
import tiny
from whole_runs import lines

from sdjax.devices import memory as device_memory
from sdjax.devices.memory import MemoryShortage, Room
from sdjax.engine import needs, train
from sdjax.engine.needs import Sizes
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import sdpo
from sdjax.models.presets import PRESETS
from sdjax.models.pretrained import Pretrained
from sdjax.run import memory, sizes
from sdjax.run.fit import check_lengths, fit, with_teacher_context
from sdjax.run.sizes import candidates, choose, first_that_fits, halves, planned, work

GIGABYTE = 1e9
pytestmark = pytest.mark.usefixtures("cached")


def room(size):
    return Room(size, size, "memory of a test")


def experiment(method=None, model=None, **changes):
    shapes = changes.pop("shapes", Shapes(context=1024, completion=512))
    student = Pretrained(PRESETS["smollm2-135m"], None, tiny.tokenizer()) if model is None else model
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    task = tiny.TASK._replace(verify=tiny.parity)
    return Experiment(method or grpo(), task, student, optimizer, shapes, prompts=8, evaluation=0, **changes)


def load(e, longest=1000):
    return planned(with_teacher_context(e, check_lengths(e)), longest)


# ---- what there is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size"), [("12GB", 12e9), ("800MB", 8e8), ("1.5G", 1.5e9), ("2GiB", 2.0**31)])
def test_a_budget_is_a_size(text, size):
    assert device_memory.parsed(text) == size
    assert device_memory.room(text).free == size


@pytest.mark.parametrize("text", ["", "12", "much", "-3GB", "12 bananas"])
def test_another_budget_is_refused(text):
    with pytest.raises(MemoryShortage, match=r"expected auto, off, or a size such as 12GB"):
        device_memory.parsed(text)


def test_a_machine_keeps_a_share_for_others_and_its_devices_share_it():
    found, there = device_memory.of_machine(), psutil.virtual_memory()
    assert 0 < found.free * len(jax.local_devices()) < 0.9 * there.available + 1e9
    assert found.total * len(jax.local_devices()) <= there.total


def test_limits_of_control_groups_count(tmp_path):
    """Version 2: a limit above the own group; pages of files that the system would give up are free."""
    (tmp_path / "pod" / "box").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/pod/box\n")
    for folder, most, used in ((tmp_path / "pod", "3000", "2000"), (tmp_path / "pod" / "box", "max", "900")):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(used + "\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert device_memory.of_control_groups(tmp_path / "cgroup", tmp_path) == [(3000, 1500)]
    assert device_memory.of_control_groups(tmp_path / "nothing", tmp_path) == []


def test_limits_of_control_groups_of_version_1(tmp_path):
    (tmp_path / "memory" / "box").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/box\n4:memory:/box\n")
    (tmp_path / "memory" / "box" / "memory.limit_in_bytes").write_text("4000")
    (tmp_path / "memory" / "box" / "memory.usage_in_bytes").write_text("1000")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))  # no limit
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("0")
    assert device_memory.of_control_groups(tmp_path / "cgroup", tmp_path) == [(4000, 1000)]


class Accelerator:
    device_kind, platform = "a card", "gpu"

    def memory_stats(self):
        return {"bytes_limit": 1000, "bytes_in_use": 300}


def test_an_accelerator_says_what_it_has():
    found = device_memory.room(device=Accelerator())
    assert (found.free, found.total, found.what) == (650, 1000, "memory on each a card")


# ---- what is needed -------------------------------------------------------------------------------------------------

MEASURED = {
    (None, None, False): 131.8,
    (None, 512, False): 106.8,
    (32, 512, False): 54.5,
    (16, 512, False): 67.5,
    (8, 512, False): 33.4,
    (16, 512, True): 5.19,
}
"""Gigabytes of temporaries of compiled updates of SmolLM2-135M: 8 x 8 completions of 512 tokens after 1,024."""


def test_estimates_are_near_what_the_compiler_says():
    e = experiment()
    own = load(e)
    assert own.batch.completion.shape == (64, 512) and own.batch.contexts["student"].tokens.shape == (8, 1024)
    for (rows, tokens, remat), size in MEASURED.items():
        found = needs.estimated_update(own, e.method.objectives[0], Sizes(64, rows, tokens, remat)) / GIGABYTE
        assert 0.7 * size < found < 1.3 * size


def test_the_state_is_counted_by_its_parts():
    parts = needs.state_of(experiment(sdpo())).parts()
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=1e-3) and parts["snapshots"] > 5e8
    adapters = needs.state_of(experiment(sdpo(), lora=train.adapters.Lora(rank=8))).parts()
    assert adapters["parameters"] < 0.05 * parts["parameters"] == 0.05 * adapters["frozen weights and teachers"]


@pytest.mark.slow
def test_few_layers_tell_of_many():
    """What 2 and 4 layers need, continued to 8, is what 8 need."""
    config = tiny.config()
    deep = dataclasses.replace(config, layers=8, windows=config.windows[:1] * 8, ropes=config.ropes[:1] * 8)
    e = experiment(model=Pretrained(deep, None, tiny.tokenizer()), shapes=Shapes(context=64, completion=64))
    own, chosen = planned(e, 64), Sizes(8, 8, 64, True)
    needed = lambda layers: needs.compiled_update(own, e.method.objectives[0], chosen, layers)
    assert needs.by_depth(own, needed) == pytest.approx(needed(None), rel=0.1)


# ---- what is chosen -------------------------------------------------------------------------------------------------


def test_candidates_go_from_the_fastest_to_the_smallest():
    e = experiment()
    own = load(e)
    found = candidates(e, own.batch)
    assert found[:2] == [Sizes(64, None, None, False), Sizes(64, None, 512, False)]
    assert found[-1] == Sizes(64, 1, 32, True)
    assert len({*found}) == len(found)
    costs = [work(own.batch, s) for s in found[:-3]]
    assert costs == sorted(costs)
    fixed = experiment(shapes=Shapes(1024, 512, rows=7, rows_per_chunk=4, tokens_per_chunk=99), remat=False)
    assert candidates(fixed, own.batch) == [Sizes(7, 4, 99, False)]


def test_halves_end_at_one():
    assert halves(12) == [12, 6, 3, 2, 1] and halves(1) == [1]


def test_what_is_compiled():
    """Nothing where the estimate is far below; the compiler's figure corrects the estimate of its kind; the last is tried."""
    asked = []
    measure = lambda x: asked.append(x) or 2.0 * x
    assert first_that_fits([10, 5, 1], float, measure, 100).choice == 10 and not asked
    found = first_that_fits([16, 9, 8, 5, 4, 1], float, measure, 10)
    assert (found.choice, found.needed, found.fits) == (5, 10.0, True) and asked == [9, 5]
    assert not first_that_fits([16, 8], float, measure, 3).fits


@pytest.fixture
def not_compiled(monkeypatch):
    """The compiler's word is the estimate's."""
    estimate = lambda load, objective, sizes, layers=None: needs.estimated_update(load, objective, sizes)
    monkeypatch.setattr(needs, "compiled_update", estimate)
    monkeypatch.setattr(needs, "compiled_sampler", lambda load, rows, layers=None: needs.estimated_sampler(load, rows))
    monkeypatch.setattr(needs, "by_depth", lambda load, needed: needed(None))


def test_less_memory_makes_smaller_sizes(not_compiled):
    own, e = load(experiment()), experiment()
    found = [choose(own, room(size * GIGABYTE)) for size in (1000, 130, 20, 8)]
    assert found[0].sizes == Sizes(64, None, None, False) and found[1].sizes == Sizes(64, None, 512, False)
    assert all(f.needed <= size * GIGABYTE for f, size in zip(found, (1000, 130, 20, 8), strict=True))
    costs = [work(own.batch, f.sizes) for f in found]
    assert costs == sorted(costs) and found[3].sizes.rows < 64 and found[3].sizes.remat
    given = dataclasses.replace(e, shapes=dataclasses.replace(e.shapes, rows_per_chunk=8))
    assert choose(own._replace(experiment=given), room(20 * GIGABYTE)).sizes.rows_per_chunk == 8


def test_where_nothing_fits_it_says_what_would_do(not_compiled):
    own = load(experiment())
    with pytest.raises(MemoryShortage) as refused:
        choose(own, room(2.4 * GIGABYTE))
    said = str(refused.value)
    assert "parameters 0.54 GB, optimizer 1.08 GB" in said and "there are 2.40 GB of memory of a test" in said
    assert "--lora-rank 16" in said and "--memory off starts it all the same" in said
    given = experiment(shapes=Shapes(1024, 512, rows_per_chunk=64), remat=False)
    with pytest.raises(MemoryShortage, match="These would do: no --rows-per-chunk and no --remat"):
        choose(own._replace(experiment=given), room(8 * GIGABYTE))


def test_a_method_that_cannot_be_sketched_is_taken_to_read_everything():
    def collect(environment, examples, key, memory):
        raise KeyError("not a model's text")

    found = load(experiment(grpo()._replace(collect=collect)))
    assert found.batch.completion.shape == (8 * sizes.MANY, 512)


# ---- runs -----------------------------------------------------------------------------------------------------------


def small(method=None, **changes):
    own = experiment(method or sdpo(group_size=2), tiny.pretrained(), shapes=Shapes(context=48, completion=8))
    return dataclasses.replace(own, **{"steps": 2, "prompts": 2, "export": False} | changes)


def test_what_was_chosen_is_kept_and_taken_again(tmp_path, monkeypatch):
    whole, record, said = memory.settled(small(), 20, tmp_path)
    assert "memory: --rows 64, all rows, all tokens, --no-remat, at most" in said and "free memory" in said
    assert record["sizes"] == {"rows": 64, "rows_per_chunk": None, "tokens_per_chunk": None, "remat": False}
    assert whole.shapes.rows == 64 and whole.remat is False
    memory.write(tmp_path, {**record, "sizes": {**record["sizes"], "rows_per_chunk": 2}})
    whole, again, said = memory.settled(small(), 20, tmp_path)
    assert "as the run began, --rows 64, --rows-per-chunk 2" in said and whole.shapes.rows_per_chunk == 2
    assert memory.settled(small(remat=True), 20, tmp_path).said.startswith(
        "memory: other sizes than the run began with"
    )
    monkeypatch.setattr(memory.memory, "room", lambda *_: room(1.0))
    with pytest.raises(MemoryShortage, match="began with sizes that need .* and there are 0.00 GB of memory of a test"):
        memory.settled(small(), 20, tmp_path)
    assert memory.settled(small(memory="off"), 20, tmp_path).record == again


@pytest.mark.slow
def test_numbers_do_not_depend_on_what_was_chosen(tmp_path, capsys):
    """One step of distillation with a teacher of its own context: the loss and the gradient's norm."""
    fit(small(steps=1), tmp_path / "a")
    kept = json.loads((tmp_path / "a" / memory.FILE).read_text())
    assert kept["needed"] > 0 and "memory: --rows 64" in capsys.readouterr().out
    parts = Shapes(context=48, completion=8, rows=1, rows_per_chunk=1, tokens_per_chunk=2)
    fit(small(steps=1, remat=True, shapes=parts), tmp_path / "b")
    (whole,), (parted,) = (lines(tmp_path / name) for name in "ab")
    for name in ("loss", "grad_norm", "reward", "length"):
        assert parted[name] == pytest.approx(whole[name], rel=1e-3)


def test_a_failed_allocation_is_a_sentence(tmp_path, capsys):
    def collect(environment, examples, key, memory):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")

    with pytest.raises(MemoryShortage, match=r"memory ran out \(RESOURCE_EXHAUSTED.*nothing was saved yet.*--resume"):
        fit(small(grpo()._replace(collect=collect)), tmp_path / "run")
