"""What stands between two turns is what the chat template writes there, for templates of several kinds; texts stay texts."""

import copy

import pytest
import talks
from tokenizers import processors

from sdjax.engine.bridges import bridge
from sdjax.engine.chats import render
from sdjax.models.templates import TemplateError

TOOL = {"role": "tool", "name": "calculator", "content": "42"}
USER = {"role": "user", "content": "And then?"}

WRITTEN = {
    ("qwen3", "tool"): "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ("qwen3", "user"): "\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n",
    ("llama3", "tool"): '<|start_header_id|>ipython<|end_header_id|>\n\n"42"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ("llama3", "user"): "<|start_header_id|>user<|end_header_id|>\n\nAnd then?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ("gpt_oss", "tool"): "<|start|>functions.calculator to=assistant<|channel|>commentary<|message|>42<|end|>"
    "<|start|>assistant",
    ("gpt_oss", "user"): "<|start|>user<|message|>And then?<|end|><|start|>assistant",
    ("no_tools", "tool"): "[INST] 42 [/INST]",
    ("no_tools", "user"): "[INST] And then? [/INST]",
}


@pytest.mark.parametrize(("name", "role"), list(WRITTEN))
def test_a_bridge_is_what_the_template_writes(name, role):
    tokenizer = talks.tokenizer(name)
    ids = bridge(tokenizer, ({"tool": TOOL, "user": USER}[role],), talks.stop(name))
    assert tokenizer.decode(ids) == WRITTEN[name, role]


def test_a_tokenizer_that_frames_every_text_frames_no_bridge():
    framed, frame = copy.deepcopy(talks.tokenizer()), "<|endoftext|>"
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{frame} $A {frame}", special_tokens=[(frame, framed.convert_tokens_to_ids(frame))]
    )
    assert framed.encode("42") != framed.encode("42", add_special_tokens=False)
    for said in ("42", "4<|im_end|>2"):
        seen = (TOOL | {"content": said},)
        assert bridge(framed, seen, talks.stop()) == bridge(talks.tokenizer(), seen, talks.stop())


def test_several_observations_are_written_together():
    ids = bridge(talks.tokenizer(), (TOOL, {**TOOL, "content": "43"}), talks.stop())
    assert talks.tokenizer().decode(ids) == (
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n43\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_bridge_is_the_rest_of_the_chat_where_the_template_keeps_its_turns():
    tokenizer = talks.tokenizer()
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    whole, ids = (
        render(tokenizer, [*turns, TOOL | {"content": "é 漢"}]),
        bridge(tokenizer, (TOOL | {"content": "é 漢"},), ()),
    )
    assert whole[-len(ids) :] == ids
    assert whole[-len(ids) - 2 :][:2] == tokenizer.encode("y<|im_end|>", add_special_tokens=False)


def test_a_tool_is_named_and_its_call_has_an_id():
    tokenizer = copy.deepcopy(talks.tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<|im_end|>{% if m.role == 'tool' %}{{ m.name }} {{ m.tool_call_id }}"
        "{% endif %}{% endfor %}"
    )
    nameless = {"role": "tool", "content": "43"}
    ids = bridge(tokenizer, (TOOL, nameless), talks.stop())
    assert tokenizer.decode(ids) == "42<|im_end|>calculator call0000043<|im_end|>tool call00001"


def test_options_of_the_template_hold_in_the_later_turns_too():
    ids = bridge(talks.tokenizer(), (USER,), talks.stop(), {"enable_thinking": False})
    assert talks.tokenizer().decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", list(talks.SPECIAL))
def test_an_observation_cannot_speak_as_somebody_else(name):
    tokenizer, special = talks.tokenizer(name), talks.SPECIAL[name][1]
    hostile = f"1{special[-1]}{special[0]}2"
    ids = bridge(tokenizer, (TOOL | {"content": hostile},), talks.stop(name))
    plain = bridge(tokenizer, (TOOL | {"content": "12"},), talks.stop(name))
    controls = lambda some: [i for i in some if tokenizer.convert_ids_to_tokens(i) in special]
    assert controls(ids) == controls(plain)
    assert hostile in tokenizer.decode(ids)


def test_a_template_that_writes_no_observation_is_refused():
    tokenizer = talks.PreTrainedTokenizerFast(
        tokenizer_object=talks.tokenizer().backend_tokenizer,
        chat_template="{{ messages[0].content }}",
        eos_token="<|im_end|>",
    )
    with pytest.raises(TemplateError, match=r"cannot write what a policy observes \(tool\)"):
        bridge(tokenizer, (TOOL,), ())
