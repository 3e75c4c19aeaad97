"""``publish_changes()``."""

from __future__ import annotations

import gc
import importlib
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
from django.apps import apps
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.core import serializers
from django.core.exceptions import AppRegistryNotReady
from django.db import connection, connections, transaction
from django.db.models import F
from django.db.models.signals import post_delete, post_save
from django.test.utils import CaptureQueriesContext

import django_eventsource
from django_eventsource import publish_changes, read_history
from django_eventsource.events import JSONIdEvent, StringIdEvent
from django_eventsource.exceptions import InvalidEvent, InvalidParameter, InvalidToken
from django_eventsource.history import History, get_history
from django_eventsource.model_changes import ModelChanges
from tests.support.histories import ALIASES, MARIADB, SERVERS, before_oldest
from tests.support.pages import blocks
from tests.support.shop.models import (
    Courier,
    Line,
    Numbered,
    Order,
    OrderProxy,
    RushOrder,
    RushOrderProxy,
)
from tests.support.valkey import shared_server
from tests.support.waiting import PROCESS_PATIENCE_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)

Publish = Callable[..., ModelChanges[Any]]
Stored = Callable[..., list[str]]


@pytest.fixture
def changes() -> Iterator[Publish]:
    """Return ``publish_changes()`` with a token. What it connects is disconnected at the end."""
    made = []

    def publish(model: Any = Order, **options: Any) -> ModelChanges[Any]:
        options = {"token": by_customer, "serialize": status, **options}
        made.append(publish_changes(model, **options))
        return made[-1]

    yield publish
    for one in made:
        one.disconnect()


@pytest.fixture
def stored(memory_history: History) -> Stored:
    """Return a function for the actions and texts of the events of a token."""

    def read(token: str = "c:1") -> list[str]:
        entries = memory_history.read(token, before_oldest(memory_history, token)).entries
        return [f"{entry.draft.action} {entry.draft.data.decode()}" for entry in entries]

    return read


def by_customer(order: Order) -> str:
    return f"c:{order.customer}"


def status(order: Order, change: str) -> str:
    """Return what the object contains and the change, to see which object is passed."""
    return f"{order.status} {order.count} {change}"


# Signals


def test_what_is_created_updated_and_deleted_is_published(changes: Publish, stored: Stored):
    changes()
    order = Order.objects.create(customer=1)
    order.count += 1
    order.save()
    order.delete()
    assert stored() == ["created new 0 created", "updated new 1 updated", "deleted new 1 deleted"]


def test_an_event_contains_only_the_primary_key_by_default(changes: Publish, stored: Stored):
    changes(serialize=None)
    order = Order.objects.create(customer=1)
    pk = order.pk
    order.delete()
    assert stored() == [f'created {{"pk":{pk}}}', f'deleted {{"pk":{pk}}}']


def test_changes_are_published_at_the_commit_and_in_order(changes: Publish, stored: Stored):
    changes()
    with transaction.atomic():
        order = Order.objects.create(customer=1)
        for order.count in (1, 2):
            order.save()
        assert stored() == []
    assert stored() == ["created new 0 created", "updated new 1 updated", "updated new 2 updated"]


def test_changes_that_are_rolled_back_are_not_published(changes: Publish, stored: Stored):
    """Those of a savepoint are rolled back alone."""
    changes()
    with pytest.raises(LookupError), transaction.atomic():
        Order.objects.create(customer=1)
        raise LookupError
    assert stored() == []
    with transaction.atomic():
        order = Order.objects.create(customer=1)
        with pytest.raises(LookupError), transaction.atomic():
            order.delete()
            raise LookupError
    assert stored() == ["created new 0 created"]


def test_an_object_that_moves_is_deleted_from_the_old_token_and_created_for_the_new_one(
    changes: Publish, stored: Stored
):
    """The old token does not receive the new values."""
    changes()
    order = Order.objects.create(customer=1)
    order.customer, order.status = 2, "secret"
    order.save()
    assert stored("c:1") == ["created new 0 created", "deleted new 0 deleted"]
    assert stored("c:2") == ["created secret 0 created"]


