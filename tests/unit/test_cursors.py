"""Tests of cursors: one id resumes all tokens of a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_eventsource.delivery.feed import Feed
from django_eventsource.delivery.subscription import Subscriber, Subscription
from django_eventsource.history import Kind, Slice
from django_eventsource.history.memory import MemoryHistory
from django_eventsource.protocol.batches import Batch
from django_eventsource.protocol.cursors import (
    UNKNOWN,
    Cursor,
    join_cursor,
    max_length,
    parse_cursor,
    parse_cursors,
    short_key,
)
from django_eventsource.protocol.field_rules import CURSOR_MARK
from django_eventsource.protocol.frames import Decoder, ServerSentEvent
from django_eventsource.signals import Reason
from django_eventsource.streaming import stream as streams
from django_eventsource.streaming.stream import EventStream
from tests.support.cursors import cursor_texts
from tests.support.events import draft

TOKENS = ["a", "b", "c", "d"]
STEPS = 12
"""Rounds of the loop after which a stream without data counts as silent."""


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use buffers that overflow early, and no pauses."""
    request.getfixturevalue("settings").EVENTSOURCE_STREAM_BUFFER_BYTES = 1600
    monkeypatch.setattr(EventStream, "BACKOFF_SECONDS", (0,))
    monkeypatch.setattr(EventStream, "STALE_SECONDS", 0)


# The text


places = st.dictionaries(
    st.text(min_size=1, max_size=20), st.tuples(st.integers(0, 10**18 - 1), st.booleans())
)


def join(tokens: dict[str, tuple[int, bool]]) -> str:
    return join_cursor((short_key(token), *place) for token, place in tokens.items())


@given(places)
def test_a_joined_cursor_is_split_into_the_cursor_of_each_token(
    tokens: dict[str, tuple[int, bool]],
) -> None:
    """The text fits an id and the stated length."""
    cursor = join(tokens)
    assert cursor.isascii()
    assert cursor.isprintable()
    assert not set(cursor) & set(" +/=&?%#")
    assert len(cursor) == max_length(len(tokens))
    assert cursor_texts(cursor, list(tokens)) == {
        token: f"{seq}+" if reopened else str(seq) for token, (seq, reopened) in tokens.items()
    }


def test_a_cursor_is_found_by_the_hash_of_its_token() -> None:
    """The order of the tokens does not matter, and a new token has no cursor."""
    cursor = join({"a": (1, False), "b": (2, True), "c": (3, False)})
    assert cursor_texts(cursor, ["c", "new", "a"]) == {"c": "3", "new": None, "a": "1"}
    assert cursor_texts(cursor, ["b"]) == {"b": "2+"}


def test_the_cursor_of_a_single_token_belongs_to_the_first_token() -> None:
    """A page that listened to one token may reconnect with more."""
    assert cursor_texts("17", ["a", "b"]) == {"a": "17", "b": None}
    assert cursor_texts("x:abc", ["a", "b"]) == {"a": "x:abc", "b": None}


@pytest.mark.parametrize("nothing", [None, ""])
def test_without_a_cursor_no_token_has_one(nothing: str | None) -> None:
    assert cursor_texts(nothing, ["a", "b"]) == {"a": None, "b": None}


GARBAGE = ["~", "~!", "~AAAA", "~é", "~A", "~" + "A" * 20 + "=", "~" + "A" * 300, "~\n", " "]


@pytest.mark.parametrize("text", GARBAGE)
def test_a_damaged_cursor_is_unknown_for_every_token(text: str) -> None:
    """No token starts without a reset."""
    for token, cursor in parse_cursors(text, ["a", "b"]).items():
        assert cursor is not None, token
        assert not MemoryHistory().locate(token, cursor).known


