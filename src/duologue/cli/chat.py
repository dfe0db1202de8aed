"""`duologue chat`: spoken or written questions, spoken answers."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.parser import add_command, add_precision, checked_output, warn_if_untrained
from duologue.text import printable

if TYPE_CHECKING:
    from duologue.conversation.answer import Reply
    from duologue.conversation.events import Event, Timings
    from duologue.language.sampling import Sampling
    from duologue.models import Card

BUNDLED_QUESTION = "question.wav"  # in the folder of pocket; it asks for the capital of France


EXAMPLES = (
    "duologue chat question.wav -o answer.wav",
    'duologue chat --text "What is two plus three?"',
    "duologue chat first.wav second.wav --json",
)


def add(commands: Any) -> None:
    text = "ask spoken or written questions and get spoken answers"
    chat = add_command(commands, "chat", _chat, text, model=True, examples=EXAMPLES)
    chat.add_argument(
        "questions",
        nargs="*",
        type=Path,
        metavar="QUESTION",
        help="audio files, the turns of a conversation (default: the bundled question)",
    )
    chat.add_argument("--text", action="append", default=[], help="a written question, after the spoken ones")
    chat.add_argument("-o", "--output", type=Path, metavar="ANSWER", help="audio file of the answer (.wav, .flac, ...)")
    add_precision(chat)
    chat.add_argument("--text-only", action="store_true", help="answer in text only")
    chat.add_argument("--voice", default="", help="one of the model's voices")
    chat.add_argument("--seed", type=int, help="seed of the sampling")
    chat.add_argument("--temperature", type=float, help="sampling temperature; 0 is greedy")
    chat.add_argument("--max-tokens", type=int, help="maximum tokens of one reply")
    chat.add_argument("--text-language", choices=("en", "zh"), help="keep the reply's text to this language")


def _chat(args: argparse.Namespace) -> None:
    """Asks the questions in one conversation and prints each answer while it is generated."""
    from duologue.conversation.chatbot import load, model_folder
    from duologue.sound_files import load_audio, save_audio

    if not args.questions and not args.text:
        args.questions = [model_folder("pocket") / BUNDLED_QUESTION]
        print(f"duologue: no question was given; asking the bundled one, {args.questions[0]}", file=sys.stderr)
    outputs = _numbered(args.output, len(args.questions) + len(args.text))
    recorded = [
        load_audio(path) for path in args.questions
    ]  # before the models are loaded, so that a bad file fails at once
    bot = load(args.model, args.device, args.dtype, args.quantize, decoder_dtype=args.decoder_dtype, gguf=args.gguf)
    warn_if_untrained(bot.models.card)
    session = bot.session(voice=args.voice, sampling=_sampling(args, bot.models.card))
    turns = []
    questions: list[str | Path] = [*args.questions, *args.text]
    for index, (question, output) in enumerate(zip(questions, outputs, strict=True)):
        if index < len(recorded):
            wav, sample_rate = recorded[index]
            session.feed(wav, sample_rate)
        else:
            session.write(str(question))
        transcript = None if args.json else _Transcript(f"you: {question}\n{bot.models.card.name}: ")
        reply = session.reply_now(text_only=args.text_only, on_event=transcript)
        written = output if output is not None and reply.audio.size else None
        if written is not None:
            save_audio(written, reply.audio, reply.sample_rate)
        if not args.json:
            if reply.heard:
                print(f"\nheard: {printable(reply.heard)}", end="")
            print(f"\n{_times(reply.timings)}{f' -> {written}' if written else ''}")
        turns.append({"question": str(question), **_reply_json(reply, written)})
    if args.json:
        print(json.dumps({"model": bot.models.card.name, "trained": bot.models.card.trained, "turns": turns}))


def _sampling(args: argparse.Namespace, card: Card) -> Sampling:
    names = ("seed", "temperature", "max_tokens", "text_language")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(card.sampling, **given)


def _numbered(output: Path | None, num: int) -> list[Path | None]:
    """Returns one path per answer: the name itself, or answer-1.wav, answer-2.wav ..."""
    if output is None:
        return [None] * num
    stem = checked_output(output).stem
    return [output.with_stem(f"{stem}-{index + 1}") if num > 1 else output for index in range(num)]


class _Transcript:
    """Prints a heading and the text of a reply as it arrives. Prints nothing before the first event."""

    def __init__(self, head: str) -> None:
        self._head = head

    def __call__(self, event: Event) -> None:
        from duologue.conversation.events import TextDelta

        text = event.text if isinstance(event, TextDelta) else ""
        print(self._head + printable(text), end="", flush=True)
        self._head = ""


def _times(timings: Timings) -> str:
    if timings.first_audio_s is None or timings.real_time_factor is None:
        return f"{timings.total_s:.2f} s"
    return (
        f"time to first audio {timings.first_audio_s:.2f} s, {timings.audio_s:.1f} s of speech, "
        f"real-time factor {timings.real_time_factor:.2f}"
    )


def _reply_json(reply: Reply, written: Path | None) -> dict[str, Any]:
    return {
        "heard": reply.heard,
        "text": reply.text,
        "audio": None if written is None else str(written),
        "sample_rate": reply.sample_rate,
        "speech_tokens": list(reply.speech_tokens),
        "reason": str(reply.reason),
        "timings": {**asdict(reply.timings), "real_time_factor": reply.timings.real_time_factor},
    }
