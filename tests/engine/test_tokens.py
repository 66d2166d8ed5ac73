"""Chats to token ids and rollouts to batches: what goes where, and what is refused."""

import dataclasses

import numpy as np
import pytest
from networks import WORDS, tokenizer

from sdjax.collect.contexts import after_demonstrations, with_solution
from sdjax.engine import tokens
from sdjax.engine.chats import render
from sdjax.engine.tokens import (
    FieldError,
    LengthError,
    Shapes,
    bucket,
    collate,
    encode_context,
    left_pad,
    padded_length,
    refuse,
    shorten,
)
from sdjax.models.templates import stop_tokens
from sdjax.types import REFERENCE, STUDENT, UNUSED, ByField, Example, Rollout, Scored, Scores, View


def user(text):
    return ({"role": "user", "content": text},)


def count(messages):
    return len(render(tokenizer(), messages))


# ---- rendering ----------------------------------------------------------------------------------------------------


def test_a_chat_is_rendered_up_to_where_the_assistant_speaks():
    ids = render(tokenizer(), ({"role": "system", "content": "w1"}, *user("w2 w3")))
    wanted = "<|im_start|> system w1 <|im_end|> <|im_start|> user w2 w3 <|im_end|> <|im_start|> assistant"
    assert tokenizer().convert_ids_to_tokens(ids) == wanted.split()


def test_other_keys_of_a_turn_are_never_rendered():
    """Also by a template that prints whatever it is given."""
    assert render(tokenizer(), ({**user("w2")[0], "privileged": "w9"},)) == render(tokenizer(), user("w2"))
    talkative = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, unk_token="<unk>")
    talkative.chat_template = "{% for m in messages %}{{ m.values() | join(' ') }} {% endfor %}"
    ids = talkative.convert_tokens_to_ids(["user", "w2", "w9"])
    assert render(talkative, ({**user("w2")[0], "privileged": "w9"},)) == ids[:2]


def test_without_a_template_the_contents_are_joined():
    ids = render(tokenizer(template=False).__class__(tokenizer_object=tokenizer().backend_tokenizer), user("w1 w2"))
    assert ids == tokenizer().convert_tokens_to_ids(["w1", "w2"])


def test_text_is_decoded_without_special_tokens():
    ids = tokenizer().convert_tokens_to_ids(["w1", "w2", "<|im_end|>"])
    assert tokens.decode_text(tokenizer(), ids) == "w1 w2"


def test_stop_tokens_are_the_end_token_and_the_known_ends_of_turn():
    ids = tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_tokens(tokenizer()) == tuple(sorted(ids))
    other = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, eos_token="w5")
    assert stop_tokens(other) == tuple(sorted([*ids, tokenizer().convert_tokens_to_ids("w5")]))


# ---- buckets ------------------------------------------------------------------------------------------------------


def test_buckets_are_few_and_waste_at_most_a_third():
    sizes = [bucket(length, 10_000) for length in range(1, 2000)]
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(size >= length for length, size in enumerate(sizes, 1))
    assert all(3 * (size - length) < size for length, size in enumerate(sizes, 1) if length >= 16)
    assert all(bucket(size, 10_000) == size for size in sizes)


def test_a_bucket_exceeds_the_limit_only_where_the_row_does():
    assert bucket(17, 20) == 20 and bucket(20, 20) == 20 and bucket(5, 10) == 10
    assert bucket(25, 20) == 25


def test_left_padding():
    ids, mask = left_pad([[5, 6], [], [7, 8, 9]], 100)
    assert ids.shape == mask.shape == (3, 16) and ids.dtype == np.int32
    assert ids[0].tolist() == [0] * 14 + [5, 6] and mask[0].tolist() == [False] * 14 + [True] * 2
    assert not mask[1].any() and mask.sum() == 5


# ---- what is too long ---------------------------------------------------------------------------------------------

QUESTION = "w1 w2 w3 w4"
SECRET = "w11 w12 w13 w14 w15 w16"
DEMONSTRATIONS = (
    *user("w20 w21"),
    {"role": "assistant", "content": "w22"},
    *user("w23 w24"),
    {"role": "assistant", "content": "w25"},
)
SYSTEM = {"role": "system", "content": "w30"}
AROUND = {"header": "w40", "instruction": "w41 w42"}
PLAIN = with_solution(user(QUESTION), SECRET, **AROUND)


