"""A model that is none of ours, from the command line: padded embedding, two end tokens, control tokens in the data."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from sdjax.__main__ import main
from sdjax.engine.train import template_of
from sdjax.methods.opsd import opsd
from sdjax.models import pretrained
from sdjax.models.pretrained import Origin
from sdjax.models.transformer import Transformer, initialise

GENERATION = {"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.95}


def test_opsds_teacher_thinks_and_its_student_does_not():
    method = opsd(teacher_thinks=True)
    assert template_of(method, "live") == {"enable_thinking": False}
    assert template_of(method, "teacher") == {"enable_thinking": True}
    assert template_of(opsd(), "live") == template_of(opsd(), "teacher") == {}
    assert template_of(opsd(teacher_thinks=True, ema_rate=1.0), "live") == {"enable_thinking": False}


def saved(folder, rows, seed, width=32):
    """A random model with this many embedding rows over a tokenizer of 272, in bfloat16."""
    tokenizer = importlib.import_module("engine.test_chats").family("qwen3")
    config = dataclasses.replace(tiny.config(), vocab_size=rows, max_context=1024, width=width)
    params = jax.jit(initialise, static_argnums=0)(Transformer(config), jax.random.key(seed))
    params["head"] = params["head"].at[len(tokenizer) :].mul(100)  # loud padding
    pretrained.save(folder, config, jax.device_get(params), tokenizer, Origin("x", "bfloat16", GENERATION))
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [["opsd", "--method.teacher-thinks"], ["gkd", "--teacher", "{}/teacher"]], ids=lambda m: m[0]
)
def test_a_run_on_a_foreign_model(tmp_path, method):
    tokenizer = saved(tmp_path / "model", 320, 0)
    saved(tmp_path / "teacher", 384, 1, width=64)
    lines = [
        {
            "prompt": f"{i}+2?<|im_end|>\n<|im_start|>assistant\n4",
            "answer": f"{i + 2}",
            "solution": f"{i + 2}<|im_end|>",
        }
        for i in range(40)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own = [part.format(tmp_path) for part in method]
    sizes = ["--completion", "16", "--context", "640", "--lora-rank", "2"]
    files = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run")]
    command = ["train", "experiments/own_data.py", "--smoke", "--method", *own, *sizes, *files]
    assert main([*command, "--template.enable-thinking", "false"]) == 0
    written = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert written and max(t for line in written for t in line["tokens"]) < len(tokenizer)
    found = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert GENERATION.items() <= found.items()
    again = pretrained.load(tmp_path / "run" / "model")
    assert "enable_thinking = false" in again.tokenizer.chat_template
    assert {x.dtype.name for x in load_file(tmp_path / "run" / "model" / "model.safetensors").values()} == {"bfloat16"}
    assert np.isfinite(again.params["embed"]).all()
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str((tmp_path / "model").resolve())
