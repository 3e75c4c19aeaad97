"""Tests that the checker finds each kind of problem."""

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


def test_a_complete_stream_has_no_findings() -> None:
    """Everything, once, in order, over two connections."""
    found = checked([*stream(11, 12, 13), Block("13"), *map(event, range(14, 21))])
    assert found == Findings(received=10)
    assert found.clean


def test_events_before_the_first_cursor_are_not_missed() -> None:
    """A listener that joined later has to receive what follows its first cursor only."""
    assert checked([Block("17+"), *map(event, (18, 19, 20))]) == Findings(received=3)


def test_a_missed_event_is_named_as_an_unreported_gap() -> None:
    found = checked(stream(11, 12, 14, 15, 16, 17, 18, 19, 20))
    assert (found.missed, found.gaps) == ([13], 1)
    assert not found.clean
    assert "missed 1: 13 'text 13'" in describe("listener 1", "t", TRUTH, found)


def test_every_gap_counts_and_so_does_the_end() -> None:
    found = checked(stream(11, 14, 17))
    assert (found.missed, found.gaps) == ([12, 13, 15, 16, 18, 19, 20], 3)


def test_a_repeated_event_is_named() -> None:
    """It may be repeated anywhere."""
    found = checked([*stream(*ALL), event(15)])
    assert found.duplicated == [(15, "text 15")]
    assert not found.clean
    assert not found.missed


def test_an_event_published_twice_is_a_repetition() -> None:
    found = check(Truth({11: "x", 12: "x"}), [Block("10"), event(11, "x"), event(12, "x")], 12)
    assert found.duplicated == [(12, "x")]


def test_a_swapped_event_is_out_of_order_and_not_missed() -> None:
    found = checked(stream(11, 13, 12, 14, 15, 16, 17, 18, 19, 20))
    assert found.disordered == [(12, "text 12")]
    assert (found.missed, found.gaps) == ([], 0)
    assert not found.clean


def test_a_gap_that_a_reset_names_is_reported() -> None:
    """The reset is counted."""
    found = checked([*stream(11, 12), reset(12, 18), event(19), event(20)])
    assert found == Findings(received=4, resets=1, covered=6)
    assert found.clean


def test_events_before_the_ones_that_a_reset_names_are_an_unreported_gap() -> None:
    found = checked([*stream(11, 12), reset(14, 18), event(19), event(20)])
    assert (found.missed, found.gaps, found.covered) == ([13, 14], 1, 4)


def test_events_after_the_place_at_which_a_reset_resumes_are_an_unreported_gap() -> None:
    found = checked([*stream(11, 12), reset(12, 15), event(18), event(19), event(20)])
    assert (found.missed, found.gaps) == ([16, 17], 1)


def test_a_reset_without_a_place_covers_the_gap_around_it() -> None:
    """It covers the events between the last one received and the next one."""
    found = checked([*stream(11, 12), reset(None, 18), event(19), event(20)])
    assert (found.covered, found.clean) == (6, True)


def test_a_cursor_that_skips_events_is_an_unreported_gap() -> None:
    """A block with only an id does not report the gap."""
    found = checked([*stream(11, 12), Block("15"), *map(event, range(16, 21))])
    assert (found.missed, found.gaps) == ([13, 14, 15], 1)


def test_an_event_that_was_never_published_is_named() -> None:
    """It was rolled back, or has the text of another one."""
    found = checked([*stream(*ALL), event(21, "rolled back")])
    assert found.strange == [(21, "rolled back")]
    found = checked([Block("10"), event(11, "text 12"), *map(event, range(12, 21))])
    assert found.strange == [(11, "text 12")]


def test_an_event_whose_publishing_failed_may_be_received_or_not() -> None:
    assert checked([*stream(*ALL), event(21, "in doubt")]).clean


@pytest.mark.parametrize("blocks", [[], [Block(None, None, None)]])
def test_a_listener_that_received_nothing_missed_everything(blocks: list[Block]) -> None:
    found = checked(blocks)
    assert (found.missed, found.gaps) == (list(ALL), 1)


def test_the_first_ten_findings_are_shown_and_the_others_are_counted() -> None:
    truth = Truth(dict.fromkeys(range(11, 41), "x"))
    text = describe("listener 1", "t", truth, check(truth, [Block("10")], 40))
    assert "missed 30" in text
    assert "and 20 more" in text


def test_blocks_are_parsed_to_ids_events_and_data() -> None:
    """Comments and retry fields are left out."""
    assert parse(b"id: 5\nevent: ping\ndata: a: b\ndata:c") == Block("5", "ping", "a: b\nc")
    assert parse(b"id: 5") == Block("5")
    assert parse(b": comment") == parse(b"retry: 5") == Block()
