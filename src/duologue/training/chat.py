"""Stage `chat`: the model answers spoken questions aloud (arXiv:2412.02612, stage 2).

Every reply comes in two copies. One trains its text, with the loss on speech masked; the other trains its speech, with
the loss on text masked. The modality of each turn is drawn for every example: users speak or write, replies are spoken
or only written. Some replies of the history are interrupted. A share of stage 1 stays in the mixture, so that the model
does not forget to listen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from duologue.interleave import INTERLEAVED, SPEECH_ONLY, TEXT_ONLY, InterleaveState, Kind, legal_prefix
from duologue.language.engine import PlainEngine
from duologue.language.sampling import GREEDY, Sampling
from duologue.scoring import is_correct
from duologue.training.corpus import CorpusSample, LabeledTurn, TokenCorpus
from duologue.training.language import LanguageOptions, LanguageStage, evaluated_first, open_start
from duologue.training.loop import Batch, LoopConfig
from duologue.training.packing import (
    SPEECH,
    TEXT,
    UNTRAINED,
    Example,
    corrupt_heard_speech,
    decisions,
    fill,
    mean_losses,
    pack,
)
from duologue.training.pretrain import NUM_SAMPLES, Jobs, Mixture, both, write_lines
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Vocabulary

SCHEDULES = {Modality.INTERLEAVED: INTERLEAVED, Modality.TEXT: TEXT_ONLY, Modality.SPEECH: SPEECH_ONLY}
WHOLE = TEXT | SPEECH


@dataclass(frozen=True)
class LossMix:
    """Shares of the ways in which a reply is trained; the defaults are the epochs of arXiv:2412.02612.

    Attributes:
        text, speech: the loss is on the ids of this modality alone.
        whole: the loss is on both, in one pass instead of two.
    """

    text: float = 4.0
    speech: float = 20.0
    whole: float = 0.0

    def __post_init__(self) -> None:
        if min(self.text, self.speech, self.whole) < 0 or self.text + self.speech + self.whole <= 0:
            raise ValueError(f"the shares of a loss mix must be 0 or more and not all 0, got {self}")

    def draw(self, rng: np.random.Generator) -> int:
        """TEXT, SPEECH or WHOLE."""
        shares = np.array([self.text, self.speech, self.whole])
        return (TEXT, SPEECH, WHOLE)[int(rng.choice(3, p=shares / shares.sum()))]


@dataclass(frozen=True)
class DialogueAugmentation:
    """Probabilities of changes to a training dialogue.

    Attributes:
        written_question: a turn of the user is text.
        written_reply: all replies of a dialogue are text alone.
        interrupted: a reply of the history is interrupted; a dialogue without history gets another dialogue before it.
        joined: other dialogues stand before this one, as in a long conversation.
        max_joined: maximum number of these dialogues; the number is drawn evenly. It is not a probability.
    """

    written_question: float = 0.15
    written_reply: float = 0.08
    interrupted: float = 0.1
    joined: float = 0.1
    max_joined: int = 1

    def __post_init__(self) -> None:
        if self.max_joined < 1:
            raise ValueError(f"max_joined must be at least 1, got {self.max_joined}")


@dataclass(frozen=True)
class ChatRecipe(LanguageOptions):
    """Recipe of the stage `chat`; more keys are in `LanguageOptions`.

    Attributes:
        corpus, vocabulary: folders of the token corpus and of the vocabulary it was made with.
        start_from: folder of the language model from stage 1, or a released one; not with `backbone`.
        pretrain_share: share of the examples that are jobs of stage 1, drawn from `mixture`.
        length, num_rows: ids in a row, rows in a batch; `num_valid_rows` in the one validation batch.
        text_weight, speech_weight: loss weight of every text id and every speech id.
        corrupt_heard_speech: share of the user's speech ids that are replaced by random ones.
        num_questions: number of validation questions that are answered for the accuracy.
    """

    corpus: str
    vocabulary: str
    start_from: str = ""
    loop: LoopConfig = field(kw_only=True)
    loss_mix: LossMix = field(default_factory=LossMix)
    augmentation: DialogueAugmentation = field(default_factory=DialogueAugmentation)
    mixture: Mixture = field(default_factory=Mixture)
    pretrain_share: float = 0.15
    length: int = 512
    num_rows: int = 12
    text_weight: float = 1.0
    speech_weight: float = 1.0
    corrupt_heard_speech: float = 0.0
    num_valid_rows: int = 4
    num_questions: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "loop", evaluated_first(self, self.loop))


def as_text(labeled: LabeledTurn, vocabulary: Vocabulary) -> LabeledTurn:
    """The turn as text; a turn without words, such as noise, is returned unchanged."""
    text, _ = both(labeled, vocabulary)
    if not text:
        return labeled
    return replace(labeled, turn=replace(labeled.turn, modality=Modality.TEXT, ids=tuple(text), voice=""))


class Chats:
    """Random training examples of dialogues.

    Histories that do not fit a row are shortened. Dialogues that do not fit even then are left out."""

    def __init__(
        self,
        corpus: TokenCorpus,
        vocabulary: Vocabulary,
        loss_mix: LossMix,
        augmentation: DialogueAugmentation,
        length: int,
    ) -> None:
        self._corpus, self._vocabulary = corpus, vocabulary
        self._loss_mix, self._augmentation, self._length = loss_mix, augmentation, length
        self._dialogues = corpus.where("task", "chat")
        if not len(self._dialogues):
            raise ValueError("the corpus holds no dialogues to train on")

    def __call__(self, rng: np.random.Generator) -> Example:
        """An example of a dialogue drawn evenly."""
        while True:
            turns = self.dialogue(self._any(rng), rng)
            for start in range(0, len(turns), 2):
                example = self.example(turns[start:], rng)
                if len(example.ids) <= self._length:
                    return example

    def dialogue(self, sample: CorpusSample, rng: np.random.Generator) -> list[LabeledTurn]:
        """The turns of a sample with the changes drawn for it."""
        augmentation = self._augmentation
        turns = list(sample.turns)
        interrupted = rng.random() < augmentation.interrupted
        if rng.random() < augmentation.joined:
            for _ in range(int(rng.integers(augmentation.max_joined)) + 1):
                turns = [*self._any(rng).turns, *turns]
        elif interrupted and len(turns) <= 2:
            turns = [*self._any(rng).turns, *turns]
        if rng.random() < augmentation.written_reply:
            turns = [as_text(turn, self._vocabulary) if turn.turn.role is Role.ASSISTANT else turn for turn in turns]
        turns = [
            as_text(turn, self._vocabulary)
            if turn.turn.role is Role.USER and rng.random() < augmentation.written_question
            else turn
            for turn in turns
        ]
        if interrupted:
            replies = [i for i, turn in enumerate(turns[:-1]) if turn.turn.modality is Modality.INTERLEAVED]
            if replies:
                cut = replies[int(rng.integers(len(replies)))]
                turns[cut] = replace(turns[cut], turn=self._interrupted(turns[cut].turn, rng))
        return turns

    def example(self, turns: list[LabeledTurn], rng: np.random.Generator, way: int | None = None) -> Example:
        """A dialogue as a sequence; each reply is trained in the given way, or in one drawn from the loss mix."""
        sample = self._vocabulary.chat_sample(Conversation(tuple(turn.turn for turn in turns)))
        trains: list[int] = []
        for labeled in turns:
            if labeled.turn.role is Role.ASSISTANT:
                trains += self._reply(labeled, self._loss_mix.draw(rng) if way is None else way)
        trained = np.flatnonzero(sample.loss)
        if len(trained) != len(trains):
            raise ValueError(
                f"the replies of a dialogue have {len(trains)} ids with a loss, its sequence has {len(trained)}"
            )
        spread = np.zeros(len(sample.ids), np.int64)
        spread[trained] = trains
        # Ids after the last trained one have no effect, so the text copy ends where the text does.
        end = int(np.flatnonzero(spread)[-1]) + 1 if spread.any() else 1
        return Example(sample.ids[:end], spread[:end].tolist())

    def _reply(self, labeled: LabeledTurn, way: int) -> list[int]:
        """The loss of each id of a reply, and of its end unless the reply was interrupted."""
        turn = labeled.turn
        kinds = self._vocabulary.kinds[list(turn.ids)].tolist()
        if not turn.interrupted:
            kinds.append(int(Kind.END))
        if not labeled.loss:
            return [UNTRAINED] * len(kinds)
        trains = decisions(tuple(kinds), SCHEDULES[turn.modality])
        if turn.modality is not Modality.INTERLEAVED:
            return list(trains)
        return [what if what & way else UNTRAINED for what in trains]

    def _any(self, rng: np.random.Generator) -> CorpusSample:
        return self._corpus[int(self._dialogues[rng.integers(len(self._dialogues))])]

    def _interrupted(self, turn: Turn, rng: np.random.Generator) -> Turn:
        kinds = [Kind(kind) for kind in self._vocabulary.kinds[list(turn.ids)].tolist()]
        heard = int(rng.integers(sum(kind is Kind.SPEECH for kind in kinds)))
        return replace(turn, ids=turn.ids[: legal_prefix(kinds, heard)], interrupted=True)


class ChatStage(LanguageStage):
    """Training of a language model of stage 1 on dialogues."""

    def __init__(self, recipe: ChatRecipe) -> None:
        self.recipe = recipe
        start = open_start(recipe)
        if start is None:
            raise ValueError("stage chat needs a language model: give start_from, or backbone")
        super().__init__(recipe, start, recipe.text_weight, recipe.speech_weight)
        self._chats = Chats(start.train, self.vocabulary, recipe.loss_mix, recipe.augmentation, recipe.length)
        self._jobs = None
        if recipe.pretrain_share:
            self._jobs = Jobs(start.train, self.vocabulary, recipe.mixture, recipe.length)
        answered = [i for i in self.valid.where("task", "chat") if self.valid[int(i)].answers]
        chosen = np.random.default_rng(0).permutation(answered)[: recipe.num_questions]
        self._questions = [self.valid[int(i)] for i in chosen]

    def batch(self, index: int) -> Batch:
        rng = np.random.default_rng((self.recipe.loop.seed, index))
        jobs = None if self._jobs is None else self._jobs.draws(rng)

        def draw() -> Example:
            is_job = jobs is not None and rng.random() < self.recipe.pretrain_share
            example = next(jobs) if jobs is not None and is_job else self._chats(rng)
            return corrupt_heard_speech(example, self.recipe.corrupt_heard_speech, self.vocabulary, rng)

        return pack(fill(draw, self.recipe.num_rows, self.recipe.length), self.recipe.length, self._padding_id)

    def evaluate(self) -> dict[str, float]:
        """Nats per id of validation replies, accuracy of greedy text answers, and perplexity of the text file."""
        plain = DialogueAugmentation(written_question=0.0, written_reply=0.0, interrupted=0.0, joined=0.0)
        chats = Chats(self.valid, self.vocabulary, LossMix(0.0, 0.0, 1.0), plain, self.recipe.length)
        rows = fill(partial(chats, np.random.default_rng(0)), self.recipe.num_valid_rows, self.recipe.length)
        metrics = mean_losses(self.model, [pack(rows, self.recipe.length, self._padding_id)]) | self.perplexity()
        if self._questions:
            engine = PlainEngine(self.model, self.vocabulary)
            for name, written in (("spoken", False), ("written", True)):
                right = [
                    is_correct(self.vocabulary.decode_text(self._answer(engine, question, written)), question.answers)
                    for question in self._questions
                ]
                metrics[f"accuracy_{name}"] = float(np.mean(right))
        return metrics

    def sample(self, folder: Path) -> None:
        """Writes spoken validation questions and the replies to them, text and speech tokens, as replies.jsonl."""
        engine = PlainEngine(self.model, self.vocabulary)
        lines = []
        for question in self._questions[:NUM_SAMPLES]:
            reply = list(engine.stream(self._prompt(question, False), Sampling(max_tokens=400)))
            kinds = [self.vocabulary.kind(token) for token in reply]
            text = [token for token, kind in zip(reply, kinds, strict=True) if kind is Kind.TEXT]
            speech = [token for token, kind in zip(reply, kinds, strict=True) if kind is Kind.SPEECH]
            lines.append(
                {
                    "asked": self.vocabulary.decode_text(both(question.turns[-2], self.vocabulary)[0]),
                    "answers": list(question.answers),
                    "reply": self.vocabulary.decode_text(text),
                    "speech_tokens": self.vocabulary.speech_codes(speech),
                    "ended": kinds[-1] is Kind.END,
                }
            )
        write_lines(folder / "replies.jsonl", lines)

    def _prompt(self, question: CorpusSample, written: bool) -> list[int]:
        turns = [
            as_text(turn, self.vocabulary) if written and turn.turn.role is Role.USER else turn
            for turn in question.turns[:-1]
        ]
        return self.vocabulary.prompt_ids(Conversation(tuple(turn.turn for turn in turns)))

    def _answer(self, engine: PlainEngine, question: CorpusSample, written: bool) -> list[int]:
        """Text ids of the greedy reply, up to the end of its text."""
        state, text = InterleaveState(), []
        for token in engine.stream(self._prompt(question, written), replace(GREEDY, max_tokens=120)):
            kind = self.vocabulary.kind(token)
            state.advance(kind)
            if kind is Kind.TEXT:
                text.append(token)
            if state.text_finished:
                break
        return text
