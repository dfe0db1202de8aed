"""SpeechDecoder: speech tokens -> wav at 22.05 kHz, streaming.

Shapes: B batch, T tokens, S samples, M mels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from duologue.layers import Padded

FlowT = TypeVar("FlowT", bound=Any)
VocoderT = TypeVar("VocoderT", bound=Any)


@dataclass
class SpeechDecoderState:
    """The states of the flow and the vocoder."""

    flow: Any
    vocoder: Any


class SpeechDecoder(nn.Module, Generic[FlowT, VocoderT]):
    """Speech tokens (B, T) int64 -> wav (B, 256 (441 T // 64)) float32 at 22.05 kHz, a streaming stage.

    The flow is a streaming stage from tokens to mels, the vocoder one from mels to samples.
    """

    def __init__(self, flow: FlowT, vocoder: VocoderT) -> None:
        super().__init__()
        self.flow = flow
        self.vocoder = vocoder

    @property
    def codebook_size(self) -> int:
        """Number of speech codes the decoder accepts: valid ones are `0 <= code < codebook_size`."""
        return int(self.flow.config.encoder.codebook_size)

    def init_state(
        self,
        batch_size: int,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        speaker: Tensor | None = None,
        style: str = "",
    ) -> SpeechDecoderState:
        """Returns a fresh state; the settings are those of the flow's `init_state`.

        Args:
            style: of all replies, whose speaker vector is taken without a `speaker`; one that the flow lacks is
                ignored.
        """
        if speaker is None and (styled := self.flow.style_speaker(style)) is not None:
            speaker = styled.expand(batch_size, -1)
        flow = self.flow.init_state(batch_size, num_steps, guidance_scale, seed, speaker)
        return SpeechDecoderState(flow, self.vocoder.init_state(batch_size))

    def capture(self, max_rows: int, num_steps: int | None = None, guidance_scale: float | None = None) -> int:
        """Returns 0: this flow has caches that grow, and is not captured as CUDA graphs."""
        return 0

    def give_prompt(self, tokens: Padded, mel: Padded, state: SpeechDecoderState) -> None:
        """Sets a voice prompt for fresh rows, see the flow's `give_prompt`; the output begins after it."""
        self.flow.give_prompt(tokens, mel, state.flow)

    def step(self, x: Padded, state: SpeechDecoderState) -> Padded:
        """Decodes tokens (B, T) and returns final samples."""
        wav: Padded = self.vocoder.step(self.flow.step(x, state.flow), state.vocoder)
        return wav

    def flush(self, state: SpeechDecoderState, rows: Tensor | None = None) -> Padded:
        """Ends the utterance: returns the samples of the open block and those held back by the vocoder."""
        wav = self.vocoder.step(self.flow.flush(state.flow, rows), state.vocoder)
        return Padded.concat([wav, self.vocoder.flush(state.vocoder, rows)])

    def forward(self, x: Padded, state: SpeechDecoderState | None = None) -> Padded:
        """Decodes tokens (B, T) to wav in one pass, equal to a stream. A fresh state may carry settings."""
        state = self.init_state(len(x.lengths)) if state is None else state
        return Padded.concat([self.step(x, state), self.flush(state)])