def test_refuse_accepts_what_fits_and_says_how_long_the_rest_is():
    assert refuse(PLAIN, count, count(PLAIN)) is PLAIN
    with pytest.raises(LengthError, match=f"{count(PLAIN)} tokens exceeds the {count(PLAIN) - 1} of --context"):
        refuse(PLAIN, count, count(PLAIN) - 1)


CHATS = {
    "secret": PLAIN,
    "system": (SYSTEM, *PLAIN),
    "demonstrations": (SYSTEM, *after_demonstrations(PLAIN, DEMONSTRATIONS)),
    "no secret": (SYSTEM, *DEMONSTRATIONS, *user(QUESTION)),
    "secret in question": with_solution(user("w1 w2 w11 w3"), "w11", **AROUND),
    "secret is question": with_solution(user(QUESTION), QUESTION, **AROUND),
    "secret in header": with_solution(user(QUESTION), "w40", **AROUND),
}


@pytest.mark.parametrize("chat", list(CHATS.values()), ids=list(CHATS))
def test_shortening_never_touches_the_question_the_system_turn_or_the_instruction(chat):
    asked = chat[-1].get("question", QUESTION)
    accepted = 0
    for limit in range(1, count(chat) + 3):
        try:
            short = shorten(chat, count, limit)
        except LengthError:
            assert not accepted, "a larger limit is refused after a smaller one was enough"
            continue
        accepted += 1
        assert count(short) <= limit
        assert short[-1]["content"].startswith(asked)
        assert short[-1]["content"].endswith(chat[-1]["content"].split()[-1])
        assert (short[0] == chat[0]) or chat[0]["role"] != "system"
        roles = [turn["role"] for turn in short if turn["role"] != "system"]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        if limit >= count(chat):
            assert short == chat
    assert accepted >= 3


def test_shortening_drops_old_turns_before_it_cuts_the_secret():
    chat = CHATS["demonstrations"]
    lengths = [len(shorten(chat, count, count(chat) - dropped)) for dropped in (0, 1, 9)]
    assert lengths == [6, 4, 4]
    short = shorten(chat, count, count((SYSTEM, *PLAIN)) - 2)
    assert len(short) == 2 and short[-1]["privileged"].split() == SECRET.split()[:-2]


def test_shortening_cuts_no_more_than_it_must():
    for dropped in range(7):
        short = shorten(PLAIN, count, count(PLAIN) - dropped)
        assert count(short) == count(PLAIN) - dropped
        assert short[-1]["privileged"].split() == SECRET.split()[: 6 - dropped]
    with pytest.raises(LengthError):
        shorten(PLAIN, count, count(PLAIN) - 7)


def test_a_context_is_refused_or_shortened_as_the_shapes_say():
    limit = count(PLAIN) - 2
    assert encode_context(tokenizer(), PLAIN, Shapes(context=count(PLAIN))) == render(tokenizer(), PLAIN)
    with pytest.raises(LengthError):
        encode_context(tokenizer(), PLAIN, Shapes(context=limit))
    assert len(encode_context(tokenizer(), PLAIN, Shapes(context=limit, too_long=shorten))) == limit


# ---- batches ------------------------------------------------------------------------------------------------------

SHAPES = Shapes(context=64, completion=12)
VIEWS = {"student": View(trainable=True), "teacher": View("teacher", per_rollout=True)}


def rollout(group, length, number=0, *, teacher=True, **more):
    """The `number`-th rollout of a group: `length` tokens `10 group + number`."""
    told = user(f"{WORDS[group]} w{50 + number}") if teacher else None
    row = Rollout(
        Example(f"{group}", user(WORDS[group])),
        tokens=(10 * group + number + 1,) * length,
        logprobs=tuple(-0.5 - i for i in range(length)),
        text="",
        group=group,
        **more,
    )
    return row.read_by(student=user(WORDS[group]), teacher=told)


UNEQUAL = [
    rollout(7, 3, 0, reward=1.0),
    rollout(2, 9, 0, source=REFERENCE),
    rollout(7, 12, 1, teacher=False, finished=False),
    rollout(7, 1, 2, reward=0.5),
]


