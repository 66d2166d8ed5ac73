"""Conversations for tests: chat templates of the public kinds that know tools, byte tokenizers for them, and a random model."""

import dataclasses
import functools

import jax
from networks import network
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdjax.engine.policies import Policy
from sdjax.engine.tokens import Shapes
from sdjax.types import Example, Step, World

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}{%- for tool in tools %}{{- "\\n" + (tool | tojson) }}{%- endfor %}
    {{- "\\n</tools>\\nReturn <tool_call></tool_call>.<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}{%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + message.tool_calls[0].function.name + '", ' }}
        {{- '"parameters": ' + (message.tool_calls[0].function.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

GPT_OSS = """{%- set ns = namespace(name=none) %}{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- set ns.name = message.tool_calls[0].function.name %}
        {{- '<|start|>assistant to=functions.' + ns.name + '<|channel|>commentary json<|message|>' }}
        {{- (message.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
    {%- elif message.role == 'assistant' %}
        {%- set ns.name = none %}{%- set end = '<|return|>' if loop.last else '<|end|>' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + end }}
    {%- elif message.role == 'tool' %}
        {%- if ns.name is none %}{{- raise_exception('a tool, but no call before it') }}{%- endif %}
        {{- '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' + message.content + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

NO_TOOLS = """{{- bos_token }}{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content + '</s>' }}{%- endif %}
{%- endfor %}"""

SPECIAL = {
    "qwen3": (QWEN3, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": (LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "gpt_oss": (
        GPT_OSS,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        "<|return|>",
    ),
    "no_tools": (NO_TOOLS, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>"),
}
"""By family: a template of its public kind, its special tokens, and the one that ends a text."""

WHOLE = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
WHOLE += ("user\n", "assistant\n", "\n\n")
STOPS = {"gpt_oss": ("<|return|>", "<|call|>")}


@functools.cache
def tokenizer(name="qwen3"):
    """Every byte is a token, and few other texts."""
    template, special, end = SPECIAL[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    inner.add_tokens([AddedToken(t, normalized=False) for t in WHOLE])
    ends = {"bos_token": special[0], "eos_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **ends)


def stop(name="qwen3"):
    """The ids that end a turn."""
    return tuple(tokenizer(name).convert_tokens_to_ids(t) for t in STOPS.get(name, (SPECIAL[name][2],)))


SHAPES = Shapes(context=32, completion=96, rows=8)


def policy(*, name="qwen3", world=None, shapes=SHAPES, seed=0, ends=1.5, template=None):
    """A random model behind such a tokenizer; its texts end the sooner, the larger `ends` is."""
    model, params = network("mixed", seed)
    assert len(tokenizer(name)) <= model.config.vocab_size
    params = {**params, "head": params["head"].at[stop(name)[0]].multiply(ends)}
    return Policy(model, params, tokenizer(name), shapes, world=world, template=template or {})


EXAMPLES = tuple(
    Example(f"e{i}", ({"role": "user", "content": text},), answer=str(i)) for i, text in enumerate(("a", "bc?", "1+2"))
)


def echo(turns=3, rewards=0.5):
    """A world that repeats how often it has been spoken to, `turns` times."""

    def step(example, messages):
        count = sum(m["role"] == "assistant" for m in messages)
        said = ({"role": "tool", "name": "echo", "content": f"{example.id} {count}"},)
        return Step(said, rewards, count >= turns, f"heard {count}", {"heard": 1.0})

    return World(lambda example: example.prompt, step, turns=turns + 5)


def forgetful(policy: Policy, **changes) -> Policy:
    """The policy with other fields."""
    return dataclasses.replace(policy, **changes)


def key(seed=0):
    return jax.random.key(seed)
