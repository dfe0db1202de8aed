"""A token corpus read in another vocabulary: the same speech codes, the text in another tokenizer's ids.

A corpus thus serves every backbone, without the sound that it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from duologue.interleave import Kind, split, weave
from duologue.training.corpus import CorpusSample, LabeledTurn, TokenCorpus
from duologue.turns import Modality, Role
from duologue.vocabulary import Vocabulary


class TranslatedCorpus(TokenCorpus):
    """The samples of a corpus in the ids of another vocabulary; the tables stay in those of its own.

    Args:
        corpus: a corpus in the ids of `source`; its tables are shared.

    Raises:
        ValueError: the codebooks differ in size.
    """

    def __init__(self, corpus: TokenCorpus, source: Vocabulary, target: Vocabulary) -> None:
        if source.codebook_size != target.codebook_size:
            raise ValueError(
                f"the corpus has {source.codebook_size} speech codes and the language model {target.codebook_size}: "
                "both need the same speech tokenizer"
            )
        self.__dict__.update(corpus.__dict__)
        self._source, self._target = source, target

    def __getitem__(self, index: int) -> CorpusSample:
        sample = super().__getitem__(index)
        return replace(sample, turns=tuple(self._translated(labeled) for labeled in sample.turns))

    def _translated(self, labeled: LabeledTurn) -> LabeledTurn:
        """The turn in the target's ids.

        A reply is woven anew, because the text has another number of ids. One whose text then does not stay ahead of
        its speech becomes a written reply.
        """
        turn, modality = labeled.turn, labeled.turn.modality
        if turn.role is Role.ASSISTANT and modality is Modality.INTERLEAVED:
            parts = split(turn.ids, self._source.kind)
            text, speech = self._text(parts.text), self._speech(parts.speech)
            try:
                ids = tuple(weave(text, speech))
            except ValueError:
                ids, modality = text, Modality.TEXT
        else:
            ids = ()
            for kind, group in groupby(turn.ids, self._source.kind):
                stretch = list(group)
                ids += self._speech(stretch) if kind is Kind.SPEECH else self._text(stretch)
        return replace(
            labeled, turn=replace(turn, ids=ids, modality=modality), transcript=self._text(labeled.transcript)
        )

    def _text(self, ids: Sequence[int]) -> tuple[int, ...]:
        style = self._target.style_ids(self._source.style(ids))
        return (*style, *self._target.encode_text(self._source.decode_text(ids))) if ids else ()

    def _speech(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(token - self._source.speech_offset + self._target.speech_offset for token in ids)
