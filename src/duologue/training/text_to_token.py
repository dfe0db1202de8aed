"""Stage `text-to-token`: text becomes speech tokens without sound (arXiv:2411.17607, section 3.1).

It is the stage `pretrain` with reading aloud as its only job. `duologue serve --text-model X --talker FOLDER` uses the
result, see `language/talker.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from duologue.interleave import SPEECH_ONLY, Kind
from duologue.language.engine import PlainEngine
from duologue.language.reading import max_ids
from duologue.language.sampling import Sampling
from duologue.models import transcribe
from duologue.scoring import word_errors
from duologue.training.pretrain import NUM_SAMPLES, Mixture, PretrainRecipe, PretrainStage, both, write_lines
from duologue.turns import Role
from duologue.vocabulary import Task


def _reading() -> Mixture:
    return Mixture(asr=0.0, tts=1.0, woven=0.0, spans=0.0, speech=0.0, text=0.0, written=0.0)


@dataclass(frozen=True)
class TextToTokenRecipe(PretrainRecipe):
    """Recipe of the stage `text-to-token`: that of `pretrain` with another default of the mixture.

    With `parts_from`, the recognizer of that model reads the tokens after training.

    Attributes:
        num_read: validation clips that are read aloud for the measures.
    """

    mixture: Mixture = field(default_factory=_reading)
    num_read: int = NUM_SAMPLES


class TextToTokenStage(PretrainStage):
    """Training of a text-to-token model."""

    def __init__(self, recipe: TextToTokenRecipe) -> None:
        super().__init__(recipe)
        self._num_read = recipe.num_read

    def sample(self, folder: Path) -> None:
        """Writes readings.jsonl: texts of validation clips and the numbers of real and made tokens.

        If `parts_from` has a recognizer, it also has what that reads from both, and wer.json has both word error rates.
        """
        parts = self._parts
        recognizer = None if parts is None else parts.load_recognizer()
        tokenizer = None if parts is None else parts.load_tokenizer()
        engine, vocabulary = PlainEngine(self.model, self.vocabulary), self.vocabulary
        clips = self.valid.where("task", "clip")
        clips = clips[self.valid.transcribed(clips)]
        clips = clips[self.valid.first_role(clips) == str(Role.ASSISTANT)]
        lines: list[dict[str, object]] = []
        errors, num_words = {"real": 0, "made": 0}, 0
        for index in clips[: self._num_read]:
            text_ids, speech = both(self.valid[int(index)].turns[0], vocabulary)
            prompt = vocabulary.task_prompt(Task.READ, text_ids)
            sampling = Sampling(temperature=0.0, max_tokens=max_ids(len(text_ids)))
            ids = [
                token for token in engine.stream(prompt, sampling, SPEECH_ONLY) if vocabulary.kind(token) is Kind.SPEECH
            ]
            text = vocabulary.decode_text(text_ids)
            codes = {"real": vocabulary.speech_codes(speech), "made": vocabulary.speech_codes(ids)}
            line: dict[str, object] = {"text": text, **{f"num_{name}": len(one) for name, one in codes.items()}}
            if recognizer is not None and tokenizer is not None:
                for name, one in codes.items():
                    line[name] = heard = transcribe(one, tokenizer, recognizer)
                    wrong, count = word_errors(text, heard)
                    errors[name] += wrong
                num_words += count
            lines.append(line)
        write_lines(folder / "readings.jsonl", lines)
        if num_words:
            write_lines(folder / "wer.json", [{name: wrong / num_words for name, wrong in errors.items()}])
