"""Chat templates: from files and with options, what they write, and the ids that end the assistant's turn."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta

from sdjax.errors import InputError

MARK = "\ue0aa"
"""A character that no template writes: it stands for a turn's content."""


class TemplateError(InputError, ValueError):
    """A chat template cannot be used as it is asked for; the message names the option, the file or the chat."""


KNOWN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def stop_tokens(tokenizer: Any, generation: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Ids that end an assistant's turn, from everything that a model's files say.

    The tokenizer's end token, `eos_token_id` of `generation` (generation_config.json), the ends of turn of public chat
    formats that the tokenizer knows, and what the chat template writes after an assistant's text.  That last one is
    left out where `generation` lists several ids: it then says itself which of the template's tokens end a turn.
    """
    listed = end_ids(generation or {})
    vocabulary = tokenizer.get_vocab()
    ids = {*listed, *(vocabulary[t] for t in KNOWN_ENDS if t in vocabulary)}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if len(listed) < 2 and tokenizer.chat_template is not None:
        ids |= {*turn_ends(tokenizer, str(tokenizer.chat_template))}
    return tuple(sorted(ids))


def end_ids(generation: Mapping[str, Any]) -> list[int]:
    """The ids under `eos_token_id`: one number, or a list of them."""
    found = generation.get("eos_token_id")
    return [] if found is None else [found] if isinstance(found, int) else list(found)


@functools.lru_cache(maxsize=32)
def turn_ends(tokenizer: Any, template: str) -> tuple[int, ...]:
    """The special token that the chat template writes next after an assistant's text, if there is one.

    `template` is the tokenizer's own and keys the cache.
    """
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
    try:
        text = written(tokenizer, chat, generation=False)
    except TemplateError:
        return ()
    after = text.rpartition(MARK)[2] if MARK in text else ""
    added = tokenizer.added_tokens_decoder
    ids = tokenizer.encode(after, add_special_tokens=False)
    return tuple([i for i in ids if i in added and added[i].special][:1])


# ---- what a template writes -----------------------------------------------------------------------------------------


def written(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, generation: bool = True, **options: Any) -> str:
    """A chat as the tokenizer's template writes it, with `generation` up to where the assistant speaks next.

    Raises: TemplateError where the template refuses the chat, or cannot be read.
    """
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, **options)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(t["role"] for t in turns)
        raise TemplateError(f"the chat template cannot write a chat of {roles}: {error}") from error


def option_names(template: str) -> set[str]:
    """The names that a template reads and does not set: its options, and what every template is given.

    Raises: TemplateError where it is no Jinja template.
    """
    try:
        return jinja2.meta.find_undeclared_variables(jinja2.Environment(extensions=[_Generation]).parse(template))
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template is not valid Jinja: {error}") from error


class _Generation(jinja2.ext.Extension):
    """The transformers library's `{% generation %}`, read as a plain block."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "bos_token", "eos_token", "namespace"}
"""What every template is given."""


def own_options(tokenizer: Any) -> list[str]:
    """The options of a tokenizer's chat template."""
    return sorted(option_names(tokenizer.get_chat_template()) - GIVEN)


def parsed(text: str) -> dict[str, Any]:
    """The options of a chat template from a JSON object.  Raises `TemplateError`."""
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise TemplateError(f"--template {text}: expected a JSON object, {error}") from error
    if not isinstance(found, dict):
        raise TemplateError(f'--template {text}: expected a JSON object such as {{"enable_thinking": false}}')
    return found


def with_defaults(template: str, options: Mapping[str, Any]) -> str:
    """A template in which these options have these values, unless a chat is written with others.

    Raises: TemplateError for an option that the template does not read.
    """
    known = sorted(option_names(template) - GIVEN)
    for name in options:
        if name not in known:
            raise TemplateError(
                f"--template.{name.replace('_', '-')}: the chat template has no such option; it has "
                f"{', '.join(n.replace('_', '-') for n in known) or 'none'}"
            )
    literal = lambda value: "none" if value is None else json.dumps(value)
    sets = (f"{{% if {n} is not defined %}}{{% set {n} = {literal(v)} %}}{{% endif %}}" for n, v in options.items())
    return "".join(sets) + template


def prepared(tokenizer: Any, file: str | os.PathLike | None, options: Mapping[str, Any]) -> None:
    """Gives a tokenizer the chat template in `file`, if there is one, and defaults for the template's options.

    Raises: TemplateError where the file cannot be read or is no chat template, or an option does not exist.
    """
    if file:
        try:
            tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"--chat-template {file} cannot be read: {error}") from error
        try:
            option_names(tokenizer.chat_template)
            shown = written(tokenizer, [{"role": "user", "content": MARK}])
        except TemplateError as error:
            raise TemplateError(f"--chat-template {file}: {error}") from error
        if MARK not in shown:
            raise TemplateError(f"--chat-template {file} does not write what a user says (message['content'])")
    if options and not tokenizer.chat_template:
        raise TemplateError("there is no chat template whose options could be set: name one with --chat-template")
    if options and isinstance(tokenizer.chat_template, dict):
        whole = tokenizer.chat_template
        tokenizer.chat_template = {**whole, "default": with_defaults(whole["default"], options)}
    elif options:
        tokenizer.chat_template = with_defaults(tokenizer.chat_template, options)
