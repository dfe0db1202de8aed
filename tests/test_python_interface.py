"""The Python interface as people meet it: names, types, representations, players, threads that end."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import duologue
from duologue.config import check_type

TONE = (0.1 * np.sin(np.arange(16_000) / 16_000 * 2 * np.pi * 220)).astype(np.float32)


@pytest.fixture(scope="module")
def bot(tiny_folder: Path) -> duologue.Chatbot:
    return duologue.load(tiny_folder)


def test_every_name_is_listed_and_there() -> None:
    names = dir(duologue)
    assert {"load", "Chatbot", "Session", "Reply", "AudioDelta", "TextDelta", "ReplyDone", "Sampling"} <= set(names)
    for name in names:
        assert getattr(duologue, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Chatbots'"):
        duologue.Chatbots  # noqa: B018


def test_listing_the_names_imports_no_torch() -> None:
    program = "import sys, duologue; dir(duologue); assert not {'torch', 'numpy'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_named(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"torch has no device 'cuda' on this machine \("):
        duologue.load(tiny_folder, device="cuda")


def test_wrong_types_are_named(bot: duologue.Chatbot, tiny_folder: Path) -> None:
    wrong: Any = 5
    with pytest.raises(TypeError, match="name must be str or Path, not int"):
        duologue.load(wrong)
    with pytest.raises(TypeError, match="device must be a name such as 'cpu' or 'cuda', not int"):
        duologue.load(tiny_folder, device=wrong)
    with pytest.raises(ValueError, match="unknown dtype 'float8'; the choices are float32, bfloat16, float16"):
        duologue.load(tiny_folder, dtype="float8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="audio must be str or Path or ndarray .* not int"):
        bot.chat(wrong)
    with pytest.raises(TypeError, match="sample_rate must be .* not str"):
        bot.chat(TONE, "16000")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text must be str or NoneType, not int"):
        bot.chat(text=wrong)
    with pytest.raises(TypeError, match="sampling must be Sampling or NoneType, not dict"):
        bot.session(sampling={"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text must be str, not int"):
        bot.session().write(wrong)
    with pytest.raises(TypeError, match="played_ms must be int or float, not str"):
        bot.session().interrupt("1")  # type: ignore[arg-type]


def test_a_flag_is_no_number() -> None:
    with pytest.raises(TypeError, match="n must be int, not bool"):
        check_type("n", True, int)
    check_type("n", True, bool)
    check_type("n", None, int, NoneType)


def test_what_was_heard_is_in_the_reply(bot: duologue.Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def transcribe(self: object, codes: tuple[int, ...]) -> str:
        asked.append(tuple(codes))
        return "what is two plus three"

    monkeypatch.setattr("duologue.models.Models.transcribe", transcribe)
    sampling = duologue.Sampling(temperature=0.0, max_tokens=8)
    straight = bot.chat(TONE, 16_000, sampling=sampling)
    streamed = bot.chat(TONE, 16_000, sampling=sampling, on_event=lambda event: None)
    assert asked == []  # read on first use
    assert straight.heard == streamed.heard == straight.heard == "what is two plus three"
    first, second = asked
    assert first == second
    assert len(first) > 5
    assert bot.chat(text="And now?", sampling=sampling).heard is None


def test_representations_fit_a_line_and_notebooks_get_a_player(bot: duologue.Chatbot) -> None:
    session = bot.session(sampling=duologue.Sampling(temperature=0.0, max_tokens=60))
    session.feed(TONE)
    events = list(session.events())
    assert repr(session) == "Session(tiny, 2 turns)"
    assert repr(bot) == "Chatbot(tiny, not trained, cpu)"
    assert all(len(repr(event)) < 200 for event in events)
    wav = np.linspace(-0.5, 0.5, 22_050, dtype=np.float32)
    done = events[-1]
    assert isinstance(done, duologue.ReplyDone)
    reply = duologue.Reply("5 < 6 & " + "so on " * 30, wav, 22_050, (1,), done.reason, done.timings)
    assert repr(
        reply
    ) == "Reply('5 < 6 & so on so on so on so on so on so on so on so on so …', 1.0 s of speech, end)".replace(
        "end", str(done.reason)
    )
    shown = reply._repr_html_()
    assert "<p>5 &lt; 6 &amp; so on" in shown
    head, _, rest = shown.partition("data:audio/wav;base64,")
    assert head.endswith('<audio controls src="')
    played, rate = soundfile.read(io.BytesIO(base64.b64decode(rest.partition('"')[0])), dtype="float32")
    assert rate == 22_050
    np.testing.assert_allclose(played, wav, atol=1e-4)
    written = duologue.Reply("In writing.", wav[:0], 22_050, (), done.reason, done.timings)
    assert "<audio" not in written._repr_html_()
    assert repr(written).startswith("Reply('In writing.', no speech, ")


def replying() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "reply"]


def test_no_thread_of_a_reply_outlives_it(bot: duologue.Chatbot) -> None:
    session = bot.session(sampling=duologue.Sampling(temperature=0.0, max_tokens=60))
    session.feed(TONE)
    for _ in session.events():
        break  # leaves early
    assert replying() == []
    session.write("And now?")
    assert session.reply_now().text is not None  # nothing is in progress
    assert replying() == []

    def fail(event: duologue.Event) -> None:
        raise OSError("the disk is full")

    session.write("Once more?")
    with pytest.raises(OSError, match="the disk is full"):
        session.reply_now(on_event=fail)
    assert replying() == []
    with pytest.raises(ValueError, match="nothing was said"):
        bot.session().reply_now()
    assert replying() == []
