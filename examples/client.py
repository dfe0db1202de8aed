"""Asks a running server one spoken question over its real-time protocol, and writes the spoken answer.

python examples/client.py [QUESTION.wav] [-o ANSWER.wav] [--server http://127.0.0.1:8000]

The API key, where the server asks for one, stands in the environment variable DUOLOGUE_API_KEY.
"""

import argparse
import asyncio
import os

import numpy as np

from duologue.client.connection import WIRE_RATE, decode_pcm, open_connection
from duologue.conversation.chatbot import model_folder
from duologue.pcm import from_int16, to_int16
from duologue.sound_files import load_audio, save_audio

parser = argparse.ArgumentParser(description="Asks a running server one spoken question.")
parser.add_argument("question", nargs="?", default=model_folder("pocket") / "question.wav")
parser.add_argument("-o", "--output", default="answer.wav")
parser.add_argument("--server", default="http://127.0.0.1:8000")
args = parser.parse_args()


async def main() -> None:
    wav, _ = load_audio(args.question, WIRE_RATE)
    async with open_connection(args.server, key=os.environ.get("DUOLOGUE_API_KEY", "")) as connection:
        manual = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}  # the turn ends at the commit
        await connection.send({"type": "session.update", "session": manual})
        await connection.append(to_int16(wav))
        await connection.send({"type": "input_audio_buffer.commit"})
        await connection.send({"type": "response.create"})
        events = await connection.receive_until("response.done", "error")
    print("".join(event["delta"] for event in events if event["type"] == "response.output_audio_transcript.delta"))
    sounds = [decode_pcm(event["delta"]) for event in events if event["type"] == "response.output_audio.delta"]
    save_audio(args.output, from_int16(np.concatenate(sounds)), WIRE_RATE)


asyncio.run(main())
