"""Release of the thread and the database connections that Django keeps for a request."""

from typing import Any

from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connections


async def release_request_thread() -> None:
    """Release the thread and the database connections of the running request.

    Django's handler makes an executor for each request and keeps it until the response ends,
    which for a stream may be hours. Later synchronous work of the request makes a new executor.
    """
    if SyncToAsync.thread_sensitive_context.get(None) in _executors():
        await sync_to_async(_close_connections)()
        abandon_thread()


def abandon_thread() -> None:
    """Drop the thread for synchronous work of this context without waiting for its work.

    Otherwise the end of the context would wait for a call that hangs.
    """
    executor = _executors().pop(SyncToAsync.thread_sensitive_context.get(None), None)
    if executor is not None:
        executor.shutdown(wait=False)


def _executors() -> Any:
    # An internal of asgiref 3.13. Without it, the end of the request releases the thread.
    return getattr(SyncToAsync, "context_to_thread_executor", {})


def _close_connections() -> None:
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close()
