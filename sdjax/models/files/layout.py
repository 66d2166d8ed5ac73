"""Where every tensor of a file lies in our parameters: one table for safetensors and GGUF."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sdjax.models.configs import ModelConfig

# One row per tensor in a file: our path, its name in transformers, its name in GGUF, and how its axes lie.
# `D` width, `K` key-value heads, `G` query heads per key-value head, `H` head width, `F` MLP width, `V` vocabulary;
# `J` queries (and their gates) per key-value head; `L` layers, `A` width and `I` vocabulary of their own
# inputs, `Z` = `L A`.  Of a delta net: `N` key heads, `R` value heads to each, `S` and `W`
# their widths, `U` = `R W`, `C` kernel; `T` = `2 S + 2 U` and `B` = `2 R`.
# "KGH,D -> DKGH": the file holds a matrix [K*G*H, D], we hold [D, K, G, H].  Tensors that share one of our arrays
# stand behind one another, in the table's order, along the axis that is marked with a dot: here "DK.GH".
# Rows with the same name in the file are parts of one tensor, behind one another along its first axis.
_MODEL = """
embed                           model.embed_tokens                       token_embd          V,D   -> VD
final_norm/scale                model.norm                               output_norm         D     -> D
"""
_INPUTS = """
inputs/embed                    model.embed_tokens_per_layer             -                   I,Z   -> IZ
inputs/project                  model.per_layer_model_projection         -                   LA,D  -> DLA
inputs/norm/scale               model.per_layer_projection_norm          -                   A     -> A
"""
_INPUT = """
layers_#/input/gate             model.layers.#.per_layer_input_gate      -                   A,D   -> DA
layers_#/input/out              model.layers.#.per_layer_projection      -                   D,A   -> AD
layers_#/input/norm/scale       model.layers.#.post_per_layer_input_norm -                   D     -> D
"""
_SCALE = """
layers_#/scale                  model.layers.#.layer_scalar!             -                   1     -> 1
"""
_HEAD = """
head                            lm_head                                  output              V,D   -> VD
"""
_QUERIES = """
layers_#/attention/qkv          model.layers.#.self_attn.q_proj          blk.#.attn_q        KJH,D -> DK.JH
"""
_KEYS_VALUES = """
layers_#/attention/qkv          model.layers.#.self_attn.k_proj          blk.#.attn_k        K1H,D -> DK.1H
layers_#/attention/qkv          model.layers.#.self_attn.v_proj          blk.#.attn_v        K1H,D -> DK.1H
"""
_OUT = """
layers_#/attention/out          model.layers.#.self_attn.o_proj          blk.#.attn_output   D,KGH -> KGHD
"""
_DELTA_INPUTS = """
layers_#/delta/mixed            model.layers.#.linear_attn.in_proj_qkv   -                   NS,D  -> DN.S
layers_#/delta/mixed            model.layers.#.linear_attn.in_proj_qkv   -                   NS,D  -> DN.S
layers_#/delta/mixed            model.layers.#.linear_attn.in_proj_qkv   -                   NU,D  -> DN.U
layers_#/delta/mixed            model.layers.#.linear_attn.in_proj_z     -                   NU,D  -> DN.U
layers_#/delta/mixed            model.layers.#.linear_attn.in_proj_b     -                   NR,D  -> DN.R
layers_#/delta/mixed            model.layers.#.linear_attn.in_proj_a     -                   NR,D  -> DN.R
"""
# Of Qwen3-Next: head after head, as we hold them.
_DELTA_INPUTS_BY_HEAD = """
layers_#/delta/mixed            model.layers.#.linear_attn.in_proj_qkvz  -                   NT,D  -> DN.T
layers_#/delta/mixed            model.layers.#.linear_attn.in_proj_ba    -                   NB,D  -> DN.B
"""
_DELTA = """
layers_#/delta/convolution      model.layers.#.linear_attn.conv1d        -                   NS,1,C -> N.S1C
layers_#/delta/convolution      model.layers.#.linear_attn.conv1d        -                   NS,1,C -> N.S1C
layers_#/delta/convolution      model.layers.#.linear_attn.conv1d        -                   NU,1,C -> N.U1C
layers_#/delta/decay_rate       model.layers.#.linear_attn.A_log         -                   NR    -> NR
layers_#/delta/step_bias        model.layers.#.linear_attn.dt_bias       -                   NR    -> NR
layers_#/delta/norm/scale       model.layers.#.linear_attn.norm          -                   W     -> W
layers_#/delta/out              model.layers.#.linear_attn.out_proj      -                   D,NU  -> NUD
"""
_FUSED_QUERIES_KEYS_VALUES = """
layers_#/attention/qkv          model.layers.#.self_attn.qkv_proj        blk.#.attn_qkv      KJH,D -> DK.JH
layers_#/attention/qkv          model.layers.#.self_attn.qkv_proj        blk.#.attn_qkv      K1H,D -> DK.1H
layers_#/attention/qkv          model.layers.#.self_attn.qkv_proj        blk.#.attn_qkv      K1H,D -> DK.1H
"""
_FUSED_MLP = """
layers_#/mlp/gate_up            model.layers.#.mlp.gate_up_proj          blk.#.ffn_up        1F,D  -> D.1F
layers_#/mlp/gate_up            model.layers.#.mlp.gate_up_proj          blk.#.ffn_up        1F,D  -> D.1F
layers_#/mlp/down               model.layers.#.mlp.down_proj             blk.#.ffn_down      D,F   -> FD
"""
_MLP = """
layers_#/mlp/gate_up            model.layers.#.mlp.gate_proj             blk.#.ffn_gate      1F,D  -> D.1F
layers_#/mlp/gate_up            model.layers.#.mlp.up_proj               blk.#.ffn_up        1F,D  -> D.1F
layers_#/mlp/down               model.layers.#.mlp.down_proj             blk.#.ffn_down      D,F   -> FD
"""
# One row for all experts of a layer: `@` is the expert's number, `E` how many there are, `X` one of them, `M` its width,
# `Y` the shared one's.
_EXPERTS = """
layers_#/mlp/router             model.layers.#.mlp.gate                  -                   E,D   -> DE
layers_#/mlp/gate_up            model.layers.#.mlp.experts.@.gate_proj   -                   X1M,D -> XD.1M
layers_#/mlp/gate_up            model.layers.#.mlp.experts.@.up_proj     -                   X1M,D -> XD.1M
layers_#/mlp/down               model.layers.#.mlp.experts.@.down_proj   -                   XD,M  -> XMD
"""
_SHARED = """
layers_#/mlp/shared/gate_up     model.layers.#.mlp.shared_expert.gate_proj -                 1Y,D   -> D.1Y
layers_#/mlp/shared/gate_up     model.layers.#.mlp.shared_expert.up_proj -                   1Y,D   -> D.1Y
layers_#/mlp/shared/down        model.layers.#.mlp.shared_expert.down_proj -                 D,Y    -> YD
layers_#/mlp/shared_gate        model.layers.#.mlp.shared_expert_gate    -                   1,D    -> D1
"""
_MIXTRAL = """
layers_#/mlp/router             model.layers.#.block_sparse_moe.gate     -                   E,D   -> DE
layers_#/mlp/gate_up            model.layers.#.block_sparse_moe.experts.@.w1 -               X1M,D -> XD.1M
layers_#/mlp/gate_up            model.layers.#.block_sparse_moe.experts.@.w3 -               X1M,D -> XD.1M
layers_#/mlp/down               model.layers.#.block_sparse_moe.experts.@.w2 -               XD,M  -> XMD
"""
# All experts in one tensor, gates and inputs in turn; a name that ends in "!" has no ".weight" behind it.
_GPT_OSS = """
layers_#/mlp/router             model.layers.#.mlp.router                -                   E,D    -> DE
layers_#/mlp/router_bias        model.layers.#.mlp.router.bias           -                   E      -> E
layers_#/mlp/gate_up            model.layers.#.mlp.experts.gate_up_proj! -                   E,D,M2 -> ED2M
layers_#/mlp/gate_up_bias       model.layers.#.mlp.experts.gate_up_proj_bias! -              E,M2   -> E2M
layers_#/mlp/down               model.layers.#.mlp.experts.down_proj!    -                   E,M,D  -> EMD
layers_#/mlp/down_bias          model.layers.#.mlp.experts.down_proj_bias! -                 E,D    -> ED
"""
_SINKS = """
layers_#/attention/sinks        model.layers.#.self_attn.sinks!          -                   KG     -> KG
"""
_OUT_BIAS = """
layers_#/attention/out_bias     model.layers.#.self_attn.o_proj.bias     blk.#.attn_output.bias D    -> D
"""
_MLP_BIAS = """
layers_#/mlp/gate_up_bias       model.layers.#.mlp.gate_proj.bias        blk.#.ffn_gate.bias 1F      -> .1F
layers_#/mlp/gate_up_bias       model.layers.#.mlp.up_proj.bias          blk.#.ffn_up.bias   1F      -> .1F
layers_#/mlp/down_bias          model.layers.#.mlp.down_proj.bias        blk.#.ffn_down.bias D       -> D
"""
_QKV_BIAS = """
layers_#/attention/qkv_bias     model.layers.#.self_attn.q_proj.bias     blk.#.attn_q.bias   KJH   -> K.JH
layers_#/attention/qkv_bias     model.layers.#.self_attn.k_proj.bias     blk.#.attn_k.bias   K1H   -> K.1H
layers_#/attention/qkv_bias     model.layers.#.self_attn.v_proj.bias     blk.#.attn_v.bias   K1H   -> K.1H
"""
_QK_NORM = {
    "none": "",
    "head": """
