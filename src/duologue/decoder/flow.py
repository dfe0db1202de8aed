"""Flow decoder: speech tokens -> log-mel by conditional flow matching, streaming exactly.

The estimator has separate caches for each evaluation of the solver. Block b at evaluation k therefore sees the past
blocks at evaluation k, streaming or not. Noise is a function of seed and absolute frame index.

Shapes: B batch, T tokens or frames, G guidance branches, M mels, C condition channels, S speaker channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from duologue import rates
from duologue.decoder.encoder import (
    TokenEncoder,
    TokenEncoderConfig,
    TokenEncoderState,
    check_tokens,
    frames_for_tokens,
)
from duologue.decoder.transformer import BLOCK_FRAMES, CausalTransformer, EstimatorCache, EstimatorConfig
from duologue.layers import BITS, Padded, hash_bits, reset_rows, split_at, take

Velocity = Callable[[int, float, Tensor], Tensor]
_CALL_BLOCKS = 8  # maximum blocks of 10 tokens per call, to bound attention memory


@dataclass(frozen=True)
class FlowConfig:
    """Sizes and solver settings of the flow. Recipes hold the sizes of trained models.

    Attributes:
        mel_mean, mel_std: of the corpus's natural-log mels; the flow models (mel - mean) / std.
        condition_dim: channels between encoder and estimator; the first num_mels are a first guess of the mel.
        speaker_dim: size of the speaker vector; zeros are the reply voice.
        num_steps, guidance_scale: defaults of the solver.
        styles: names of reply styles that have a speaker vector of their own; the released flow has none.
        RETIRED: keys of older folders, with the only values still supported.
    """

    encoder: TokenEncoderConfig = field(default_factory=TokenEncoderConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    num_mels: int = 80
    mel_mean: float = -6.0
    mel_std: float = 2.5
    condition_dim: int = 160
    speaker_dim: int = 32
    num_steps: int = 3
    guidance_scale: float = 0.7
    styles: tuple[str, ...] = ()
    RETIRED: ClassVar[Mapping[str, object]] = {"solver": "euler", "sway": -1.0}

    def __post_init__(self) -> None:
        cosine_times(self.num_steps)
        if self.condition_dim < self.num_mels:
            raise ValueError(f"condition_dim is {self.condition_dim}; it must be at least num_mels, {self.num_mels}")
        if not self.mel_std > 0:
            raise ValueError(f"mel_std is {self.mel_std}; it must be positive")


def cosine_times(num_steps: int) -> list[float]:
    """Returns the num_steps + 1 times from 0 to 1 of the released cosine schedule, densest near the noise.

    Raises:
        ValueError: fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return [1 - math.cos(math.pi / 2 * k / num_steps) for k in range(num_steps)] + [1.0]


def solve_euler(velocity: Velocity, x0: Tensor, times: Sequence[float]) -> Tensor:
    """Integrates dx/dt = velocity from x0 over the times by Euler's method.

    Args:
        velocity: takes the number of the evaluation (which selects a cache), the time and x.
    """
    x = x0
    for k, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(k, t, x)
    return x


def guide(velocity: Tensor, guidance_scale: float) -> Tensor:
    """Applies classifier-free guidance: (B, T, G, M) -> (B, T, M), (1 + g) conditional - g unconditional."""
    if velocity.shape[2] == 1:
        return velocity[:, :, 0]
    return (1 + guidance_scale) * velocity[:, :, 0] - guidance_scale * velocity[:, :, 1]


def noise_at(seed: Tensor, frame: Tensor, num_mels: int) -> Tensor:
    """Returns standard normal noise by position: seed (B,) and frame (B, T) int64 -> (B, T, M).

    A counter-based generator (a 32-bit integer hash and Box-Muller) gives equal noise on every device and leaves global
    generators untouched.
    """
    key = hash_bits(seed & BITS)[:, None, None]
    count = (frame[:, :, None] * num_mels + torch.arange(num_mels, device=frame.device)) & BITS
    first = hash_bits(hash_bits(count) ^ key)
    second = hash_bits(first ^ 0x3C6EF372)
    radius = (-2.0 * (((first >> 8).float() + 0.5) / 2**24).log()).sqrt()
    return radius * ((second >> 8).float() * (2 * math.pi / 2**24)).cos()


@dataclass
class FlowState:
    """Streaming state of the flow.

    Attributes:
        pending: (B, T < 10) tokens of the open block.
        encoder: state of the token encoder; `encoder.start` counts the decoded tokens.
        solver: one estimator cache per solver step.
        prompt: (B, P, M) normalized mel of the first frames, excluded from the output.
        seed: (B,) int64 noise seed.
        speaker: (B, S).
    """

    pending: Padded
    encoder: TokenEncoderState
    solver: list[EstimatorCache]
    prompt: Padded
    seed: Tensor
    speaker: Tensor
    guidance_scale: float


