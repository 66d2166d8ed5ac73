"""`sdjax evaluate` of adapters, sampled by refilled slots; what cannot be measured is refused in one sentence."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from whole_runs import run_here

from sdjax.cli import measure, models
from sdjax.models import adapters, pretrained
from sdjax.models.adapters import Lora
from sdjax.models.fields import ModelError
from sdjax.models.files import peft_files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, an adapter of it that changes much, and problems."""
    folder, model = tmp_path_factory.mktemp("measure"), tiny.pretrained()
    pretrained.save(folder / "model", model.config, model.params, model.tokenizer)
    lora = Lora(rank=2)
    own = adapters.initial(model.config, lora, jax.random.key(1))
    own = jax.tree.map(lambda x: x + 0.5, own)
    peft_files.save(folder / "adapter", model.config, own, lora, str(folder / "model"))
    rows = [{"prompt": f"ask key {k} ->", "answer": str(k)} for k in range(3)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_adapter_is_folded_into_its_model(place):
    whole, plain = models.named(str(place / "adapter")), models.named(str(place / "model"))
    changed = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(plain.params), strict=True)
    ]
    assert max(changed) > 0.1 and whole.config == plain.config


def test_model_and_adapter_are_compared_and_slots_write_the_same(place, capfd):
    how = ("--data", place / "p.jsonl", "--completion", 4, "--context", 32, "--out", place / "answers", "--as-json")
    how += ("--samples", 2, "--temperature", 1.0)
    found = []
    for more in ((), ("--slots", 2)):
        assert run_here("evaluate", place / "model", place / "adapter", *how, *more) == 0
        found.append(json.loads(capfd.readouterr().out))
    texts = [
        [
            [a["text"] for a in json.loads(line)["answers"]]
            for line in Path(m["folder"], "answers.jsonl").read_text().splitlines()
        ]
        for one in found
        for m in one["models"].values()
    ]
    assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]
    assert len(list((place / "answers").glob("*-minus-*.json"))) == 2


@pytest.mark.parametrize(
    "given, sentence",
    [
        (("model", "model"), "is named twice"),
        (("model", "adapter", "none"), "one or two models, and 3 are named"),
        (("model", "--caps", "x"), "--caps x: expected numbers of tokens, as 1024,4096"),
        (("model", "--out", "gs://bucket/folder"), "on a disk|gs:// needs a client"),
        (("nothing@7",), "nothing"),
        (("run",), "is a run without a model, which it leaves at its end: name a checkpoint, .*run@20"),
        (("lost",), "is an adapter and does not name its model: name it with --base"),
    ],
)
def test_what_cannot_be_measured_is_refused(place, capfd, given, sentence):
    (place / "run" / "checkpoints" / "20").mkdir(parents=True, exist_ok=True)
    (place / "run" / "arguments.json").write_text("{}")
    (place / "lost").mkdir(exist_ok=True)
    told = json.loads((place / "adapter" / "adapter_config.json").read_text())
    (place / "lost" / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": None}))
    names = [
        place / name if not name.startswith("-") and "/" not in name and i < 3 and name != "x" else name
        for i, name in enumerate(given)
    ]
    assert run_here("evaluate", *names, "--data", place / "p.jsonl", "--completion", 4, "--context", 32) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(sentence, said)


def test_blocks_keep_the_sampler_busy():
    setting = measure.Setting((), "", measure.Protocol(4, 1.0), tiny.SHAPES, "maths", (), False, 0, "", "", None)
    assert [measure.block(setting._replace(**c)) for c in ({}, {"slots": 8}, {"server": "http://x"})] == [2, 8, 16]


def test_an_unfit_adapter_is_refused(place, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        models.named(str(tmp_path))