def test_a_stale_object_is_deleted_from_the_token_that_is_stored(changes: Publish, stored: Stored):
    changes()
    stale = Order.objects.create(customer=1)
    fresh = Order.objects.get()
    fresh.customer = 2
    fresh.save()
    stale.customer = 3
    stale.save()
    assert stored("c:2") == ["created new 0 created", "deleted new 0 deleted"]
    assert stored("c:3") == ["created new 0 created"]
    stale.customer = 4
    stale.delete()  # its row has another customer
    assert stored("c:3")[1:] == ["deleted new 0 deleted"]
    assert stored("c:4") == []


def test_fields_that_are_not_updated_do_not_change_the_event(changes: Publish, stored: Stored):
    """Neither its token nor its value."""
    changes()
    order = Order.objects.create(customer=1)
    order.customer, order.status, order.count = 2, "paid", 9
    order.save(update_fields=["status"])
    assert stored("c:1")[1:] == ["updated paid 0 updated"]
    order.save(update_fields=["customer"])
    assert stored("c:1")[2:] == ["deleted paid 0 deleted"]
    assert stored("c:2") == ["created paid 0 created"]
    order.save(update_fields=[])  # saves nothing
    assert len(stored("c:2")) == 1


@pytest.mark.parametrize("deferred", ["customer", "status"])
def test_an_object_with_deferred_fields_is_published_as_it_is_stored(
    changes: Publish, stored: Stored, deferred: str
):
    changes()
    Order.objects.create(customer=1)
    order = Order.objects.defer(deferred).get()
    order.count = 5
    order.save()
    assert stored()[1:] == ["updated new 5 updated"]
    assert deferred in order.get_deferred_fields()


def test_expressions_and_converted_values_are_published_as_they_are_stored(
    changes: Publish, stored: Stored
):
    changes()
    order = Order.objects.create(customer="1", count="4")
    order.count = F("count") + 1
    order.save()
    assert stored() == ["created new 4 created", "updated new 5 updated"]


def test_an_object_with_a_chosen_key_is_created_or_updated(changes: Publish, stored: Stored):
    """Django saves it without reading it before."""
    changes()
    Order(pk=7, customer=1).save()
    Order(pk=7, customer=1, count=1).save()
    Order(pk=8, customer=1).save(force_insert=True)
    assert [text.split()[0] for text in stored()] == ["created", "updated", "created"]


def test_a_save_that_fails_does_not_confuse_the_next_one(changes: Publish, stored: Stored):
    changes()
    order = Order.objects.create(customer=1)
    order.count = "x"
    with pytest.raises(ValueError):
        order.save()
    order.count = 1
    order.save()
    assert stored() == ["created new 0 created", "updated new 1 updated"]


def test_a_signal_that_code_sends_by_itself_publishes_nothing(changes: Publish, stored: Stored):
    """Without the signal before it, the change is not known."""
    changes()
    order = Order(customer=1)
    post_save.send(Order, instance=order, created=True)
    post_delete.send(Order, instance=order)
    assert stored() == []


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_receiver_that_saves_the_object_again_publishes_both_changes(
    changes: Publish, stored: Stored, first: bool
):
    """Before or after the receiver of the package."""

    def again(instance: Order, **kwargs: Any) -> None:
        if instance.count < 2:
            instance.count += 1
            instance.save()

    if not first:
        changes()
    post_save.connect(again, Order)
    try:
        if first:
            changes()
        order = Order.objects.create(customer=1)
    finally:
        post_save.disconnect(again, Order)
    assert sorted(text.split()[0] for text in stored()) == ["created", "updated", "updated"]
    assert stored()[-1].startswith("created new 2" if first else "updated new 2")
    assert not [name for name in vars(order) if name.startswith("_eventsource")]


def test_fixtures_publish_nothing(changes: Publish, stored: Stored):
    changes()
    order = Order(pk=1, customer=1)
    for loaded in serializers.deserialize("json", serializers.serialize("json", [order])):
        loaded.save()
    assert Order.objects.count() == 1
    assert stored() == []


