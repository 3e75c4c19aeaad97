"""Tests of the Event classes."""

from __future__ import annotations

import json
import time

import pytest

from django_eventsource.events import (
    Event,
    EventId,
    JSONEvent,
    JSONIdEvent,
    StringEvent,
    StringIdEvent,
    check_field,
    check_id,
    is_durable,
    retry_ms,
    split_lines,
)
from django_eventsource.exceptions import EventSourceError, InvalidEvent

# The classes that a user of the classic library has


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
def test_classic_subclass_joins_lines(cls):
    """An overridden get_value() is what the value gives, however the property is written."""
    event = cls("token", "ping", "a\nb\r\nc")
    assert event.value == ["a;b;c"]
    event.value = "d\ne"
    assert event.value == ["d;e"]


@pytest.mark.parametrize("cls", names(LIVE_ONLY))
def test_classic_subclass_without_id_is_live_only(cls):
    """A subclass of a class without an id has none either."""
    assert not is_durable(cls)
    assert cls("token", "ping", "x").id is None


@pytest.mark.parametrize("cls", names(WITH_SEQUENCE))
def test_classic_subclass_with_event_id(cls):
    """EventId mixed in, in either order, gives the history's sequence number as the id."""
    event = cls("token", "ping", "x")
    assert is_durable(cls)
    assert event.id is None
    event._seq = 42
    assert event.id == "42"


@pytest.mark.parametrize("cls", names(WITH_TIMESTAMP))
def test_classic_subclass_with_timestamp(cls, monkeypatch):
    """A computed id is computed once: the clock goes on, the event's id does not."""
    clock = iter([1.5, 2.5])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    first, second = cls("token", "ping", "x"), cls("token", "ping", "y")
    assert is_durable(cls)
    assert [first.id, first.id, second.id, first.id] == ["1.500000"] * 2 + ["2.500000", "1.500000"]


def test_computed_id_is_text():
    """Whatever an id property gives is text, since the wire's ids are."""

    class Numbered(StringEvent):
        id = property(lambda self: 7)

    assert Numbered("token", "ping", "x").id == "7"


class Identified:
    """A mixin that knows nothing of Event classes."""

    calls = 0

    @property
    def id(self):
        self.calls += 1
        return f"{self.action}.{self.calls}"


def test_computed_id_of_a_mixin():
    """An id property that comes from a mixin is computed once too."""

    class WithMixin(Identified, StringEvent):
        pass

    event = WithMixin("token", "ping", "x")
    assert is_durable(WithMixin)
    assert [event.id, event.id] == ["ping.1", "ping.1"]


def test_computed_id_of_none_is_asked_again():
    """An id property that gives None has not decided yet."""

    class Late(StringEvent):
        decided = None
        id = property(lambda self: self.decided)

    event = Late("token", "ping", "x")
    assert event.id is None
    event.decided = "x1"
    event.decided, known = "x2", event.id
    assert (known, event.id) == ("x1", "x1")


def test_property_without_getter_is_left_alone():
    """An id property that cannot be read is the user's own error, told by Python."""

    class WriteOnly(StringEvent):
        id = property(None, lambda self, value: None)

    with pytest.raises(AttributeError):
        WriteOnly("token", "ping", "x").id  # noqa: B018


# Names that a user of the classic library knows


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
def test_class_attributes(cls, actions, content_type, durable):
    """Every class has the classic library's attributes, and the guarantee of its id."""
    assert (cls.LISTEN, cls.FINISH, cls.RETRY) == ("poll", "close", "retry")
    assert (cls.ACTIONS, cls.content_type, is_durable(cls)) == (actions, content_type, durable)


def test_attributes_of_an_event():
    """An event knows its token, also by its classic name, its action and its value."""
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
    """CRLF, CR and LF are line ends; U+2028, U+0085, VT and FF are not."""
    assert split_lines(text) == lines
    assert StringEvent("token", "ping", text).value == lines


# Values


@pytest.mark.parametrize("value", [5, b"bytes", ["list"], 1.5, True], ids=repr)
def test_string_value_of_another_type_is_refused(value):
    """A string class takes strings; anything else is told what it is."""
    with pytest.raises(InvalidEvent, match=r"value of a StringEvent must be a string, not "):
        StringEvent("token", "ping", value)