def collated(rollouts=UNEQUAL, views=VIEWS, groups=1, shapes=SHAPES):
    return collate(rollouts, views, tokenizer(), shapes, groups)


def test_groups_stand_together_in_order_and_are_padded_to_the_largest():
    found = collated(groups=3)
    assert found.completion.shape == (9, 12)
    assert found.valid.tolist() == [True] * 4 + [False] * 5
    assert found.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert found.completion[:, 0].tolist() == [71, 72, 73, 21, 0, 0, 0, 0, 0]
    assert found.present.sum(-1).tolist() == [3, 12, 1, 9, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(found.reward, [1, 0, 0.5] + [0] * 6)
    assert found.source.tolist() == [STUDENT] * 3 + [REFERENCE] + [STUDENT] * 5
    assert found.finished.tolist() == [True, False] + [True] * 7


def test_completions_are_padded_on_the_right_with_their_logprobs():
    found = collated()
    assert found.completion[0].tolist() == [71] * 3 + [0] * 9
    np.testing.assert_allclose(found.behavior_logprobs[0], [-0.5, -1.5, -2.5] + [0] * 9)
    np.testing.assert_array_equal(found.mask, found.present)
    assert not found.behavior_logprobs[~found.present].any() and not found.completion[~found.present].any()


def test_a_batch_has_as_many_groups_as_are_given_or_a_multiple():
    assert collate(UNEQUAL[:1], VIEWS, tokenizer(), SHAPES).completion.shape[0] == 1
    assert collate(UNEQUAL, VIEWS, tokenizer(), SHAPES, multiple=4).valid.tolist() == [True] * 4 + [False] * 8


def test_each_row_is_read_by_the_policy_that_its_example_names():
    """The first row with something to read speaks for its group; a group without one, and padding, is the first policy's."""
    views = {**VIEWS, "teacher": View(ByField("who", ("left", "right")), per_rollout=True)}
    named = lambda who, row: dataclasses.replace(row, example=dataclasses.replace(row.example, meta={"who": who}))
    silent = rollout(7, 2, 0, teacher=False)
    rows = [silent, named("right", rollout(7, 3, 1)), named("left", rollout(2, 3)), rollout(4, 3, teacher=False)]
    found = collated(rows, views, groups=4)
    assert found.contexts["teacher"].member.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert found.contexts["student"].member is None and found.contexts["student"].scores is None
    for row, said in ((named("up", rollout(7, 3)), "has who='up'"), (rollout(7, 3), "has no field 'who'")):
        with pytest.raises(FieldError, match=f"example '7' {said}: it must name one of the teachers left, right"):
            collated([row], views)


def test_scores_of_a_server_are_padded_to_the_batch():
    views = {**VIEWS, "teacher": View(Scored("far"), per_rollout=True)}
    scores = lambda tokens, entries: Scores(np.full((tokens, entries), 5), np.full((tokens, entries), -0.5, np.float32))
    rows = [rollout(7, 3).scored(teacher=scores(3, 2)), rollout(7, 2, 1), rollout(2, 1).scored(teacher=scores(1, 4))]
    ids, logprobs = collated(rows, views).contexts["teacher"].scores
    assert ids.shape == logprobs.shape == (4, collated(rows).completion.shape[1], 4)
    wanted = np.full(ids.shape, UNUSED)
    wanted[0, :3, :2], wanted[2, :1, :4] = 5, 5
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(logprobs, np.where(wanted == 5, -0.5, 0.0))


def test_shared_contexts_are_stored_once_per_group_and_own_ones_per_rollout():
    found = collated(groups=3)
    shared, own = found.contexts["student"], found.contexts["teacher"]
    assert shared.tokens.shape[0] == 3 and own.tokens.shape[0] == 9
    assert shared.tokens[0][shared.mask[0]].tolist() == render(tokenizer(), user(WORDS[7]))
    assert shared.tokens[1][shared.mask[1]].tolist() == render(tokenizer(), user(WORDS[2]))
    assert own.tokens[2][own.mask[2]].tolist() == render(tokenizer(), user(f"{WORDS[7]} w52"))
    assert shared.valid.tolist() == [True] * 3 + [True] + [False] * 5
    assert own.valid.tolist() == [True, False, True, True] + [False] * 5


def test_own_contexts_that_do_not_differ_are_stored_once_per_group():
    rows = [rollout(1, 2), rollout(1, 4), rollout(2, 3, teacher=False), rollout(2, 3)]
    alike = collated(rows).contexts["teacher"]
    assert alike.tokens.shape[0] == 2 and alike.valid.tolist() == [True, True, False, True]
    rows[1] = rollout(1, 4, 1)
    differing = collated(rows).contexts["teacher"]
    assert differing.tokens.shape[0] == 4
    silent = [r.read_by(teacher=None) for r in rows]
    assert collated(silent).contexts["teacher"].tokens.shape[0] == 4  # nothing is known of them


def test_every_context_has_a_token_to_read_and_ends_at_the_last_column():
    for context in collated(groups=3).contexts.values():
        assert context.mask[:, -1].all()
        assert (np.diff(context.mask.astype(int), axis=-1) >= 0).all()


def test_a_view_without_a_word_for_one_row_of_a_group_still_has_its_shared_context():
    views = {"teacher": View()}
    rows = [rollout(1, 2), rollout(1, 2, teacher=False)]
    context = collated(rows, views).contexts["teacher"]
    assert context.tokens[0][context.mask[0]].tolist() == render(tokenizer(), rows[0].contexts["teacher"])
    assert context.valid.tolist() == [True, False]


def test_rollouts_that_disagree_about_a_shared_context_are_refused():
    with pytest.raises(ValueError, match=r"'teacher'.*per_rollout=True"):
        collated(views={"teacher": View()})


def test_a_context_that_does_not_fit_is_refused():
    with pytest.raises(LengthError):
        collated(shapes=Shapes(context=5, completion=12))


def test_tokens_kept_out_of_the_loss_stay_present():
    rows = [rollout(1, 4, trained=(False, True, True, False)), rollout(1, 2, 1)]
    found = collated(rows)
    assert found.mask[0].tolist() == [False, True, True, False] + [False] * (found.mask.shape[1] - 4)
    assert found.present[0].sum() == 4 and found.mask[1].sum() == 2


def test_short_completions_get_half_the_length_and_long_ones_what_they_need():
    assert collated([rollout(1, 6)]).completion.shape[1] == 6
    assert collated([rollout(1, 7)]).completion.shape[1] == 12
    assert collated([rollout(1, 20)]).completion.shape[1] == 20


def test_completions_are_padded_to_few_lengths():
    padded = {longest: padded_length(longest, 1000) for longest in (0, 250, 251, 500, 501, 1000, 1001)}
    assert padded == {0: 250, 250: 250, 251: 500, 500: 500, 501: 1000, 1000: 1000, 1001: 1001}
    assert len({padded_length(longest, 2048) for longest in range(2049)}) == 5  # 128, 256, ...
    assert [padded_length(n, 28) for n in (1, 14, 15)] == [14, 14, 28] and padded_length(0, 1) == 1


def test_extras_per_row_and_per_token_of_every_kind():
    rows = [
        rollout(1, 3).with_extras(ratio=[1.5, 2.5, 3.5], span=[True, False, True], gate=0.25, flag=True, pair=7),
        rollout(1, 2, 1),
        rollout(2, 2).with_extras(ratio=np.float32([9, 8]), kind=[1, 2], gate=np.float64(0.5), flag=False),
    ]
    found = collated(rows).extras
    width = collated(rows).completion.shape[1]
    pad = lambda values: [*values] + [0] * (width - len(values))
    assert found["ratio"].dtype == np.float32 and found["ratio"].shape == (4, width)
    assert found["ratio"].tolist() == [pad([1.5, 2.5, 3.5]), pad([]), pad([9, 8]), pad([])]
    assert found["span"].dtype == bool and found["span"].tolist() == [pad([True, False, True]), *[pad([])] * 3]
    assert found["kind"].dtype == np.int32 and found["kind"][2].tolist() == pad([1, 2])
    assert found["gate"].dtype == np.float32 and found["gate"].tolist() == [0.25, 0, 0.5, 0]
    assert found["flag"].dtype == bool and found["flag"].tolist() == [True, False, False, False]
    assert found["pair"].dtype == np.int32 and found["pair"].tolist() == [7, 0, 0, 0]
    assert set(found) == {"ratio", "span", "kind", "gate", "flag", "pair"}
