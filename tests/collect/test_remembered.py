"""What is remembered by key: a mapping that is never changed in place, whose cost does not grow with it."""

import json

import pytest

from sdjax.collect import remembered
from sdjax.collect.remembered import Remembered, RememberedError


def test_it_is_a_mapping_and_every_version_stays_what_it_was():
    one = Remembered({"a": 1, "b": [2]})
    two = one | {"c": None} | {"a": {"x": (3,)}}
    three = one | {"d": 4}  # of an old version: a log of its own
    assert one == {"a": 1, "b": [2]} and len(one) == 2 and "c" not in one and list(one) == ["a", "b"]
    assert two == {"a": {"x": [3]}, "b": [2], "c": None} and list(two) == ["a", "b", "c"] and len(two) == 3
    assert three == {"a": 1, "b": [2], "d": 4} and three.log is not two.log
    assert {**two} == two and two.get("z") is None and not Remembered()
    with pytest.raises(KeyError):
        one["c"]
    assert repr(one) == "Remembered({'a': 1, 'b': [2]})"


def test_values_are_those_that_a_json_file_gives_back():
    value = [1, 2]
    found = Remembered() | {"a": value, 5: (1.5, True)}
    value.append(3)
    assert found == {"a": [1, 2], "5": [1.5, True]}
    with pytest.raises(RememberedError, match="cannot be saved as JSON: Object of type set"):
        found | {"b": {1}}


def test_more_entries_join_the_same_log_and_touch_nothing_else(monkeypatch):
    """As many bytes become JSON with 100,000 entries as with 10."""
    written, dumps = [], json.dumps

    def counted(value, *rest, **named):
        written.append(dumps(value, *rest, **named))
        return written[-1]

    monkeypatch.setattr(json, "dumps", counted)
    for count in (10, 100_000):
        memory = Remembered({str(i): "text" for i in range(count)})
        written.clear()
        more = memory | {"new": "text", "0": "other"}
        assert written == ['{"new": "text", "0": "other"}']
        assert more.log is memory.log and len(more.log) == count + 2 and len(more) == count + 1
        assert memory["0"] == "text" and more["0"] == "other"


def test_what_was_replaced_is_forgotten_now_and_then():
    memory, longest = Remembered({"a": 0, "b": 0}), 0
    for number in range(5000):
        memory |= {"a": number}
        longest = max(longest, len(memory.log))
        assert memory == {"a": number, "b": 0} and len(memory) == 2
    assert 1000 < longest < 1010


def test_trees_are_taken_apart_and_put_together():
    a, b = Remembered({"x": 1}), Remembered({"y": 2})
    tree = {"method": {"texts": a, "count": 3, "list": [1]}, "refresh": b}
    bare, found = remembered.apart(tree)
    assert bare == {"method": {"texts": None, "count": 3, "list": [1]}, "refresh": None}
    assert found == {("method", "texts"): a, ("refresh",): b}
    assert remembered.together(bare, found) == tree
    assert remembered.together(*remembered.apart(a)) is a and remembered.apart(None) == (None, {})


def test_a_plain_dictionary_becomes_one_where_the_method_begins_with_one():
    initial = {"texts": Remembered(), "count": 0, "other": {"x": 1}}
    found = remembered.like({"texts": {"a": 1}, "count": 2, "other": {"x": 3}, "more": [1]}, initial)
    assert found == {"texts": {"a": 1}, "count": 2, "other": {"x": 3}, "more": [1]}
    assert isinstance(found["texts"], Remembered) and isinstance(found["other"], dict)
    assert remembered.like(found, initial)["texts"] is found["texts"]
