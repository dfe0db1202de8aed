"""States of sessions in one batch: what can be joined, what stays of the company, and what a reply does with blocks."""

import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import torch

from duologue.conversation.block_policy import BlockPolicy
from duologue.conversation.chatbot import Chatbot
from duologue.conversation.events import AudioDelta, ReplyDone
from duologue.conversation.session import Session
from duologue.decoder.encoder import TokenEncoderConfig
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.transformer import EstimatorConfig
from duologue.interleave import INTERLEAVED, Schedule, weave
from duologue.language.sampling import Sampling
from duologue.layers import Padded, join_states, state_row, state_settings
from duologue.models import Models
from duologue.rates import speak_samples_for_tokens
from duologue.text import heard_text
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.vocabulary import Vocabulary
from tests.tiny import write_tiny_chatbot


def small_flow() -> Flow:
    sizes = {"width": 16, "num_heads": 2, "ffn_dim": 24, "num_layers": 1}
    encoder = TokenEncoderConfig(codebook_size=40, **sizes)
    return Flow(FlowConfig(encoder, EstimatorConfig(time_dim=8, **sizes), condition_dim=80)).eval()


def test_states_of_unequal_settings_are_not_joined() -> None:
    flow = small_flow()
    plain = flow.init_state(1, num_steps=2)
    for other in (
        flow.init_state(1, num_steps=3),
        flow.init_state(1, num_steps=2, guidance_scale=0.0),
        flow.init_state(1, num_steps=2, guidance_scale=0.5),
        flow.encoder.init_state(1),
    ):
        assert state_settings(other) != state_settings(plain)
        with pytest.raises(ValueError, match="unequal settings"):
            join_states([plain, other])
    assert state_settings(flow.init_state(1, num_steps=2, seed=7)) == state_settings(plain)


@torch.inference_mode()
def test_seeds_are_those_of_the_rows() -> None:
    flow, tokens = small_flow(), torch.arange(10)[None]
    alone = [flow.step(Padded.full(tokens), flow.init_state(1, seed=seed)).values for seed in (1, 2)]
    joined = join_states([flow.init_state(1, seed=seed) for seed in (1, 2)])
    together = flow.step(Padded.full(tokens.expand(2, -1)), joined).values
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 0.1


@torch.inference_mode()
def test_a_row_does_not_keep_the_width_or_the_memory_of_its_company() -> None:
    torch.manual_seed(0)
    encoder = EncoderConfig(width=16, num_heads=2, ffn_dim=32, num_layers=2)
    stage = SpeechTokenizer(SpeechTokenizerConfig(encoder=encoder, quantizer=QuantizerConfig(32))).eval()
    long, short = stage.init_state(1), stage.init_state(1)
    block = 13000
    for _ in range(5):
        stage.step(Padded.full(torch.randn(1, block)), long)
    joined = join_states([long, short])
    stage.step(Padded.full(torch.randn(2, block)), joined)
    row = state_row(joined, 1)
    assert row.encoder.layers[0].keys.untyped_storage().nbytes() == row.encoder.layers[0].keys.nbytes
    stage.step(Padded.full(torch.randn(1, block)), row)
    assert row.encoder.layers[0].keys.shape[1] == int(row.encoder.start) == 80


class Fast:
    """An engine that says a hundred speech tokens at once."""

    max_positions, max_sessions, cached_tokens, running = 512, 1, 0, 0

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._reply = weave(
            vocabulary.encode_text("one two three"), vocabulary.speech_ids([i % 32 for i in range(100)])
        )
        self._reply.append(vocabulary.end_id)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        schedule: Schedule = INTERLEAVED,
        request_id: str | None = None,
    ) -> AsyncIterator[int]:
        for token in self._reply:
            yield token

    async def warm(self, prompt_ids: Sequence[int]) -> None: ...
    def cached_prefix(self, prompt_ids: Sequence[int]) -> int:
        return 0

    def cancel(self, request_id: str) -> None: ...


def test_blocks_grow_when_sound_is_ready(tmp_path: Path) -> None:
    """By a clock that stands still no playback is used up: after the first block every one is as large as can be."""
    models = Models.load(write_tiny_chatbot(tmp_path))
    models = dataclasses.replace(models, engine=Fast(models.vocabulary))
    bot = Chatbot(models)
    session = Session(models, bot.worker, policy=lambda: BlockPolicy(clock=lambda: 0.0, max_tokens=30))
    session.write("Hello")
    events = list(session.events())
    done = events[-1]
    assert isinstance(done, ReplyDone)
    sounds = [event.wav for event in events if isinstance(event, AudioDelta)]
    assert len(sounds) == 1 + 3  # 10, 30, 30, 30 tokens
    held_back = 256 * 2 + 384  # of the vocoder
    assert len(sounds[0]) == speak_samples_for_tokens(10) - held_back
    assert len(sounds[1]) == speak_samples_for_tokens(40) - speak_samples_for_tokens(10)


def test_the_text_that_was_heard_ends_with_a_word() -> None:
    text = "Seven plus five is twelve, isn't it?"
    assert heard_text(text, 0.0) == ""
    assert heard_text(text, 1.0) == heard_text(text, 3.0) == text
    assert heard_text(text, 0.5) == "Seven plus five is"
    assert heard_text(text, 0.85) == "Seven plus five is twelve,"
    assert heard_text("七加五等于十二。", 0.5) == "七加五等"