class Flow(nn.Module):
    """Speech tokens (B, T) int64 -> natural-log mel (B, 441 T // 64, M) of `SpeakMel`, a streaming stage.

    `step` returns whole blocks of 10 tokens, `flush` the rest. A flushed row keeps its seed and speaker but not its
    prompt.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TokenEncoder(config.encoder, config.speaker_dim, config.condition_dim)
        self.estimator = CausalTransformer(config.estimator, config.num_mels, config.condition_dim, config.speaker_dim)
        if config.styles:
            self.styles = nn.Parameter(torch.zeros(len(config.styles), config.speaker_dim))

    def style_speaker(self, style: str) -> Tensor | None:
        """Returns the speaker vector (1, S) of a reply style; None for a style without one."""
        styles = self.config.styles
        return self.styles[styles.index(style)][None] if style in styles else None

    def init_state(
        self,
        batch_size: int,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        speaker: Tensor | None = None,
    ) -> FlowState:
        """Returns a fresh state.

        Args:
            num_steps, guidance_scale: of the config by default; a scale of 0 omits the unconditional branch.
            seed: noise seed of all rows; `state.seed` holds one per row.
            speaker: (B, S), zeros by default.
        """
        config, weight = self.config, self.encoder.norm.weight
        num_steps = config.num_steps if num_steps is None else num_steps
        guidance_scale = config.guidance_scale if guidance_scale is None else guidance_scale
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {guidance_scale}")
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        branches = 1 if guidance_scale == 0 else 2
        return FlowState(
            pending=Padded(zeros[:, None][:, :0], zeros),
            encoder=self.encoder.init_state(batch_size),
            solver=[self.estimator.init_cache(batch_size, branches) for _ in range(num_steps)],
            prompt=Padded(weight.new_zeros(batch_size, 0, config.num_mels), zeros),
            seed=zeros + seed,
            speaker=weight.new_zeros(batch_size, config.speaker_dim) if speaker is None else speaker,
            guidance_scale=float(guidance_scale),
        )

    def give_prompt(self, tokens: Padded, mel: Padded, state: FlowState) -> None:
        """Sets a voice prompt for fresh rows: tokens (B, T) and their natural-log mel (B, P, M).

        The output begins after min(P, 441 T // 64) frames. Rows without a prompt have no tokens.
        """
        if bool(((state.encoder.start + state.pending.lengths > 0) & (tokens.lengths > 0)).any()):
            raise ValueError("a prompt can only be given before the first token")
        check_tokens(tokens, self.config.encoder.codebook_size)
        lengths = torch.minimum(mel.lengths, frames_for_tokens(tokens.lengths))
        state.prompt = Padded(self.normalize(mel.values[:, : int(lengths.max())]), lengths)
        state.pending = Padded.concat([state.pending, tokens])

    def step(self, x: Padded, state: FlowState) -> Padded:
        """Decodes tokens (B, T) and returns the mel frames of closed blocks."""
        check_tokens(x, self.config.encoder.codebook_size)
        tokens = Padded.concat([state.pending, x])
        closed, state.pending = split_at(tokens, tokens.lengths // rates.BLOCK_TOKENS * rates.BLOCK_TOKENS)
        return self._run(closed, state)

    def flush(self, state: FlowState, rows: Tensor | None = None) -> Padded:
        """Ends the utterance and returns the mel frames of the open block."""
        rows = torch.ones_like(state.pending.lengths, dtype=torch.bool) if rows is None else rows
        pending = state.pending
        closing = self.step(Padded(pending.values[:, :0], torch.zeros_like(pending.lengths)), state)  # of a prompt
        mel = self._run(Padded(state.pending.values, state.pending.lengths * rows), state)
        fresh = self.init_state(len(rows), len(state.solver), state.guidance_scale)
        fresh.seed, fresh.speaker = state.seed, state.speaker
        reset_rows(state, fresh, rows)
        return Padded.concat([closing, mel])

    def forward(self, x: Padded, state: FlowState | None = None) -> Padded:
        """Decodes tokens (B, T) to mel (B, 441 T // 64, M) in one pass, equal to a stream. A fresh state may carry
        settings."""
        state = self.init_state(len(x.lengths)) if state is None else state
        return Padded.concat([self.step(x, state), self.flush(state)])

    @property
    def speaker_dim(self) -> int:
        return self.config.speaker_dim

    def predict(
        self, tokens: Padded, start: Tensor, speaker: Tensor, given: Tensor, x_t: Tensor, time: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Evaluates the flow once for training.

        Args:
            tokens: (B, T) int64, cut from utterances at token `start` (B,), a multiple of 10.
            speaker: (B, S).
            given: (B, F, M) mel of the prompt, zeros after it.
            x_t: (B, F, M) at time (B,).
            keep: (B,) bool, false where guidance dropout hides the condition.

        Returns:
            velocity and the encoder's first guess of the mel, both (B, F, M) and normalized.
        """
        encoder_state = self.encoder.init_state(len(start))
        encoder_state.start = start
        condition = self.encoder.step(tokens, speaker, encoder_state)
        context = self.estimator.embed_context(condition.values, speaker, given) * keep[:, None, None]
        cache = self.estimator.init_cache(len(start), 1)
        span = self.estimator.span(condition, start, cache)
        velocity = self.estimator.step(x_t, time, context[:, :, None], span, cache)[:, :, 0]
        return velocity, condition.values[..., : self.config.num_mels].float()

    def normalize(self, mel: Tensor) -> Tensor:
        """Maps natural-log mel to the scale of the flow."""
        return (mel - self.config.mel_mean) / self.config.mel_std

    def _run(self, tokens: Padded, state: FlowState) -> Padded:
        """Decodes whole blocks, or the end of an utterance."""
        parts: list[Padded] = []
        while bool(tokens.lengths.any()) or not parts:
            now, tokens = split_at(tokens, tokens.lengths.clamp(max=_CALL_BLOCKS * rates.BLOCK_TOKENS))
            parts.append(self._run_part(now, state))
        return Padded.concat(parts)

    def _run_part(self, tokens: Padded, state: FlowState) -> Padded:
        if not tokens.values.shape[1]:
            empty = state.prompt.values.new_zeros(len(tokens.lengths), 0, self.config.num_mels)
            return Padded(empty, tokens.lengths)
        start = state.encoder.start
        condition = self.encoder.step(tokens, state.speaker, state.encoder)
        first, num_frames = frames_for_tokens(start), condition.lengths
        frame = first[:, None] + torch.arange(condition.values.shape[1], device=first.device)
        x0 = noise_at(state.seed, frame, self.config.num_mels)
        given = self._prompt_at(state.prompt, frame)
        context = self.estimator.embed_context(condition.values, state.speaker, given)[:, :, None]
        if state.guidance_scale != 0:
            context = torch.cat([context, torch.zeros_like(context)], 2)  # (B, T, G, D)
        span = self.estimator.span(condition, start, state.solver[0])

        def velocity(k: int, t: float, x: Tensor) -> Tensor:
            time = x.new_full((len(x),), t)
            return guide(self.estimator.step(x, time, context, span, state.solver[k]), state.guidance_scale)

        x1 = solve_euler(velocity, x0, cosine_times(len(state.solver)))
        mel = Padded(x1 * self.config.mel_std + self.config.mel_mean, num_frames)
        dropped = (state.prompt.lengths - first).clamp(min=0).minimum(num_frames)
        return split_at(mel, dropped)[1]

    def _prompt_at(self, prompt: Padded, frame: Tensor) -> Tensor:
        """Returns the prompt's mel at absolute frames (B, T), zeros after it: (B, T, M)."""
        if not prompt.values.shape[1]:
            return prompt.values.new_zeros(*frame.shape, self.config.num_mels)
        given = take(prompt.values, frame.clamp(max=prompt.values.shape[1] - 1))
        return given * (frame < prompt.lengths[:, None])[:, :, None]


def state_bytes(state: object) -> int:
    """Returns the size of a state's tensors in bytes."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, list | tuple):
        return sum(state_bytes(item) for item in state)
    if dataclasses.is_dataclass(state):
        return sum(state_bytes(getattr(state, item.name)) for item in dataclasses.fields(state))
    return 0


def max_state_bytes(config: FlowConfig, bytes_per_value: int = 4) -> int | None:
    """Returns the maximum size of one row of a state without prompt; None if the past is unbounded.

    Pocket: 3 evaluations x 2 branches x 5 layers x (2 x 138 cached frames + 4 of the convolution) x 160 = 5.5 MB.
    """
    encoder, estimator = config.encoder, config.estimator
    if encoder.past_blocks is None or estimator.past_blocks is None:
        return None
    cached = 2 * estimator.past_blocks * BLOCK_FRAMES + estimator.kernel_size - 1
    branches = 1 if config.guidance_scale == 0 else 2
    values = config.num_steps * branches * estimator.num_layers * cached * estimator.width
    values += 2 * encoder.num_layers * encoder.past_blocks * rates.BLOCK_TOKENS * encoder.width
    values += encoder.width + config.speaker_dim
    whole_numbers = rates.BLOCK_TOKENS - 1 + 4  # pending tokens; its length, the prompt's, start and seed
    return values * bytes_per_value + 8 * whole_numbers
