"""Tests of the Event classes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
import uuid
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import pydantic
import pytest
from django.utils.functional import lazystr
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy
from hypothesis import given, strategies

from django_eventsource import events
from django_eventsource.events import (
    Event,
    EventId,
    JSONEvent,
    JSONIdEvent,
    StringEvent,
    StringIdEvent,
    is_durable,
)
from django_eventsource.exceptions import EventSourceError, InvalidEvent
from django_eventsource.protocol.field_rules import check_field, check_id, retry_ms, split_lines

# Classes written for the classic library


class OneLine(StringEvent):
    def get_value(self):
        return [";".join(super().get_value())]


class OneLineWithProperty(StringEvent):
    ACTIONS = ["ping", Event.FINISH]

    def get_value(self):
        return [";".join(self._value.splitlines())]

    value = property(get_value, Event.set_value)


class OneLineId(OneLine, EventId):
    pass


class OneLineIdMixinFirst(EventId, OneLine):
    pass


class OneLineIdWithProperties(OneLineWithProperty, EventId):
    ACTIONS = ["ping", Event.RETRY, Event.FINISH]
    id = property(EventId.get_id)
    value = property(OneLineWithProperty.get_value, OneLineWithProperty.set_value)


class OneLineIdMixinFirstWithProperties(EventId, OneLineWithProperty):
    id = property(EventId.get_id)
    value = property(OneLineWithProperty.get_value, OneLineWithProperty.set_value)


class OneLineTimestamp(OneLine):
    id = property(lambda self: "%f" % time.time())  # noqa: UP031


class OneLineTimestampWithProperty(OneLineWithProperty):
    id = property(lambda self: "%f" % time.time())  # noqa: UP031


WITH_SEQUENCE = [
    OneLineId,
    OneLineIdMixinFirst,
    OneLineIdWithProperties,
    OneLineIdMixinFirstWithProperties,
]
WITH_TIMESTAMP = [OneLineTimestamp, OneLineTimestampWithProperty]
LIVE_ONLY = [OneLine, OneLineWithProperty]


def names(classes):
    return [pytest.param(cls, id=cls.__name__) for cls in classes]


@pytest.mark.parametrize("cls", names(LIVE_ONLY + WITH_SEQUENCE + WITH_TIMESTAMP))
def test_a_classic_subclass_can_override_get_value(cls):
    """The property `value` returns the overridden lines."""
    event = cls("token", "ping", "a\nb\r\nc")
    assert event.value == ["a;b;c"]
    event.value = "d\ne"
    assert event.value == ["d;e"]


@pytest.mark.parametrize("cls", names(LIVE_ONLY))
def test_classic_subclass_without_id_is_live_only(cls):
    assert not is_durable(cls)
    assert cls("token", "ping", "x").id is None


@pytest.mark.parametrize("cls", names(WITH_SEQUENCE))
def test_a_classic_subclass_with_event_id_is_durable(cls):
    """The order of the base classes does not matter."""
    event = cls("token", "ping", "x")
    assert is_durable(cls)
    assert event.id is None
    event._seq = 42
    assert event.id == "42"


@pytest.mark.parametrize("cls", names(WITH_TIMESTAMP))
def test_a_computed_id_is_computed_once(cls, monkeypatch):
    """A timestamp does not change during the life of the event."""
    clock = iter([1.5, 2.5])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    first, second = cls("token", "ping", "x"), cls("token", "ping", "y")
    assert is_durable(cls)
    assert [first.id, first.id, second.id, first.id] == ["1.500000"] * 2 + ["2.500000", "1.500000"]


def test_a_computed_id_is_converted_to_text():

    class Numbered(StringEvent):
        id = property(lambda self: 7)

    assert Numbered("token", "ping", "x").id == "7"


class Identified:
    """A mixin that is not an Event class."""

    calls = 0

    @property
    def id(self):
        self.calls += 1
        return f"{self.action}.{self.calls}"


def test_a_computed_id_of_a_mixin_is_computed_once():

    class WithMixin(Identified, StringEvent):
        pass

    event = WithMixin("token", "ping", "x")
    assert is_durable(WithMixin)
    assert [event.id, event.id] == ["ping.1", "ping.1"]


def test_a_computed_id_of_none_is_computed_again():

    class Late(StringEvent):
        decided = None
        id = property(lambda self: self.decided)

    event = Late("token", "ping", "x")
    assert event.id is None
    event.decided = "x1"
    event.decided, known = "x2", event.id
    assert (known, event.id) == ("x1", "x1")


def test_an_id_property_without_a_getter_raises_attribute_error():

    class WriteOnly(StringEvent):
        id = property(None, lambda self, value: None)

    with pytest.raises(AttributeError):
        WriteOnly("token", "ping", "x").id  # noqa: B018


# Names of the classic library


@pytest.mark.parametrize(
    ("cls", "actions", "content_type", "durable"),
    [
        (Event, ["close"], "text/plain", False),
        (StringEvent, ["ping", "close"], "text/plain", False),
        (JSONEvent, ["ping", "close"], "application/json", False),
        (EventId, ["close"], "text/plain", True),
        (StringIdEvent, ["ping", "retry", "close"], "text/plain", True),
        (JSONIdEvent, ["ping", "retry", "close"], "application/json", True),
    ],
)
def test_every_class_has_the_classic_attributes_and_its_guarantee(
    cls, actions, content_type, durable
):
    assert (cls.LISTEN, cls.FINISH, cls.RETRY) == ("poll", "close", "retry")
    assert (cls.ACTIONS, cls.content_type, is_durable(cls)) == (actions, content_type, durable)


def test_an_event_contains_its_token_action_and_value():
    """The classic name of the token is `target`."""
    event = StringIdEvent("42:42", "ping")
    assert (event.token, event.target, event.action, event.value) == (
        "42:42",
        "42:42",
        "ping",
        [""],
    )
    assert repr(event) == "<StringIdEvent token='42:42' action='ping' id=None>"


# Lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("a\nb", ["a", "b"]),
        ("a\rb", ["a", "b"]),
        ("a\r\nb", ["a", "b"]),
        ("a\n\rb", ["a", "", "b"]),
        ("a\r\n\r\nb", ["a", "", "b"]),
        ("a\n", ["a", ""]),
        ("\n", ["", ""]),
        *((f"a{end}b", [f"a{end}b"]) for end in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"),
    ],
    ids=ascii,
)
def test_lines_end_with_crlf_cr_and_lf_only(text, lines):
    """U+2028, U+0085, VT and FF are not line ends."""
    assert split_lines(text) == lines
    assert StringEvent("token", "ping", text).value == lines


# Values


@pytest.mark.parametrize("value", [5, b"bytes", ["list"], 1.5, True], ids=repr)
def test_a_string_class_refuses_a_value_of_another_type(value):
    with pytest.raises(InvalidEvent, match=r"value of a StringEvent must be a string, not "):
        StringEvent("token", "ping", value)


def test_none_is_the_empty_string():
    """It is the default of the classic library."""
    event = StringEvent("token", "close", None)
    assert event.value == [""]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("42", "42"),
        ('"text"', '"text"'),
        (' {"a":\n 1}\r\n', '{"a":1}'),
        ("null", "null"),
        ('{"a": 1, "a": 2}', '{"a":2}'),
        ('"\\ud800"', '"\\ud800"'),
        ('"\\u2028\\u00e9\\ud83d\\ude00\\n"', '"\u2028é😀\\n"'),
        ("1e308", "1e+308"),
        ("9" * 400, "9" * 400),
        ({"a": [1, None, True]}, '{"a":[1,null,true]}'),
        ((1, 2), "[1,2]"),
        ({1: "x"}, '{"1":"x"}'),
        ("[" * 90 + "]" * 90, "[" * 90 + "]" * 90),
        (None, "null"),
        (False, "false"),
        (0, "0"),
        (["\ud800\r\n"], '["\\ud800\\r\\n"]'),
        (["é\\\udfff", {"\udc00": "\u2028"}], '["é\\\\\\udfff",{"\\udc00":"\u2028"}]'),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_json_value_is_sent_on_one_line(value, line):
    """JSON text is checked and encoded again. A Python value is encoded."""
    event = JSONEvent("token", "ping", value)
    assert event.value == [line]
    line.encode()


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "{",
        "{'a': 1}",
        "1 2",
        "\ufeff1",
        '"a\nb"',
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "1e400",
        "9" * 5000,
        "[" * 100_000,
        float("nan"),
        [float("inf")],
        {1, 2},
        b"1",
        {(1, 2): 3},
        object(),
    ],
    ids=lambda value: "object" if type(value) is object else ascii(value)[:20],
)
def test_a_value_that_json_cannot_represent_is_refused(value):
    with pytest.raises(InvalidEvent, match=r"^The value is not JSON: "):
        JSONEvent("token", "ping", value)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_nan_and_infinity_in_json_text_are_refused(name):
    """The error names the constant."""
    with pytest.raises(InvalidEvent, match=rf"not JSON: {name} is not a JSON value\."):
        JSONEvent("token", "ping", f"[{name}]")


@given(
    strategies.recursive(
        strategies.none()
        | strategies.booleans()
        | strategies.integers()
        | strategies.floats(allow_nan=False, allow_infinity=False)
        | strategies.text(strategies.characters(codec=None)),
        lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
    ).filter(lambda value: not isinstance(value, str))
)
def test_the_line_of_a_json_value_is_decoded_to_the_value(value):
    """It is UTF-8 without CR and LF, also if the value contains lone surrogates."""
    (line,) = JSONEvent("token", "ping", value).value
    line.encode()
    assert not {"\r", "\n"} & set(line)
    assert repr(json.loads(line)) == repr(json.loads(json.dumps(value)))
    assert JSONEvent("token", "ping", line).value == [line]


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Reading:
    at: datetime.datetime
    of: object = None

    def __deepcopy__(self, memo):
        raise AssertionError("Encoding copies nothing.")


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    inner: object


class Model(pydantic.BaseModel):
    at: datetime.date = datetime.date(2026, 2, 1)
    inner: Any = None


class Shape(msgspec.Struct, rename="camel", tag="shape"):
    side_length: Any


class Dumping:
    """A class that is like a pydantic model."""

    def model_dump(self, *, mode):
        return {"mode": mode}


NOON = datetime.datetime(2026, 2, 1, 12, 0, 0, 123456, tzinfo=datetime.UTC)
ID = uuid.UUID("6f0b1c5e-0000-4000-8000-000000000001")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (NOON, '"2026-02-01T12:00:00.123Z"'),
        (datetime.date(2026, 2, 1), '"2026-02-01"'),
        (datetime.time(12, 30), '"12:30:00"'),
        (datetime.timedelta(days=1, seconds=2), '"P1DT00H00M02S"'),
        (Decimal("1.50"), '"1.50"'),
        (ID, f'"{ID}"'),
        (gettext_lazy("Hello"), '"Hello"'),
        (lazystr(""), '""'),
        ([mark_safe("<b>é</b>")], '["<b>é</b>"]'),
        (Point(1, 2), "[1,2]"),
        (
            Reading(NOON, [Slotted(ID)]),
            f'{{"at":"2026-02-01T12:00:00.123Z","of":[{{"inner":"{ID}"}}]}}',
        ),
        (Model(inner=[Decimal(1), ID]), f'{{"at":"2026-02-01","inner":["1","{ID}"]}}'),
        (Shape(NOON.date()), '{"type":"shape","sideLength":"2026-02-01"}'),
        (Dumping(), '{"mode":"json"}'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_json_class_encodes_each_accepted_type(value, line):
    """The value may be nested anywhere."""
    assert JSONEvent("token", "ping", value).value == [line]
    assert JSONEvent("token", "ping", {"a": [value]}).value == [f'{{"a":[{line}]}}']


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (Slotted(Shape([Model()])), '{"type":"shape","sideLength":[{"at":"2026-02-01",'),
        (Slotted(Model(inner=Slotted(1))), '{"at":"2026-02-01","inner":{"inner":1}}'),
        (Slotted(Shape(Slotted(ID))), f'"sideLength":{{"inner":"{ID}"}}'),
        (Slotted(Shape({"a": gettext_lazy("Hi")})), '"sideLength":{"a":"Hi"}'),
        (Slotted(Shape(mark_safe("<b>"))), '"sideLength":"<b>"'),
        (Slotted(Shape(Reading(NOON))), '"sideLength":{"at":"2026-02-01T12:00:00.123456Z"'),
        (Model(inner=Model()), '"inner":{"at":"2026-02-01","inner":null}'),
    ],
    ids=["model", "dataclass", "dataclass2", "lazy", "safe", "reading", "models"],
)
def test_values_of_different_libraries_may_be_nested(value, line):
    assert line in JSONEvent("token", "ping", value).value[0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("hello", "Expecting value: line 1 column 1 (char 0). The string 'hello' was passed"),
        ("'" + "x" * 99, f'The string "\'{"x" * 39}" was passed, and a string must be JSON text'),
        ("1e400", "The string '1e400' was passed, and a string must be JSON text"),
        ([{1}], "Object of type set is not JSON serializable. A value of the type list was"),
        ({"x": float("nan")}, "A value of the type dict was passed. Pass JSON text, a value that"),
        (Slotted(float("inf")), "A value of the type Slotted was passed."),
        (Slotted, "Object of type type is not JSON serializable. A value of the type type was"),
        (Model, "is not JSON serializable. A value of the type ModelMetaclass was passed."),
        (Shape, "is not JSON serializable. A value of the type StructMeta was passed."),
        (Shape(object()), "Object of type object is not JSON serializable. A value of the type"),
        (Shape(float("nan")), "A value of the type Shape was passed."),
        (Model(inner=object()), "A value of the type Model was passed."),
        (datetime.time(1, tzinfo=datetime.UTC), "JSON can't represent timezone-aware times. A"),
    ],
    ids=lambda value: ascii(value)[:20] if isinstance(value, str) else type(value).__name__,
)
def test_the_error_of_a_json_class_names_what_was_passed_and_what_is_accepted(value, reason):
    with pytest.raises(InvalidEvent) as caught:
        JSONEvent("token", "ping", value)
    assert str(caught.value).startswith("The value is not JSON: ")
    assert reason in str(caught.value)


class Failing:
    def model_dump(self, mode):
        raise KeyError("broken")


@dataclasses.dataclass(slots=True)
class Unset:
    number: int = dataclasses.field(init=False)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Failing(), "KeyError('broken'). A value of the type Failing was passed."),
        (Unset(), "AttributeError("),
        (10**5000, "Exceeds the limit (4300 digits)"),
    ],
    ids=["model_dump", "unset", "large"],
)
def test_any_error_of_the_code_of_a_value_is_an_invalid_event(value, reason):
    with pytest.raises(InvalidEvent) as caught:
        JSONEvent("token", "ping", [value])
    assert str(caught.value).startswith(f"The value is not JSON: {reason}".partition(". A")[0])


def test_a_value_that_contains_itself_is_refused():
    reading = Reading(NOON)
    reading.of = [reading]
    shape = Shape(None)
    shape.side_length = [shape]
    model = Model()
    model.inner = [model]
    for value in (reading, shape, model):
        with pytest.raises(InvalidEvent, match="The value is not JSON: "):
            JSONEvent("token", "ping", value)


def test_a_json_value_is_encoded_without_msgspec(monkeypatch):
    """The package does not import it."""
    monkeypatch.delitem(sys.modules, "msgspec")
    assert JSONEvent("token", "ping", [ID, Model()]).value[0].startswith(f'["{ID}",')
    with pytest.raises(InvalidEvent, match="Object of type object is not JSON serializable"):
        JSONEvent("token", "ping", object())
    assert "msgspec" not in sys.modules


# Subclasses of JSONEvent that were written for the classic library


class Wrapped(JSONEvent):
    def set_value(self, value):
        self._value = {"wrapped": value}


class Stamped(JSONEvent):
    def set_value(self, value):
        super().set_value(value)
        self._value["at"] = 1


class StampedLate(JSONEvent):
    def __init__(self, *args):
        super().__init__(*args)
        self._value["at"] = 1


class Shown(JSONEvent):
    def get_value(self):
        return [f"{self._value['a']!r}", *super().get_value()]


class Replaced(JSONEvent):
    def set_value(self, value):
        super().set_value(value)
        self._value = sorted(self._value)


class Converted(JSONEvent):
    def set_value(self, value):
        super().set_value(value)
        self._value = list(json.loads(value))


class WithProperty(JSONEvent):
    def set_value(self, value):
        self._value = json.loads(value)

    value = property(JSONEvent.get_value, set_value)


@pytest.mark.parametrize(
    ("cls", "lines"),
    [
        (Wrapped, [r'{"wrapped":"{\"b\": 2, \"a\": 1}"}']),
        (Stamped, ['{"b":2,"a":1,"at":1}']),
        (StampedLate, ['{"b":2,"a":1,"at":1}']),
        (Shown, ["1", '{"b":2,"a":1}']),
        (Replaced, ['["a","b"]']),
        (Converted, ['["b","a"]']),
        (WithProperty, ['{"b":2,"a":1}']),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_classic_json_subclass_can_override_the_hooks(cls, lines):
    """It may set the value, change it, and read it."""
    event = cls("token", "ping", '{"b": 2, "a": 1}')
    assert event.value == lines
    assert event.value == lines


def test_a_value_that_a_subclass_sets_is_checked_when_it_is_read():
    event = Wrapped("token", "ping", float("nan"))
    with pytest.raises(InvalidEvent, match="The value is not JSON: "):
        event.value  # noqa: B018


@pytest.mark.parametrize("value", ['{"a": 1}', {"a": 1}])
def test_a_json_value_is_encoded_once(monkeypatch, value):
    """Later changes of the value by its owner do not change the event."""
    encoded = []
    encode = events._encode
    monkeypatch.setattr(events, "_encode", lambda one: encoded.append(one) or encode(one))
    event = JSONEvent("token", "ping", value)
    if isinstance(value, dict):
        value["a"] = 2
    assert [event.value, event.value, len(encoded)] == [['{"a":1}'], ['{"a":1}'], 1]
    event.value = [3]
    assert [event.value, len(encoded)] == [["[3]"], 2]


def test_a_circular_or_deeply_nested_json_value_is_refused():
    circular = []
    circular.append(circular)
    deep = []
    for _ in range(200_000):
        deep = [deep]
    for value in (circular, deep):
        with pytest.raises(InvalidEvent):
            JSONEvent("token", "ping", value)
    while deep:
        deep = deep.pop()


@pytest.mark.parametrize("cls", [JSONEvent, JSONIdEvent])
def test_an_empty_json_value_is_null_for_close_only(cls):
    assert cls("token", "close", "").value == ["null"]
    assert cls("token", "close").value == ["null"]
    with pytest.raises(InvalidEvent):
        cls("token", "ping", "")


def test_a_refused_value_does_not_change_the_event():
    event = JSONEvent("token", "ping", "1")
    with pytest.raises(ValueError):
        event.value = "{"
    assert json.loads(event.value[0]) == 1


# Fields


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("", r"The action is empty"),
        ("a\rb", r"The action 'a\\rb' contains CR at position 1"),
        ("ab\n", r"contains LF at position 2"),
        ("\0", r"contains NUL at position 0"),
        ("a\ud800", r"The action contains a lone surrogate at position 1"),
        ("a" * 256, r"The action is 256 characters long; at most 255 are allowed"),
        (5, r"The action must be a text, not 5"),
        (None, r"The action must be a text, not None"),
    ],
    ids=lambda text: ascii(text)[:12],
)
def test_an_action_with_a_line_end_or_nul_is_refused(action, reason):
    """The error contains the character and its position."""
    with pytest.raises(InvalidEvent, match=reason):
        StringEvent("token", action, "x")


@pytest.mark.parametrize(
    "action", ["a" * 255, "\u2028", "\x85\x0b\x0c", " ", "ünï:cöde"], ids=ascii
)
def test_every_other_action_is_accepted(action):
    """Other line separators are allowed."""
    assert StringEvent("token", action, "x").action == action
    check_field("action", action, 255)


@pytest.mark.parametrize("event_id", ["1", "!~", "a" * 255, "1700000000.000000"])
def test_an_id_of_1_to_255_visible_ascii_characters_is_accepted(event_id):
    check_id(event_id)


@pytest.mark.parametrize(
    "event_id",
    ["", " ", "a b", "a\n", "\r", "\0", "\x7f", "é", "\u0661", "\ud800", "a" * 256],
    ids=lambda text: ascii(text)[:12],
)
def test_other_ids_are_refused(event_id):
    with pytest.raises(InvalidEvent, match=r"must be 1 to 255 visible ASCII characters"):
        check_id(event_id)


def test_an_id_that_starts_like_a_cursor_of_several_tokens_is_refused():
    with pytest.raises(InvalidEvent, match="must not start with '~'"):
        check_id("~" + "A" * 19)
    check_id("A~")


@pytest.mark.parametrize(
    ("lines", "milliseconds"),
    [(["0"], 0), (["05"], 5), (["3000"], 3000), (["9" * 15], 10**15 - 1)],
)
def test_a_retry_value_is_one_line_of_ascii_digits(lines, milliseconds):
    assert retry_ms(lines) == milliseconds


@pytest.mark.parametrize(
    "lines",
    [
        *([text] for text in ("", "-5", "+1", "1.5", "1e3", "abc", " 1", "1\n", "1_0", "9" * 16)),
        *(["\u0663"], ["\u00b2"], [], ["1", "2"], ["1", ""]),
    ],
    ids=repr,
)
def test_every_other_retry_value_is_refused(lines):
    """The error states what is expected."""
    with pytest.raises(InvalidEvent, match=r"must be ASCII digits, milliseconds"):
        retry_ms(lines)


def test_a_malformed_value_raises_a_value_error_of_the_package():
    assert issubclass(InvalidEvent, ValueError)
    assert issubclass(InvalidEvent, EventSourceError)
