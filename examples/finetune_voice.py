"""Gives pocket another voice: trains its flow on your recordings (needs `pip install -e ".[train]"`).

python examples/finetune_voice.py OUT one.wav two.wav ... [--steps 2000], then: duologue chat --model OUT/model
"""

import argparse
import json
from pathlib import Path
from shutil import copytree

import numpy as np

from duologue.conversation.chatbot import model_folder
from duologue.pcm import to_int16
from duologue.rates import LISTEN_SAMPLE_RATE as RATE
from duologue.sound_files import load_audio
from duologue.training.data import Clip
from duologue.training.flow import FlowRecipe, FlowStage
from duologue.training.loop import LoopConfig, run

parser = argparse.ArgumentParser(description="Trains pocket's flow on your recordings.")
parser.add_argument("out", type=Path)
parser.add_argument("recordings", nargs="+", help="one speaker, at least 8 s together; minutes are better")
parser.add_argument("--steps", type=int, default=2000)
args = parser.parse_args()

pocket, corpus, size = model_folder("pocket"), args.out / "corpus", 4 * RATE
wav = np.concatenate([load_audio(path, RATE)[0] for path in args.recordings])
corpus.mkdir(parents=True, exist_ok=True)
to_int16(wav).tofile(corpus / "clips-00000.pcm")
with (corpus / "clips-00000.jsonl").open("w") as lines:  # clips of 4 s; every tenth, and the first, is for validation
    for i in range(len(wav) // size):
        split = "train" if i % 10 else "valid"
        clip = Clip(str(i), "", "reply", "mine", "en", "plain", split, "free", RATE, i * size, size)
        lines.write(json.dumps(vars(clip)) + "\n")
tokenizer, store, start_from = (str(path) for path in (pocket / "tokenizer", args.out / "store", pocket / "decoder"))
loop = LoopConfig(args.steps, learning_rate=5e-4)
print(run(FlowStage(FlowRecipe((str(corpus),), tokenizer, store, loop, start_from)), loop, args.out / "run"))
copytree(pocket, args.out / "model", dirs_exist_ok=True)
copytree(args.out / "run" / "final" / "flow", args.out / "model" / "decoder" / "flow", dirs_exist_ok=True)
