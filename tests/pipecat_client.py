"""pipecat's service for the OpenAI Realtime API, in a pipeline without microphone and loudspeaker."""

from __future__ import annotations

import asyncio

from pipecat.frames.frames import EndFrame, ErrorFrame, Frame, InputAudioRawFrame, TTSAudioRawFrame, TTSTextFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.openai.realtime import events
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService

SAMPLE_RATE = 24_000


class Heard(FrameProcessor):  # type: ignore[misc]  # untyped where pipecat is not installed
    """Collects what the service says, and errors."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.audio, self.text = b"", ""
        self.errors: list[str] = []
        self.done = asyncio.Event()
        self._num_bytes = int(seconds * SAMPLE_RATE) * 2

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            self.audio += frame.audio
            if len(self.audio) >= self._num_bytes:
                self.done.set()
        elif isinstance(frame, TTSTextFrame):
            self.text += frame.text
        elif isinstance(frame, ErrorFrame):
            self.errors.append(frame.error)
            self.done.set()
        await self.push_frame(frame, direction)


async def ask(url: str, key: str, pcm: bytes, seconds: float) -> Heard:
    """Speaks pcm (16 bit, 24 kHz) and waits for so many seconds of an answer."""
    properties = events.SessionProperties(
        instructions="You are brief.",
        audio=events.AudioConfiguration(
            input=events.AudioInput(
                transcription=events.InputAudioTranscription(), turn_detection=events.TurnDetection()
            )
        ),
    )
    service = OpenAIRealtimeLLMService(
        api_key=key,
        base_url=f"{url}/realtime",
        settings=OpenAIRealtimeLLMService.Settings(session_properties=properties),
    )
    heard = Heard(seconds)
    aggregators = LLMContextAggregatorPair(LLMContext())
    pipeline = Pipeline([aggregators.user(), service, heard, aggregators.assistant()])
    params = PipelineParams(audio_in_sample_rate=SAMPLE_RATE, audio_out_sample_rate=SAMPLE_RATE)
    task = PipelineTask(pipeline, params=params)
    running = asyncio.create_task(PipelineRunner(handle_sigint=False).run(task))
    for start in range(0, len(pcm), 4800):
        await task.queue_frame(InputAudioRawFrame(pcm[start : start + 4800], SAMPLE_RATE, 1))
    await heard.done.wait()
    await task.queue_frame(EndFrame())
    await running
    return heard
