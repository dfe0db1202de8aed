"""The released flow: speech tokens -> log-mel by a U-Net over the whole utterance (docs/checkpoints.md 3.1 to 3.4).

Modules have the names of the released state dict flow.pt. The U-Net attends to all its frames, so it has no exact
incremental form. A block is decoded with previous output frames as its prompt: all of them as in the released code, or
the last `Streaming.window_frames`. The encoder caches closed blocks; the length regulator runs over all tokens. Noise
depends on the absolute frame index. The last frames of a block are held back and cross-faded with the next block.

Shapes: B batch, N tokens, T mel frames, M mels, S speaker channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.cuda import CapturedGraphs, next_size
from duologue.decoder.encoder import check_tokens, frames_for_tokens
from duologue.decoder.flow import noise_at, solve_euler
from duologue.layers import Padded, reset_rows, split_at
from duologue.released.decoder.blocks import FORGET_TOKENS, Streaming, fade, last_of, select, where_rows
from duologue.released.decoder.conformer import BlockConformer, ConformerConfig, ConformerState
from duologue.released.decoder.regulator import LengthRegulator, RegulatorConfig, mask_of
from duologue.released.decoder.unet import UNet, UNetConfig

log = logging.getLogger(__name__)
NUM_STEPS = 10  # solver steps, a constant of the released code
# Rows and frames of captured solves. A block of 10 tokens has 69 frames, with a full window 182; of 20 251, of 40 389.
GRAPH_ROWS = (1, 2, 4, 8, 16)
GRAPH_FRAMES = (96, 192, 256, 416)


@dataclass(frozen=True)
class SolverConfig:
    """The `flow.decoder.cfm_params` of config.yaml. Only the guidance rate matters for inference."""

    solver: Literal["euler"] = "euler"
    t_scheduler: Literal["cosine"] = "cosine"
    inference_cfg_rate: float = 0.7
    training_cfg_rate: float = 0.2
    sigma_min: float = 1e-6
    reg_loss_type: str = "l1"


@dataclass(frozen=True)
class ReleasedFlowConfig:
    """The `flow` of config.yaml; the defaults are the published sizes (111,166,208 parameters)."""

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
                raise ValueError(f"{name} is {value}; the other sizes require {expected}")
        for name in ("vocab_size", "spk_embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass
class ReleasedFlowState:
    """Streaming state of the flow, bounded if the streaming settings are.

    Attributes:
        encoder: keys and values of the closed encoder blocks of 10 tokens.
        encoded: (B, N, M) their outputs.
        start: (B,) forgotten tokens before them.
        open: (B, N) tokens after the closed blocks; a decoder block or prompt may end within an encoder block.
        pending: (B, N) tokens of the open decoder block.
        mel: (B, T, M) the last frames of prompt and output.
        num_given: (B,) the count of all frames of prompt and output.
        held: (B, T, M) frames held back for the cross-fade.
        num_blocks: (B,) decoded blocks.
        seed: (B,) noise seed.
        speaker: (B, S).
        streaming: settings, in a tuple because settings are not reset.
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
    """Returns t_k = 1 - cos(pi k / 2 n), k = 0..n, accumulated in float32 as in the released solver.

    The estimator takes the sine of 1000 t, so the seventh digit of t affects the mel.
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
        self.graphs: CapturedGraphs | None = CapturedGraphs()

    @property
    def speaker_dim(self) -> int:
        return self.config.spk_embed_dim

    def normalize(self, mel: Tensor) -> Tensor:
        """Returns the mel itself, the scale of the released flow."""
        return mel

    def predict(
        self, tokens: Padded, start: Tensor, speaker: Tensor, given: Tensor, x_t: Tensor, time: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Evaluates the flow once for training, as `duologue.decoder.flow.Flow.predict`.

        `start` is unused: a cut clip counts as a whole utterance.
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
        """Converts the U-Net to this dtype; the rest and the solver's sums are unchanged."""
        self.decoder.to(dtype)
        if self.graphs is not None:
            self.graphs.clear()
        return self

    def encode(self, tokens: Padded) -> Padded:
        """Encodes a whole utterance (B, N) -> (B, N, M) at 12.5/s."""
        return self.encode_on(tokens, self.encoder.init_state(len(tokens.lengths)), None)

    def encode_on(self, tokens: Padded, state: ConformerState, max_cached: int | None) -> Padded:
        """Encodes tokens (B, N) after the closed blocks -> (B, N, M); see `BlockConformer.step`."""
        embedded = Padded(self.input_embedding(tokens.zeroed().values), tokens.lengths)
        h = self.encoder.step(embedded, state, max_cached)
        return Padded(self.encoder_proj(h.values), h.lengths)

    def condition(self, tokens: Padded) -> Padded:
        """Computes the condition mu (B, T, M) of tokens (B, N)."""
        return self.length_regulator(self.encode(tokens), frames_for_tokens(tokens.lengths))  # type: ignore[no-any-return]

    def speaker_condition(self, speaker: Tensor) -> Tensor:
        """Projects speaker vectors (B, S) to (B, M). Zeros, as in the released demo, give the layer's bias."""
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
            mel (B, T, M) in the dtype of the noise, the prompt's frames included.
        """
        given = functional.pad(prompt.zeroed().values, (0, 0, 0, mu.values.shape[1] - prompt.values.shape[1]))
        inputs = mu.values, self.speaker_condition(speaker), given, noise
        if self.graphs is not None and self.graphs.usable(noise):
            rows, frames = next_size(len(noise), GRAPH_ROWS), next_size(noise.shape[1], GRAPH_FRAMES)
            if rows is not None and frames is not None:
                try:
                    return self._solve_captured(
                        self.graphs, rows, frames, mu.lengths, inputs, num_steps, guidance_scale
                    )
                except RuntimeError as error:  # such as too little memory
                    log.warning("the decoder goes on without CUDA graphs: %s", error)
                    self.graphs = None
        return self._integrate(*inputs, mask_of(mu.lengths, noise.shape[1]), num_steps, guidance_scale)

    def capture(
        self, rows: int, frames: int, num_steps: int | None = None, guidance_scale: float | None = None
    ) -> bool:
        """Captures the solve of a bucket, so that the first conversation does not wait for it.

        Returns:
            whether graphs are used on this device and the bucket exists.
        """
        like, config = self.encoder_proj.weight, self.config
        if self.graphs is None or next_size(rows, GRAPH_ROWS) is None or next_size(frames, GRAPH_FRAMES) is None:
            return False
        with torch.no_grad():
            if not self.graphs.usable(like):
                return False
            noise = like.new_zeros(rows, frames, config.output_size)
            prompt = Padded.full(noise[:, :0])
            scale = config.solver.inference_cfg_rate if guidance_scale is None else guidance_scale
            speaker = like.new_zeros(rows, config.spk_embed_dim)
            self.solve(Padded.full(noise), speaker, prompt, noise, num_steps or NUM_STEPS, scale)
        return self.graphs is not None

    def _solve_captured(
        self,
        graphs: CapturedGraphs,
        rows: int,
        frames: int,
        lengths: Tensor,
        inputs: Sequence[Tensor],
        num_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Integrates in a bucket of rows and frames as one CUDA graph. Padding is masked, so the result is the same."""
        num_rows, num_frames = inputs[3].shape[:2]
        weight = next(self.decoder.parameters())
        key = rows, frames, num_steps, guidance_scale, weight.dtype, weight.data_ptr()
        # A padded row counts as one of a single frame: attention and norms need one.
        lengths = functional.pad(lengths, (0, rows - num_rows), value=1)
        below, right = (0, rows - num_rows), (0, frames - num_frames)
        padded = [functional.pad(x, (0, 0, *(right if x.dim() == 3 else ()), *below)) for x in inputs]

        def work(lengths: Tensor, mu: Tensor, speaker: Tensor, given: Tensor, noise: Tensor) -> Tensor:
            mask = (torch.arange(frames, device=lengths.device) < lengths[:, None])[:, None]
            return self._integrate(mu, speaker, given, noise, mask, num_steps, guidance_scale)

        return graphs.run(key, work, [lengths, *padded])[:num_rows, :num_frames]

    def _integrate(
        self,
        mu: Tensor,
        speaker: Tensor,
        given: Tensor,
        noise: Tensor,
        mask: Tensor | None,
        num_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Integrates from the noise (B, T, M) on, without host synchronization.

        Args:
            mu, given: (B, T, M); speaker: (B, M).
            mask: (B, 1, T) bool, true on valid frames; None if all are.
        """
        inputs = [mu, speaker, given]
        guided = guidance_scale != 0
        if guided:  # both branches in one call; the unconditional inputs are all zeros
            inputs = [torch.cat([x, torch.zeros_like(x)]) for x in inputs]
            mask = None if mask is None else torch.cat([mask, mask])
        estimator = self.decoder["estimator"]
        dtype = next(estimator.parameters()).dtype
        inputs = [x.to(dtype) for x in inputs]

        def velocity(k: int, t: float, x: Tensor) -> Tensor:
            now = (torch.cat([x, x]) if guided else x).to(dtype)
            times = torch.full(
                (len(now),), t, device=x.device
            )  # float32, because bfloat16 has too few digits for 1000 t
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
        """Returns a fresh state.

        Args:
            num_steps, guidance_scale: by default the released 10 and the config's rate.
            seed: noise seed of all rows; `state.seed` holds one per row.
            speaker: (B, S), zeros by default.
            streaming: by default the flow's settings; `OFFLINE` decodes in one block.
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
        """Sets a voice prompt for fresh rows: tokens (B, N) and their natural-log mel (B, P, M).

        The output begins after min(P, 441 N // 64) frames. Rows without a prompt have no tokens.
        """
        given = tokens.lengths > 0
        if bool(((state.encoder.start + state.open.lengths + state.pending.lengths > 0) & given).any()):
            raise ValueError("a prompt can only be given before the first token")
        check_tokens(tokens, self.config.vocab_size)
        lengths = torch.minimum(mel.lengths, frames_for_tokens(tokens.lengths))
        state.open = Padded.concat([state.open, tokens])
        self._give(Padded(mel.values[:, : int(lengths.max())], lengths), state)

    def step(self, x: Padded, state: ReleasedFlowState) -> Padded:
        """Decodes tokens (B, N) and returns final mel frames (B, T, M)."""
        check_tokens(x, self.config.vocab_size)
        state.pending = Padded.concat([state.pending, x])
        parts = []
        while bool((size := state.streaming[0].ready(state.pending.lengths, state.num_blocks)).any()):
            parts.append(self._decode(size, state, torch.zeros_like(size, dtype=torch.bool)))
        return Padded.concat(parts) if parts else self._nothing(state)

    def flush(self, state: ReleasedFlowState, rows: Tensor | None = None) -> Padded:
        """Ends the utterance: decodes the open block and returns the held-back frames. Rows keep seed and speaker."""
        rows = torch.ones_like(state.start, dtype=torch.bool) if rows is None else rows
        mel = self._nothing(state)
        pending = state.pending.lengths * rows
        if bool(pending.any()):
            mel = self._decode(pending, state, rows)
        # Rows without pending tokens still have held-back frames.
        rest = state.held.lengths * rows
        mel = Padded.concat([mel, Padded(state.held.values[:, : int(rest.max())], rest)])
        fresh = self.init_state(len(rows), state.num_steps, state.guidance_scale, streaming=state.streaming[0])
        fresh.seed, fresh.speaker = state.seed, state.speaker
        reset_rows(state, fresh, rows)
        return mel

    def forward(self, x: Padded, state: ReleasedFlowState | None = None) -> Padded:
        """Decodes tokens (B, N) to mel (B, 441 N // 64, M) in one pass, equal to a stream. A fresh state may carry
        settings."""
        state = self.init_state(len(x.lengths)) if state is None else state
        return Padded.concat([self.step(x, state), self.flush(state)])

    def _nothing(self, state: ReleasedFlowState) -> Padded:
        return Padded(state.mel.values[:, :0], torch.zeros_like(state.start))

    def _decode(self, num_tokens: Tensor, state: ReleasedFlowState, ending: Tensor) -> Padded:
        """Decodes this many pending tokens (B,) and returns final frames."""
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
        """Computes the new mel frames of the active rows (B,)."""
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
        """Encodes all tokens of the active rows from `start` on (B, N, M); closed blocks enter the state."""
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
        """Records frames of the output or the prompt."""
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
        # Only output frames can be forgotten; held-back frames are not in `mel`.
        given = state.num_given - frames_for_tokens(state.start)
        drop = torch.minimum(drop, given // rates.frames_for_tokens(FORGET_TOKENS) * FORGET_TOKENS)
        state.encoded = split_at(state.encoded, drop)[1]
        state.start = state.start + drop
        kept = state.num_given - frames_for_tokens(state.start)
        state.mel = last_of(state.mel, state.mel.lengths.minimum(kept))
