"""Helpers: tiny random decoders, contexts and batches, and a whitespace tokenizer."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdjax.models import transformer
from sdjax.models.configs import ModelConfig
from sdjax.models.ropes import rope
from sdjax.models.transformer import Transformer, initialise
from sdjax.types import Batch, Context

VOCABULARY = 300
"""Tokens of every tiny network: not a multiple of the sampler's block of 256."""

NAMES = ("plain", "mixed")


def config(name: str) -> ModelConfig:
    """`plain`: tied, full attention.  `mixed`: untied, grouped queries with norms, a sliding window in one layer."""
    windows = {"plain": (None, None), "mixed": (3, None)}[name]
    return ModelConfig(
        family={"plain": "llama", "mixed": "qwen3"}[name],
        vocab_size=VOCABULARY,
        width=32,
        layers=len(windows),
        heads=4,
        kv_heads={"plain": 4, "mixed": 2}[name],
        head_dim=8,
        mlp_width=48,
        norm_eps=1e-5,
        max_context=128,
        tied_embeddings=name == "plain",
        windows=windows,
        ropes=(rope(8, 128),) * len(windows),
        qk_norm={"plain": "none", "mixed": "head"}[name],
    )


@functools.cache
def network(name: str, seed: int = 0) -> tuple[Transformer, dict]:
    """A model and parameters large enough that its distributions are neither flat nor certain."""
    model = Transformer(config(name))
    params = jax.jit(initialise, static_argnums=0)(model, jax.random.key(seed))
    params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)
    return model, {**params, "embed": 0.3 * params["embed"]}


def unoptimised():
    """For a module's fixture: programs compile in half the time (and tiny ones run as fast)."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.partial(jax.jit, static_argnums=0)
def everything(model: Transformer, params, tokens):
    """Logits `[S, V]` of one run of tokens `[S]`: no padding, no past, no cache."""
    positions = jnp.arange(len(tokens))[None]
    hidden, _ = transformer.hidden(model, params, tokens[None], positions, jnp.ones((1, len(tokens)), bool))
    return transformer.logits(model, params, hidden)[0]


def full_logits(model: Transformer, params, prompt, completion) -> np.ndarray:
    """Logits `[T, V]` that predict each token of a completion, by one plain forward pass."""
    run = np.concatenate([prompt, completion]).astype(np.int32)
    # Later tokens are never read; one length compiles once.
    later = np.zeros(24 - len(run), np.int32)
    return np.asarray(everything(model, params, jnp.asarray([*run, *later])))[len(prompt) - 1 : len(run) - 1]


def prompts(lengths, seed: int = 0) -> list[np.ndarray]:
    """Random token ids of these lengths."""
    draw = np.random.default_rng(seed)
    return [draw.integers(1, VOCABULARY - 1, n).astype(np.int32) for n in lengths]


def padded(rows, width: int, fill: int = 0) -> tuple[jax.Array, jax.Array]:
    """Rows of token ids left-padded to `width`, and their mask."""
    tokens, mask = np.full((len(rows), width), fill, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


def context(rows, width: int, count: int, fill: int = 0) -> Context:
    """A context for `count` completions."""
    return Context(*padded(rows, width, fill), jnp.ones(count, bool))


def batch(contexts: dict, lengths, width: int, seed: int = 1, fill: int = 0) -> Batch:
    """A batch of random completions of these lengths, right-padded to `width` with `fill`."""
    rows = len(lengths)
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY - 1, (rows, max(lengths))).astype(np.int32)
    tokens = np.pad(tokens, ((0, 0), (0, width - max(lengths))))
    present = np.arange(width) < np.asarray(lengths)[:, None]
    zeros = jnp.zeros(rows, jnp.int32)
    return Batch(
        completion=jnp.asarray(np.where(present, tokens, fill)),
        present=jnp.asarray(present),
        mask=jnp.asarray(present),
        behavior_logprobs=jnp.zeros(present.shape),
        contexts=contexts,
        reward=jnp.zeros(rows),
        group=zeros,
        source=zeros,
        finished=jnp.ones(rows, bool),
        valid=jnp.ones(rows, bool),
        extras={},
    )


TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
ROLES = ("system", "user", "assistant")
WORDS = tuple(f"w{i}" for i in range(VOCABULARY - len(SPECIAL) - len(ROLES)))


@functools.cache
def tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """One token per whitespace-separated word: `w0`, `w1`, ...; any other word is unknown."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *ROLES, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    found.chat_template = TEMPLATE if template else None
    return found


def jaxprs(value):
    """Every equation of a jaxpr, the inner programs' included."""
    inner = getattr(value, "jaxpr", value)
    for equation in getattr(inner, "eqns", ()):
        yield equation
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                yield from jaxprs(part)


def read_lines(path) -> list[dict]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
