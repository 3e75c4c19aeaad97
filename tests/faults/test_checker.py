"""The checker finds what it is there for."""

from __future__ import annotations

import json

import pytest

from tests.faults.checker import Block, Findings, Truth, check, describe, parse

EVENTS = {seq: f"text {seq}" for seq in range(11, 21)}
TRUTH = Truth(EVENTS, perhaps=["in doubt"])


def event(seq: int, text: str | None = None) -> Block:
    return Block(str(seq), "ping", EVENTS.get(seq, "?") if text is None else text)


def reset(after: int | None, resume: int) -> Block:
    data = {"reason": "expired", "after": after and str(after), "resume": str(resume)}
    return Block(str(resume), "reset", json.dumps(data))


def stream(*seqs: int) -> list[Block]:
    return [Block("10"), *map(event, seqs)]


def checked(blocks: list[Block]) -> Findings:
    return check(TRUTH, blocks, 20)


ALL = tuple(range(11, 21))


def test_a_whole_stream_is_clean() -> None:
    """Everything, once, in order, over two connections."""
    found = checked([*stream(11, 12, 13), Block("13"), *map(event, range(14, 21))])
    assert found == Findings(received=10)
    assert found.clean


def test_what_came_before_the_first_cursor_is_not_missed() -> None:
    """A listener that joined later has to see what is after its first cursor only."""
    assert checked([Block("17+"), *map(event, (18, 19, 20))]) == Findings(received=3)


def test_a_missed_event() -> None:
    """It is named, and is one gap that no reset reports."""
    found = checked(stream(11, 12, 14, 15, 16, 17, 18, 19, 20))
    assert (found.missed, found.gaps) == ([13], 1)
    assert not found.clean
    assert "missed 1: 13 'text 13'" in describe("listener 1", "t", TRUTH, found)


def test_several_gaps_and_the_tail() -> None:
    """Every gap counts, also the one after the last event received."""
    found = checked(stream(11, 14, 17))
    assert (found.missed, found.gaps) == ([12, 13, 15, 16, 18, 19, 20], 3)


def test_a_repeated_event() -> None:
    """It is named, wherever it comes again."""
    found = checked([*stream(*ALL), event(15)])
    assert found.duplicated == [(15, "text 15")]
    assert not found.clean
    assert not found.missed


def test_a_text_under_two_numbers() -> None:
    """An event that was published twice is a repetition."""
    found = check(Truth({11: "x", 12: "x"}), [Block("10"), event(11, "x"), event(12, "x")], 12)
    assert found.duplicated == [(12, "x")]


def test_a_swapped_event() -> None:
    """It is out of order, and not missed."""
    found = checked(stream(11, 13, 12, 14, 15, 16, 17, 18, 19, 20))
    assert found.disordered == [(12, "text 12")]
    assert (found.missed, found.gaps) == ([], 0)
    assert not found.clean


def test_a_gap_that_a_reset_reports() -> None:
    """What it names is covered, and counted."""
    found = checked([*stream(11, 12), reset(12, 18), event(19), event(20)])
    assert found == Findings(received=4, resets=1, covered=6)
    assert found.clean


def test_a_reset_that_names_too_little() -> None:
    """What is missing before the place it names is an unreported gap."""
    found = checked([*stream(11, 12), reset(14, 18), event(19), event(20)])
    assert (found.missed, found.gaps, found.covered) == ([13, 14], 1, 4)


def test_a_reset_that_resumes_too_early() -> None:
    """What follows the place from which it says the stream goes on is not covered."""
    found = checked([*stream(11, 12), reset(12, 15), event(18), event(19), event(20)])
    assert (found.missed, found.gaps) == ([16, 17], 1)


def test_a_reset_without_a_place() -> None:
    """It covers what is between the last event received and where the stream goes on."""
    found = checked([*stream(11, 12), reset(None, 18), event(19), event(20)])
    assert (found.covered, found.clean) == (6, True)


def test_a_cursor_that_moves_on_over_events() -> None:
    """A block with nothing but an id hides a gap as well as none."""
    found = checked([*stream(11, 12), Block("15"), *map(event, range(16, 21))])
    assert (found.missed, found.gaps) == ([13, 14, 15], 1)


def test_an_event_that_was_never_published() -> None:
    """One that was rolled back, or that has the text of another."""
    found = checked([*stream(*ALL), event(21, "rolled back")])
    assert found.strange == [(21, "rolled back")]
    found = checked([Block("10"), event(11, "text 12"), *map(event, range(12, 21))])
    assert found.strange == [(11, "text 12")]


def test_an_event_in_doubt() -> None:
    """What failed to be published may come or not."""
    assert checked([*stream(*ALL), event(21, "in doubt")]).clean


@pytest.mark.parametrize("blocks", [[], [Block(None, None, None)]])
def test_a_listener_that_got_nothing(blocks: list[Block]) -> None:
    """It missed everything."""
    found = checked(blocks)
    assert (found.missed, found.gaps) == (list(ALL), 1)


def test_many_findings_are_cut_short() -> None:
    """The first ten are shown, and how many more there are."""
    truth = Truth(dict.fromkeys(range(11, 41), "x"))
    text = describe("listener 1", "t", truth, check(truth, [Block("10")], 40))
    assert "missed 30" in text
    assert "and 20 more" in text


def test_blocks_are_parsed() -> None:
    """Ids, events and data; comments and retry are nothing."""
    assert parse(b"id: 5\nevent: ping\ndata: a: b\ndata:c") == Block("5", "ping", "a: b\nc")
    assert parse(b"id: 5") == Block("5")
    assert parse(b": comment") == parse(b"retry: 5") == Block()
