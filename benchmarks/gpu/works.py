"""Section `does_it_run`: the bundled model on the device against the same on the CPU.

Each comparison runs twice on CUDA, with float32 products and convolutions in float32 and in TF32.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import duologue
from benchmarks.gpu.record import Run
from duologue import rates
from duologue.conversation.chatbot import Chatbot, Reply
from duologue.conversation.events import AudioDelta
from duologue.cuda import CapturedGraphs, set_float32_precision
from duologue.language.sampling import Sampling
from duologue.layers import Padded
from duologue.released.decoder.decoder import build_released_decoder
from duologue.released.random_weights import PRESETS

QUESTION = "What is two plus three?"
NUM_SESSIONS = 3
NOISE_S = 8.0
TINY_S = 1.6  # of each sound


def does_it_run(run: Run) -> None:
    """Compares ids, speech tokens and sound, then holds three conversations at once."""
    record = run.record
    on_cpu = duologue.load("pocket")
    on_device = duologue.load("pocket", device=str(run.device)) if run.on_cuda else on_cpu
    greedy = Sampling(temperature=0.0, max_tokens=24 if run.tiny else 100)
    expected = on_cpu.chat(text=QUESTION, sampling=greedy)
    heard = _sounds(run)
    codes = [_tokens(on_cpu, wav) for wav in heard]
    wav = _sound(on_cpu, expected.speech_tokens)
    for exact in (True, False) if run.on_cuda else (True,):
        set_float32_precision(run.device, exact)
        mode = "float32" if exact else "TF32"
        with record.attempt(f"chat, {mode}"):
            _compare_replies(run, mode, expected, on_device.chat(text=QUESTION, sampling=greedy))
        with record.attempt(f"tokenizer, {mode}"):
            other = [_tokens(on_device, each) for each in heard]
            wrong = sum(int((a != b).sum()) for a, b in zip(codes, other, strict=True))
            record.add(f"speech tokens that differ, {mode}", wrong, "", of=sum(map(len, codes)))
        with record.attempt(f"decoder, {mode}"):
            difference = _difference(wav, _sound(on_device, expected.speech_tokens))
            record.add(f"sound of equal tokens, {mode}", difference, "relative difference")
        with record.attempt(f"released decoder, {mode}"):
            _compare_released(run, mode)
    set_float32_precision(run.device)
    with record.attempt("conversations together"):
        on_device.worker.max_batch_s = float("inf")
        sounds, refused = asyncio.run(_talk_together(on_device, heard[0], greedy))
        sizes = Counter(on_device.worker.stats().batch_sizes)
        record.add("conversations together", NUM_SESSIONS, "", seconds_of_sound=sounds, refused=refused, batches=sizes)
        record.add("largest batch of the worker", max(sizes), "rows")


def _sounds(run: Run) -> list[NDArray[np.float32]]:
    """A recorded question and noise, each (S,) at 16 kHz; noise alone where audio files cannot be read."""
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal(int(NOISE_S * rates.LISTEN_SAMPLE_RATE))).astype(np.float32)
    with run.record.attempt("recorded questions"):
        from benchmarks.speech import questions

        if run.tiny:
            return [wav[: int(TINY_S * rates.LISTEN_SAMPLE_RATE)] for wav in (questions()[0], noise)]
        return [*questions(), noise]
    return [noise]


@torch.inference_mode()
def _tokens(bot: Chatbot, wav: NDArray[np.float32]) -> torch.Tensor:
    tokenizer = bot.models.tokenizer
    device = next(tokenizer.parameters()).device
    codes: Padded = tokenizer(Padded.full(torch.from_numpy(wav)[None].to(device)))
    return codes.values[0].cpu()


@torch.inference_mode()
def _sound(bot: Chatbot, codes: Sequence[int]) -> NDArray[np.float32]:
    decoder = bot.models.decoder
    device = next(decoder.parameters()).device
    tokens = Padded.full(torch.tensor([list(codes)], dtype=torch.int64, device=device))
    wav: NDArray[np.float32] = decoder(tokens).values[0].float().cpu().numpy()
    return wav


def _difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The mean absolute difference over the mean absolute value of `a`."""
    size = min(len(a), len(b))
    if not size:
        return float("nan")
    return float(np.abs(a[:size] - b[:size]).mean() / (np.abs(a[:size]).mean() + 1e-12))


def _compare_replies(run: Run, mode: str, expected: Reply, reply: Reply) -> None:
    pairs = list(zip(expected.speech_tokens, reply.speech_tokens, strict=False))
    equal = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    run.record.add(
        f"greedy speech ids before the first difference, {mode}",
        equal,
        "",
        of=len(expected.speech_tokens),
        same_number=len(expected.speech_tokens) == len(reply.speech_tokens),
        same_text=expected.text == reply.text,
        text=reply.text,
    )
    difference = _difference(expected.audio, reply.audio)
    run.record.add(f"sound of a reply, {mode}", difference, "relative difference")


@torch.inference_mode()
def _compare_released(run: Run, mode: str) -> None:
    """A small released decoder: the CPU, the device without graphs, and the device with them."""
    preset = PRESETS["tiny"]()
    torch.manual_seed(0)
    on_cpu = build_released_decoder(preset.flow, preset.vocoder).eval().requires_grad_(False)
    on_device = copy.deepcopy(on_cpu).to(run.device)
    tokens, lengths = torch.randint(preset.flow.vocab_size, (2, 25)), torch.tensor([25, 14])
    expected = on_cpu.flow(Padded(tokens, lengths)).values
    moved = Padded(tokens.to(run.device), lengths.to(run.device))
    on_device.flow.graphs = None
    plain = on_device.flow(moved).values
    scale = float(expected.abs().max())
    mask = Padded(expected, _frames(lengths)).mask
    record = run.record
    record.add(f"released mel, {mode}", float((plain.cpu() - expected)[mask].abs().max()), "", largest=scale)
    on_device.flow.graphs = CapturedGraphs(capture=run.on_cuda)
    for name in ("first", "again"):
        graphed = on_device.flow(moved).values
        difference = float((graphed - plain).cpu()[mask].abs().max())
        record.add(f"released mel in graphs, {name}, {mode}", difference, "", graphs=len(on_device.flow.graphs))
    samples = rates.SPEAK_HOP * _frames(lengths)
    wav, other = on_cpu(Padded(tokens, lengths)), on_device(moved)
    shift = (other.values.cpu() - wav.values)[Padded(wav.values, samples).mask].abs().mean()
    record.add(f"released sound, {mode}", float(shift), "mean difference", level=float(wav.values.abs().mean()))


def _frames(num_tokens: torch.Tensor) -> torch.Tensor:
    return torch.tensor([rates.frames_for_tokens(int(each)) for each in num_tokens])


async def _talk_together(
    bot: Chatbot, question: NDArray[np.float32], sampling: Sampling
) -> tuple[list[float], list[str]]:
    """Returns the seconds of sound that each conversation got, and errors."""

    async def talk() -> float:
        session = bot.session(sampling=sampling)
        await session.hear(question)
        samples = 0
        async for event in session.reply():
            samples += len(event.wav) if isinstance(event, AudioDelta) else 0
        return round(samples / rates.SPEAK_SAMPLE_RATE, 2)

    found = await asyncio.gather(*(talk() for _ in range(NUM_SESSIONS)), return_exceptions=True)
    return [each for each in found if isinstance(each, float)], [
        str(each) for each in found if isinstance(each, BaseException)
    ]
