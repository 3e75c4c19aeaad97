"""Channel-layer messages: how a batch travels from a publisher to the hubs of other processes."""

from __future__ import annotations

from typing import Any

from .batches import Batch
from .field_rules import shown

MESSAGE_TYPE = "eventsource.frame"
PROBE_TYPE = "eventsource.probe"


def encode(group: str, batch: Batch) -> dict[str, Any]:
    """Return the message for a batch whose sequence numbers, if any, are consecutive.

    :param group: the channel-layer group of the batch's token.
    """
    return {
        "type": MESSAGE_TYPE,
        "group": group,
        "seq": batch.first,
        "closes": batch.closes,
        "frames": list(batch.frames),
        "published": batch.published,
    }


def encode_probe() -> dict[str, Any]:
    """Return the message that a hub sends to its own group to check that the layer delivers."""
    return {"type": PROBE_TYPE}


def decode(message: Any) -> tuple[str, Batch] | None:
    """Return the group and the batch of a message; ``None`` for a probe.

    An empty frame is an error, because an empty chunk would end the body of an HTTP response.

    :raises ValueError: if the message has another form.
    """
    match message:
        case {
            "type": str(kind),
            "group": str(group),
            "seq": int() | None as seq,
            "closes": bool(closes),
            "frames": [_, *_] as frames,
            "published": float() | None as published,
        } if kind == MESSAGE_TYPE and all(isinstance(frame, bytes) and frame for frame in frames):
            seqs = None if seq is None else range(seq, seq + len(frames))
            return group, Batch(frames, seqs, closes=closes, published=published)
        case {"type": str(kind)} if kind == PROBE_TYPE:
            return None
        case _:
            raise ValueError(f"not a message of django-eventsource: {_described(message)}")


def _described(message: Any) -> str:
    # Not the message itself. To show one that is large or deeply nested takes many times its
    # memory, or raises RecursionError.
    kind = message.get("type") if isinstance(message, dict) else None
    suffix = f" with the type {shown(kind)}" if isinstance(kind, str) else ""
    return f"a {type(message).__name__}{suffix}"
