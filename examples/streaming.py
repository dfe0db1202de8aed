"""Holds a conversation of two turns: listens in chunks of 20 ms, prints and collects the reply while it is produced.
python examples/streaming.py [QUESTION.wav] [-o ANSWERS.wav] [--model FOLDER]
"""

import argparse
import asyncio

import numpy as np

import duologue
from duologue.conversation.events import AudioDelta, ReplyDone, TextDelta
from duologue.sound_files import load_audio, save_audio

parser = argparse.ArgumentParser(description="Holds a conversation of two turns.")
parser.add_argument("question", nargs="?", default=f"{duologue.__path__[0]}/pocket/question.wav")
parser.add_argument("-o", "--output", default="answers.wav")
parser.add_argument("--model", default="pocket")
args = parser.parse_args()


async def main() -> None:
    session, sounds = duologue.load(args.model).session(), []
    wav, sample_rate = load_audio(args.question)
    for interrupts in (False, True):  # the user asks twice, and speaks into the second answer
        for start in range(0, len(wav), chunk := sample_rate // 50):
            await session.hear(wav[start : start + chunk], sample_rate)
            await asyncio.sleep(0.02)  # a microphone delivers chunks at this pace
        async for event in session.reply():
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
            elif isinstance(event, AudioDelta):
                sounds.append(event)
                if interrupts:
                    session.interrupt(played_ms=400)  # how much the loudspeaker has played so far
            elif isinstance(event, ReplyDone):
                print(f" [{event.reason}; heard: {event.text.strip()!r}]")
    save_audio(args.output, np.concatenate([sound.wav for sound in sounds]), sounds[0].sample_rate)


asyncio.run(main())