def test_a_cascade_publishes_each_object_that_django_deletes(changes: Publish, stored: Stored):
    """The functions may read rows that are deleted with the object."""
    changes(Line, token=lambda line: f"c:{line.order.customer}", serialize=lambda line, _: "line")
    changes()
    order = Order.objects.create(customer=1)
    Line.objects.create(order=order)
    Line.objects.create(order=order)
    Order.objects.all().delete()
    assert stored() == [
        "created new 0 created",
        "created line",
        "created line",
        "deleted line",
        "deleted line",
        "deleted new 0 deleted",
    ]


async def test_asynchronous_saves_are_published(changes: Publish, stored: Stored):
    changes()
    order = await Order.objects.acreate(customer=1)
    order.count = 1
    await order.asave()
    await order.adelete()
    assert [text.split()[0] for text in stored()] == ["created", "updated", "deleted"]


def test_a_change_costs_the_queries_of_the_documentation(changes: Publish, stored: Stored):
    """A creation or a deletion costs one, and an update two."""

    def queries() -> list[int]:
        found = []
        order = Order(customer=1)
        for work in (order.save, order.save, order.delete):
            with CaptureQueriesContext(
                connection,
            ) as captured:
                work()
            found.append(sum("SELECT" in one["sql"] for one in captured.captured_queries))
        return found

    before = queries()
    changes()
    assert [after - one for after, one in zip(queries(), before, strict=True)] == [1, 2, 1]


# Tokens


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (lambda order: None, []),
        (lambda order: [], []),
        (lambda order: ["a", "b"], ["a", "b"]),
        (lambda order: (token for token in ("a", "b", "a")), ["a", "b"]),
    ],
)
def test_an_object_has_no_token_or_several(
    changes: Publish, stored: Stored, returned: Any, expected: list[str]
):
    changes(token=returned)
    Order.objects.create(customer=1)
    assert [token for token in ("a", "b") if stored(token)] == expected
    for token in expected:
        assert stored(token) == ["created new 0 created"]


def test_an_object_that_gains_and_loses_tokens_is_created_and_deleted(
    changes: Publish, stored: Stored
):
    """Such as a draft that becomes visible. Tokens that stay receive ``updated``."""
    changes(token=lambda order: order.status.split())
    order = Order.objects.create(customer=1, status="")
    for order.status in ("a b", "b c", ""):
        order.save()
    assert stored("a") == ["created a b 0 created", "deleted a b 0 deleted"]
    assert stored("b") == [
        "created a b 0 created",
        "updated b c 0 updated",
        "deleted b c 0 deleted",
    ]
    assert stored("c") == ["created b c 0 created", "deleted b c 0 deleted"]


@pytest.mark.parametrize("returned", [7, "", b"x", ["a", None]])
def test_a_token_that_is_not_valid_raises_an_error_that_names_the_function(
    changes: Publish, stored: Stored, returned: Any
):
    changes(token=lambda order: returned)
    with pytest.raises(InvalidToken) as caught, transaction.atomic():
        Order.objects.create(customer=1)
    assert caught.value.__notes__ == [
        f"The function token= of <ModelChanges of Order> returned {returned!r}."
    ]
    assert Order.objects.count() == 0


# Actions and values


def test_only_the_listed_changes_are_published(changes: Publish, stored: Stored):
    """The value of another change is not made."""
    changes(actions=["deleted"], serialize=lambda order, change: change)
    order = Order.objects.create(customer=1)
    order.customer = 2
    order.save()
    order.delete()
    assert stored("c:1") == ["deleted deleted"]
    assert stored("c:2") == ["deleted deleted"]


def test_a_change_may_have_another_action(changes: Publish, stored: Stored):
    changes(actions={"created": "message", "deleted": "message"})
    order = Order.objects.create(customer=1)
    order.save()
    order.delete()
    assert stored() == ["message new 0 created", "message new 0 deleted"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("<li>Tea</li>\n<hr>", "<li>Tea</li>\n<hr>"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (None, "null"),
        (5, "5"),
    ],
)
def test_a_text_is_published_as_it_is_and_other_values_as_json(
    changes: Publish, stored: Stored, value: Any, text: str
):
    changes(serialize=lambda order, change: value)
    Order.objects.create(customer=1)
    assert stored() == [f"created {text}"]


