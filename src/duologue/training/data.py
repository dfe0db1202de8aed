"""Audio corpora: clips on disk, and batches of like lengths.

A corpus folder holds shards `clips*.jsonl` (one clip a line) beside `clips*.pcm` (flat int16, little endian).
Shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duologue.config import read_json_lines
from duologue.pcm import from_int16

Wav = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """One line of a shard; keys that are not here are left out.

    Attributes:
        role: "user", "reply" (the reply voice) or "free" (no part of a dialogue).
        split: "train", "valid", "test", "test_unseen" or "test_warped".
        offset, num_samples: place in the shard's samples.
    """

    id: str
    text: str
    role: str
    voice: str
    language: str
    style: str
    split: str
    intent: str
    sample_rate: int
    offset: int
    num_samples: int


class Clips:
    """All clips of a corpus folder, or of some splits, roles, voices and shards (a name or pattern without ending);
    samples stay on disk until asked for."""

    def __init__(
        self,
        folder: str | Path,
        splits: Collection[str] | None = None,
        roles: Collection[str] | None = None,
        voices: Collection[str] | None = None,
        shards: str = "clips*",
    ) -> None:
        self.records: list[Clip] = []
        self._samples: list[NDArray[np.int16]] = []
        names = [field.name for field in fields(Clip)]
        for shard in sorted(Path(folder).glob(f"{shards}.jsonl")):
            samples = np.memmap(shard.with_suffix(".pcm"), np.int16, "r")
            for _, row in read_json_lines(shard):
                clip = Clip(**{name: row[name] for name in names})
                if (
                    (splits is None or clip.split in splits)
                    and (roles is None or clip.role in roles)
                    and (voices is None or clip.voice in voices)
                ):
                    self.records.append(clip)
                    self._samples.append(samples[clip.offset : clip.offset + clip.num_samples])
        if not self.records:
            raise ValueError(f"{folder} holds no clips of splits {splits}, roles {roles}, voices {voices}")

    def __len__(self) -> int:
        return len(self.records)

    def wav(self, index: int) -> Wav:
        """(S,) float32 in [-1, 1]."""
        return from_int16(self._samples[index])


class LengthBatches:
    """Random batches of clips of like lengths, each a pure function of its index.

    A batch begins at a random place of the clips sorted by length and draws from the stretch that follows, so that
    little is padding. Its size is what fills `batch_s` seconds.
    """

    def __init__(self, lengths_s: NDArray[np.float64], batch_s: float, seed: int) -> None:
        self._order = np.argsort(lengths_s, kind="stable")
        self._lengths = lengths_s[self._order]
        self._batch_s, self._seed = batch_s, seed

    def __call__(self, index: int) -> tuple[list[int], np.random.Generator]:
        """Indices of the clips of one batch, and the generator for all other choices about it."""
        rng = np.random.default_rng((self._seed, index))
        at = int(rng.integers(len(self._order)))
        size = max(int(self._batch_s / self._lengths[at]), 1)
        stretch = self._order[max(at - 2 * size, 0) : at + 2 * size]
        return [int(i) for i in rng.permutation(stretch)[:size]], rng