@given(st.text(max_size=60).map(lambda text: CURSOR_MARK + text) | st.text(max_size=60))
def test_any_text_is_parsed_into_a_cursor_that_a_history_can_look_up(text: str) -> None:
    found = parse_cursors(text, ["a", "b"])
    assert list(found) == ["a", "b"]
    for token, cursor in found.items():
        MemoryHistory().locate(token, cursor)


def test_the_largest_number_that_fits_is_parsed() -> None:
    found = parse_cursors(join({"a": (2**63 - 1, True), "b": (0, False)}), ["a", "b"])
    assert found == {"a": UNKNOWN, "b": Cursor("", 0)}
    assert not MemoryHistory().locate("a", found["a"]).known


@pytest.mark.parametrize("text", ["a\nb", "a b", "é", "\0", "x" * 256, "~x", "~" * 10_000])
def test_a_text_that_cannot_be_a_cursor_is_unknown(text: str) -> None:
    """A cursor consists of up to 255 visible ASCII characters."""
    assert parse_cursor(text) is UNKNOWN
    assert set(parse_cursors(text, ["a", "b"]).values()) == {UNKNOWN}


@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("17", Cursor("17", 17)),
        ("17+", Cursor("17+", 17, reopened=True)),
        ("!", Cursor("!", None)),
        ("x" * 255, Cursor("x" * 255, None)),
        ("9" * 19, Cursor("9" * 19, None)),
    ],
)
def test_a_cursor_is_a_sequence_number_or_an_own_id(text: str, cursor: Cursor) -> None:
    """Only a number of up to 18 digits is a sequence number."""
    assert parse_cursor(text) == cursor
    assert str(cursor) == text


def test_a_joined_cursor_may_be_as_long_as_the_setting_allows() -> None:
    """A page may reconnect with fewer tokens."""
    text = join({str(n): (10**17 + n, False) for n in range(40)})
    assert len(text) == max_length(40) > 255
    assert parse_cursors(text, ["1"], 40) == {"1": Cursor("", 10**17 + 1)}
    assert parse_cursors(text, ["1"]) == {"1": UNKNOWN}
    assert parse_cursors(text, [str(n) for n in range(40)])["39"] == Cursor("", 10**17 + 39)


# Streams without a server


class Hub:
    """A replacement of the hub. The test delivers the messages and starts the history checks."""

    def __init__(self, history: MemoryHistory) -> None:
        self.history = history
        self.feeds: dict[str, Feed] = {}
        self.loop = asyncio.get_running_loop()
        self.failing = False
        self.patience = 0
        """The duration of a read, in steps of the loop."""

    async def subscribe(self, subscriber: Subscriber) -> None:
        for one in subscriber.subscriptions:
            if one.close_buffered:
                continue
            feed = self.feeds.setdefault(one.token, Feed(one.token, lambda: None))
            feed.add(one)
            if feed.last is not None:
                feed.try_go_live(one)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        for one in subscriber.subscriptions:
            if one.token in self.feeds:
                self.feeds[one.token].remove(one)

    def catch_up(self, subscription: Subscription, slice_: Slice) -> bytes:
        return self.feeds[subscription.token].catch_up(subscription, slice_)

    def flush(self, subscriber: Subscriber) -> None:
        pass

    async def read(self, token: str, after: int) -> Slice:
        slice_ = self.history.read(token, after, max_bytes=20)
        for _ in range(self.patience):
            await asyncio.sleep(0)
        if self.failing:
            raise ConnectionError
        return slice_

    def receive(self, token: str, batch: Batch) -> None:
        """Deliver a batch of the channel layer."""
        if token in self.feeds:
            self.feeds[token].receive(batch)

    def repair(self, token: str) -> None:
        """Close a gap and check the history, as the hub does."""
        feed = self.feeds.get(token)
        if feed is None or feed.last is None:
            return
        more = (
            feed.check(feed.last, self.history.heads([token])[token], recent=True) or feed.has_gap
        )
        while more and feed.subscriptions:
            after = feed.last
            more = feed.apply_slice(after, self.history.read(token, after))

    def drop_empty_feeds(self) -> None:
        for token in [token for token, feed in self.feeds.items() if not feed.subscriptions]:
            del self.feeds[token]


