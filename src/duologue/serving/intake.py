"""What clients put into a conversation: messages of text and sound become items with their turns."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from duologue.conversation.chatbot import Chatbot
from duologue.conversation.history import turn_of
from duologue.serving.formats import unpack
from duologue.serving.items import Item, Sound, written
from duologue.serving.objects import AnyItem, Content, Format, FunctionCall, FunctionCallOutput, Message, ProtocolError
from duologue.serving.protocol import new_id
from duologue.turns import Role


async def new_item(
    bot: Chatbot, body: AnyItem, wire: Format, max_chars: int, max_audio_s: float, where: str = "item"
) -> Item:
    """The item that a client described. Calls of tools and their results are kept, and not shown to the model.

    Args:
        wire: format of its sound.
        max_chars, max_audio_s: of one message.
        where: its path in the event.
    Raises:
        ProtocolError: a part that its role cannot have, without its value, too long, or not sound of this format.
    """
    item_id = body.id or new_id("item")
    if isinstance(body, FunctionCall | FunctionCallOutput):
        return Item(body.model_copy(update={"id": item_id, "status": "completed"}))
    if not body.content:
        raise ProtocolError(f"{where}.content must hold at least one part", param=f"{where}.content")
    ids: list[int] = []
    sounds: list[Sound] = []
    parts: list[Content] = []
    for index, part in enumerate(body.content):
        place = f"{where}.content.{index}"
        if part.type == "input_audio" and body.role == "user":
            wav = await _sound(part, wire, max_audio_s, place)
            ids += await _tokenized(bot, wav, wire.rate)
            sounds.append(Sound.of([wav], wire.rate))
        else:
            text = written(part, body.role, place)
            if len(text) > max_chars:
                raise ProtocolError(
                    f"{place}.text has {len(text)} characters; at most {max_chars} are taken", param=f"{place}.text"
                )
            ids += bot.models.vocabulary.encode_text(text)
        parts.append(part.model_copy(update={"audio": None}))
    kept = Message(type="message", id=item_id, status="completed", role=body.role, content=parts)
    # One sound belongs to one part; of several there is none to give back.
    return Item(
        kept, turn_of(Role(body.role), ids, bot.models.vocabulary), sound=sounds[0] if len(sounds) == 1 else None
    )


async def _sound(part: Content, wire: Format, max_audio_s: float, place: str) -> NDArray[np.float32]:
    if not part.audio:
        raise ProtocolError(f"{place}.audio is missing", "missing_required_parameter", f"{place}.audio")
    wav = await asyncio.to_thread(unpack, part.audio, wire, f"{place}.audio")
    if len(wav) > max_audio_s * wire.rate:
        raise ProtocolError(
            f"{place}.audio lasts {len(wav) / wire.rate:.0f} s; at most {max_audio_s:g} s are taken",
            param=f"{place}.audio",
        )
    return wav


async def _tokenized(bot: Chatbot, wav: NDArray[np.float32], sample_rate: int) -> tuple[int, ...]:
    session = bot.session()
    await session.hear(wav, sample_rate)
    return (await session.commit()).ids