def test_a_value_that_cannot_be_sent_raises_an_error(changes: Publish, stored: Stored):
    changes(serialize=lambda order, change: object())
    with pytest.raises(InvalidEvent, match="not JSON"), transaction.atomic():
        Order.objects.create(customer=1)
    assert Order.objects.count() == 0


def test_the_class_of_the_project_may_be_used(changes: Publish, stored: Stored):
    """The value is passed unchanged."""

    class OrderEvent(JSONIdEvent):
        ACTIONS = ["created"]

    changes(actions=["created"], event_class=OrderEvent, serialize=lambda order, _: '{"a": 1}')
    Order.objects.create(customer=1)
    assert stored() == ['created {"a":1}']


def test_every_registration_publishes(changes: Publish, stored: Stored):
    first = changes(serialize=lambda order, change: "one")
    changes(serialize=lambda order, change: "two")
    order = Order.objects.create(customer=1)
    assert stored() == ["created one", "created two"]
    first.disconnect()
    order.save()
    assert stored()[2:] == ["updated two"]


# Kinds of models


def test_a_child_is_published_as_its_parent(changes: Publish, stored: Stored):
    """A deletion is published once."""
    changes(serialize=lambda order, change: type(order).__name__)
    for cls, options in ((RushOrder, {}), (RushOrderProxy, {}), (Courier, {"name": "Ada"})):
        child = cls.objects.create(customer=1, **options)
        child.save()
        child.delete()
    assert stored() == ["created Order", "updated Order", "deleted Order"] * 3


def test_a_child_that_is_deleted_without_its_parent_is_not_deleted_as_the_parent(
    changes: Publish, stored: Stored
):
    changes()
    changes(RushOrder, token=lambda order: "rush", serialize=lambda order, _: f"{order.hours}")
    RushOrder.objects.create(customer=1, hours=5).delete(keep_parents=True)
    assert stored() == ["created new 0 created"]
    assert stored("rush") == ["created 5", "deleted 5"]


def test_a_parent_is_not_published_as_a_child(changes: Publish, stored: Stored):
    """The deletion of a parent is the deletion of the child."""
    changes(RushOrder, serialize=lambda order, _: type(order).__name__)
    Order.objects.create(customer=1)
    assert stored() == []
    RushOrder.objects.create(customer=1)
    Order.objects.all().delete()
    assert stored() == ["created RushOrder", "deleted RushOrder"]


@pytest.mark.parametrize("model", [Order, OrderProxy])
@pytest.mark.parametrize("cls", [Order, OrderProxy])
def test_a_proxy_has_the_same_rows_as_its_model(
    changes: Publish, stored: Stored, model: Any, cls: Any
):
    """The functions receive an object of the class that was passed."""
    changes(model, serialize=lambda order, change: type(order).__name__)
    order = cls.objects.create(customer=1)
    order.save()
    order.delete()
    name = model.__name__
    assert stored() == [f"created {name}", f"updated {name}", f"deleted {name}"]


def test_a_key_that_is_no_number_is_sent(changes: Publish, stored: Stored):
    changes(Line, token=lambda line: "c:1", serialize=None)
    line = Line.objects.create(order=Order.objects.create(customer=1))
    assert stored() == [f'created {{"pk":"{line.pk}"}}']


def test_deletions_of_other_models_stay_fast(changes: Publish):
    """Django reads the objects before it deletes them if a signal has receivers."""
    changes()
    order = Order.objects.create(customer=1)
    Line.objects.create(order=order)
    with CaptureQueriesContext(connection) as captured:
        Line.objects.all().delete()
    statements = [one["sql"].split()[0] for one in captured.captured_queries]
    assert [one for one in statements if one in ("SELECT", "DELETE")] == ["DELETE"]


# Bulk operations


