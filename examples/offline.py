"""Answers one spoken question with the three models one after the other. `bot.chat` gives the same reply in one call.

python examples/offline.py [QUESTION.wav] [-o ANSWER.wav] [--model FOLDER]
"""

import argparse

import torch

import duologue
from duologue.conversation.answer import decode, generate, language_of, tokenize
from duologue.conversation.chatbot import model_folder
from duologue.conversation.history import reply_prompt, turn_of
from duologue.interleave import INTERLEAVED, split
from duologue.sound_files import load_audio, save_audio
from duologue.turns import Conversation, Modality, Role

parser = argparse.ArgumentParser(description="Answers one spoken question.")
parser.add_argument("question", nargs="?", default=model_folder("pocket") / "question.wav")
parser.add_argument("-o", "--output", default="answer.wav")
parser.add_argument("--model", default="pocket")
args = parser.parse_args()

bot = duologue.load(args.model)
models, vocabulary = bot.models, bot.models.vocabulary
with torch.inference_mode():
    codes = tokenize(models, *load_audio(args.question))  # 12.5 speech tokens a second
    question = turn_of(Role.USER, vocabulary.speech_ids(codes), vocabulary)
    conversation = Conversation((question,), vocabulary.hash)
    prompt, sampling = reply_prompt(models, conversation, Modality.INTERLEAVED, models.card.sampling)
    ids = list(generate(language_of(models), vocabulary, prompt, sampling, INTERLEAVED))
    said = split(ids, vocabulary.kind, INTERLEAVED)  # 13 text tokens, 26 speech tokens, and so on
    audio = decode(models, vocabulary.speech_codes(said.speech), sampling.seed)
print(vocabulary.decode_text(said.text).strip())
save_audio(args.output, audio, bot.sample_rate)
