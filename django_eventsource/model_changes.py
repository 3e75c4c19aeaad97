"""Publish the changes of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from django.apps import apps
from django.core.exceptions import AppRegistryNotReady
from django.db import connections, router, transaction
from django.db.models import Model, signals

from .conf import check_event_class
from .events import Event, StringIdEvent, action_error, encode_json
from .exceptions import InvalidParameter
from .history import get_history
from .protocol.field_rules import shown
from .protocol.tokens import check_token
from .publishing import Item, publish, publish_many

__all__ = ["ChangeEvent", "ModelChanges", "publish_changes"]

CREATED, UPDATED, DELETED = CHANGES = ("created", "updated", "deleted")

M = TypeVar("M", bound=Model)
Tokens = str | Iterable[str] | None
Receivers = dict[signals.ModelSignal, Callable[..., None]]


class ChangeEvent(StringIdEvent):
    """A change of a model. A text is sent as it is, and every other value as JSON."""

    ACTIONS = ["*"]

    def set_value(self, value: Any) -> None:
        """Set the value. Encode it as JSON if it is not a text."""
        super().set_value(value if isinstance(value, str) else encode_json(value))


def publish_changes(
    model: type[M],
    *,
    token: Callable[[M], Tokens],
    serialize: Callable[[M, str], Any] | None = None,
    actions: Iterable[str] | Mapping[str, str] = CHANGES,
    event_class: type[Event] = ChangeEvent,
) -> ModelChanges[M]:
    """Publish an event for each object of a model that is created, updated or deleted.

    Call it in the ``ready()`` method of an ``AppConfig``. Each call adds a publisher.

    The functions receive the object as it is stored in the database, not the one that was saved.
    If an update removes a token from those of the object, the listeners of that token receive
    ``deleted``, and those of an added token receive ``created``.

    :param model: a model that is not abstract. Changes of its proxies are published too, and
        those of its child models, as changes of ``model``.
    :param token: a function that receives an object and returns its token, several tokens, or
        ``None`` to publish nothing.
    :param serialize: a function that receives an object and the change (``"created"``,
        ``"updated"`` or ``"deleted"``), and returns the value of the event: a text, or a value
        that is sent as JSON. ``None`` sends ``{"pk": ...}`` and nothing else of the object.
    :param actions: the changes to publish, or a dictionary from change to action.
    :param event_class: a class that allows the actions and accepts the values.
    :raises ValueError: if an argument is not valid.
    :raises AppRegistryNotReady: if the models are not loaded yet.
    """
    return ModelChanges(model, token, serialize, actions, event_class)


class ModelChanges(Generic[M]):
    """Publishes the changes of a model. :func:`~django_eventsource.publish_changes` returns it.

    Django sends no signals for bulk operations. Call :meth:`created`, :meth:`updated` or
    :meth:`deleted` for their objects, in the same transaction.
    """

    def __init__(
        self,
        model: type[M],
        token: Callable[[M], Tokens],
        serialize: Callable[[M, str], Any] | None,
        actions: Iterable[str] | Mapping[str, str],
        event_class: type[Event],
    ) -> None:
        self.model = _check_model(model)
        for name, function in (("token", token), ("serialize", serialize)):
            if not callable(function) and (name, function) != ("serialize", None):
                raise InvalidParameter(
                    f"{name} must be a function that receives an object of {model.__name__}"
                    f"{'' if name == 'token' else ' and the change'}, not {shown(function)}."
                )
        self._token = token
        self._serialize = serialize or _only_pk
        self._actions = _check_actions(actions, check_event_class(event_class))
        self._event_class = event_class
        self._attribute = f"_eventsource_{id(self)}"
        self._connect()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.model.__name__}>"

    # Bulk operations

    def created(self, objs: Iterable[M], *, using: str | None = None) -> None:
        """Publish ``created`` for objects, for example after ``bulk_create()``.

        The functions receive the objects that are passed.

        :param objs: the objects, which have primary keys.
        :param using: the alias of their database; the one for writes by default.
        :raises ValueError: if a token or a value is not valid. Nothing was published.
        """
        self._publish_bulk(CREATED, objs, using)

    def updated(self, objs: Iterable[M], *, using: str | None = None) -> None:
        """Publish ``updated`` for objects, for example after ``QuerySet.update()``.

        The functions receive the objects that are passed. It cannot detect that an object had
        another token before: pass such objects to :meth:`deleted` before the update, and to
        :meth:`created` after it.

        :param objs: the objects, as they are stored now.
        :param using: the alias of their database; the one for writes by default.
        :raises ValueError: if a token or a value is not valid. Nothing was published.
        """
        self._publish_bulk(UPDATED, objs, using)

    def deleted(self, objs: Iterable[M], *, using: str | None = None) -> None:
        """Publish ``deleted`` for objects, for example before raw SQL deletes them.

        The functions receive the objects that are passed.

        :param objs: the objects, which have primary keys.
        :param using: the alias of their database; the one for writes by default.
        :raises ValueError: if a token or a value is not valid. Nothing was published.
        """
        self._publish_bulk(DELETED, objs, using)

    def _publish_bulk(self, change: str, objs: Iterable[M], using: str | None) -> None:
        items: list[Item] = []
        for obj in objs:
            if not isinstance(obj, self.model):
                raise InvalidParameter(
                    f"{change}() of the changes of {self.model.__name__} must receive its "
                    f"objects, not {shown(obj)}."
                )
            if obj.pk is None:
                raise InvalidParameter(
                    f"{change}() received a {self.model.__name__} without a primary key. Some "
                    "databases set none in bulk_create(): read the objects again, and pass those."
                )
            items += self._items(change, obj, self._tokens(obj))
        self._publish(items, using or router.db_for_write(self.model))

    # Signals

    def disconnect(self) -> None:
        """Stop publishing the changes that Django signals, for example at the end of a test."""
        for signal, receiver, sender in self._connected:
            signal.disconnect(receiver, sender)

    def _connect(self) -> None:
        """Connect to the signals of the classes whose objects have a row in the model's table.

        Not to those of all models, because deletions without receivers are faster.

        A child model is saved with signals of the child alone. When it is deleted, the row of the
        parent is too, with signals of the parent.
        """
        on_save: Receivers = {
            signals.pre_save: self._before_save,
            signals.post_save: self._after_save,
        }
        on_delete: Receivers = {
            signals.pre_delete: self._before_delete,
            signals.post_delete: self._after_delete,
        }
        table: Any = self.model._meta.concrete_model
        senders: list[Any] = list(dict.fromkeys([self.model, *apps.get_models()]))
        self._connected: list[tuple[signals.ModelSignal, Callable[..., None], Any]] = []
        for sender in senders:
            receivers: Receivers = {}
            if issubclass(sender._meta.concrete_model, table):
                receivers |= on_save
            if sender._meta.concrete_model is table:
                receivers |= on_delete
            for signal, receiver in receivers.items():
                signal.connect(receiver, sender, weak=False)
                self._connected.append((signal, receiver, sender))

    def _before_save(self, instance: Model, raw: bool, using: str, **kwargs: Any) -> None:
        if not raw:
            before = self._stored(instance, using, lock=True)
            self._push(instance, (before, self._tokens(before)))

    def _after_save(self, instance: Model, raw: bool = False, **kwargs: Any) -> None:
        state = None if raw else self._pop(instance)
        if state is None:
            return
        using = kwargs["using"]
        before, old = state
        after = self._stored(instance, using)
        new = self._tokens(after)
        items = [
            *self._items(DELETED, before, [token for token in old if token not in new]),
            *self._items(UPDATED, after, [token for token in new if token in old]),
            *self._items(CREATED, after, [token for token in new if token not in old]),
        ]
        self._publish(items, using)

    def _before_delete(self, instance: Model, using: str, **kwargs: Any) -> None:
        # The functions may read related rows, which Django may delete first.
        before = self._stored(instance, using, lock=True)
        self._push(instance, self._items(DELETED, before, self._tokens(before)))

    def _after_delete(self, instance: Model, **kwargs: Any) -> None:
        items = self._pop(instance)
        if items:
            self._publish(items, kwargs["using"])

    def _push(self, instance: Model, state: Any) -> None:
        # A stack, because a receiver of another app may save the same object again in between.
        vars(instance).setdefault(self._attribute, []).append(state)

    def _pop(self, instance: Model) -> Any:
        """Return the state; ``None`` if code of the project has sent the signal by itself."""
        stack = vars(instance).get(self._attribute)
        if stack is None:
            return None
        state = stack.pop()
        if not stack:
            del vars(instance)[self._attribute]
        return state

    def _stored(self, instance: Model, using: str, lock: bool = False) -> M | None:
        """Return the object as it is stored, or ``None``.

        The object that is saved cannot be used: ``update_fields`` may exclude some of its values,
        deferred fields have none, and others may be expressions.

        :param lock: whether to lock the row until the end of the transaction, so that the row does
            not change before it is written.
        """
        # A child object has the fields of its parents.
        pk = getattr(instance, self.model._meta.pk.attname)
        if pk is None:
            return None
        rows = self.model._base_manager.using(using).filter(pk=pk)
        connection = connections[using]
        if lock and connection.in_atomic_block:
            # As an UPDATE locks it. PostgreSQL lets others insert rows that refer to it.
            no_key = connection.features.has_select_for_no_key_update
            rows = rows.select_for_update(no_key=no_key)
        # Without the model's own ordering, whose joins PostgreSQL may refuse to lock.
        return rows.order_by().first()

    # Events

    def _tokens(self, obj: M | None) -> list[str]:
        returned = None if obj is None else self._token(obj)
        if returned is None:
            return []
        try:
            several = isinstance(returned, Iterable) and not isinstance(returned, str | bytes)
            tokens: Any = returned if several else [returned]
            return list(dict.fromkeys(check_token(one) for one in tokens))
        except ValueError as error:
            error.add_note(f"The function token= of {self!r} returned {shown(returned)}.")
            raise

    def _items(self, change: str, obj: M | None, tokens: list[str]) -> list[Item]:
        action = self._actions.get(change)
        if obj is None or action is None or not tokens:
            return []
        value = self._serialize(obj, change)
        return [(token, action, value) for token in tokens]

    def _publish(self, items: list[Item], using: str) -> None:
        if not items:
            return

        def work() -> None:  # Django requires a function with a name
            if len(items) == 1:
                publish(*items[0], self._event_class)
            else:
                publish_many(items, self._event_class)

        if using == get_history().using:
            work()
        else:
            # The events would not wait for the commit of another database.
            transaction.on_commit(work, using=using, robust=True)


def _only_pk(obj: Model, change: str) -> dict[str, Any]:
    return {"pk": obj.pk}


def _check_model(model: type[M]) -> type[M]:
    if not (isinstance(model, type) and issubclass(model, Model)):
        raise InvalidParameter(f"model must be a model class, not {shown(model)}.")
    if model._meta.abstract:
        raise InvalidParameter(
            f"{model.__name__} is abstract and has no rows: call publish_changes() for each model "
            "that is derived from it."
        )
    try:
        apps.check_models_ready()
    except AppRegistryNotReady as error:
        error.add_note("Call publish_changes() in the ready() method of an AppConfig.")
        raise
    return model


def _check_actions(
    actions: Iterable[str] | Mapping[str, str], event_class: type[Event]
) -> dict[str, str]:
    if isinstance(actions, str) or not isinstance(actions, Iterable):
        raise InvalidParameter(
            f"actions must be a list of {', '.join(CHANGES)}, or a dictionary from these to "
            f"actions, not {shown(actions)}."
        )
    found = dict(actions) if isinstance(actions, Mapping) else {one: one for one in actions}
    for change, action in found.items():
        if change not in CHANGES:
            raise InvalidParameter(
                f"actions contains the change {shown(change)}; the changes are "
                f"{', '.join(CHANGES)}."
            )
        if error := action_error(event_class, action):
            raise error
    if not found:
        raise InvalidParameter(f"actions is empty: pass some of {', '.join(CHANGES)}.")
    return found