def test_bulk_operations_are_published_by_a_call(changes: Publish, stored: Stored):
    orders = changes()
    with transaction.atomic():
        new = Order.objects.bulk_create([Order(customer=1), Order(customer=2)])
        orders.created(new)
        Order.objects.update(status="paid")
        orders.updated(Order.objects.all())
        orders.deleted(Order.objects.all())
        Order.objects.all()._raw_delete("default")
        assert stored() == []
    for token in ("c:1", "c:2"):
        assert stored(token) == [
            "created new 0 created",
            "updated paid 0 updated",
            "deleted paid 0 deleted",
        ]


def test_a_bulk_operation_that_django_does_not_signal_publishes_nothing(
    changes: Publish, stored: Stored
):
    changes()
    orders = Order.objects.bulk_create([Order(customer=1)])
    Order.objects.update(status="paid")
    orders[0].count = 1
    Order.objects.bulk_update(orders, ["count"])
    assert stored() == []


def test_a_call_without_objects_publishes_nothing(changes: Publish, stored: Stored):
    changes().created([])
    assert stored() == []


def test_a_bulk_call_with_an_error_publishes_nothing(changes: Publish, stored: Stored):
    orders = changes(token=lambda order: order.status)
    first = Order.objects.create(customer=1, status="c:1")
    with pytest.raises(InvalidToken):
        orders.updated([first, Order(pk=2, customer=1, status="")])
    with pytest.raises(InvalidParameter, match="without a primary key"):
        orders.updated([first, Order(customer=1, status="c:1")])
    with pytest.raises(InvalidParameter, match=r"updated\(\) of the changes of Order .* not 7"):
        orders.updated([first, 7])
    assert len(stored()) == 1


# Histories and databases


def history_setting(name: str) -> dict[str, Any]:
    """Return ``EVENTSOURCE_HISTORY`` for a history."""
    match name:
        case "memory":
            path, options = "memory.MemoryHistory", {}
        case "redis":
            path, options = "redis.RedisHistory", {"HOSTS": [shared_server().url]}
        case _:
            path, options = "database.DatabaseHistory", {"USING": name}
    return {"BACKEND": f"django_eventsource.history.{path}", "OPTIONS": options}


def events(token: str) -> list[tuple[str, Any]]:
    """Return the actions and the values of all events of a token."""
    history = get_history()
    found, after = [], before_oldest(history, token)
    while entries := history.read(token, after).entries:
        found += [(entry.draft.action, json.loads(entry.draft.data)) for entry in entries]
        after = entries[-1].seq
    return found


every_database = pytest.mark.django_db(transaction=True, databases=ALIASES)


@every_database
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "autocommit"])
@pytest.mark.parametrize("name", ["memory", "default", "postgres", MARIADB, "redis"])
def test_every_history_has_the_changes_in_their_order(
    changes: Publish, settings: Any, name: str, atomic: bool
):
    settings.EVENTSOURCE_HISTORY = history_setting(name)
    using = get_history().using
    changes(serialize=lambda order, change: order.count)
    with transaction.atomic(using) if atomic else nullcontext():
        first, second = (Order(customer=1) for _ in range(2))
        for order in (first, second):
            order.save(using=using)
        for n in range(1, 10):
            first.count, first.customer = n, 1 + n % 2
            first.save(using=using)
        second.delete(using=using)
    moves = [("deleted", 0), *[(one, n) for n in (2, 4, 6, 8) for one in ("created", "deleted")]]
    assert events("c:1") == [("created", 0), ("created", 0), *moves, ("deleted", 0)]
    assert events("c:2") == [
        *[(one, n) for n in (1, 3, 5, 7) for one in ("created", "deleted")],
        ("created", 9),
    ]


