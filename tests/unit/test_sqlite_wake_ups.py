"""Tests of the wake-ups of SQLite: files that are written, locked and replaced."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from django_eventsource.history.database.backend import DatabaseHistory
from django_eventsource.history.database.sqlite_wake_ups import SqliteWakeUps
from django_eventsource.history.wake_ups import Groups

MODES = ["delete", "wal"]
"""The journal modes. The first one is that of a rollback journal."""


class Watch:
    """Watches a file."""

    def __init__(self, name: str | Path) -> None:
        self.wake_ups = SqliteWakeUps(name)
        self.wake_ups.interval_seconds = 0
        self.news: Generator[Groups, None, None] = self.wake_ups.watch()

    def changed(self) -> bool:
        """Return whether the next read of the version finds a change."""
        groups = next(self.news)
        assert groups in (None, ())
        return groups is None


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(tmp_path: Path, mode: str) -> Path:
    """Return the path of a database. Parts of the name have a meaning in URIs."""
    path = tmp_path / "a b?c#d%20.sqlite3"
    create(path, mode)
    return path


def create(path: Path, mode: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={mode}")
        connection.execute("CREATE TABLE t (n)")
        connection.commit()


@pytest.fixture
def writer(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        yield connection


@pytest.fixture
def watch(path: Path) -> Iterator[Watch]:
    watch = Watch(path)
    assert watch.changed()  # what was committed before
    assert not watch.changed()
    yield watch
    watch.news.close()


def insert(writer: sqlite3.Connection) -> None:
    writer.execute("INSERT INTO t VALUES (1)")


def test_a_commit_is_a_change(watch: Watch, writer: sqlite3.Connection) -> None:
    """It is found once."""
    for _ in range(3):
        insert(writer)
        assert watch.changed()
        assert not watch.changed()


def test_a_transaction_that_is_open_or_rolled_back_is_not_a_change(
    watch: Watch, writer: sqlite3.Connection
) -> None:
    writer.execute("BEGIN IMMEDIATE")
    insert(writer)
    assert not watch.changed()
    writer.execute("ROLLBACK")
    assert not watch.changed()


def test_no_lock_is_held_between_two_reads_of_the_version(
    watch: Watch, writer: sqlite3.Connection
) -> None:
    """The writer does not wait for a lock."""
    for _ in range(3):
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("ROLLBACK")
        watch.changed()


@pytest.mark.parametrize("mode", ["delete"])
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_an_exclusive_lock_counts_as_a_change(
    watch: Watch, writer: sqlite3.Connection, end: str
) -> None:
    """So does its end."""
    writer.execute("BEGIN EXCLUSIVE")
    insert(writer)
    assert [watch.changed() for _ in range(3)] == [True, False, False]
    writer.execute(end)
    assert [watch.changed() for _ in range(3)] == [True, False, False]


def test_no_read_of_the_version_waits_for_a_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def open_(*args: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*args, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", open_)
    watch = Watch(path)
    watch.changed()
    assert opened[0].execute("PRAGMA busy_timeout").fetchall() == [(0,)]
    watch.news.close()


def test_the_commits_to_a_file_that_has_replaced_the_database_are_found(
    watch: Watch, path: Path, mode: str
) -> None:
    """The replacement itself is a change too."""
    other = path.with_name("other.sqlite3")
    create(other, mode)
    os.replace(other, path)
    assert watch.changed()
    assert not watch.changed()
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        insert(writer)
        assert watch.changed()


def test_a_missing_file_is_an_error_and_is_not_created(watch: Watch, path: Path) -> None:
    """A file that is about to be replaced may be missing for a moment."""
    path.unlink()
    with pytest.raises(FileNotFoundError):
        watch.changed()
    with pytest.raises(FileNotFoundError):
        Watch(path).changed()
    assert not path.exists()


def test_a_file_that_is_removed_before_it_is_opened_is_not_created(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(path)
    found = watch.wake_ups._file()
    path.unlink()
    monkeypatch.setattr(watch.wake_ups, "_file", lambda: found)
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        watch.changed()
    assert not path.exists()


def test_a_file_that_is_not_a_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("x" * 4096)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        Watch(path).changed()


def test_an_error_of_the_disk_is_not_a_lock(path: Path) -> None:
    class Broken:
        def execute(self, sql: str) -> None:
            raise sqlite3.OperationalError("disk I/O error")

    wake_ups = SqliteWakeUps(path)
    with pytest.raises(sqlite3.OperationalError, match="disk"):
        next(wake_ups._watch(Broken(), wake_ups._file()))  # type: ignore[arg-type]


def test_a_name_may_be_a_uri(path: Path) -> None:
    watch = Watch(f"{path.as_uri()}?cache=private")
    assert watch.changed()
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        insert(writer)
    assert watch.changed()
    watch.news.close()


def test_the_store_reports_commits_itself(path: Path) -> None:
    wake_ups = SqliteWakeUps(path)
    assert not wake_ups.sends
    with pytest.raises(NotImplementedError, match="reports commits"):
        wake_ups.send([None])


@pytest.mark.parametrize("name", [":memory:", "file:x?mode=memory&cache=shared"])
def test_a_database_in_memory_has_no_wake_ups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes cannot write to it."""
    monkeypatch.setitem(connections["default"].settings_dict, "NAME", name)
    assert DatabaseHistory().wake_ups is None


def test_wake_ups_can_be_disabled() -> None:
    assert isinstance(DatabaseHistory().wake_ups, SqliteWakeUps)
    assert DatabaseHistory(WAKE_UP=False).wake_ups is None
