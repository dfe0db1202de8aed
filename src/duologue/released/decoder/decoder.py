"""ReleasedDecoder: the published glm-4-voice-decoder behind the same words as pocket's `SpeechDecoder`.

    decoder = load_released_decoder("glm-4-voice-decoder")      # config.yaml, flow.pt, hift.pt
    state = decoder.init_state(batch_size)
    wav = decoder.step(tokens, state) ... decoder.flush(state)

Shapes: B batch, T tokens, S samples, M mels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from duologue import rates
from duologue.checkpoint import load_weights, save_tensors
from duologue.layers import Padded
from duologue.released.decoder.blocks import Streaming
from duologue.released.decoder.flow import ReleasedFlow, ReleasedFlowConfig, ReleasedFlowState
from duologue.released.decoder.folder import CONFIG_FILE, read_decoder_config, read_weights, write_decoder_config
from duologue.released.decoder.hift import HiFT, HiFTConfig
from duologue.released.decoder.hift_stream import HiFTState, HiFTVocoder


@dataclass
class ReleasedDecoderState:
    flow: ReleasedFlowState
    vocoder: HiFTState


class ReleasedDecoder(nn.Module):
    """Speech tokens (B, T) int64 -> wav (B, 256 (441 T // 64)) float32 at 22.05 kHz, a streaming stage.

    Unlike the released streaming it gives every frame once, whatever ends the utterance: see `flow.py` for the mel and
    `hift_stream.py` for the wave.
    """

    def __init__(self, flow: ReleasedFlow, vocoder: HiFTVocoder) -> None:
        super().__init__()
        self.flow = flow
        self.vocoder = vocoder

    @property
    def codebook_size(self) -> int:
        """Number of speech codes that the decoder accepts: valid ones are `0 <= code < codebook_size`."""
        return self.flow.config.vocab_size

    def init_state(
        self,
        batch_size: int,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        speaker: Tensor | None = None,
        streaming: Streaming | None = None,
    ) -> ReleasedDecoderState:
        """A fresh state; the settings are those of `ReleasedFlow.init_state`."""
        flow = self.flow.init_state(batch_size, num_steps, guidance_scale, seed, speaker, streaming)
        return ReleasedDecoderState(flow, self.vocoder.init_state(batch_size, seed))

    def give_prompt(self, tokens: Padded, mel: Padded, state: ReleasedDecoderState) -> None:
        """Sets how fresh rows begin, see `ReleasedFlow.give_prompt`; the wave begins after the prompt."""
        self.flow.give_prompt(tokens, mel, state.flow)

    def step(self, x: Padded, state: ReleasedDecoderState) -> Padded:
        """Tokens (B, T) -> samples that have become final."""
        return self.vocoder.step(self.flow.step(x, state.flow), state.vocoder)

    def flush(self, state: ReleasedDecoderState, rows: Tensor | None = None) -> Padded:
        """End of the utterance, for whatever reason: the open block and all that was held back."""
        rows = torch.ones_like(state.flow.start, dtype=torch.bool) if rows is None else rows
        wav = self.vocoder.step(self.flow.flush(state.flow, rows), state.vocoder)
        return Padded.concat([wav, self.vocoder.flush(state.vocoder, rows)])

    def forward(self, x: Padded, state: ReleasedDecoderState | None = None) -> Padded:
        """Tokens (B, T) -> wav; what a stream gives, at once. A fresh state may carry settings."""
        state = self.init_state(len(x.lengths)) if state is None else state
        return Padded.concat([self.step(x, state), self.flush(state)])


def build_released_decoder(
    flow: ReleasedFlowConfig, hift: HiFTConfig, streaming: Streaming | None = None
) -> ReleasedDecoder:
    """A decoder with random weights; the default configs are the published sizes."""
    if hift.sampling_rate != rates.SPEAK_SAMPLE_RATE or hift.hop_length != rates.SPEAK_HOP:
        raise ValueError(
            f"the vocoder makes {hift.hop_length} samples a frame at {hift.sampling_rate} Hz; only "
            f"{rates.SPEAK_HOP} at {rates.SPEAK_SAMPLE_RATE} Hz are known"
        )
    return ReleasedDecoder(ReleasedFlow(flow, streaming), HiFTVocoder(HiFT(hift)))


def load_released_decoder(
    folder: str | Path,
    streaming: Streaming | None = None,
    dtype: torch.dtype = torch.float32,
    configs: tuple[ReleasedFlowConfig, HiFTConfig] | None = None,
) -> ReleasedDecoder:
    """Reads a folder in the released format: config.yaml, and flow and hift as .pt or .safetensors.

    Args:
        dtype: of the U-Net, where nearly all of the work is; the rest stays in float32, and so do the solver's sums.
        configs: those of the folder's config.yaml; read where None.
    Returns:
        the decoder on the CPU, in evaluation mode.
    Raises:
        ValueError: one sentence naming file and key: a part is missing or damaged, describes something else, or its
            weights have other names or shapes than the config asks for.
    """
    flow, hift = read_decoder_config(folder) if configs is None else configs
    try:
        with torch.device("meta"):  # no time is spent on random weights that are overwritten
            decoder = build_released_decoder(flow, hift, streaming)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG_FILE}: {error}") from None
    decoder.to_empty(device="cpu")
    for module, name in ((decoder.flow, "flow"), (decoder.vocoder.network, "hift")):
        tensors, file = read_weights(folder, name)
        load_weights(module, tensors, file)
    decoder.vocoder.network.fuse()
    decoder.flow.estimate_in(dtype)
    return decoder.eval().requires_grad_(False)


def save_released_decoder(
    folder: str | Path,
    decoder: ReleasedDecoder,
    *,
    note: str = "",
    safetensors: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the released format.

    Args:
        decoder: with its weights as they were made or read by `build_released_decoder`, not fused.
        note: goes to the top of config.yaml, like the word that weights are random.
        safetensors: flow.safetensors and hift.safetensors instead of flow.pt and hift.pt.
        dtype: of the stored weights; as they are where None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_decoder_config(folder, decoder.flow.config, decoder.vocoder.network.config, note)
    for module, name in ((decoder.flow, "flow"), (decoder.vocoder.network, "hift")):
        state = {key: tensor.detach().cpu() for key, tensor in module.state_dict().items()}
        if dtype is not None:
            state = {key: tensor.to(dtype) for key, tensor in state.items()}
        if safetensors:
            save_tensors(folder, state, name)
        else:
            torch.save(state, folder / f"{name}.pt")
