"""The released flow: speech tokens -> log-mel, by a U-Net over the whole utterance (docs/checkpoints.md 3.1 to 3.4).

Modules carry the names of the released state dict flow.pt. Attention and normalization of the U-Net run over all frames
that it is given, so it has no exact incremental form: a block of a stream is decoded with the mel that was given out
before it as its prompt, all of it as in the released code, or only the last frames of it, which bounds the cost of a
block (`Streaming.window_frames`). What comes before the U-Net is the same either way: the encoder keeps keys and values
of closed blocks, and the length regulator runs over all tokens. Frames count by absolute index, the noise too; the last
frames of a block are held back and faded into the next block's by weights that sum to one, and whatever ends an
utterance brings the rest.

Shapes: B batch, N tokens, T mel frames, M mels, S speaker channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.decoder.encoder import check_tokens, frames_for_tokens
from duologue.decoder.flow import noise_at, solve_euler
from duologue.layers import Padded, reset_rows, split_at
from duologue.released.decoder.blocks import FORGET_TOKENS, Streaming, fade, last_of, select, where_rows
from duologue.released.decoder.conformer import BlockConformer, ConformerConfig, ConformerState
from duologue.released.decoder.regulator import LengthRegulator, RegulatorConfig, mask_of
from duologue.released.decoder.unet import UNet, UNetConfig

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


@dataclass
class ReleasedFlowState:
    """Bounded where the streaming is: then nothing of it grows beyond the first `context_tokens`.

    Attributes:
        encoder: keys and values of the closed encoder blocks, of 10 tokens each.
        encoded: (B, N, M) of their tokens; `start` (B,) counts those before them that are forgotten.
        open: (B, N) tokens after the closed blocks: a decoder block or a prompt may end inside of an encoder block.
        pending: (B, N) of the open decoder block.
        mel: (B, T, M) the last frames of the prompt and of what was given out; `num_given` (B,) counts all of them.
        held: (B, T, M) frames of the last block that wait for the next one's.
        num_blocks: (B,) decoded so far.
        seed: (B,) of the noise.
        speaker: (B, S).
        streaming: in a tuple of one, for settings are not reset.
    """

    encoder: ConformerState
    encoded: Padded
    start: Tensor
    open: Padded
    pending: Padded
    mel: Padded
    num_given: Tensor
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

    @property
    def speaker_dim(self) -> int:
        """Size of a speaker vector."""
        return self.config.spk_embed_dim

    def normalize(self, mel: Tensor) -> Tensor:
        """Natural-log mel -> the values that the flow predicts, here the mel itself."""
        return mel

    def predict(
        self, tokens: Padded, start: Tensor, speaker: Tensor, given: Tensor, x_t: Tensor, time: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One evaluation for training, as `duologue.decoder.flow.Flow.predict`.

        `start` is not used: a cut clip is an utterance of its own, and sees nothing before the cut.
        """
        num_frames = frames_for_tokens(start + tokens.lengths) - frames_for_tokens(start)
        mu = self.length_regulator(self.encode(tokens), num_frames).values
        inputs = (
            mu * keep[:, None, None],
            self.speaker_condition(speaker) * keep[:, None],
            given * keep[:, None, None],
        )
        return self.decoder["estimator"](x_t, time, *inputs, mask_of(num_frames, mu.shape[1])), mu

    def estimate_in(self, dtype: torch.dtype) -> ReleasedFlow:
        """Turns the U-Net, where nearly all of the work is, into this type; all else stays, the solver's sums too."""
        self.decoder.to(dtype)
        return self

    def encode(self, tokens: Padded) -> Padded:
        """A whole utterance (B, N) -> (B, N, M), at 12.5/s."""
        return self.encode_on(tokens, self.encoder.init_state(len(tokens.lengths)), None)

    def encode_on(self, tokens: Padded, state: ConformerState, max_cached: int | None) -> Padded:
        """Tokens (B, N) that follow the closed blocks -> (B, N, M); see `BlockConformer.step`."""
        embedded = Padded(self.input_embedding(tokens.zeroed().values), tokens.lengths)
        h = self.encoder.step(embedded, state, max_cached)
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
            mel (B, T, M) in the type of the noise, the prompt's frames included.
        """
        time = mu.values.shape[1]
        mask = mask_of(mu.lengths, time)
        given = functional.pad(prompt.zeroed().values, (0, 0, 0, time - prompt.values.shape[1]))
        inputs = [mu.values, self.speaker_condition(speaker), given]
        guided = guidance_scale != 0
        if guided:  # both branches in one call; the second one knows nothing, not even the speaker layer's bias
            inputs = [torch.cat([x, torch.zeros_like(x)]) for x in inputs]
            mask = None if mask is None else torch.cat([mask, mask])
        estimator = self.decoder["estimator"]
        dtype = next(estimator.parameters()).dtype
        inputs = [x.to(dtype) for x in inputs]

        def velocity(k: int, t: float, x: Tensor) -> Tensor:
            now = (torch.cat([x, x]) if guided else x).to(dtype)
            times = torch.full((len(now),), t, device=x.device)  # float32: 1000 t has more digits than bfloat16
            out: Tensor = estimator(now, times, *inputs, mask).to(x.dtype)
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
            encoder=self.encoder.init_state(batch_size),
            encoded=Padded(no_mel, zeros),
            start=zeros,
            open=no_tokens,
            pending=no_tokens,
            mel=Padded(no_mel, zeros),
            num_given=zeros,
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
        if bool(((state.encoder.start + state.open.lengths + state.pending.lengths > 0) & given).any()):
            raise ValueError("a prompt can only be given before the first token")
        check_tokens(tokens, self.config.vocab_size)
        lengths = torch.minimum(mel.lengths, frames_for_tokens(tokens.lengths))
        state.open = Padded.concat([state.open, tokens])
        self._give(Padded(mel.values[:, : int(lengths.max())], lengths), state)

    def step(self, x: Padded, state: ReleasedFlowState) -> Padded:
        """Tokens (B, N) -> mel frames (B, T, M) that the blocks they close make final."""
        check_tokens(x, self.config.vocab_size)
        state.pending = Padded.concat([state.pending, x])
        parts = []
        while bool((size := state.streaming[0].ready(state.pending.lengths, state.num_blocks)).any()):
            parts.append(self._decode(size, state, torch.zeros_like(size, dtype=torch.bool)))
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
        state.num_blocks = state.num_blocks + active
        raw = fade(state.held, self._frames_of(new, active, state))
        keep = raw.lengths.clamp(max=state.streaming[0].overlap_frames) * ~ending
        final, held = split_at(raw, raw.lengths - keep)
        state.held = Padded(
            where_rows(active, held.values, state.held.values), torch.where(active, held.lengths, state.held.lengths)
        )
        self._give(final, state)
        self._forget(state)
        return final

    def _frames_of(self, new: Padded, active: Tensor, state: ReleasedFlowState) -> Padded:
        """Mel of the active rows (B,) without what was given out before; the other rows get no frames."""
        encoded = self._encode(new, active, state)
        index = active.nonzero()[:, 0]
        encoded, given = select(encoded, index), state.num_given[index]
        forgotten = frames_for_tokens(state.start[index])
        mu = self.length_regulator(encoded, frames_for_tokens(encoded.lengths))
        first = state.streaming[0].first_frame(given, forgotten)
        mu = split_at(mu, first - forgotten)[1]
        frame = first[:, None] + torch.arange(mu.values.shape[1], device=first.device)
        noise = noise_at(state.seed[index], frame, self.config.output_size)
        noise = noise.to(torch.promote_types(noise.dtype, mu.values.dtype))
        prompt = last_of(select(state.mel, index), given - first)
        mel = self.solve(mu, state.speaker[index], prompt, noise, state.num_steps, state.guidance_scale)
        raw = split_at(Padded(mel, mu.lengths), prompt.lengths)[1]
        values = raw.values.new_zeros(len(state.start), *raw.values.shape[1:]).index_copy(0, index, raw.values)
        return Padded(values, torch.zeros_like(state.start).index_copy(0, index, raw.lengths))

    def _encode(self, new: Padded, active: Tensor, state: ReleasedFlowState) -> Padded:
        """All tokens of the active rows from `start` on, encoded (B, N, M); closed blocks go into the state."""
        tokens = Padded.concat([state.open, new])
        tokens = Padded(tokens.values, tokens.lengths * active)
        before = state.encoder.start
        fresh = self.encode_on(tokens, state.encoder, state.streaming[0].context_tokens)
        closed = state.encoder.start - before
        whole = Padded.concat([state.encoded, fresh])
        state.encoded = Padded.concat([state.encoded, split_at(fresh, closed)[0]])
        rest = split_at(tokens, closed)[1]
        state.open = Padded(
            where_rows(active, rest.values, state.open.values), torch.where(active, rest.lengths, state.open.lengths)
        )
        return whole

    def _give(self, mel: Padded, state: ReleasedFlowState) -> None:
        """Takes in frames that are given out, or were given as the prompt."""
        state.num_given = state.num_given + mel.lengths
        state.mel = Padded.concat([state.mel, mel])
        if (window := state.streaming[0].window_frames) is not None:
            state.mel = last_of(state.mel, state.mel.lengths.clamp(max=window + 1))

    def _forget(self, state: ReleasedFlowState) -> None:
        limit = state.streaming[0].context_tokens
        if limit is None:
            return
        excess = (state.encoded.lengths + state.open.lengths - limit).clamp(min=0)
        drop = -(-excess // FORGET_TOKENS) * FORGET_TOKENS
        # Only what was given out can be forgotten; the frames held back are not in `mel`.
        given = state.num_given - frames_for_tokens(state.start)
        drop = torch.minimum(drop, given // rates.frames_for_tokens(FORGET_TOKENS) * FORGET_TOKENS)
        state.encoded = split_at(state.encoded, drop)[1]
        state.start = state.start + drop
        kept = state.num_given - frames_for_tokens(state.start)
        state.mel = last_of(state.mel, state.mel.lengths.minimum(kept))