@every_database
@pytest.mark.parametrize("robust", [True, False])
def test_changes_in_another_database_wait_for_its_commit(
    changes: Publish, stored: Stored, robust: bool, monkeypatch: pytest.MonkeyPatch
):
    """An error of the history after the commit is logged, and not raised."""
    history = get_history()
    orders = changes()
    if not robust:
        monkeypatch.setattr(history, "append", lambda *args: 1 / 0)
    with transaction.atomic("postgres"):
        order = Order.objects.using("postgres").create(customer=1)
        orders.updated([order], using="postgres")
        assert stored() == []
    expected = ["created new 0 created", "updated new 0 updated"] if robust else []
    assert stored() == expected
    with pytest.raises(LookupError), transaction.atomic("postgres"):
        order.delete()
        raise LookupError
    assert stored() == expected


@every_database
@pytest.mark.parametrize("name", ["default", *SERVERS])
def test_a_row_is_locked_also_if_the_model_has_an_ordering_with_joins(
    changes: Publish, settings: Any, name: str
):
    settings.EVENTSOURCE_HISTORY = history_setting(name)
    changes(Line, token=lambda line: "lines", serialize=lambda line, change: 0)
    with transaction.atomic(name):
        order = Order.objects.using(name).create(customer=1)
        line = Line.objects.using(name).create(order=order)
        line.save()
        line.delete()
    assert events("lines") == [("created", 0), ("updated", 0), ("deleted", 0)]


MOVES, MOVERS, ORDERS, CUSTOMERS = 40, 4, 3, 3


@every_database
@pytest.mark.parametrize("name", SERVERS)
def test_concurrent_transactions_are_published_in_the_order_of_their_commits(
    changes: Publish, settings: Any, name: str
):
    """Threads move the same rows with stale objects. Each token ends with exactly its rows."""
    settings.EVENTSOURCE_HISTORY = history_setting(name)
    changes(serialize=lambda order, change: [order.pk, order.count])
    with transaction.atomic(name):
        pks = [Order.objects.using(name).create(customer=0).pk for _ in range(ORDERS)]

    def move(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(MOVES):
                with transaction.atomic(name):
                    order = Order.objects.using(name).get(pk=chance.choice(pks))
                    order.customer = chance.randrange(CUSTOMERS)
                    order.count = F("count") + 1
                    order.save()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(MOVERS) as executor:
        list(executor.map(move, range(MOVERS), timeout=PROCESS_PATIENCE_SECONDS))
    versions: dict[int, list[int]] = {pk: [] for pk in pks}
    for customer in range(CUSTOMERS):
        shown: dict[int, int] = {}
        for action, (pk, count) in events(f"c:{customer}"):
            # The event continues what the token had before.
            assert (pk in shown) == (action != "created")
            if action == "deleted":
                assert shown.pop(pk) == count
            else:
                assert shown.get(pk, -1) < count
                shown[pk] = count
                versions[pk].append(count)
        rows = Order.objects.using(name).filter(customer=customer)
        assert shown == dict(rows.values_list("pk", "count"))
    for pk, counts in versions.items():
        assert sorted(counts) == list(range(Order.objects.using(name).get(pk=pk).count + 1))
    assert sum(map(len, versions.values())) == ORDERS + MOVES * MOVERS


# The page of the documentation


PAGE = "docs/howto/model-changes.rst"


@pytest.fixture
def log_entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LogEntry]]:
    """Return a function that creates log entries. The publishers of the page are disconnected."""
    made: list[ModelChanges[Any]] = []

    def publish(*args: Any, **options: Any) -> ModelChanges[Any]:
        made.append(publish_changes(*args, **options))
        return made[-1]

    monkeypatch.setattr(django_eventsource, "publish_changes", publish)
    yield lambda **options: LogEntry(action_flag=1, object_repr="Tea", **options)
    for one in made:
        one.disconnect()


def page_block(number: int) -> dict[str, Any]:
    """Execute a Python block of the page and return its names."""
    names: dict[str, Any] = {"__name__": "news"}
    exec(compile(blocks(PAGE, "python")[number], PAGE, "exec", dont_inherit=True), names)
    return names


@pytest.mark.usefixtures("memory_history")
def test_the_app_of_the_page_publishes_the_primary_key(log_entries: Any):
    config = page_block(0)["NewsConfig"]
    config("news", importlib.import_module("tests")).ready()
    user = User.objects.create_user("ada")
    entry = log_entries(user=user)
    entry.save()
    assert events(f"log:{user.pk}") == [("created", {"pk": entry.pk})]