layers_#/attention/q_norm/scale model.layers.#.self_attn.q_norm          blk.#.attn_q_norm   H     -> H
layers_#/attention/k_norm/scale model.layers.#.self_attn.k_norm          blk.#.attn_k_norm   H     -> H
""",
    "flat": """
layers_#/attention/q_norm/scale model.layers.#.self_attn.q_norm          blk.#.attn_q_norm   Q     -> Q
layers_#/attention/k_norm/scale model.layers.#.self_attn.k_norm          blk.#.attn_k_norm   P     -> P
""",
}
_NORMS = {
    "before": """
layers_#/attention_norm/scale   model.layers.#.input_layernorm           blk.#.attn_norm     D     -> D
layers_#/mlp_norm/scale         model.layers.#.post_attention_layernorm  blk.#.ffn_norm      D     -> D
""",
    "after": """
layers_#/attention_norm/scale   model.layers.#.post_attention_layernorm  blk.#.post_attention_norm D -> D
layers_#/mlp_norm/scale         model.layers.#.post_feedforward_layernorm blk.#.post_ffw_norm D    -> D
""",
    "both": """
layers_#/attention_norm/scale   model.layers.#.input_layernorm           blk.#.attn_norm     D     -> D
layers_#/attention_out_norm/scale model.layers.#.post_attention_layernorm blk.#.post_attention_norm D -> D
layers_#/mlp_norm/scale         model.layers.#.pre_feedforward_layernorm blk.#.ffn_norm      D     -> D
layers_#/mlp_out_norm/scale     model.layers.#.post_feedforward_layernorm blk.#.post_ffw_norm D    -> D
""",
}


WHOLE = (".bias", ".A_log", ".dt_bias")
"""How names end that have no ".weight" behind them."""


class Place(NamedTuple):
    """Where one tensor of a file, or rows of it, lie in our parameters, for one configuration."""

    path: str
    name: str  # in transformers
    gguf: str
    shape: tuple[int, ...]  # in the file: of these rows alone
    view: tuple[int, ...]  # the file's shape with every axis apart
    groups: tuple[int, ...]  # how many of them make one axis of the file
    axes: tuple[int, ...]  # of the view, in our order
    axis: int  # ours, along which it shares the array
    start: int
    row: int = 0  # the first of these rows in the file's tensor
    expert: int | None = None  # whose it is: its number along our first axis

    @property
    def ours(self) -> tuple[int, ...]:
        """The shape of the part of our array that this tensor fills."""
        return tuple(self.view[axis] for axis in self.axes)

    @property
    def of_experts(self) -> bool:
        """Whether it is a matrix of an expert, or of all of them."""
        return "experts" in self.name.split(".")

    @property
    def begins(self) -> tuple[int, ...]:
        """Where that part begins along each axis of our array."""
        along = [self.start if axis == self.axis else 0 for axis in range(len(self.axes))]
        return (self.expert, *along[1:]) if self.expert is not None else tuple(along)

    @property
    def ends(self) -> tuple[int, ...]:
        """Where it ends."""
        return tuple(begin + size for begin, size in zip(self.begins, self.ours, strict=True))

    def part(self, array: np.ndarray) -> np.ndarray:
        """This tensor's part of our array: a view."""
        return array[tuple(map(slice, self.begins, self.ends))]

    def read(self, stored: np.ndarray) -> np.ndarray:
        """The file's tensor in our order of axes."""
        return stored.reshape(self.view).transpose(self.axes)

    def written(self, array: np.ndarray) -> np.ndarray:
        """The file's tensor, from our whole array."""
        return np.ascontiguousarray(self.part(array).transpose(np.argsort(self.axes)).reshape(self.shape))


