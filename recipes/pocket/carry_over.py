"""Carries language model and flow of a trained pocket over to a new speech tokenizer, as a start for their training.

    python -m recipes.pocket.carry_over --model src/duologue/pocket --runs runs/pocket

Both tokenizers read the same sound and give 12.5 codes a second. The embedding of a new code is the mean of the old
codes' embeddings, weighted by how often each stands at the same place. Text rows follow their token. All other weights
stay as they are. `recipes.pocket.run --carry-over` runs this in place of the steps `flow` and `pretrain`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duologue import rates
from duologue.checkpoint import file_hash, load_component, save_component
from duologue.config import load_config
from duologue.decoder.flow import Flow, FlowConfig
from duologue.language.backbone import Provenance, load_language, save_language
from duologue.layers import Padded
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.data import Clips
from duologue.training.pretrain import PretrainRecipe
from duologue.vocabulary import Vocabulary

_BATCH_CLIPS = 16


@torch.no_grad()
def count_pairs(old: SpeechTokenizer, new: SpeechTokenizer, clips: Clips, hours: float) -> Tensor:
    """Returns counts (new codes, old codes) float64 of codes at the same place, over random clips of `hours` in all."""
    sizes = (new.config.quantizer.codebook_size, old.config.quantizer.codebook_size)
    counts = torch.zeros(sizes[0] * sizes[1], dtype=torch.float64)
    for batch in tqdm(list(_batches(clips, hours)), desc="codes of both tokenizers", mininterval=5.0):
        wav = Padded.stack([torch.from_numpy(clips.wav(index)) for index in batch])
        for before, after in zip(old(wav).rows(), new(wav).rows(), strict=True):
            pairs = after.long() * sizes[1] + before.long()
            counts.index_add_(0, pairs, torch.ones(len(pairs), dtype=torch.float64))
    return counts.view(sizes)


def _batches(clips: Clips, hours: float) -> Iterator[list[int]]:
    """Batches of indices of clips of like lengths."""
    order = np.random.default_rng(0).permutation(len(clips))
    seconds = np.cumsum([clips.records[i].num_samples / rates.LISTEN_SAMPLE_RATE for i in order])
    num_clips = int(np.searchsorted(seconds, hours * 3600)) + 1
    chosen = sorted(order[:num_clips].tolist(), key=lambda i: clips.records[i].num_samples)
    for first in range(0, len(chosen), _BATCH_CLIPS):
        yield chosen[first : first + _BATCH_CLIPS]


def translate_rows(table: Tensor, counts: Tensor, seed: int = 0) -> Tensor:
    """Returns rows (new codes, D) for old rows (old codes, D), in the dtype of `table`.

    A mean is shorter than the vectors that it is taken of, so each row is scaled to their mean length. A code that was
    never seen gets the mean of all. A tenth of noise tells apart codes with the same counts.

    Args:
        counts: (new codes, old codes) from `count_pairs`.
    """
    dtype, table = table.dtype, table.double()
    smoothed = counts + 0.5 * counts.sum(0) / counts.sum()
    share = smoothed / smoothed.sum(1, keepdim=True)
    rows = share @ table
    length = share @ table.norm(dim=1)
    rows = rows * (length / rows.norm(dim=1).clamp(min=1e-6))[:, None]
    noise = torch.randn(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    noisy: Tensor = rows + 0.1 * table.std() * noise
    return noisy.to(dtype)


@torch.no_grad()
def carry_language(model: Path, after: Vocabulary, tokenizer: Path, out: Path, counts: Tensor | None = None) -> None:
    """Writes the language model of a pocket folder for another vocabulary.

    Args:
        after: the vocabulary.
        tokenizer: folder of the speech tokenizer that the new model hears with.
        out: folder of the new model.
        counts: from `count_pairs`; None if the speech tokens stay the same.
    """
    before = Vocabulary.load(model / "vocabulary")
    language = load_language(model / "language")
    table = language.get_input_embeddings().weight.detach().clone()
    language.resize_token_embeddings(after.size, mean_resizing=False)
    recipe = load_config(Path(__file__).with_name("pretrain.yaml"), PretrainRecipe)
    language.config.max_position_embeddings = recipe.language.max_positions
    rows = language.get_input_embeddings().weight
    old_speech = table[before.speech_offset : before.speech_offset + before.codebook_size]
    new_speech = old_speech if counts is None else translate_rows(old_speech, counts)
    rows[after.speech_offset : after.speech_offset + after.codebook_size] = new_speech
    known = before.tokenizer.get_vocab()
    for token, place in after.tokenizer.get_vocab().items():
        rows[place] = table[known[token]] if token in known else _mean_of(place, before, after, table)
    for name, place in after.config.controls.items():
        rows[place] = table[before.control_id(name)]
    save_language(out, language, Provenance(file_hash(tokenizer), after.hash))


def _mean_of(token: int, before: Vocabulary, after: Vocabulary, table: Tensor) -> Tensor:
    """The mean of the rows of the old tokens that spell a new one."""
    ids = before.encode_text(after.decode_text([token]))
    return table[ids].mean(0) if ids else table.mean(0)


@torch.no_grad()
def carry_flow(model: Path, runs: Path, out: Path, counts: Tensor) -> None:
    """Writes the flow of a pocket folder for the codes of the tokenizer in `runs`."""
    before = load_component(model / "decoder" / "flow", Flow, FlowConfig)
    encoder = dataclasses.replace(before.config.encoder, codebook_size=len(counts))
    after = Flow(dataclasses.replace(before.config, encoder=encoder))
    weights = before.state_dict()
    name = "encoder.embed_tokens.weight"
    weights[name] = translate_rows(weights[name], counts)
    after.load_state_dict(weights)
    save_component(out / "flow", after, after.config, extra={"tokenizer": file_hash(runs / "frozen" / "tokenizer")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("src/duologue/pocket"), help="folder of the trained pocket")
    parser.add_argument("--runs", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--hours", type=float, default=3.0, help="of sound that both tokenizers read")
    parser.add_argument("--voices", nargs="*", help="of the corpus; all by default")
    args = parser.parse_args()
    old = load_component(args.model / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    new = load_component(args.runs / "frozen" / "tokenizer", SpeechTokenizer, SpeechTokenizerConfig)
    clips = Clips(args.runs / "corpus" / "free", voices=args.voices or None)
    counts = count_pairs(old, new, clips, args.hours)
    out = args.runs / "carried"
    carry_flow(args.model, args.runs, out, counts)
    vocabulary, tokenizer = Vocabulary.load(args.runs / "vocabulary"), args.runs / "frozen" / "tokenizer"
    carry_language(args.model, vocabulary, tokenizer, out / "language", counts)
    seen, share = int((counts.sum(1) > 0).sum()), counts.max(1).values.sum() / counts.sum()
    print(f"{out}: {seen} of {len(counts)} codes seen; the likeliest old code of each covers {share:.0%} of its places")


if __name__ == "__main__":
    main()