@pytest.mark.usefixtures("memory_history")
def test_the_functions_of_the_page_publish_json_and_html(log_entries: Any, settings: Any):
    template = '<li id="entry-{{ entry.pk }}">{{ entry.object_repr }} {{ change }}</li>'
    loaders = [("django.template.loaders.locmem.Loader", {"news/entry.html": template})]
    backend = "django.template.backends.django.DjangoTemplates"
    settings.TEMPLATES = [{"BACKEND": backend, "OPTIONS": {"loaders": loaders}}]
    page_block(1)["publish_log"]()
    entry = log_entries(user=User.objects.create_user("ada"))
    entry.save()
    entry.save()
    value = {"pk": entry.pk, "text": "Tea"}
    assert events("log") == [("created", value), ("updated", value)]
    (stored,) = read_history("log:html").events
    assert stored.action == "message"
    assert stored.value == f'<li id="entry-{entry.pk}">Tea created</li>'


@pytest.mark.usefixtures("memory_history")
def test_the_bulk_operations_of_the_page_are_published(log_entries: Any):
    names = page_block(2)
    user = User.objects.create_user("ada")
    names["import_entries"]([log_entries(user=user), log_entries(user=user)])
    names["rename"](user.pk, "Cake")
    pks = list(LogEntry.objects.order_by("pk").values_list("pk", flat=True))
    token = f"log:{user.pk}"
    assert [action for action, _ in events(token)] == ["created"] * 2 + ["updated"] * 2
    assert sorted(value["pk"] for _, value in events(token)) == sorted(pks * 2)
    assert set(LogEntry.objects.values_list("object_repr", flat=True)) == {"Cake"}


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"model": 7}, InvalidParameter, "model must be a model class, not 7"),
        ({"model": int}, InvalidParameter, "model must be a model class, not <class 'int'>"),
        ({"model": Numbered}, InvalidParameter, "Numbered is abstract and has no rows: call"),
        ({"token": "c:1"}, InvalidParameter, "token must be a function .* of Order, not 'c:1'"),
        ({"token": None}, InvalidParameter, "token must be a function"),
        ({"serialize": "x"}, InvalidParameter, "object of Order and the change, not 'x'"),
        ({"actions": []}, InvalidParameter, "actions is empty: pass some of created, updated"),
        ({"actions": "created"}, InvalidParameter, "list of created.*, not 'created'"),
        ({"actions": None}, InvalidParameter, "list of created.*, not None"),
        ({"actions": ["saved"]}, InvalidParameter, "the change 'saved'; the changes are created"),
        ({"actions": {"created": "a/b"}}, InvalidEvent, "contains a slash"),
        ({"actions": {"created": None}}, InvalidEvent, "must be a text, not None"),
        ({"event_class": StringIdEvent}, InvalidEvent, "'created': StringIdEvent allows ping"),
    ],
)
def test_an_argument_that_is_not_valid_raises_an_error(
    changes: Publish, stored: Stored, options: Any, error: type[Exception], text: str
):
    """Nothing is connected."""
    with pytest.raises(error, match=text):
        changes(**options)
    Order.objects.create(customer=1)
    assert stored() == []


def test_a_call_before_the_models_are_loaded_names_the_place_for_it(
    changes: Publish, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(apps, "models_ready", False)
        with pytest.raises(AppRegistryNotReady) as caught:
            changes()
    assert caught.value.__notes__ == [
        "Call publish_changes() in the ready() method of an AppConfig."
    ]


def test_a_publisher_that_is_not_kept_is_not_collected(stored: Stored):
    """The signals refer to it."""
    names = {"made": publish_changes(Order, token=by_customer)}
    disconnect = names.pop("made").disconnect
    gc.collect()
    Order.objects.create(customer=1)
    disconnect()
    assert len(stored()) == 1
    assert json.loads(stored()[0].split()[1])["pk"]