class Site:
    """A history, a hub, and streams like those of the view."""

    def __init__(self, **options: Any) -> None:
        self.live_only = 0
        self.history = MemoryHistory(**options)
        self.hub = Hub(self.history)

    def open(self, tokens: list[str], cursor: str) -> EventStream | None:
        """Open a stream as the view does; ``None`` stands for status 204."""
        asked = cursor or None
        cursors = parse_cursors(asked, tokens)
        positions = {token: self.history.locate(token, cursors[token]) for token in tokens}
        if all(position.closed for position in positions.values()):
            return None
        first = positions.pop(tokens[0])
        return EventStream(tokens[0], first, asked=asked, others=positions)

    def publish(
        self, token: str, text: str, kind: Kind = Kind.EVENT, *, lost: bool = False
    ) -> int:
        (entry,) = self.history.append(token, [draft(text, kind=kind)])
        if not lost:
            self.hub.receive(token, entry.batch())
        return entry.seq


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site()
    for token in TOKENS:
        site.publish(token, "start")
    monkeypatch.setattr(streams, "get_hub", lambda: site.hub)
    return site


class Client:
    """A listener that reconnects. Its state is that of its decoder."""

    def __init__(self, site: Site, tokens: list[str], cursor: str = "") -> None:
        self.site = site
        self.tokens = tokens
        self.events: list[ServerSentEvent] = []
        self.stream: EventStream | None = None
        self.reading: asyncio.Task[bytes | None] | None = None
        self.ended = False
        self.connect(cursor)

    def connect(self, cursor: str | None = None) -> bool:
        """Connect with a cursor, by default the last one; return whether it may listen."""
        self.decoder = Decoder(self.decoder.last_event_id if cursor is None else cursor)
        self.stream = self.site.open(self.tokens, self.decoder.last_event_id)
        self.ended = False
        return self.stream is not None

    async def leave(self) -> None:
        """Disconnect."""
        reading, self.reading = self.reading, None
        if reading is not None:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        if self.stream is not None:
            await self.stream.aclose()

    async def reconnect(self, tokens: list[str] | None = None) -> bool:
        """Disconnect and reconnect; return whether it may listen."""
        await self.leave()
        self.tokens = tokens or self.tokens
        return self.connect()

    @property
    def cursor(self) -> str:
        return self.decoder.last_event_id

    async def _next(self) -> bytes | None:
        assert self.stream is not None
        try:
            return await self.stream.__anext__()
        except StopAsyncIteration:
            return None

    async def chunk(self) -> bytes:
        """Return the next bytes; none if the stream has sent none or has ended."""
        if self.reading is None:
            self.reading = asyncio.ensure_future(self._next())
        for _ in range(STEPS):
            await asyncio.sleep(0)
        if not self.reading.done():
            return b""
        reading, self.reading = self.reading, None
        chunk = reading.result()
        self.ended = chunk is None
        return chunk or b""

    async def read(self) -> list[str]:
        """Read all that is sent; return the texts of the events, and the names of special ones."""
        got = []
        while chunk := await self.chunk():
            for event in self.decoder.feed(chunk):
                self.events.append(event)
                got.append(event.data if event.event == "ping" else event.event)
        return got

    def resets(self) -> list[dict[str, Any]]:
        return [json.loads(event.data) for event in self.events if event.event == "reset"]


# Several tokens


