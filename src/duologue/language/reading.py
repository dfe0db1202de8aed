"""Reading aloud: a reply whose text is given and whose speech is generated.

The given text fills the text runs, and the model generates each following speech run. Any interleaved chat model can
thus read text in its own voice without training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from duologue.interleave import INTERLEAVED, SPEECH_ONLY, InterleaveState, Kind, Schedule
from duologue.language.engine import Engine
from duologue.language.sampling import Sampling
from duologue.spoken_text import with_end
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Vocabulary

MAX_EARLY_ENDS = 100
RETRY_TEMPERATURE = 0.7
MAX_CHUNK_IDS = 60  # text ids that are read in one reply
SPEECH_PER_TEXT = 8  # maximum speech ids per text id
SPARE_IDS = 64


def say_prompt(text: str, vocabulary: Vocabulary, instructions: str = "") -> list[int]:
    """Returns the prompt of a reply that reads a text aloud: the request "say ..."."""
    ids = vocabulary.encode_text(f"say {text} {instructions}".strip())
    asked = Turn(Role.USER, Modality.TEXT, tuple(ids))
    return vocabulary.prompt_ids(Conversation((asked,), vocabulary.hash))


def max_ids(num_text: int) -> int:
    """Returns the maximum ids of a reply that reads `num_text` text ids aloud."""
    return num_text * (1 + SPEECH_PER_TEXT) + SPARE_IDS


@dataclasses.dataclass(frozen=True, eq=False)
class ReadingEngine:
    """An engine for replies with given text.

    Attributes:
        engine: generates the speech.
        text_ids: the text, at least one id.
    """

    engine: Engine
    vocabulary: Vocabulary
    text_ids: tuple[int, ...]
    _running: dict[str, str] = dataclasses.field(default_factory=dict)  # request -> its running part

    @property
    def max_positions(self) -> int:
        return self.engine.max_positions

    @property
    def cached_tokens(self) -> int:
        return self.engine.cached_tokens

    @property
    def running(self) -> int:
        return self.engine.running

    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        return self.engine.cached_prefix(prompt_ids)

    async def warm(self, prompt_ids: Sequence[int]) -> None:
        await self.engine.warm(prompt_ids)

    def cancel(self, request_id: str) -> None:
        if (part := self._running.pop(request_id, None)) is not None:
            self.engine.cancel(part)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        """Yields a reply as `Engine.generate`; `sampling.max_tokens` includes the text.

        Raises:
            ValueError: as `Engine.generate`; a schedule without text or speech, or no room for the text.
            RuntimeError: the model keeps ending before the end of the text.
        """
        needed = schedule.min_speech(len(self.text_ids)) + len(self.text_ids)
        if not schedule.text_run or not schedule.speech_run:
            raise ValueError("reading aloud needs a reply of text and speech")
        if needed >= sampling.max_tokens:
            raise ValueError(
                f"the text of {len(self.text_ids)} ids and its speech do not fit a reply of {sampling.max_tokens} ids"
            )
        reply: list[int] = []
        remaining, state = list(self.text_ids), InterleaveState(schedule)
        request = request_id or f"reading-{id(state)}"
        num_early_ends = 0
        try:
            while True:
                while remaining and state.allowed.text:
                    reply.append(remaining.pop(0))
                    state.advance(Kind.TEXT)
                    yield reply[-1]
                spoken = state.run_length if state.run is Kind.SPEECH else 0
                wanted = schedule.speech_run - spoken if remaining else sampling.max_tokens - len(reply)
                now = dataclasses.replace(sampling, max_tokens=wanted, seed=sampling.seed + len(reply))
                if num_early_ends:  # the likeliest id was the end
                    now = dataclasses.replace(now, temperature=RETRY_TEMPERATURE, speech_temperature=None, top_p=1.0)
                self._running[request] = part = f"{request}/{len(reply)}/{num_early_ends}"
                ended = False
                async with aclosing(self._part([*prompt_ids, *reply], now, part)) as stream:
                    async for token in stream:
                        kind = self.vocabulary.kind(token)
                        ended = kind is Kind.END
                        if ended and remaining:
                            break
                        state.advance(kind)
                        reply.append(token)
                        yield token
                if not remaining or request not in self._running:
                    return
                num_early_ends += ended
                if num_early_ends > MAX_EARLY_ENDS:
                    raise RuntimeError("the model ended the reply before the end of the text")
        finally:
            self._running.pop(request, None)

    async def _part(self, ids: list[int], sampling: Sampling, part: str) -> AsyncGenerator[int, None]:
        stream = self.engine.generate(ids, sampling, SPEECH_ONLY, part)
        try:
            async for token in stream:
                yield token
        finally:
            self.engine.cancel(part)
            await stream.aclose()  # type: ignore[attr-defined]


def prepare_reading(
    engine: Engine, vocabulary: Vocabulary, text: str, sampling: Sampling, instructions: str = ""
) -> tuple[ReadingEngine, list[int], Sampling]:
    """Returns what reads a text aloud: the engine of the reply, its prompt, and the sampling with the room for it.

    Text without an end gets one, see `spoken_text.with_end`.
    """
    text = with_end(text)
    ids = tuple(vocabulary.encode_text(text))
    prompt = say_prompt(text, vocabulary, instructions)
    room = min(max_ids(len(ids)), engine.max_positions - len(prompt))
    return ReadingEngine(engine, vocabulary, ids), prompt, dataclasses.replace(sampling, max_tokens=room)
