"""ReleasedDecoder: glm-4-voice-decoder with the interface of pocket's `SpeechDecoder`.

    decoder = load_released_decoder("glm-4-voice-decoder")      # config.yaml, flow.pt, hift.pt
    state = decoder.init_state(batch_size)
    wav = decoder.step(tokens, state) ... decoder.flush(state)

Shapes: B batch, T tokens, S samples, M mels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from duologue import rates
from duologue.checkpoint import load_weights, save_tensors
from duologue.decoder.decoder import SpeechDecoder, SpeechDecoderState
from duologue.released.decoder.blocks import Streaming
from duologue.released.decoder.flow import GRAPH_FRAMES, GRAPH_ROWS, ReleasedFlow, ReleasedFlowConfig
from duologue.released.decoder.folder import CONFIG_FILE, read_decoder_config, read_weights, write_decoder_config
from duologue.released.decoder.hift import HiFT, HiFTConfig
from duologue.released.decoder.hift_stream import HiFTVocoder


class ReleasedDecoder(SpeechDecoder[ReleasedFlow, HiFTVocoder]):
    """`SpeechDecoder` with the released parts. Unlike the released streaming, every frame is emitted exactly once."""

    @property
    def codebook_size(self) -> int:
        """Number of speech codes the decoder accepts: valid ones are `0 <= code < codebook_size`."""
        return self.flow.config.vocab_size

    def init_state(
        self,
        batch_size: int,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        speaker: Tensor | None = None,
        style: str = "",
        streaming: Streaming | None = None,
    ) -> SpeechDecoderState:
        """Returns a fresh state; the settings are those of `ReleasedFlow.init_state`, which knows no styles."""
        flow = self.flow.init_state(batch_size, num_steps, guidance_scale, seed, speaker, streaming)
        return SpeechDecoderState(flow, self.vocoder.init_state(batch_size, seed))

    def capture(self, max_rows: int, num_steps: int | None = None, guidance_scale: float | None = None) -> int:
        """Captures the solves of the flow for all buckets up to `max_rows`; returns their number, 0 without CUDA."""
        buckets = [(rows, frames) for frames in reversed(GRAPH_FRAMES) for rows in reversed(GRAPH_ROWS)]
        return sum(
            self.flow.capture(rows, frames, num_steps, guidance_scale) for rows, frames in buckets if rows <= max_rows
        )


def build_released_decoder(
    flow: ReleasedFlowConfig, hift: HiFTConfig, streaming: Streaming | None = None
) -> ReleasedDecoder:
    """Returns a decoder with random weights; the default configs are the published sizes."""
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
    """Loads a folder in the released format: config.yaml, and flow and hift as .pt or .safetensors.

    Args:
        dtype: of the U-Net; the rest and the solver's sums stay in float32.
        configs: of the folder's config.yaml; read by default.

    Returns:
        the decoder on the CPU, in evaluation mode.

    Raises:
        ValueError: names file and key: a part is missing or damaged, or its weights do not match the config.
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
        decoder: with weights that are not fused, from `build_released_decoder`.
        note: a comment at the top of config.yaml.
        safetensors: writes .safetensors instead of .pt.
        dtype: of the stored weights; unchanged by default.
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