async def test_the_id_of_every_event_resumes_all_tokens(site: Site) -> None:
    """A listener continues after the event that it received last."""
    client = Client(site, ["a", "b"])
    assert await client.read() == []
    for text in ["a1", "b1", "b2", "a2", "a3", "b3"]:
        site.publish(text[0], text)
    assert await client.read() == ["a1", "b1", "b2", "a2", "a3", "b3"]
    for index, event in enumerate(client.events):
        late = Client(site, ["a", "b"], event.id)
        expected = ["a1", "b1", "b2", "a2", "a3", "b3"][index + 1 :]
        assert sorted(await late.read()) == sorted(expected)
        await late.leave()
    assert client.resets() == []
    await client.leave()


async def test_the_id_of_a_retry_resumes_all_tokens(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    site.publish("a", "a1")
    site.publish("b", "700", Kind.RETRY)
    assert await client.read() == ["a1"]
    assert client.decoder.retry_ms == 700
    assert await client.reconnect()
    assert await client.read() == []
    assert client.resets() == []
    await client.leave()


async def test_the_joined_cursor_replaces_the_own_id_of_an_event(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    site.publish("b", "b1")
    site.history.append("a", [draft("a1", own_id="own")])
    site.hub.repair("a")
    assert await client.read() == ["b1", "a1"]
    assert client.cursor.startswith(CURSOR_MARK)
    await client.reconnect()
    assert await client.read() == []
    await client.leave()


async def test_live_only_events_do_not_move_the_cursor(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    site.publish("a", "a1")
    site.hub.receive("b", draft("live").batch())
    site.publish("b", "b1")
    assert await client.read() == ["a1", "live", "b1"]
    assert client.events[1].id == client.events[0].id
    await client.reconnect()
    assert await client.read() == []
    await client.leave()


async def test_a_token_that_is_added_starts_at_its_newest_event(site: Site) -> None:
    """The other tokens continue."""
    client = Client(site, ["a", "b"])
    await client.read()
    await client.leave()
    for token in "abc":
        site.publish(token, f"{token}1")
    assert await client.reconnect(["c", "b", "a"])
    assert sorted(await client.read()) == ["a1", "b1"]
    site.publish("c", "c2")
    assert await client.read() == ["c2"]
    assert client.resets() == []
    await client.leave()


async def test_a_token_that_is_removed_and_added_again_starts_at_its_newest_event(
    site: Site,
) -> None:
    """The other tokens continue."""
    client = Client(site, ["a", "b", "c"])
    await client.read()
    assert await client.reconnect(["c", "a"])
    for token in "abc":
        site.publish(token, f"{token}1")
    assert sorted(await client.read()) == ["a1", "c1"]
    assert await client.reconnect(["a", "b", "c"])
    assert await client.read() == []
    site.publish("b", "b2")
    assert await client.read() == ["b2"]
    await client.leave()


async def test_a_page_that_adds_and_removes_a_token_misses_no_event_of_the_first(
    site: Site,
) -> None:
    client = Client(site, ["a"])
    await client.read()
    assert not client.cursor.startswith(CURSOR_MARK)
    await client.leave()
    site.publish("a", "a1")
    assert await client.reconnect(["a", "b"])
    assert await client.read() == ["a1"]
    assert client.cursor.startswith(CURSOR_MARK)
    await client.leave()
    site.publish("a", "a2")
    assert await client.reconnect(["a"])
    assert await client.read() == ["a2"]
    assert not client.cursor.startswith(CURSOR_MARK)
    assert client.resets() == []
    await client.leave()


@pytest.mark.parametrize("cursor", [one for one in GARBAGE if one.isascii() and "\n" not in one])
async def test_an_unknown_cursor_resets_each_token(site: Site, cursor: str) -> None:
    for token in "ab":
        site.publish(token, f"{token}1")
    client = Client(site, ["a", "b"], cursor)
    await client.read()
    assert sorted(reset["token"] for reset in client.resets()) == ["a", "b"]
    assert {reset["reason"] for reset in client.resets()} == {"unknown"}
    site.publish("b", "b2")
    assert await client.read() == ["b2"]
    await client.leave()


# Resets


def trim(history: MemoryHistory, token: str, kept: int) -> None:
    """Remove all but the newest events, as the history does beyond MAX_EVENTS."""
    epoch = history._epochs[token]
    while len(epoch.entries) > kept:
        epoch.drop_oldest()


async def trimmed(site: Site, client: Client, *tokens: str) -> None:
    """Publish and trim events of some tokens while the listener is disconnected."""
    await client.leave()
    for token in tokens:
        for n in range(5):
            site.publish(token, f"{token}{n}")
        trim(site.history, token, 2)


async def test_a_reset_of_one_of_three_tokens_moves_that_token_alone(site: Site) -> None:
    client = Client(site, ["a", "b", "c"])
    await client.read()
    site.publish("b", "b")
    await client.read()
    before = client.cursor
    await trimmed(site, client, "b")
    site.publish("c", "c1")
    assert await client.reconnect()
    assert await client.read() == ["reset", "c1"]
    (reset,) = client.resets()
    assert (reset["reason"], reset["token"], reset["after"]) == ("expired", "b", before)
    assert reset["resume"] == client.events[-2].id
    site.publish("b", "b6")
    assert await client.read() == ["b6"]
    await client.reconnect()
    assert await client.read() == []
    await client.leave()


async def test_a_listener_cut_off_between_two_resets_receives_the_second_one_later(
    site: Site,
) -> None:
    client = Client(site, ["a", "b", "c"])
    await client.read()
    for token in "abc":
        site.publish(token, token)
    await client.read()
    cursor = client.cursor
    await trimmed(site, client, "a", "b", "c")
    whole = Client(site, ["a", "b", "c"], cursor)
    first = await whole.chunk()
    await whole.leave()
    for cut in range(len(first) + 1):
        one = Client(site, ["a", "b", "c"], cursor)
        one.events += one.decoder.feed(first[:cut])
        await one.reconnect()
        await one.read()
        reset_tokens = {reset["token"] for reset in one.resets()}
        assert reset_tokens == {"a", "b", "c"}, f"cut after {cut} bytes of {first!r}"
        await one.leave()


async def test_a_reset_in_the_middle_of_a_stream_moves_its_token_alone(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    site.publish("a", "a0")
    site.publish("b", "b0")
    await client.read()
    for n in range(1, 5):
        site.publish("b", f"b{n}", lost=True)
    trim(site.history, "b", 2)
    site.publish("a", "a1")
    site.hub.repair("b")
    site.publish("a", "a2")
    assert await client.read() == ["a1", "reset", "a2"]
    (reset,) = client.resets()
    assert (reset["reason"], reset["token"]) == ("expired", "b")
    await client.reconnect()
    assert await client.read() == []
    await client.leave()


# Closing


async def test_a_closed_token_stays_closed_while_the_others_continue(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    site.publish("a", "bye", Kind.CLOSE)
    site.publish("a", "a1")
    site.publish("b", "b1")
    assert await client.read() == ["close", "b1"]
    assert not client.ended
    assert await client.reconnect()
    site.publish("a", "a2")
    site.publish("b", "b2")
    assert await client.read() == ["b2"]
    await client.leave()


async def test_the_close_of_the_last_token_ends_the_stream_and_a_reconnect_gets_204(
    site: Site,
) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    site.publish("b", "bye", Kind.CLOSE)
    site.publish("a", "bye", Kind.CLOSE)
    assert await client.read() == ["close", "close"]
    assert client.ended
    assert client.stream is not None
    assert client.stream.reason is Reason.TOKEN_CLOSED
    assert not await client.reconnect()


async def test_events_up_to_each_close_are_replayed_before_the_stream_ends(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    await client.leave()
    for token in "ab":
        site.publish(token, f"{token}1")
        site.publish(token, "bye", Kind.CLOSE)
        site.publish(token, "anew")
    assert await client.reconnect()
    assert await client.read() == ["a1", "close", "b1", "close"]
    assert client.ended
    assert not await client.reconnect()


async def test_a_new_listener_of_a_closed_token_has_a_cursor_that_states_it(site: Site) -> None:
    site.publish("a", "bye", Kind.CLOSE)
    close = site.publish("b", "bye", Kind.CLOSE)
    client = Client(site, ["a", "b"])
    await client.read()
    assert cursor_texts(client.cursor, ["b"]) == {"b": f"{close}+"}
    assert await client.reconnect()
    site.publish("a", "a1")
    assert await client.read() == ["a1"]
    assert cursor_texts(client.cursor, ["b"]) == {"b": f"{close}+"}
    assert await client.reconnect()
    site.publish("b", "b1")
    assert await client.read() == ["b1"]
    assert cursor_texts(client.cursor, ["b"]) == {"b": str(close + 1)}
    site.publish("b", "bye", Kind.CLOSE)
    site.publish("a", "bye", Kind.CLOSE)
    assert await client.read() == ["close", "close"]
    assert not await client.reconnect()


async def test_a_close_that_was_dropped_in_an_overflow_is_read_again(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    await client.chunk()
    site.publish("a", "bye", Kind.CLOSE)
    for n in range(20):
        site.publish("b", f"b{n} {'x' * 100}")
    got = await client.read()
    assert got[0] == "close"
    assert [text.split()[0] for text in got[1:]] == [f"b{n}" for n in range(20)]
    await client.leave()


async def test_a_live_only_close_comes_after_the_events_still_to_be_read(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    await client.leave()
    for n in range(8):
        site.publish("b", f"b{n} {'x' * 30}")
    await client.reconnect()
    await client.chunk()
    site.hub.patience = 5 * STEPS
    await client.chunk()
    site.hub.receive("b", draft("bye", kind=Kind.CLOSE).batch())
    site.hub.patience = 0
    got = []
    for _ in range(20):
        got += await client.read()
    assert [text.split()[0] for text in got] == [*(f"b{n}" for n in range(8)), "close"]
    await client.leave()


async def test_events_still_to_be_read_are_sent_before_the_last_live_only_close(
    site: Site,
) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    await client.leave()
    site.publish("a", "bye", Kind.CLOSE)
    for n in range(8):
        site.publish("b", f"b{n} {'x' * 30}")
    await client.reconnect()
    await client.chunk()
    site.hub.patience = 5 * STEPS
    await client.chunk()
    site.hub.receive("b", draft("bye", kind=Kind.CLOSE).batch())
    site.hub.patience = 0
    got = []
    for _ in range(20):
        got += await client.read()
    assert client.ended
    texts = [text.split()[0] for text in got]
    assert [text for text in texts if text != "close"] == [f"b{n}" for n in range(8)]
    assert texts[-1] == "close"


async def test_a_dropped_live_only_close_is_reported_as_an_overflow(site: Site) -> None:
    client = Client(site, ["a", "b"])
    await client.read()
    site.hub.receive("a", draft("bye", kind=Kind.CLOSE).batch())
    for n in range(20):
        site.publish("b", f"b{n} {'x' * 100}")
    got = await client.read()
    assert got[0] == "close" or {reset["reason"] for reset in client.resets()} == {"overflow"}
    assert len(got) == 21
    await client.leave()


async def test_a_stream_continues_after_an_outage_of_the_history(site: Site) -> None:
    """Events that need no history are sent before it responds."""
    client = Client(site, ["a", "b"])
    await client.read()
    await client.leave()
    site.publish("a", "a1")
    await client.reconnect()
    await client.chunk()
    site.hub.failing = True
    assert await client.chunk() == b""
    site.hub.receive("b", draft("live").batch())
    assert await client.read() == ["live"]
    site.hub.failing = False
    assert await client.read() == ["a1"]
    await client.leave()


# Everything together


class Witness(Client):
    """A listener that checks that it receives every event of each token once and in order.

    The data of an event contains its sequence number. A reset must name its token and the
    position from which the stream continues, and events before that must be missing.
    """

    def __init__(self, site: Site, tokens: list[str]) -> None:
        self.last: dict[str, int] = {}
        self.closed: set[str] = set()
        super().__init__(site, tokens)

    def connect(self, cursor: str | None = None) -> bool:
        self.starts = {token: self.site.history.newest(token)[0] for token in self.tokens}
        self.wire = b""
        self.moves: dict[tuple[str, str], int] = {}
        return super().connect(cursor)

    def receive(self, size: int) -> None:
        """Receive a number of the bytes that were sent, and check every line."""
        taken, self.wire = self.wire[:size], self.wire[size:]
        for line in taken.splitlines(keepends=True):
            for event in self.decoder.feed(line):
                self.check(event)
            self.move()
            if self.cursor:
                # The opening has set the cursor, also for tokens that are new.
                self.last = {**self.starts, **self.last}

    def check(self, event: ServerSentEvent) -> None:
        if event.event == "reset":
            self.check_reset(json.loads(event.data))
            return
        token, _, number = event.data.partition(" ")
        if number == "live":
            return
        seq = int(number.split()[0])
        if token in self.closed:
            # This is correct only if the close was trimmed and a later close was published.
            epoch = self.site.history._epochs[token]
            assert self.last[token] < epoch.kept, "an event follows the close"
            assert self.last[token] != epoch.closed
            self.closed.discard(token)
        assert seq == self.last[token] + 1, f"{token}: {seq} after {self.last[token]}"
        self.last[token] = seq
        if event.event == "close":
            self.closed.add(token)

    def check_reset(self, reset: dict[str, Any]) -> None:
        if reset["reason"] == "overflow":
            assert self.site.live_only, "no live-only event was published"
            return
        token = reset.get("token") or self.tokens[0]
        assert ("token" in reset) == (len(self.tokens) > 1)
        assert reset["reason"] == "expired"
        assert token in self.last, "the token had no position"
        # A feed that is behind reports its own position.
        after = int(reset["after"]) if reset["after"].isdigit() else self.last[token]
        oldest = self.site.history._epochs[token].kept
        assert after <= self.last[token]
        assert oldest > after + 1, f"{token}: no event is missing after {after}"
        cursor = cursor_texts(reset["resume"], self.tokens)[token]
        assert cursor is not None
        self.moves[reset["resume"], token] = int(cursor.rstrip("+"))

    def move(self) -> None:
        """Apply a reset after its cursor was received. Otherwise the next stream repeats it."""
        for (cursor, token), seq in list(self.moves.items()):
            if cursor == self.cursor:
                self.last[token] = seq
                self.closed.discard(token)
                del self.moves[cursor, token]


class Random(Site):
    """A site whose steps are chosen at random."""

    def __init__(self, data: st.DataObject) -> None:
        super().__init__(MAX_EVENTS=8)
        # The numbers do not depend on the clock, because hypothesis repeats the steps.
        self.history._floor = 1000
        self.history.first_seq = lambda floor: floor + 1  # type: ignore[method-assign]
        self.data = data
        self.sent: list[tuple[str, Batch]] = []
        """The published batches, which the layer may deliver any number of times."""
        self.tokens = TOKENS[: data.draw(st.integers(2, 4), "tokens")]
        self.fates = st.tuples(
            st.sampled_from(self.tokens),
            st.sampled_from(["delivered", "delivered", "lost", "live"]),
        )

    def pick(self, *choices: Any) -> Any:
        return self.data.draw(st.sampled_from(choices))

    def happen(self, token: str, kind: Kind, size: int) -> None:
        """Publish a durable event without delivering it."""
        number = self.history.newest(token)[0] + 1
        text = f"{token} {number} {'x' * size}"
        (entry,) = self.history.append(token, [draft(text, kind=kind)])
        self.sent.append((token, entry.batch()))

    async def step(self, client: Witness) -> Witness:
        token = self.pick(*self.tokens)
        match self.pick(
            *["burst"] * 5, *["read"] * 5, "repair", "replay", "cut", "cut", "cut",
            "close", "set", "fresh", "history", "slow",
        ):  # fmt: skip
            case "burst":
                size = self.pick(0, 0, 150)
                for one, fate in self.data.draw(st.lists(self.fates, max_size=8)):
                    if fate == "live":
                        self.live_only += 1
                        self.hub.receive(one, draft(f"{one} live").batch())
                        continue
                    self.happen(one, Kind.EVENT, size)
                    if fate == "delivered":
                        self.hub.receive(*self.sent[-1])
            case "close":
                self.happen(token, Kind.CLOSE, 0)
                self.hub.receive(*self.sent[-1])
            case "replay" if self.sent:
                self.hub.receive(*self.pick(*self.sent[-9:]))
            case "repair":
                self.hub.repair(token)
            case "read":
                for _ in range(self.pick(1, 1, 2, 9)):
                    if client.stream is not None and not client.ended:
                        client.wire += await client.chunk()
                if self.pick(True, True, False):
                    client.receive(len(client.wire))
            case "cut":
                client.receive(self.data.draw(st.integers(0, len(client.wire))))
                await self.reconnect(client)
            case "set" if client.cursor:
                # A token that was removed starts at its newest event when it is added again.
                tokens = self.data.draw(st.permutations(self.tokens))
                tokens = tokens[: self.pick(2, len(tokens))]
                removed = set(client.tokens) - set(tokens)
                await self.reconnect(client, tokens)
                if client.stream is not None:
                    client.last = {
                        one: at for one, at in client.last.items() if one not in removed
                    }
                    client.closed -= removed
                    client.wire += await client.chunk()
                    client.receive(len(client.wire))
            case "fresh":
                await client.leave()
                client = Witness(self, client.tokens)
            case "history":
                self.hub.failing = not self.hub.failing
            case "slow":
                self.hub.patience = self.pick(0, 1, 3 * STEPS)
        return client

    async def reconnect(self, client: Witness, tokens: list[str] | None = None) -> None:
        if not await client.reconnect(tokens):
            assert client.closed >= set(client.tokens), "204 before every close"
        self.hub.drop_empty_feeds()

    async def run(self) -> None:
        for token in TOKENS:
            self.happen(token, Kind.EVENT, 0)
        client = Witness(self, self.tokens)
        for _ in range(len(self.tokens) + 2):
            client.wire += await client.chunk()
        client.receive(len(client.wire))
        for _ in range(self.data.draw(st.integers(5, 40), "steps")):
            client = await self.step(client)
        await self.settle(client)

    async def settle(self, client: Witness) -> None:
        """Check that the listener receives everything after the last step."""
        self.hub.failing = False
        self.hub.patience = 0
        quiet = rounds = 0
        while quiet < 6:  # a slow read takes more than three rounds
            rounds += 1
            assert rounds < 500, "the stream does not become silent"
            if client.ended:
                client.receive(len(client.wire))
                await self.reconnect(client)
            if client.stream is None:
                break
            for token in client.tokens:
                self.hub.repair(token)
            client.wire += await client.chunk()
            quiet = 0 if client.wire or client.ended else quiet + 1
            client.receive(len(client.wire))
        for token in client.tokens:
            if token not in client.closed:
                assert client.last[token] == self.history.newest(token)[0], token
        await client.leave()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_event_arrives_once_or_a_reset_reports_it(data: st.DataObject) -> None:
    """Events are lost, buffers overflow, streams are cut at any byte, and tokens change."""

    async def run() -> None:
        site = Random(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streams, "get_hub", lambda: site.hub)
            await site.run()

    asyncio.run(run())
