"""The released flow: speech tokens -> log-mel, by a U-Net over the whole utterance (checkpoints.md 3.1 to 3.4).

Modules carry the names of the released state dict flow.pt. Since attention and normalisation of the U-Net run over all
frames, every block of a stream decodes all tokens so far, with the mel that was given out as its prompt. The streaming
here keeps every frame: frames count by absolute index, the last ones of a block are held back and faded into the next
block's by weights that sum to one, and whatever ends an utterance brings the rest.

Shapes: B batch, N tokens, T mel frames, M mels, S speaker channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.decoder.conformer import BlockConformer, ConformerConfig
from duologue.decoder.encoder import check_tokens, frames_for_tokens
from duologue.decoder.flow import noise_at
from duologue.decoder.regulator import LengthRegulator, RegulatorConfig, mask_of
from duologue.decoder.solvers import solve_euler
from duologue.decoder.unet import UNet, UNetConfig
from duologue.layers import Padded, reset_rows, split_at

NUM_STEPS = 10  # of the solver, a constant of the released code


@dataclass(frozen=True)
class SolverConfig:
    """`flow.decoder.cfm_params` of config.yaml. All but the guidance count in training only or have one choice."""

    solver: Literal["euler"] = "euler"
    t_scheduler: Literal["cosine"] = "cosine"
    inference_cfg_rate: float = 0.7
    training_cfg_rate: float = 0.2
    sigma_min: float = 1e-6
    reg_loss_type: str = "l1"


@dataclass(frozen=True)
class ReleasedFlowConfig:
    """`flow` of config.yaml; the defaults are the published sizes (111,166,208 parameters)."""

    input_size: int = 512
    output_size: int = 80
    spk_embed_dim: int = 192
    vocab_size: int = 16384
    input_frame_rate: float = 12.5
    output_type: Literal["mel"] = "mel"
    only_mask_loss: bool = True
    encoder: ConformerConfig = field(default_factory=ConformerConfig)
    length_regulator: RegulatorConfig = field(default_factory=RegulatorConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    estimator: UNetConfig = field(default_factory=UNetConfig)

    def __post_init__(self) -> None:
        mels = self.output_size
        if self.input_frame_rate != rates.TOKEN_RATE:
            raise ValueError(f"input_frame_rate is {self.input_frame_rate}; only {rates.TOKEN_RATE} is known")
        for name, value, expected in (
            ("encoder.input_size", self.encoder.input_size, self.input_size),
            ("length_regulator.channels", self.length_regulator.channels, mels),
            ("estimator.in_channels", self.estimator.in_channels, 4 * mels),
            ("estimator.out_channels", self.estimator.out_channels, mels),
        ):
            if value != expected:
                raise ValueError(f"{name} is {value}; the sizes beside it ask for {expected}")
        for name in ("vocab_size", "spk_embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def codebook_size(self) -> int:
        return self.vocab_size


@dataclass(frozen=True)
class Streaming:
    """How a stream is cut; the borders depend on counts of tokens alone, never on how they arrive.

    Attributes:
        block_tokens: sizes of the blocks, the last one again and again; empty for a single block at the end.
        overlap_frames: mel frames held back at the end of a block and faded into the next one's.
        context_tokens: once more tokens than this were decoded, the oldest 320 are forgotten, which bounds memory and
            the cost of a block; None never forgets.
    """

    block_tokens: tuple[int, ...] = (25, 50, 100, 150, 200)
    overlap_frames: int = 34
    context_tokens: int | None = 1280

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.block_tokens):
            raise ValueError(f"block_tokens must be positive, got {list(self.block_tokens)}")
        if self.overlap_frames < 0:
            raise ValueError(f"overlap_frames must not be negative, got {self.overlap_frames}")
        if self.context_tokens is not None and self.context_tokens < 2 * _FORGET_TOKENS:
            raise ValueError(f"context_tokens must be at least {2 * _FORGET_TOKENS}, got {self.context_tokens}")

    def size_of(self, block: Tensor) -> Tensor:
        """Tokens of the block with each of these numbers (B,)."""
        if not self.block_tokens:
            return torch.full_like(block, torch.iinfo(torch.int64).max)
        sizes = torch.tensor(self.block_tokens, device=block.device)
        return sizes[block.clamp(max=len(self.block_tokens) - 1)]


# Whole frames and whole blocks of 10: 320 tokens are exactly 2205 frames.
_FORGET_TOKENS = 320
OFFLINE = Streaming(block_tokens=())


@dataclass
class ReleasedFlowState:
    """Attributes:
    tokens: (B, N) that were decoded; `start` (B,) counts those before them that are forgotten.
    pending: (B, N) of the open block.
    mel: (B, T, M) prompt and what was given out, from the first of `tokens` on.
    held: (B, T, M) frames of the last block that wait for the next one's.
    num_blocks: (B,) decoded so far.
    seed: (B,) of the noise.
    speaker: (B, S).
    streaming: in a tuple of one, for settings are not reset.
    """

    tokens: Padded
    start: Tensor
    pending: Padded
    mel: Padded
    held: Padded
    num_blocks: Tensor
    seed: Tensor
    speaker: Tensor
    num_steps: int
    guidance_scale: float
    streaming: tuple[Streaming]


def released_times(num_steps: int) -> list[float]:
    """t_k = 1 - cos(pi k / 2 n), k = 0..n, in float32 and summed up step by step as the released solver does.

    The estimator takes the sine of 1000 t, so that the seventh digit of t is seen in the mel.
    """
    span = 1 - torch.cos(torch.linspace(0, 1, num_steps + 1) * 0.5 * torch.pi)
    times = [span[0]]
    for target in span[1:]:
        times.append(times[-1] + (target - times[-1]))
    return [float(t) for t in times]


class ReleasedFlow(nn.Module):
    """Speech tokens (B, N) int64 -> natural-log mel (B, 441 N // 64, M), a streaming stage."""

    def __init__(self, config: ReleasedFlowConfig, streaming: Streaming | None = None) -> None:
        super().__init__()
        self.config = config
        self.streaming = streaming or Streaming()
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, config.output_size)
        self.encoder = BlockConformer(config.encoder)
        self.encoder_proj = nn.Linear(config.encoder.output_size, config.output_size)
        self.length_regulator = LengthRegulator(config.length_regulator, config.output_size)
        self.decoder = nn.ModuleDict({"estimator": UNet(config.estimator)})

    def encode(self, tokens: Padded) -> Padded:
        """Tokens (B, N) -> (B, N, M), at 12.5/s."""
        h = self.encoder(Padded(self.input_embedding(tokens.zeroed().values), tokens.lengths))
        return Padded(self.encoder_proj(h.values), h.lengths)

    def condition(self, tokens: Padded) -> Padded:
        """Tokens (B, N) -> mu (B, T, M)."""
        return self.length_regulator(self.encode(tokens), frames_for_tokens(tokens.lengths))  # type: ignore[no-any-return]

    def speaker_condition(self, speaker: Tensor) -> Tensor:
        """Speaker vectors (B, S) -> (B, M). Zeros, which the released demo gives, leave the layer's bias."""
        return self.spk_embed_affine_layer(functional.normalize(speaker, dim=1))  # type: ignore[no-any-return]

    def solve(
        self, mu: Padded, speaker: Tensor, prompt: Padded, noise: Tensor, num_steps: int, guidance_scale: float
    ) -> Tensor:
        """Integrates the flow.

        Args:
            mu: (B, T, M).
            speaker: (B, S).
            prompt: (B, P, M) mel of the first frames, P at most T.
            noise: (B, T, M).
        Returns:
            mel (B, T, M), the prompt's frames included.
        """
        time = mu.values.shape[1]
        mask = mask_of(mu.lengths, time)
        given = functional.pad(prompt.zeroed().values, (0, 0, 0, time - prompt.values.shape[1]))
        inputs = [mu.values, self.speaker_condition(speaker), given]
        guided = guidance_scale != 0
        if guided:  # both branches in one call; the second one knows nothing, not even the speaker layer's bias
            inputs = [torch.cat([x, torch.zeros_like(x)]) for x in inputs]
            mask = None if mask is None else torch.cat([mask, mask])

        def velocity(k: int, t: float, x: Tensor) -> Tensor:
            x = torch.cat([x, x]) if guided else x
            estimator = self.decoder["estimator"]
            out: Tensor = estimator(x, x.new_full((len(x),), t), *inputs, mask)
            if not guided:
                return out
            conditional, unconditional = out.chunk(2)
            return (1 + guidance_scale) * conditional - guidance_scale * unconditional

        return solve_euler(velocity, noise, released_times(num_steps))

    def init_state(
        self,
        batch_size: int,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        speaker: Tensor | None = None,
        streaming: Streaming | None = None,
    ) -> ReleasedFlowState:
        """A fresh state.

        Args:
            num_steps, guidance_scale: the released 10 and the config's where None.
            seed: of the noise, the same for all rows; give rows their own through `state.seed`.
            speaker: (B, S), zeros where None.
            streaming: how the stream is cut, the flow's own way where None; `OFFLINE` decodes in one piece.
        """
        num_steps = NUM_STEPS if num_steps is None else num_steps
        guidance_scale = self.config.solver.inference_cfg_rate if guidance_scale is None else guidance_scale
        if num_steps < 1 or guidance_scale < 0:
            raise ValueError(
                f"num_steps must be at least 1 and guidance_scale not negative, got {num_steps} and {guidance_scale}"
            )
        like = self.encoder_proj.weight
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        no_tokens, no_mel = Padded(zeros[:, None][:, :0], zeros), like.new_zeros(batch_size, 0, self.config.output_size)
        return ReleasedFlowState(
            tokens=no_tokens,
            start=zeros,
            pending=no_tokens,
            mel=Padded(no_mel, zeros),
            held=Padded(no_mel, zeros),
            num_blocks=zeros,
            seed=zeros + seed,
            speaker=like.new_zeros(batch_size, self.config.spk_embed_dim) if speaker is None else speaker,
            num_steps=num_steps,
            guidance_scale=float(guidance_scale),
            streaming=(streaming or self.streaming,),
        )

    def give_prompt(self, tokens: Padded, mel: Padded, state: ReleasedFlowState) -> None:
        """Sets how fresh rows begin: tokens (B, N) and their natural-log mel (B, P, M), whose voice goes on.

        The output begins after the prompt: after min(P, 441 N // 64) frames. Rows without a prompt have no tokens.
        """
        given = tokens.lengths > 0
        if bool(((state.start + state.tokens.lengths + state.pending.lengths > 0) & given).any()):
            raise ValueError("a prompt can only be given before the first token")
        check_tokens(tokens, self.config.vocab_size)
        lengths = torch.minimum(mel.lengths, frames_for_tokens(tokens.lengths))
        state.tokens = Padded.concat([state.tokens, tokens])
        state.mel = Padded.concat([state.mel, Padded(mel.values[:, : int(lengths.max())], lengths)])

    def step(self, x: Padded, state: ReleasedFlowState) -> Padded:
        """Tokens (B, N) -> mel frames (B, T, M) that the blocks they close make final."""
        check_tokens(x, self.config.vocab_size)
        state.pending = Padded.concat([state.pending, x])
        parts = []
        while True:
            size = state.streaming[0].size_of(state.num_blocks)
            ready = state.pending.lengths >= size
            if not bool(ready.any()):
                break
            parts.append(self._decode(torch.where(ready, size, 0), state, torch.zeros_like(ready)))
        return Padded.concat(parts) if parts else self._nothing(state)

    def flush(self, state: ReleasedFlowState, rows: Tensor | None = None) -> Padded:
        """End of the utterance: the open block and the frames held back. Rows keep seed and speaker."""
        rows = torch.ones_like(state.start, dtype=torch.bool) if rows is None else rows
        mel = self._nothing(state)
        pending = state.pending.lengths * rows
        if bool(pending.any()):
            mel = self._decode(pending, state, rows)
        # Rows that end with a block just closed have nothing to decode and frames to give.
        rest = state.held.lengths * rows
        mel = Padded.concat([mel, Padded(state.held.values[:, : int(rest.max())], rest)])
        fresh = self.init_state(len(rows), state.num_steps, state.guidance_scale, streaming=state.streaming[0])
        fresh.seed, fresh.speaker = state.seed, state.speaker
        reset_rows(state, fresh, rows)
        return mel

    def forward(self, x: Padded, state: ReleasedFlowState | None = None) -> Padded:
        """Tokens (B, N) -> mel (B, 441 N // 64, M); what a stream gives, at once. A fresh state may carry settings."""
        state = self.init_state(len(x.lengths)) if state is None else state
        return Padded.concat([self.step(x, state), self.flush(state)])

    def _nothing(self, state: ReleasedFlowState) -> Padded:
        return Padded(state.mel.values[:, :0], torch.zeros_like(state.start))

    def _decode(self, num_tokens: Tensor, state: ReleasedFlowState, ending: Tensor) -> Padded:
        """Decodes this many pending tokens (B,) of the rows that have any; returns the frames that become final."""
        new, state.pending = split_at(state.pending, num_tokens)
        active = num_tokens > 0
        state.tokens = Padded.concat([state.tokens, new])
        state.num_blocks = state.num_blocks + active
        raw = self._frames_of(active.nonzero()[:, 0], state)  # after those given out
        raw = _fade(state.held, raw)
        keep = raw.lengths.clamp(max=state.streaming[0].overlap_frames) * ~ending
        final, held = split_at(raw, raw.lengths - keep)
        state.held = Padded(
            _where_rows(active, held.values, state.held.values), torch.where(active, held.lengths, state.held.lengths)
        )
        state.mel = Padded.concat([state.mel, final])
        self._forget(state)
        return final

    def _frames_of(self, index: Tensor, state: ReleasedFlowState) -> Padded:
        """Mel of the rows with these numbers, without what was given out before; the other rows get no frames."""
        tokens, given = _select(state.tokens, index), _select(state.mel, index)
        mu = self.condition(tokens)
        first = frames_for_tokens(state.start[index])
        frame = first[:, None] + torch.arange(mu.values.shape[1], device=first.device)
        noise = noise_at(state.seed[index], frame, self.config.output_size).to(mu.values.dtype)
        mel = self.solve(mu, state.speaker[index], given, noise, state.num_steps, state.guidance_scale)
        raw = split_at(Padded(mel, mu.lengths), given.lengths)[1]
        values = raw.values.new_zeros(len(state.start), *raw.values.shape[1:]).index_copy(0, index, raw.values)
        return Padded(values, torch.zeros_like(state.start).index_copy(0, index, raw.lengths))

    def _forget(self, state: ReleasedFlowState) -> None:
        limit = state.streaming[0].context_tokens
        if limit is None:
            return
        excess = (state.tokens.lengths - limit).clamp(min=0)
        drop = -(-excess // _FORGET_TOKENS) * _FORGET_TOKENS
        # Only what was given out can be forgotten; the frames held back are not in `mel`.
        known = state.mel.lengths // rates.frames_for_tokens(_FORGET_TOKENS) * _FORGET_TOKENS
        drop = torch.minimum(drop, known)
        state.tokens = split_at(state.tokens, drop)[1]
        state.mel = split_at(state.mel, frames_for_tokens(drop))[1]
        state.start = state.start + drop


def _select(x: Padded, index: Tensor) -> Padded:
    """Some rows of a batch, no wider than they need."""
    lengths = x.lengths[index]
    return Padded(x.values[index, : int(lengths.max())], lengths)


def _where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of the one or the other (B, T, M), padded to one width."""
    width = max(new.shape[1], old.shape[1])
    new, old = (functional.pad(x, (0, 0, 0, width - x.shape[1])) for x in (new, old))
    return torch.where(rows[:, None, None], new, old)


def _fade(held: Padded, raw: Padded) -> Padded:
    """Goes over from the last block's idea of the first frames to this one's, by weights that sum to one.

    The first frame is almost the last block's: the step from what was given out is as small as within that block.
    """
    overlap = torch.minimum(held.lengths, raw.lengths)
    width = int(overlap.max())
    place = torch.arange(width, device=overlap.device)
    weight = ((place + 1) / (overlap[:, None] + 1)).clamp(max=1)[:, :, None].to(raw.values.dtype)
    mixed = raw.values[:, :width] * weight + held.values[:, :width] * (1 - weight)
    mixed = torch.where((place < overlap[:, None])[:, :, None], mixed, raw.values[:, :width])
    return Padded(torch.cat([mixed, raw.values[:, width:]], 1), raw.lengths)
