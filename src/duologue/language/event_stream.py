"""Server-sent events of a streamed HTTP answer, as chat and completion endpoints send them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable

MAX_EVENT_BYTES = 2**24
DONE = b"[DONE]"


async def event_data(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Yields the data of each event until `[DONE]`. What follows is left in `chunks`.

    Lines are split as bytes: a text in JSON may hold Unicode line separators, and a chunk may end anywhere.

    Raises:
        ValueError: an event without an end.
    """
    left = b""
    async for chunk in chunks:
        *lines, left = (left + chunk).split(b"\n")
        if len(left) > MAX_EVENT_BYTES:
            raise ValueError("an event has no end")
        for line in lines:
            name, _, data = line.strip().partition(b":")
            if name != b"data":
                continue
            if (data := data.strip()) == DONE:
                return
            yield data
