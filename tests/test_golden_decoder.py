"""The released decoder's numerics, kept without the fixtures: outputs of our own code, stored once parity held.

`python -m tests.test_golden_decoder` writes the file anew.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duologue.layers import Padded
from duologue.released.decoder.blocks import OFFLINE, Streaming
from duologue.released.decoder.hift_stream import speak_as_released
from tests.released_sizes import formula, small_decoder, small_tokens
from tests.released_stream import init_released, released_mel, released_noise, step_released

FILE = Path(__file__).parent / "golden" / "released_decoder.safetensors"


@torch.inference_mode()
def outputs() -> dict[str, Tensor]:
    """Each part of the small decoder, both streaming modes; time before channels, the batch of one taken away."""
    decoder = small_decoder()
    flow, network = decoder.flow, decoder.vocoder.network
    tokens = small_tokens(17)[None]
    whole = Padded.full(tokens)
    mu = flow.condition(whole)
    speaker = formula(torch.Size([1, flow.config.spk_embed_dim]), 1)
    prompt = formula(torch.Size([1, 41, 80]), 2)
    noise = released_noise(mu.values.shape[1])
    found = {
        "encoded": flow.encode(whole).values,
        "mu": mu.values,
        "velocity": flow.decoder["estimator"](
            noise, torch.tensor([0.3]), mu.values, flow.speaker_condition(speaker), torch.zeros_like(noise)
        ),
        "prompted": released_mel(flow, tokens[:, 6:], tokens[:, :6], prompt, speaker, noise),
    }
    state = init_released(flow)
    for i, piece in enumerate(tokens.split(7, dim=1)):
        block = step_released(flow, network, piece, state, last=i == 2)
        found[f"released.{i}.mel"], found[f"released.{i}.wav"] = block.mel, block.wav
    mel = formula(torch.Size([1, 24, 80]), 3)
    harmonics = network.config.num_harmonics
    start, additive = formula(torch.Size([1, harmonics]), 4), formula(torch.Size([1, 24 * 256, harmonics]), 5)
    found["pitch"] = network.pitch(Padded.full(mel))
    found["wav"], found["source"] = speak_as_released(network, mel, start, additive, formula(torch.Size([1, 256]), 6))
    for name, streaming in (("offline", OFFLINE), ("stream", Streaming((7,), 12, None))):
        found[f"{name}.mel"] = flow(whole, flow.init_state(1, seed=3, streaming=streaming)).values
    found["stream.wav"] = decoder.vocoder(Padded.full(mel), decoder.vocoder.init_state(1, seed=3)).values
    return {name: tensor[0].contiguous().clone() for name, tensor in found.items()}


def test_numerics_are_those_that_were_stored() -> None:
    golden, got = load_file(FILE), outputs()
    assert set(golden) == set(got)
    for name, expected in golden.items():
        kind = name.rpartition(".")[2]
        if kind == "wav":  # the vocoder amplifies the rounding of a processor in a few samples
            difference = got[name] - expected
            assert float(difference.norm() / expected.norm()) < 1e-3, f"{name} has changed"
            assert float((difference.abs() > 2e-3 + 1e-4 * expected.abs()).float().mean()) < 5e-4, f"{name} has changed"
        else:
            tolerance = 1e-2 if kind == "pitch" else 3e-4
            torch.testing.assert_close(got[name], expected, atol=tolerance, rtol=1e-4, msg=f"{name} has changed")
    assert FILE.stat().st_size < 2**20


if __name__ == "__main__":
    save_file(outputs(), FILE)
