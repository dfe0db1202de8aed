"""Section `finetuning`: one training step of a language model of the published size, with its MFU.

All weights of the 9B with their optimizer do not fit one device, so full training is timed with few layers. Adapters
are timed with all layers, where peft is installed.
"""

from __future__ import annotations

import copy
import importlib.util

import torch
from transformers import GlmForCausalLM, PreTrainedModel

from benchmarks.gpu.record import Run
from duologue.language.adapters import LoraOptions, add_lora
from duologue.training.packing import SPEECH, Example, LanguageObjective, pack
from duologue.training.throughput import language_work, peak_flops
from duologue.vocabulary import Vocabulary

NUM_LAYERS = 4
EXAMPLE_IDS = 512
REPETITIONS = 3


def finetuning(run: Run) -> None:
    """Times a step of forward, backward and optimizer on packed rows."""
    language, vocabulary = run.models["language"], run.models["vocabulary"]
    few = 2 if run.tiny else NUM_LAYERS
    with run.record.attempt("full"):
        _step(run, f"full, {few} layers", _with_layers(language, few), vocabulary)
    if importlib.util.find_spec("peft") is not None:
        with run.record.attempt("LoRA"):
            adapted = copy.deepcopy(language, {id(weight): weight for weight in language.parameters()})
            add_lora(adapted, vocabulary, LoraOptions(rank=4 if run.tiny else 64), run.device)
            _step(run, "LoRA, all layers", adapted.to(run.device), vocabulary)


def _with_layers(language: PreTrainedModel, number: int) -> PreTrainedModel:
    """A random model of the same sizes with fewer layers, float32."""
    config = copy.deepcopy(language.config)
    config.num_hidden_layers = number
    config.dtype = torch.float32
    with torch.device(language.device):
        return GlmForCausalLM(config).float()


def _step(run: Run, name: str, model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    length = 64 if run.tiny else 8192
    size = min(EXAMPLE_IDS, length // 2)
    example = Example(vocabulary.speech_ids([k % vocabulary.codebook_size for k in range(size)]), [SPEECH] * size)
    batch = pack([[example] * (length // size)], length, 0)
    work = language_work(model, batch)
    batch = {key: value.to(run.device) for key, value in batch.items()}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = LanguageObjective(model.train(), chunk=1024)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.on_cuda):
            losses = objective(batch)
        (losses["text"] + losses["speech"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    milliseconds = run.median_ms(step, repetitions=REPETITIONS, warm_up=1)
    peak = peak_flops(str(run.device))
    rate = work.flops / milliseconds * 1e3
    details = {} if peak is None else {"mfu": round(rate / peak, 3)}
    if run.on_cuda:
        details["peak_gb"] = round(torch.cuda.max_memory_allocated(run.device) / 1e9, 1)
    run.record.add(f"step, {name}", milliseconds, "ms", ids=work.tokens, tflops=rate / 1e12, **details)
    run.record.add(f"ids per second, {name}", work.tokens / milliseconds * 1e3)
