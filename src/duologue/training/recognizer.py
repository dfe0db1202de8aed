"""Stage `recognizer`: a smaller recognizer for a frozen speech tokenizer, distilled from a larger one.

The student keeps some decoder layers of its teacher and learns the transcripts and the teacher's distributions, as
Distil-Whisper does (arXiv 2311.00430). It reads the ids of a token corpus, so no sound is encoded in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from duologue import rates
from duologue.checkpoint import file_hash, load_component
from duologue.language.backbone import Provenance
from duologue.layers import Padded
from duologue.scoring import error_rate
from duologue.tokenizer.speech_recognizer import SpeechRecognizer, load_speech_recognizer, save_speech_recognizer
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.corpus import TokenCorpus
from duologue.training.data import LengthBatches
from duologue.training.language import open_corpora
from duologue.training.loop import Batch, LoopConfig
from duologue.training.pretrain import both, write_lines

_VALID_BATCH = 16
_DECODER_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class RecognizerRecipe:
    """How a recognizer is distilled.

    Attributes:
        corpus, vocabulary: folders of the token corpus and of the vocabulary it was made with.
        tokenizer: folder of the frozen tokenizer, whose codebook the recognizer reads.
        teacher: folder of the larger recognizer.
        decoder_layers: layers of the teacher's text decoder that the student keeps.
        batch_s: seconds of speech in a batch.
        asr_weight: of the cross-entropy of the transcripts.
        distill_weight: of the Kullback-Leibler divergence from the teacher's distributions; 0 for a language that the
            teacher does not know.
        corrupt: share of the speech tokens that are replaced by random ones.
        ids_per_token: see `SpeechRecognizerConfig`; None for the teacher's.
        num_valid_clips: clips that the word error rate is measured on, spread evenly over the validation split.
    """

    corpus: str
    vocabulary: str
    tokenizer: str
    teacher: str
    decoder_layers: tuple[int, ...]
    loop: LoopConfig
    batch_s: float = 240.0
    asr_weight: float = 1.0
    distill_weight: float = 0.8
    corrupt: float = 0.02
    ids_per_token: float | None = None
    num_valid_clips: int = 200


@dataclass(frozen=True)
class _Utterance:
    """Speech tokens of a clip, and its transcript as written and as ids with prompt and end."""

    codes: Sequence[int]
    text: Sequence[int]
    written: str
    language: str


class RecognizerStage:
    """Training of a `SpeechRecognizer` with fewer decoder layers. Clips that its text ids cannot write are left out."""

    phases: Mapping[str, nn.Module]
    weights: Mapping[str, float]

    def __init__(self, recipe: RecognizerRecipe) -> None:
        self.recipe = recipe
        self.teacher = load_speech_recognizer(recipe.teacher).eval().requires_grad_(False)
        self.recognizer = with_decoder_layers(self.teacher, recipe.decoder_layers, recipe.ids_per_token)
        self.recognizer.decoder.embed_tokens.requires_grad_(False)
        tokenizer = load_component(recipe.tokenizer, SpeechTokenizer, SpeechTokenizerConfig)
        self._codebook = tokenizer.quantizer.codebook.weight.detach().clone()
        self.phases = {"recognizer": self.recognizer}
        self.weights = {"asr": recipe.asr_weight, "distill": recipe.distill_weight}
        self._vocabulary, provenance, train, valid = open_corpora(recipe.corpus, recipe.vocabulary, "")
        given = Provenance(file_hash(recipe.tokenizer), self._vocabulary.hash)
        provenance.check(given, f"the corpus {recipe.corpus}", f"the tokenizer {recipe.tokenizer}")
        self.train, held_out = self._utterances(train), self._utterances(valid)
        self.valid = held_out[:: max(len(held_out) // recipe.num_valid_clips, 1)][: recipe.num_valid_clips]
        if not self.train or not self.valid:
            raise ValueError(f"{recipe.corpus} has no clip with a transcript in its training or validation split")
        seconds = np.array([len(one.codes) / rates.TOKEN_RATE for one in self.train])
        self._batches = LengthBatches(seconds, recipe.batch_s, recipe.loop.seed)

    def batch(self, index: int) -> Batch:
        chosen, rng = self._batches(index)
        utterances = [self.train[number] for number in chosen]
        codes = Padded.stack([torch.tensor(one.codes) for one in utterances])
        noise = torch.from_numpy(rng.integers(len(self._codebook), size=codes.values.shape))
        replaced = torch.from_numpy(rng.random(codes.values.shape) < self.recipe.corrupt)
        text = Padded.stack([torch.tensor(one.text) for one in utterances])
        prompts = [len(self.recognizer.text.prompt(one.language)) for one in utterances]
        return {
            "codes": torch.where(replaced, noise, codes.values),
            "lengths": codes.lengths,
            "text": text.values,
            "text_lengths": text.lengths,
            "num_prompt": torch.tensor(prompts),
        }

    def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
        values = self._vectors(batch["codes"], batch["lengths"])
        text, num_prompt = Padded(batch["text"], batch["text_lengths"]), batch["num_prompt"]
        logits, ids = self.recognizer.text_logits(self.recognizer.memory(values), text, num_prompt)
        losses = {"asr": functional.cross_entropy(logits, ids)}
        if self.recipe.distill_weight:
            with torch.no_grad():
                teacher = self.teacher.to(ids.device)
                wanted, _ = teacher.text_logits(teacher.memory(values), text, num_prompt)
            own, wanted = logits.log_softmax(-1), wanted.log_softmax(-1)
            losses["distill"] = functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
        return losses

    def evaluate(self) -> dict[str, float]:
        """Word error rates of student and teacher on validation clips."""
        return {
            f"wer/{name}": error_rate(
                (one.written, heard, one.language)
                for one, heard in zip(self.valid, self._heard(recognizer, self.valid), strict=True)
            )
            for name, recognizer in (("student", self.recognizer), ("teacher", self.teacher))
        }

    def sample(self, folder: Path) -> None:
        """Writes what the student hears in a few validation clips next to what was said."""
        said = self.valid[:_VALID_BATCH]
        lines = [
            {"said": one.written, "heard": heard}
            for one, heard in zip(said, self._heard(self.recognizer, said), strict=True)
        ]
        write_lines(folder / "transcripts.jsonl", lines)

    def save(self, folder: Path) -> None:
        save_speech_recognizer(folder / "recognizer", self.recognizer)

    def _utterances(self, corpus: TokenCorpus) -> list[_Utterance]:
        """The clips that the recognizer can be trained on."""
        text, config, found = self.recognizer.text, self.recognizer.config, []
        clips = corpus.where("task", "clip")
        for index in clips[corpus.transcribed(clips)]:
            labeled = corpus[int(index)].turns[0]
            written, speech = both(labeled, self._vocabulary)
            said, language = self._vocabulary.decode_text(written), labeled.turn.language
            try:
                ids = text.encode(said, language)
            except ValueError:  # it has text ids that the recognizer lacks
                continue
            if 0 < len(speech) <= config.max_tokens and len(ids) <= config.max_text:
                found.append(_Utterance(self._vocabulary.speech_codes(speech), ids, said, language))
        return found

    def _vectors(self, codes: Tensor, lengths: Tensor) -> Padded:
        """Codes (B, T) -> their vectors of the codebook (B, T, D)."""
        return Padded(functional.embedding(codes, self._codebook.to(codes.device)), lengths)

    def _heard(self, recognizer: SpeechRecognizer, said: Sequence[_Utterance]) -> list[str]:
        device = recognizer.end.device
        texts: list[str] = []
        for at in range(0, len(said), _VALID_BATCH):
            rows = said[at : at + _VALID_BATCH]
            codes = Padded.stack([torch.tensor(one.codes, device=device) for one in rows])
            texts += recognizer.transcribe(self._vectors(codes.values, codes.lengths), rows[0].language)
        return texts


def with_decoder_layers(
    recognizer: SpeechRecognizer, kept: Sequence[int], ids_per_token: float | None = None
) -> SpeechRecognizer:
    """Returns a copy of a recognizer with these layers of its text decoder alone, in training mode.

    Args:
        ids_per_token: see `SpeechRecognizerConfig`; None for that of `recognizer`.

    Raises:
        ValueError: there is no such layer, or none is kept.
    """
    config = recognizer.config
    if not kept or not all(0 <= layer < config.num_decoder_layers for layer in kept):
        raise ValueError(
            f"decoder_layers is {list(kept)}; the teacher has layers 0 to {config.num_decoder_layers - 1} to keep"
        )
    most = config.ids_per_token if ids_per_token is None else ids_per_token
    smaller = SpeechRecognizer(replace(config, num_decoder_layers=len(kept), ids_per_token=most))
    weights = recognizer.state_dict()
    for name in smaller.state_dict().keys() & {key for key in weights if key.startswith(_DECODER_LAYERS)}:
        layer, rest = name.removeprefix(_DECODER_LAYERS).split(".", 1)
        weights[name] = recognizer.state_dict()[f"{_DECODER_LAYERS}{kept[int(layer)]}.{rest}"]
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    smaller.text = recognizer.text
    return smaller
