"""Styles: ids without characters at the beginning of a reply, and the speaker vectors of the flow that they choose."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from duologue.conversation import answer as straight
from duologue.conversation.chatbot import Chatbot
from duologue.decoder.decoder import SpeechDecoder
from duologue.decoder.flow import Flow
from duologue.interleave import Kind, split, weave
from duologue.language.sampling import GREEDY
from duologue.language.scripts import language_mask
from duologue.models import Models
from duologue.training.flow import REPLY, FlowModel, with_styles
from duologue.turns import Conversation, Modality, Role, Turn
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer
from tests.live_server import TEXT, ScriptedEngine
from tests.tiny import TEXTS

STYLES = ("higher", "slower")
QUESTION = np.full(16_000, 0.1, np.float32)


@pytest.fixture(scope="module")
def plain() -> Vocabulary:
    return Vocabulary.extend(train_text_tokenizer(TEXTS, 300), 32, multiple_of=64)


@pytest.fixture(scope="module")
def vocabulary(plain: Vocabulary) -> Vocabulary:
    return plain.with_styles(STYLES)


@pytest.fixture(scope="module")
def flow(tiny_folder: Path) -> Flow:
    """A flow whose styles are far from its plain voice."""
    flow = with_styles(Models.load(tiny_folder).decoder.flow, STYLES)
    with torch.no_grad():
        flow.styles.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(0))
    return flow.eval()


class StyledEngine(ScriptedEngine):
    """Its replies begin with a style."""

    style = ""

    def reply(self, schedule: object) -> list[int]:
        text = [*self._vocabulary.style_ids(self.style), *self._vocabulary.encode_text(TEXT)]
        return weave(text, self._vocabulary.speech_ids([index % 32 for index in range(60)]))


@pytest.fixture
def engine(vocabulary: Vocabulary) -> StyledEngine:
    return StyledEngine(vocabulary)


@pytest.fixture
def bot(tiny_folder: Path, vocabulary: Vocabulary, flow: Flow, engine: StyledEngine) -> Chatbot:
    models = Models.load(tiny_folder)
    decoder = SpeechDecoder(flow, models.decoder.vocoder)
    return Chatbot(dataclasses.replace(models, vocabulary=vocabulary, engine=engine, decoder=decoder))


def test_a_style_is_a_text_id_without_characters(plain: Vocabulary, vocabulary: Vocabulary, tmp_path: Path) -> None:
    [higher] = vocabulary.style_ids("higher")
    assert vocabulary.kind(higher) is Kind.TEXT
    assert plain.kind(higher) is Kind.PADDING
    text = vocabulary.encode_text(TEXT)
    assert vocabulary.decode_text([higher, *text]) == TEXT
    assert vocabulary.style([higher, *text]) == "higher"
    assert [vocabulary.style(ids) for ids in ([], text, [*text, higher])] == ["", "", ""]
    assert vocabulary.style_ids("plain") == []
    assert language_mask(vocabulary, "zh")[higher]
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path).config == vocabulary.config
    assert vocabulary.hash != plain.hash
    reply = Turn(Role.ASSISTANT, Modality.INTERLEAVED, tuple(weave([higher, *text], vocabulary.speech_ids([1] * 60))))
    asked = Turn(Role.USER, Modality.TEXT, tuple(vocabulary.encode_text("Hello")))
    sample = vocabulary.chat_sample(Conversation((asked, reply), vocabulary.hash))
    assert sample.loss[sample.ids.index(higher)]


def test_a_vocabulary_without_styles_is_as_it_was(plain: Vocabulary, tmp_path: Path) -> None:
    plain.save(tmp_path)
    assert "styles" not in (tmp_path / "vocabulary.json").read_text()
    assert Vocabulary.load(tmp_path).hash == plain.hash


def test_styles_need_rows(plain: Vocabulary, vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="styles need a vocabulary without styles"):
        vocabulary.with_styles(["louder"])
    with pytest.raises(ValueError, match="padding rows"):
        plain.with_styles([str(number) for number in range(64)])
    config = dataclasses.replace(plain.config, styles={"higher": plain.end_id})
    with pytest.raises(ValueError, match="style higher would be id"):
        Vocabulary(plain.tokenizer, config)


@pytest.mark.parametrize("style", ["", *STYLES])
def test_a_reply_is_spoken_in_the_style_that_it_begins_with(
    bot: Chatbot, engine: StyledEngine, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.style = style
    ids = engine.reply(None)
    monkeypatch.setattr(straight, "language_of", lambda models: models.decoder)
    monkeypatch.setattr(straight, "generate", lambda *_: [*ids, bot.models.vocabulary.end_id])
    wanted = straight.answer(bot.models, QUESTION, sampling=GREEDY)
    session = bot.session(sampling=GREEDY)
    session.feed(QUESTION)
    reply = session.reply_now()
    assert reply.text == wanted.text == TEXT
    np.testing.assert_allclose(reply.audio, wanted.audio, atol=1e-4, rtol=0)
    codes = bot.models.vocabulary.speech_codes(split(ids, bot.models.vocabulary.kind).speech)
    np.testing.assert_allclose(wanted.audio, straight.decode(bot.models, codes, GREEDY.seed, style), atol=1e-4, rtol=0)
    plain = straight.decode(bot.models, codes, GREEDY.seed)
    assert np.allclose(wanted.audio, plain, atol=1e-4) == (style == "")


def test_a_flow_gets_styles_that_sound_plain_before_they_are_trained(tiny_folder: Path, flow: Flow) -> None:
    before = Models.load(tiny_folder).decoder.flow
    fresh = with_styles(before, ("louder",))
    assert torch.equal(fresh.styles, torch.zeros(1, before.speaker_dim))
    wider = with_styles(flow, ("louder", "slower"))
    assert torch.equal(wider.styles[1], flow.styles[1])
    assert with_styles(flow, ()) is flow
    assert before.style_speaker("louder") is None
    decoder = SpeechDecoder(flow, Models.load(tiny_folder).decoder.vocoder)
    assert torch.equal(decoder.init_state(2, style="slower").flow.speaker, flow.styles[[1, 1]])
    assert not decoder.init_state(2, style="louder").flow.speaker.any()


def test_the_speaker_of_a_training_clip(flow: Flow) -> None:
    model = FlowModel(flow, num_voices=2)
    vectors = model.speaker(torch.tensor([1, REPLY, REPLY - 1, REPLY - 2]))
    assert torch.equal(vectors[0], model.speakers.weight[1])
    assert torch.equal(vectors[1], torch.zeros(flow.speaker_dim))
    assert torch.equal(vectors[2:], flow.styles)
