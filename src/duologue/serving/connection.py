"""`/v1/realtime`: one conversation over one WebSocket, from `session.created` to the close and its reason."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback

from fastapi import WebSocket, WebSocketDisconnect

from duologue.conversation.chatbot import Chatbot
from duologue.serving.admission import Visit, new_session_id
from duologue.serving.items import Items
from duologue.serving.live import Kept, Live
from duologue.serving.metrics import Metrics
from duologue.serving.objects import Audio, AudioOutput, Session
from duologue.serving.outbox import Ended, Ending, Outbox
from duologue.serving.protocol import new_id
from duologue.serving.settings import Settings

log = logging.getLogger(__name__)

CLOSE_S = 2.0  # a client that does not answer the close is left


async def converse(
    socket: WebSocket, bot: Chatbot, settings: Settings, metrics: Metrics, model: str, visit: Visit | None = None
) -> None:
    """Holds one conversation over an accepted WebSocket until it closes.

    Args:
        model: the name that the client asked for; it is told back, whatever model answers.
        visit: who is there, see `Visit`; None for a conversation that nobody resumes, records or drains.
    """
    visit = visit or Visit(new_session_id(), asyncio.Event())
    outbox = Outbox(socket, settings.outbound_events, settings.stall_s, metrics)
    kept = _kept(bot, settings, model, visit)
    live: Live | None = None
    # Unless one of the tasks says otherwise, somebody outside has cancelled them all.
    ending = Ending(1012, "the server ended the connection", "draining")
    try:
        async with asyncio.TaskGroup() as tasks:
            live = Live(bot, settings, metrics, visit, outbox, tasks, kept)
            tasks.create_task(outbox.send())
            tasks.create_task(_end_after(settings.session_s))
            tasks.create_task(_end_when_draining(visit, live, outbox))
            await live.begin()
            await _listen(socket, live, settings)
    except* Ended as group:
        ending = next(error.ending for error in _leaves(group) if isinstance(error, Ended))
        # The frame of the TaskGroup refers to the group, and that to the frame: sound would wait for the collector.
        traceback.clear_frames(group.__traceback__)
    except* Exception:
        ending = Ending(1011, "the server failed; its log says why", "error")
        log.exception("a conversation failed")
    finally:
        if live is not None:
            visit.kept = live.end()
        metrics.closed.labels(ending.label).inc()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await socket.close(ending.code, ending.reason)


async def _listen(socket: WebSocket, live: Live, settings: Settings) -> None:
    """Takes messages for ever. Raises Ended."""
    while True:
        try:
            async with asyncio.timeout(settings.idle_s):
                message = await socket.receive()
        except TimeoutError:
            raise Ended(1000, f"the client has sent nothing for {settings.idle_s:g} s", "idle") from None
        except (WebSocketDisconnect, RuntimeError):
            raise Ended(1000, "the client is gone", "client") from None
        if message["type"] == "websocket.disconnect":
            raise Ended(1000, "the client is gone", "client")
        text = message.get("text")
        content: str | bytes = message.get("bytes") or b"" if text is None else text
        if len(content) > settings.max_message_bytes:
            raise Ended(1009, f"a message may have at most {settings.max_message_bytes} bytes", "message_size")
        await live.take(content)


async def _end_after(session_s: float) -> None:
    await asyncio.sleep(session_s)
    raise Ended(1000, f"a session may last at most {session_s:g} s", "session_length")


async def _end_when_draining(visit: Visit, live: Live, outbox: Outbox) -> None:
    """When the server stops, the current answer is finished first."""
    await visit.draining.wait()
    await live.finish_answers()
    await outbox.empty()
    raise Ended(1012, "the server is stopping; connect again later", "draining")


def _kept(bot: Chatbot, settings: Settings, model: str, visit: Visit) -> Kept:
    """The conversation that goes on, or a new one."""
    changes = {"id": visit.session_id, "model": model, "expires_at": int(time.time() + settings.session_s)}
    if isinstance(visit.resumed, Kept):
        return Kept(visit.resumed.config.model_copy(update=changes), visit.resumed.items)
    voice = bot.models.card.voices[0]
    config = Session(audio=Audio(output=AudioOutput(voice=voice))).model_copy(update=changes)
    return Kept(config, Items(bot.models.vocabulary, new_id("conv")))


def _leaves(group: BaseExceptionGroup[Ended]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
