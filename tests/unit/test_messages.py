"""Channel-layer messages: encoding and decoding."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.messages import MESSAGE_TYPE, decode, encode, encode_probe


@pytest.mark.parametrize(
    ("batch", "seqs"),
    [
        (Batch([b"a"]), None),
        (Batch([b"a"], closes=True), None),
        (Batch([b"a", b"b"], [7, 8], closes=True), range(7, 9)),
        (Batch([b"a"], [1], published=1.5), range(1, 2)),
    ],
)
def test_a_decoded_message_equals_the_encoded_batch(batch: Batch, seqs: range | None) -> None:
    """The sequence numbers follow from the first one."""
    decoded = decode(encode("g", batch))
    assert decoded is not None
    group, found = decoded
    assert (group, found.seqs) == ("g", seqs)
    assert (found.frames, found.closes) == (batch.frames, batch.closes)
    assert found.published == batch.published


def test_a_message_contains_only_types_that_layers_can_encode() -> None:
    """The pub/sub layer and the core layer encode with msgpack."""
    assert encode("g", Batch((b"a", b"b"), (7, 8))) == {
        "type": MESSAGE_TYPE,
        "group": "g",
        "seq": 7,
        "closes": False,
        "frames": [b"a", b"b"],
        "published": None,
    }


def test_a_probe_contains_no_batch() -> None:
    """The hub sends it to itself."""
    assert decode(encode_probe()) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "chat.message"},
        {"type": 5},
        {"seq": "5"},
        {"frames": "text"},
        {"frames": []},
        {"frames": [b"x", "text"]},
        {"frames": [b"x", b""]},
        {"closes": None},
        {"group": 5},
        {"published": "now"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_message_of_another_form_is_an_error(changes: dict[str, Any]) -> None:
    """An empty frame would be an empty chunk, which ends the body of an HTTP response."""
    message = encode("g", Batch([b"a"])) | changes
    with pytest.raises(ValueError, match=r"not a message of django-eventsource: a dict"):
        decode(message)


@pytest.mark.parametrize("message", [None, "text", {}, [MESSAGE_TYPE]])
def test_anything_else_is_an_error(message: object) -> None:
    """Other applications may share the layer."""
    with pytest.raises(ValueError, match="not a message"):
        decode(message)


def test_the_error_names_the_type_of_the_message() -> None:
    """The type shows which application has sent it."""
    with pytest.raises(ValueError, match=r"eventsource: a dict with the type 'chat\.message'$"):
        decode({"type": "chat.message"})


@pytest.mark.parametrize("name", ["type", "frames", "other"])
@pytest.mark.parametrize("levels", [1000, 100_000])
def test_a_deeply_nested_message_is_an_error_like_any_other(name: str, levels: int) -> None:
    """Another error would end the receive task of the hub. msgpack decodes 1,024 levels."""
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    with pytest.raises(ValueError, match="not a message"):
        decode({"type": "chat.message", "group": "g"} | {name: nested})


def test_the_error_of_a_large_message_needs_little_memory() -> None:
    """The text of the message would take four times its memory."""
    message = {"type": "x" * 1_000_000, "data": b"\0" * 1_000_000}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="not a message"):
            decode(message)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