def test_no_string_value_is_the_empty_one():
    """None, the classic library's default, is the empty value."""
    event = StringEvent("token", "close", None)
    assert event.value == [""]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("42", "42"),
        ('"text"', '"text"'),
        (' {"a":\n 1}\r\n', '{"a": 1}'),
        ("null", "null"),
        ('{"a": 1, "a": 2}', '{"a": 2}'),
        ('"\\ud800"', '"\\ud800"'),
        ('"\\u2028\\n"', '"\\u2028\\n"'),
        ("1e308", "1e+308"),
        ("9" * 400, "9" * 400),
        ({"a": [1, None, True]}, '{"a": [1, null, true]}'),
        ((1, 2), "[1, 2]"),
        ({1: "x"}, '{"1": "x"}'),
        ("[" * 90 + "]" * 90, "[" * 90 + "]" * 90),
        (None, "null"),
        (False, "false"),
        (0, "0"),
        (["\ud800\r\n"], '["\\ud800\\r\\n"]'),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_json_value_is_sent_on_one_line(value, line):
    """JSON text is validated and re-encoded on one line, a Python value encoded."""
    event = JSONEvent("token", "ping", value)
    assert event.value == [line]
    line.encode("ascii")


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
def test_json_value_that_is_no_json_is_refused(value):
    """What JSON cannot say is refused with a ValueError, never sent as NaN or raised raw."""
    with pytest.raises(InvalidEvent, match=r"^The value is not JSON: "):
        JSONEvent("token", "ping", value)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_json_text_that_only_python_reads_is_named(name):
    """The error tells which of Python's extensions to JSON was used."""
    with pytest.raises(InvalidEvent, match=f"{name} is no JSON value$"):
        JSONEvent("token", "ping", f"[{name}]")


def test_json_value_that_holds_itself_is_refused():
    """A circular value and one that is nested too deep are refused too."""
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
def test_empty_json_value_is_null_for_close_only(cls):
    """`close` needs no value in a JSON class; every other action does."""
    assert cls("token", "close", "").value == ["null"]
    assert cls("token", "close").value == ["null"]
    with pytest.raises(InvalidEvent):
        cls("token", "ping", "")


def test_refused_value_leaves_the_old_one():
    """A failed assignment changes nothing."""
    event = JSONEvent("token", "ping", "1")
    with pytest.raises(ValueError):
        event.value = "{"
    assert json.loads(event.value[0]) == 1


# Fields


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("", r"The action is empty"),
        ("a\rb", r"The action 'a\\rb' holds CR at position 1"),
        ("ab\n", r"holds LF at position 2"),
        ("\0", r"holds NUL at position 0"),
        ("a\ud800", r"The action holds a lone surrogate at position 1"),
        ("a" * 256, r"The action is 256 characters long; at most 255 are allowed"),
    ],
    ids=lambda text: ascii(text)[:12],
)
def test_action_that_cannot_be_sent_is_refused(action, reason):
    """CR, LF and NUL never reach an event field; the error says which and where."""
    with pytest.raises(InvalidEvent, match=reason):
        StringEvent("token", action, "x")


@pytest.mark.parametrize(
    "action", ["a" * 255, "\u2028", "\x85\x0b\x0c", " ", "ünï:cöde"], ids=ascii
)
def test_action_that_can_be_sent_is_taken(action):
    """Everything else may be an action, other line separators included."""
    assert StringEvent("token", action, "x").action == action
    check_field("action", action, 255)


@pytest.mark.parametrize("event_id", ["1", "!~", "a" * 255, "1700000000.000000"])
def test_visible_ascii_ids_are_taken(event_id):
    """An id of 1 to 255 visible ASCII characters can be sent and asked for."""
    check_id(event_id)


@pytest.mark.parametrize(
    "event_id",
    ["", " ", "a b", "a\n", "\r", "\0", "\x7f", "é", "\u0661", "\ud800", "a" * 256],
    ids=lambda text: ascii(text)[:12],
)
def test_other_ids_are_refused(event_id):
    """Anything else is refused before it reaches an id field or a header."""
    with pytest.raises(InvalidEvent, match=r"must be 1 to 255 visible ASCII characters"):
        check_id(event_id)


def test_an_id_that_looks_like_a_cursor_is_refused():
    """With it a listener would be taken for one of several tokens, and start afresh."""
    with pytest.raises(InvalidEvent, match="must not begin with '~'"):
        check_id("~" + "A" * 19)
    check_id("A~")


@pytest.mark.parametrize(
    ("lines", "milliseconds"),
    [(["0"], 0), (["05"], 5), (["3000"], 3000), (["9" * 15], 10**15 - 1)],
)
def test_retry_takes_ascii_digits(lines, milliseconds):
    """A retry event's value is one line of ASCII digits."""
    assert retry_ms(lines) == milliseconds


@pytest.mark.parametrize(
    "lines",
    [
        *([text] for text in ("", "-5", "+1", "1.5", "1e3", "abc", " 1", "1\n", "1_0", "9" * 16)),
        *(["\u0663"], ["\u00b2"], [], ["1", "2"], ["1", ""]),
    ],
    ids=repr,
)
def test_retry_refuses_everything_else(lines):
    """Anything else is refused, saying what was expected."""
    with pytest.raises(InvalidEvent, match=r"must be ASCII digits, milliseconds"):
        retry_ms(lines)


def test_errors_are_the_packages_own_and_value_errors():
    """A bad value can be caught as ValueError or as this package's error."""
    assert issubclass(InvalidEvent, ValueError)
    assert issubclass(InvalidEvent, EventSourceError)
