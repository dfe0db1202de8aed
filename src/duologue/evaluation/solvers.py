"""The suite `solvers`: what is heard of a flow that is solved in few steps or many, with guidance or without.

The same reference replies are tokenized and resynthesised with every setting, from the same noise. Distances to the
recording count what any resynthesis changes too, so only those of unlike settings tell something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from duologue import machine, rates
from duologue.audio import SpeakMel, resample
from duologue.decoder.decoder import SpeechDecoder
from duologue.decoder.solvers import Method, Solver
from duologue.evaluation.intelligibility import Naturalness, error_row, if_available
from duologue.evaluation.parts import plain_replies, tokenize
from duologue.evaluation.recognition import Recognizer
from duologue.evaluation.report import Report, Row, difference_row
from duologue.evaluation.testset import TestClip, TestSet
from duologue.layers import Padded
from duologue.tokenizer.tokenizer import SpeechTokenizer

RECORDINGS = "recordings"
_BATCH = 10


@dataclass(frozen=True)
class Setting:
    """How the flow is solved."""

    solver: Solver
    guidance_scale: float

    @property
    def name(self) -> str:
        """ "euler 6, sway -1, guidance 0.7"."""
        solver = self.solver
        return f"{solver.method} {solver.num_steps}, sway {solver.sway:g}, guidance {self.guidance_scale:g}"

    @property
    def num_passes(self) -> int:
        """How often the estimator runs for a block, guidance counted: what the flow costs goes with it."""
        return self.solver.num_evaluations * (1 if self.guidance_scale == 0 else 2)


def parse_setting(text: str, guidance_scale: float) -> Setting:
    """ "METHOD:STEPS:SWAY" or "METHOD:STEPS:SWAY:GUIDANCE" -> a setting.

    Args:
        guidance_scale: where the text names none.
    Raises:
        ValueError: not of this form, or a solver that cannot be.
    """
    parts = text.split(":")
    try:
        method, steps, sway, guidance = parts if len(parts) == 4 else (*parts, str(guidance_scale))
        num_steps, bend, scale = int(steps), float(sway), float(guidance)
    except ValueError:
        raise ValueError(f"{text!r} is no setting; write METHOD:STEPS:SWAY or METHOD:STEPS:SWAY:GUIDANCE") from None
    if not 0 <= scale < float("inf"):
        raise ValueError(f"the guidance of {text!r} must be a number from 0 on")
    return Setting(Solver(cast(Method, method), num_steps, bend), scale)  # the solver checks its method


def evaluate_solvers(
    tokenizer: SpeechTokenizer,
    decoder: SpeechDecoder,
    test_set: TestSet,
    settings: Sequence[Setting],
    num_clips: int,
    judge: Recognizer | None,
    why_not: str,
    *,
    model: dict[str, Any],
    seed: int = 0,
) -> Report:
    """Word error rate, distance to the recording and naturalness with each setting, and the same of the recordings.

    Args:
        num_clips: reference replies at most.
        judge: reads the renditions; None for the reason `why_not`.
        model: name and hashes, for the report.
        seed: of the noise.
    Raises:
        ValueError: the test set has no plain replies.
    """
    clips = plain_replies(test_set, num_clips)
    if not clips:
        raise ValueError("the test set has no replies in the plain style, which could be resynthesised")
    codes, _ = tokenize(tokenizer, clips)
    listen = _Listener(clips, judge, why_not)
    own = listen.rows(RECORDINGS, [clip.wav for clip in clips], [clip.sample_rate for clip in clips])
    rows = list(own)
    for setting in tqdm(settings, "settings", disable=None, leave=False):
        mels, wavs = _resynthesize(decoder, [codes[clip.id] for clip in clips], setting, seed)
        heard = listen.rows(setting.name, wavs, [rates.SPEAK_SAMPLE_RATE] * len(clips))
        distance = float(np.mean([_distance(mel, clip) for mel, clip in zip(mels, clips, strict=True)]))
        rows += [
            Row(setting.name, "estimator passes a block", float(setting.num_passes)),
            *heard,
            difference_row(setting.name, "WER lost against the recordings", heard[0], own[0], 0.1),
            Row(setting.name, "log-mel distance to the recordings", distance, num=len(clips)),
        ]
    numbers = {"num_clips": len(clips), "seed": seed}
    return Report("solvers", model, machine.describe(), tuple(rows), numbers)


class _Listener:
    """What the recognizer and DNSMOS make of renditions of the same clips."""

    def __init__(self, clips: Sequence[TestClip], judge: Recognizer | None, why_not: str) -> None:
        self._clips, self._judge, self._why_not = clips, judge, why_not
        self._naturalness, self._why_no_mos = if_available(Naturalness)

    def rows(self, group: str, wavs: Sequence[NDArray[np.float32]], sample_rates: Sequence[int]) -> tuple[Row, Row]:
        """Word error rate and naturalness, each skipped where its library is missing."""
        errors = Row(group, "WER", None, "%", skipped=self._why_not or "-")
        quality = Row(group, "DNSMOS", None, "MOS", skipped=self._why_no_mos or "-")
        if self._judge is not None:
            texts = map(self._judge.transcribe, wavs, sample_rates)
            errors = error_row(group, "WER", [(c.text, text) for c, text in zip(self._clips, texts, strict=True)])
        if self._naturalness is not None:
            quality = Row(
                group, "DNSMOS", float(np.mean([*map(self._naturalness, wavs, sample_rates)])), "MOS", num=len(wavs)
            )
        return errors, quality


@torch.inference_mode()
def _resynthesize(
    decoder: SpeechDecoder, codes: Sequence[NDArray[np.int64]], setting: Setting, seed: int
) -> tuple[list[Tensor], list[NDArray[np.float32]]]:
    """Natural-log mels (F, M) and wavs (S,) at the reply's sample rate."""
    device = next(decoder.parameters()).device
    solver, order = setting.solver, sorted(range(len(codes)), key=lambda index: len(codes[index]))
    made: dict[int, tuple[Tensor, NDArray[np.float32]]] = {}
    for at in range(0, len(order), _BATCH):
        batch = order[at : at + _BATCH]
        tokens = Padded.stack([torch.from_numpy(codes[index]).to(device) for index in batch])
        state = decoder.flow.init_state(
            len(batch), solver.num_steps, setting.guidance_scale, seed, solver=solver.method, sway=solver.sway
        )
        mel = decoder.flow(tokens, state)
        for index, row, wav in zip(batch, mel.rows(), decoder.vocoder(mel).rows(), strict=True):
            made[index] = row.cpu(), wav.clamp(-1.0, 1.0).float().cpu().numpy()
    return [made[index][0] for index in range(len(codes))], [made[index][1] for index in range(len(codes))]


def _distance(mel: Tensor, clip: TestClip) -> float:
    """Mean absolute difference of natural-log mels over the frames that both have."""
    wav = torch.from_numpy(resample(clip.wav, clip.sample_rate, rates.SPEAK_SAMPLE_RATE))
    recorded = SpeakMel()(wav[None])[0]
    num = min(len(mel), len(recorded))
    return float((mel[:num] - recorded[:num]).abs().mean())
