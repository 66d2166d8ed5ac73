"""What test files share: a tiny random model that reads the recall task, environments of it, and batches without it."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.engine.policies import Environment, Policy
from sdjax.engine.tokens import Shapes, collate
from sdjax.engine.train import all_views
from sdjax.kernels.distributions import normalise
from sdjax.kernels.reductions import reduce_terms, token_mean
from sdjax.models.configs import from_hf
from sdjax.models.pretrained import Pretrained
from sdjax.models.transformer import Transformer, initialise
from sdjax.tasks.recall import recall, vocabulary
from sdjax.tasks.words import CHAT, word_tokenizer
from sdjax.types import Batch, Context, Rollout, Verdict

KEYS = 8
TASK = recall(keys=KEYS)
SHAPES = Shapes(context=128, completion=8, rows=8, tokens_per_chunk=None)
TEMPLATE = CHAT


# ---- a model ------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer():
    """A word-level tokenizer with a chat template; words that recall does not use are all `<unk>`."""
    return word_tokenizer(vocabulary(keys=KEYS))


@functools.cache
def config():
    return from_hf(
        {
            "model_type": "llama",
            "vocab_size": len(tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
        }
    )


@functools.cache
def pretrained(seed=0):
    """A random model; another seed is another teacher."""
    return Pretrained(config(), jax.jit(initialise, static_argnums=0)(model(), jax.random.key(seed)), tokenizer())


def model():
    return Transformer(config())


def policy(params=None, shapes=SHAPES):
    return Policy(model(), pretrained().params if params is None else params, tokenizer(), shapes)


# ---- what was compiled ----------------------------------------------------------------------------------------------

COMPILED: collections.Counter = collections.Counter()


def count(event, seconds, fun_name=None, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED[fun_name] += 1


jax.monitoring.register_event_duration_secs_listener(count)


def programs(name):
    """How many programs of a jitted function of this name were made in this process so far."""
    return COMPILED[f"jit({name})"]


# ---- environments -------------------------------------------------------------------------------------------------


def parity(example, text):
    """A verdict that differs between the answers of a random model: whether the text has an even sum of characters."""
    return Verdict(float(sum(map(ord, text)) % 2 == 0), "try again")


def environment(method=None, *, verify=parity, more=None, shapes=SHAPES):
    """The live policy, the method's snapshots of it (equal to it), and another model as the external `teacher`."""
    others = {"teacher": policy(pretrained(1).params, shapes)}
    snapshots = {name: policy(shapes=shapes) for name in (method.snapshots if method else ())}
    return Environment({"live": policy(shapes=shapes), **others, **snapshots}, verify, more)


def others(environment):
    """Parameters and networks of an environment's policies, as `make_update` wants them."""
    params = {name: p.params for name, p in environment.policies.items() if name != "live"}
    return params, {name: p.model for name, p in environment.policies.items()}


def endless(size=2, start=0):
    """`more()` of an environment: `size` training examples at a time, for ever."""
    examples = itertools.islice(itertools.cycle(TASK.train), start, None)
    return lambda: list(itertools.islice(examples, size))


def collected(method, rollouts, groups=1):
    """The batch of a method's rollouts."""
    return jax.tree.map(jnp.asarray, collate(rollouts, all_views(method), tokenizer(), SHAPES, groups))


# ---- batches without a model --------------------------------------------------------------------------------------


def batch(
    tokens, *, behavior=None, reward=None, group=None, mask=None, taught=True, views=("student", "teacher"), **extras
):
    """A `Batch` of completion tokens `[B, T]`; `taught` says for whom the views other than the student's speak."""
    tokens = jnp.asarray(tokens, jnp.int32)
    rows, length = tokens.shape
    array = lambda x, default, dtype: jnp.asarray(default if x is None else x, dtype)
    speaks = lambda view: jnp.broadcast_to(jnp.asarray(True if view == "student" else taught), (rows,))
    blank = jnp.ones((rows, 1), jnp.int32)
    return Batch(
        completion=tokens,
        present=jnp.ones((rows, length), bool),
        mask=array(mask, jnp.ones((rows, length)), bool),
        behavior_logprobs=array(behavior, jnp.zeros((rows, length)), jnp.float32),
        contexts={view: Context(blank, blank.astype(bool), speaks(view)) for view in views},
        reward=array(reward, jnp.zeros(rows), jnp.float32),
        group=array(group, jnp.zeros(rows), jnp.int32),
        source=jnp.zeros(rows, jnp.int32),
        finished=jnp.ones(rows, bool),
        valid=jnp.ones(rows, bool),
        extras={name: jnp.asarray(x) for name, x in extras.items()},
    )


def reduced(objective, batch, sig, step=0, reduce=token_mean):
    """Loss and terms `{name: []}` of given signals `{name: [B, T]}`."""
    return reduce_terms(objective.terms(batch, sig, step), batch.mask & batch.valid[:, None], reduce)


def loss(objective, batch, step=0, reduce=token_mean, **dists):
    """Loss and terms of given distributions, log-probabilities `[B, T, V]` by view: what the engine does, all at once."""
    return reduced(objective, batch, objective.signals(dists, batch.completion), step, reduce)


def log(*probabilities):
    """Log-probabilities of probabilities, float32."""
    return jnp.log(jnp.asarray(probabilities, jnp.float32))


def logit_gradient(function, dist):
    """The gradient of `function(log-probabilities [..., V]) -> scalar` with respect to logits, at a distribution."""
    return np.asarray(jax.grad(lambda z: function(normalise(z)))(jnp.asarray(dist)))


# ---- rollouts without a model ---------------------------------------------------------------------------------------


def row(text="", reward=0.0, group=0, *, tokens=(1,), example=None, **more):
    """A `Rollout` of the recall task's first example, or of `example`."""
    example = TASK.train[0] if example is None else example
    return Rollout(example, tokens, (0.0,) * len(tokens), text, group, reward=reward, **more)
