"""SpeechTokenizer: 16 kHz wav -> speech tokens at 12.5/s, streaming.

Shapes: B batch, S samples, T tokens, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from duologue import rates
from duologue.audio import LogMel, LogMelConfig, LogMelState
from duologue.layers import Padded, reset_rows, split_at
from duologue.tokenizer.encoder import Encoder, EncoderConfig, EncoderState
from duologue.tokenizer.quantizer import Quantized, Quantizer, QuantizerConfig


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    features: LogMelConfig = field(default_factory=LogMelConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        if self.features.num_mels != self.encoder.num_mels:
            raise ValueError(
                f"features.num_mels is {self.features.num_mels} but encoder.num_mels is {self.encoder.num_mels}; "
                "they must be equal"
            )
        if self.encoder.block_frames % rates.POOL:
            raise ValueError(
                f"encoder.block_frames is {self.encoder.block_frames}; it must be a multiple of {rates.POOL} (pooling)"
            )


@dataclass
class SpeechTokenizerState:
    """Streaming state of the tokenizer.

    Attributes:
        waiting: (B, S) samples of the open block, processed when it closes.
        missing: (B,) int64 number of waiting samples at which it closes.
    """

    waiting: Padded
    missing: Tensor
    features: LogMelState
    encoder: EncoderState


class SpeechTokenizer(nn.Module):
    """wav (B, S) float32 at 16 kHz -> codes (B, T) int64, T = ceil(S / 1280), a streaming stage.

    Audio is cut into independent pieces of 30 s as in the released model (docs/checkpoints.md 1.5). Within a piece,
    `step` returns the codes of closed attention blocks and `flush` those of the open one.
    """

    def __init__(self, config: SpeechTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.features = LogMel(config.features)
        self.encoder = Encoder(config.encoder)
        self.quantizer = Quantizer(config.quantizer, config.encoder.width)

    @property
    def piece_samples(self) -> int:
        """Samples in one piece, by default 480000."""
        return self.config.encoder.max_positions * rates.ENCODER_STRIDE * rates.LISTEN_HOP

    @property
    def block_tokens(self) -> int:
        return self.config.encoder.block_frames // rates.POOL

    def init_state(self, batch_size: int) -> SpeechTokenizerState:
        features, encoder = self.features.init_state(batch_size), self.encoder.init_state(batch_size)
        waiting = Padded(self.features.window.new_zeros(batch_size, 0), features.num_samples)
        state = SpeechTokenizerState(waiting, features.num_samples, features, encoder)
        state.missing = self._missing(state)
        return state

    def step(self, x: Padded, state: SpeechTokenizerState) -> Padded:
        """Tokenizes wav (B, S) and returns final codes."""
        state.waiting = Padded.concat([state.waiting, x])
        codes: list[Padded] = []
        while (closing := state.waiting.lengths >= state.missing).any():
            room = self.piece_samples - state.features.num_samples
            now, state.waiting = split_at(state.waiting, torch.minimum(state.waiting.lengths, room) * closing)
            codes.append(
                self.quantizer.codes(self._encode_closed(self.features.step(now, state.features), state.encoder))
            )
            full = state.features.num_samples == self.piece_samples
            if bool(full.any()):
                codes.append(self._flush_piece(state, full))
            state.missing = self._missing(state)
        if not codes:
            none = torch.zeros_like(x.lengths)
            return Padded(none.new_empty(none.shape[0], 0), none)
        return Padded.concat(codes)

    def flush(self, state: SpeechTokenizerState, rows: Tensor | None = None) -> Padded:
        """Ends the utterance: returns codes of the open block, the last token padded with silence."""
        rows = torch.ones_like(state.features.started) if rows is None else rows
        now, state.waiting = split_at(state.waiting, state.waiting.lengths * rows)
        state.encoder.pending = Padded.concat([state.encoder.pending, self.features.step(now, state.features)])
        codes = self._flush_piece(state, rows)
        state.missing = self._missing(state)
        return codes

    def provisional(self, state: SpeechTokenizerState) -> Padded:
        """Returns what `flush` would return now, without changing the state.

        Codes of the open block may change with every chunk.
        """
        return self.flush(copy.deepcopy(state))

    def _missing(self, state: SpeechTokenizerState) -> Tensor:
        """Returns how many samples must wait until a step can close a block: (B,) int64.

        The last frame of a block needs 200 samples after its position; at the end of a piece they are mirrored.
        """
        block = self.config.encoder.block_frames
        end = (state.encoder.start // block + 1) * block * rates.ENCODER_STRIDE * rates.LISTEN_HOP
        needed = end - rates.LISTEN_HOP + self.features.edge
        return needed.clamp(max=self.piece_samples) - state.features.num_samples

    def _flush_piece(self, state: SpeechTokenizerState, rows: Tensor) -> Padded:
        num_valid = -(-state.features.num_samples // rates.LISTEN_HOP)
        mel = Padded.concat([state.encoder.pending, self.features.flush(state.features, rows)])
        lengths = mel.lengths * rows
        ending = Padded(mel.values[:, : int(lengths.max())], lengths)  # whole tokens, independent of other rows
        codes: Padded = self.quantizer.codes(self.encoder.encode(ending, state.encoder, num_valid))
        state.encoder.pending = mel
        reset_rows(state.encoder, self.encoder.init_state(len(rows)), rows)
        return codes

    def forward(self, x: Padded) -> Padded:
        """Tokenizes wav (B, S) to codes (B, T) in one pass, equal to a stream."""
        codes: list[Padded] = []
        for piece in self._pieces(x):
            codes.append(self.quantizer.codes(self.encode_piece(piece, self.encoder.init_state(len(x.lengths)))))
        return Padded.concat(codes)

    def quantize_piece(self, x: Padded) -> Quantized:
        """Quantizes wav (B, S) of at most 30 s per row, with vectors and commitment loss."""
        return self.quantizer(self.encode_piece(x, self.encoder.init_state(len(x.lengths))))  # type: ignore[no-any-return]

    def encode_piece(self, x: Padded, state: EncoderState) -> Padded:
        """Encodes wav (B, S) of at most 30 s per row to vectors before quantization (B, T, D)."""
        return self.encoder.encode(self.features(x), state, -(-x.lengths // rates.LISTEN_HOP))

    def _pieces(self, x: Padded) -> list[Padded]:
        pieces = []
        while True:
            now, x = split_at(x, x.lengths.clamp(max=self.piece_samples))
            pieces.append(now)
            if not bool(x.lengths.any()):
                return pieces

    def _encode_closed(self, mel: Padded, state: EncoderState) -> Padded:
        """Appends mel frames to the open block and encodes the blocks that close."""
        block = self.config.encoder.block_frames * rates.ENCODER_STRIDE
        mel = Padded.concat([state.pending, mel])
        closed, state.pending = split_at(mel, mel.lengths // block * block)
        return self.encoder.encode(closed, state)
