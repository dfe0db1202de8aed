"""Speech codes and mels of a corpus, computed once for a frozen tokenizer and kept on disk.

A store is a folder of parts, each for `PART_CLIPS` clips in the order of the corpus. A part is three files, with its
clips one after another: `part-00000.json` (ids and lengths of the clips), `part-00000.codes.npy` uint16 (T,), and
`part-00000.mels.npy` float16 (F, M). `store.json` holds the hash of the tokenizer, and a store of another tokenizer is
refused. Existing parts are kept, so a stopped run resumes, and a larger corpus costs only its new clips.

The token corpus of `corpus.py` cannot replace the store: it holds the codes of augmented sound, and no mels.

Shapes: S samples, T tokens, F mel frames, M mels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from duologue import rates
from duologue.audio import SpeakMel, resample
from duologue.checkpoint import file_hash, load_component
from duologue.config import read_json, write_json
from duologue.layers import Padded
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.data import Clips, Wav

PART_CLIPS = 1000
_BATCH_S = 60.0


class CodeStore:
    """Codes and mels of the first clips of a corpus, as memory maps."""

    def __init__(self, folder: str | Path, tokenizer_hash: str) -> None:
        self.folder = Path(folder)
        _check_hash(self.folder, tokenizer_hash)
        self.ids: list[str] = []
        self._codes: list[NDArray[np.uint16]] = []
        self._mels: list[NDArray[np.float16]] = []
        for part in sorted(self.folder.glob("part-?????.json")):
            index = read_json(part)
            self.ids += index["ids"]
            ends = np.cumsum(index["num_tokens"])
            codes = np.load(part.with_suffix(".codes.npy"), mmap_mode="r")
            self._codes += np.split(codes, ends[:-1])
            frames = np.cumsum([rates.frames_for_tokens(n) for n in index["num_tokens"]])
            self._mels += np.split(np.load(part.with_suffix(".mels.npy"), mmap_mode="r"), frames[:-1])

    def __len__(self) -> int:
        return len(self.ids)

    def num_tokens(self, index: int) -> int:
        return len(self._codes[index])

    def codes(self, index: int) -> NDArray[np.int64]:
        """(T,) int64 of one clip, T = ceil(S / 1280)."""
        return self._codes[index].astype(np.int64)

    def mel(self, index: int) -> NDArray[np.float32]:
        """(F, M) natural-log mel of one clip, F = 441 T // 64."""
        return self._mels[index].astype(np.float32)


def build_store(
    corpus: str | Path,
    tokenizer: str | Path,
    folder: str | Path,
    *,
    roles: Collection[str] | None = None,
    max_hours: float | None = None,
    device: str = "cpu",
    load_tokenizer: Callable[[], SpeechTokenizer] | None = None,
) -> CodeStore:
    """Completes the store of a corpus and opens it.

    Args:
        corpus: a folder of clips, see `duologue.training.data`.
        tokenizer: folder of a frozen `SpeechTokenizer`.
        roles: only clips of these roles; a folder is for one choice of roles.
        max_hours: maximum duration of the first clips to take, in hours.
        device: where the tokenizer runs.
        load_tokenizer: loads the tokenizer where its folder is of another format.

    Raises:
        ValueError: the store was made with another tokenizer.
    """
    folder, wanted = Path(folder), file_hash(tokenizer)
    clips = Clips(corpus, roles=roles)
    if (folder / "store.json").exists():
        _check_hash(folder, wanted)
    else:
        write_json(folder / "store.json", {"version": 1, "tokenizer": wanted})
    num_clips = _first_clips(clips, max_hours)
    model: SpeechTokenizer | None = None
    for first in tqdm(range(0, num_clips, PART_CLIPS), desc=f"codes of {Path(corpus).name}", mininterval=5.0):
        chosen = list(range(first, min(first + PART_CLIPS, num_clips)))
        name = folder / f"part-{first // PART_CLIPS:05d}.json"
        if _is_complete(name, [clips.records[i].id for i in chosen]):
            continue
        if model is None:
            load = load_tokenizer or partial(load_component, tokenizer, SpeechTokenizer, SpeechTokenizerConfig)
            model = load().to(device)
        _write_part(name, clips, chosen, model)
    return CodeStore(folder, wanted)


def speak_mel(wav: Wav, mel: SpeakMel) -> torch.Tensor:
    """A clip (S,) at 16 kHz -> (F, M) natural-log mel, F = 441 T // 64 for its T = ceil(S / 1280) tokens."""
    padded = np.pad(wav, (0, -len(wav) % rates.SAMPLES_PER_TOKEN))
    spoken = resample(padded, rates.LISTEN_SAMPLE_RATE, rates.SPEAK_SAMPLE_RATE)
    frames: torch.Tensor = mel(torch.from_numpy(spoken)[None])[0]
    return frames[: rates.frames_for_tokens(rates.tokens_for_samples(len(wav)))]


def _first_clips(clips: Clips, max_hours: float | None) -> int:
    if max_hours is None:
        return len(clips)
    ends = np.cumsum([clip.num_samples / clip.sample_rate for clip in clips.records])
    return max(int(np.searchsorted(ends, max_hours * 3600)), 1)


def _check_hash(folder: Path, tokenizer_hash: str) -> None:
    found = read_json(folder / "store.json").get("tokenizer")
    if found != tokenizer_hash:
        raise ValueError(
            f"{folder} holds the codes of another tokenizer ({str(found)[:12]}, not {tokenizer_hash[:12]}): "
            "name another folder or remove this one"
        )


def _is_complete(part: Path, ids: list[str]) -> bool:
    if not part.exists() or not part.with_suffix(".mels.npy").exists():
        return False
    return bool(read_json(part)["ids"] == ids)


@torch.no_grad()
def _write_part(part: Path, clips: Clips, chosen: list[int], tokenizer: SpeechTokenizer) -> None:
    """Writes a part. The JSON file comes last and marks the part as complete."""
    part.unlink(missing_ok=True)
    codes: dict[int, NDArray[np.uint16]] = {}
    batch: list[int] = []
    for i in sorted(chosen, key=lambda i: clips.records[i].num_samples):
        batch.append(i)
        if len(batch) * clips.records[i].num_samples > _BATCH_S * rates.LISTEN_SAMPLE_RATE:
            codes |= _tokenize(clips, batch, tokenizer)
            batch = []
    codes |= _tokenize(clips, batch, tokenizer)
    _save(part.with_suffix(".codes.npy"), np.concatenate([codes[i] for i in chosen]))
    mel = SpeakMel()
    rows = [speak_mel(clips.wav(i), mel).numpy().astype(np.float16) for i in chosen]
    _save(part.with_suffix(".mels.npy"), np.concatenate(rows))
    ids = [clips.records[i].id for i in chosen]
    write_json(part, {"ids": ids, "num_tokens": [len(codes[i]) for i in chosen]})


def _save(path: Path, values: NDArray[np.uint16] | NDArray[np.float16]) -> None:
    """Writes a file atomically, because all processes of one training may write the same file."""
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    np.save(scratch, values)
    scratch.replace(path)


def _tokenize(clips: Clips, batch: list[int], tokenizer: SpeechTokenizer) -> dict[int, NDArray[np.uint16]]:
    if not batch:
        return {}
    wav = Padded.stack([torch.from_numpy(clips.wav(i)) for i in batch])
    device = tokenizer.quantizer.codebook.weight.device
    codes: Padded = tokenizer(Padded(wav.values.to(device), wav.lengths.to(device)))
    return {i: row.cpu().numpy().astype(np.uint16) for i, row in zip(batch, codes.rows(), strict=True)}