@functools.lru_cache(maxsize=32)
def layout(config: ModelConfig) -> tuple[Place, ...]:
    """Every tensor of a file with this configuration, and where it lies in our parameters."""
    table = _MODEL + ("" if config.tied_embeddings else _HEAD)
    table += _INPUTS if config.shapes and config.shapes.inputs else ""
    table += "".join(_block(config, layer).replace("#", str(layer)) for layer in range(config.layers))
    places, ends, rows = [], {}, {}
    for line in table.split("\n"):
        for expert in range(config.moe.experts) if "@" in line else (None,) if line else ():
            places.append(_place(config, line, ends, rows, expert))
    return tuple(places)


def stored_shapes(
    places: Iterable[Place], named: Callable[[Place], str] = lambda place: place.name
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file by its name, in transformers or as `named`."""
    # The last part of a tensor ends where the tensor ends.
    return {named(place): (place.row + place.shape[0], *place.shape[1:]) for place in places}


def _block(config: ModelConfig, layer: int) -> str:
    """The rows of one layer."""
    own = _INPUT if config.shapes and config.shapes.inputs else ""
    own += _SCALE if config.layer_scale else ""
    return _mixer(config, layer) + _mlp(config, layer) + _NORMS[config.norms] + own


def _mixer(config: ModelConfig, layer: int) -> str:
    if config.has_delta(layer):
        return (_DELTA_INPUTS_BY_HEAD if config.family == "qwen3_next" else _DELTA_INPUTS) + _DELTA
    biases = (
        (_QKV_BIAS if config.qkv_bias else "")
        + (_OUT_BIAS if config.out_bias else "")
        + (_SINKS if config.sinks else "")
    )
    lines = lambda table, some: "".join(line + "\n" for line in table.strip().split("\n")[:some])
    products = config.key_products(layer)
    own = _FUSED_QUERIES_KEYS_VALUES if config.fused else _QUERIES + lines(_KEYS_VALUES, products)
    return own + _OUT + biases + lines(_QK_NORM[config.qk_norm], 2 if products else 1)


def _mlp(config: ModelConfig, layer: int) -> str:
    if config.has_experts(layer):
        own = {"mixtral": _MIXTRAL, "gpt_oss": _GPT_OSS}.get(config.family, _EXPERTS)
        return own + (_SHARED if config.moe.shared else "")
    return (_FUSED_MLP if config.fused else _MLP) + (_MLP_BIAS if config.mlp_bias else "")


def _place(
    config: ModelConfig, line: str, ends: dict[Any, int], rows: dict[str, int], expert: int | None = None
) -> Place:
    path, name, gguf, stored, _, ours = line.replace("@", str(expert)).split()
    layer = int(found[1]) if (found := re.match(r"layers_(\d+)/", path)) else 0
    kv_heads, head_dim = config.heads_of(layer)
    sizes = {"D": config.width, "K": kv_heads, "G": config.heads // kv_heads, "H": head_dim}
    sizes["J"] = sizes["G"] * (2 if config.gated_attention else 1)
    sizes |= {"F": config.mlp_units(layer), "V": config.vocab_size, "1": 1}
    sizes |= {"Q": config.heads * head_dim, "P": kv_heads * head_dim}
    if config.shapes is not None:
        sizes |= {"L": config.layers, "A": config.shapes.inputs, "I": config.shapes.input_vocabulary}
        sizes["Z"] = config.layers * config.shapes.inputs
    if config.moe is not None:
        sizes |= {"E": config.moe.experts, "X": 1, "2": 2, "M": config.moe.width, "Y": config.moe.shared}
    if config.delta is not None:
        shape = config.delta
        sizes |= {"N": shape.heads, "S": shape.key, "R": shape.per_key, "U": shape.values, "W": shape.value}
        sizes |= {"C": shape.kernel, "T": 2 * (shape.key + shape.values), "B": 2 * shape.per_key}
    letters = stored.replace(",", "")
    start, axis = ends.get((path, expert), 0), max(ours.find("."), 0)
    ends[path, expert] = start + sizes[ours.replace(".", "")[axis]]
    shape = tuple(math.prod(sizes[letter] for letter in group) for group in stored.split(","))
    row = rows.get(name, 0)
    rows[name] = row + shape[0]
    return Place(
        path=path,
        name=name.removesuffix("!") if name.endswith((*WHOLE, "!")) else f"{name}.weight",
        gguf=gguf if gguf.endswith(".bias") else f"{gguf}.weight",
        shape=shape,
        view=tuple(sizes[letter] for letter in letters),
        groups=tuple(map(len, stored.split(","))),
        axes=tuple(letters.index(letter) for letter in ours.replace(".", "")),
        axis=axis,
        start=start,
        row=row,
        expert=expert,
    )


def never_read(config: ModelConfig) -> set[str]:
    """Tensors that published files may hold besides, and no class reads: keys and values of layers that borrow them."""
    borrowing = [layer for layer in range(config.layers) if config.keys_of(layer) != layer]
    return {f"model.layers.{n}.self_attn.{name}.weight" for n in borrowing for name in ("k_proj", "v_proj", "k_norm")}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every one of our parameters, by path: "layers_0/attention/qkv"."""
    result: dict[str, tuple[int, ...]] = {}
    for place in layout(config):  # the last tensor of an array ends where the array ends
        result[place.path] = place.ends
    return result
