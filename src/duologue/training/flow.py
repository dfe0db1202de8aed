"""Stage `flow`: the flow decoder learns to turn speech tokens into mels (arXiv:2412.02612).

The first run trains many voices, each with a learned speaker vector; the reply voice has the zero vector. The second
run starts from the first and trains the reply voice alone, with truncated utterances (the first n blocks of 10 tokens).
The flow is pocket's, or one of the released architecture (`released`).

Shapes: B batch, T tokens, F mel frames, M mels, S speaker channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from duologue import rates
from duologue.checkpoint import file_hash, load_component, read_extra, save_component, save_tensors
from duologue.decoder.encoder import frames_for_tokens, token_of_frame
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.layers import Padded
from duologue.released.decoder.flow import ReleasedFlow, ReleasedFlowConfig
from duologue.sound_files import save_audio
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training.codes import CodeStore, build_store
from duologue.training.data import Clip, Clips, LengthBatches
from duologue.training.loop import Batch, LoopConfig

REPLY = -1  # in place of a voice's number: the zero speaker; below it are the styles of the reply voice
_STATISTICS_CLIPS = 500


@dataclass(frozen=True)
class FlowRecipe:
    """Recipe of the stage `flow`.

    Attributes:
        corpora: folders of clips.
        tokenizer: folder of the frozen tokenizer.
        store: folder for its codes and the mels of the corpora; created where it is missing.
        start_from: folder of an earlier run of this stage (`final`) to start from; empty for random weights.
        vocoder: folder of a vocoder for the written samples; empty for pictures only.
        flow: sizes; codebook size, mean and deviation of the mel come from tokenizer and corpus.
        released: sizes of a flow of the released architecture, which replaces `flow`; the codebook size is set
            likewise.
        joined_tokens: clips of one voice are joined to utterances of at most this many tokens; 0 for no joining.
        roles: roles of the clips; empty for all.
        styles: styles of replies that get a speaker vector of their own; replies in others share the zero vector.
        max_hours: maximum hours of each corpus and these roles; None for all.
        batch_s: seconds of speech in a batch.
        max_tokens: longer clips are cut to this length, from a random block on.
        prefix_probability: probability that a batch is cut to the first n blocks, n uniform.
        prompt_probability: probability that the beginning of the mel is given; uniform length up to `max_prompt`.
        guidance_dropout: probability that the whole condition is hidden.
        speaker_dropout: probability of the zero speaker instead of a voice's own.
        coarse_weight: weight of the loss on the encoder's coarse mel.
        compare_guidance: whether the evaluation generates with this guidance and with none.
    """

    corpora: tuple[str, ...]
    tokenizer: str
    store: str
    loop: LoopConfig
    start_from: str = ""
    vocoder: str = ""
    flow: FlowConfig = field(default_factory=FlowConfig)
    released: ReleasedFlowConfig | None = None
    joined_tokens: int = 0
    roles: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    max_hours: float | None = None
    batch_s: float = 120.0
    max_tokens: int = 50
    prefix_probability: float = 0.0
    prompt_probability: float = 0.5
    max_prompt: float = 0.8
    guidance_dropout: float = 0.2
    speaker_dropout: float = 0.3
    time_sampling: Literal["cosine", "uniform"] = "cosine"
    coarse_weight: float = 0.3
    compare_guidance: float = 0.7
    num_valid_clips: int = 64
    num_generated: int = 8

    def __post_init__(self) -> None:
        if self.max_tokens < rates.BLOCK_TOKENS or self.max_tokens % rates.BLOCK_TOKENS:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be a multiple of {rates.BLOCK_TOKENS}")
        if not self.corpora:
            raise ValueError("corpora is empty: name at least one folder of clips")
        names = [Path(corpus).name for corpus in self.corpora]
        if len(set(names)) < len(names):
            raise ValueError(f"corpora must have names of their own, got {', '.join(names)}")


class FlowModel(nn.Module):
    """The flow and the speaker vectors of the corpus, as one set of weights."""

    def __init__(self, flow: Flow | ReleasedFlow, num_voices: int) -> None:
        super().__init__()
        self.flow = flow
        self.speakers = nn.Embedding(max(num_voices, 1), flow.speaker_dim)

    def speaker(self, voice: Tensor) -> Tensor:
        """Voice numbers (B,), REPLY, or REPLY - 1 - i for style i -> (B, S)."""
        vectors: Tensor = self.speakers(voice.clamp(min=0)) * (voice > REPLY)[:, None]
        if not isinstance(self.flow, Flow) or not self.flow.config.styles:
            return vectors
        return vectors + self.flow.styles[(REPLY - 1 - voice).clamp(min=0)] * (voice < REPLY)[:, None]


@dataclass(frozen=True)
class TrainingUtterance:
    """One clip, or joined clips of one voice: number of the corpus, indices in it, and the record of the first clip."""

    store: int
    indices: tuple[int, ...]
    clip: Clip
    num_tokens: int


class FlowStage:
    """Training of `Flow`."""

    phases: Mapping[str, nn.Module]
    weights: Mapping[str, float]

    def __init__(self, recipe: FlowRecipe) -> None:
        self.recipe = recipe
        self.tokenizer_hash = file_hash(recipe.tokenizer)
        self.stores, utterances = self._open_corpora()
        self.train = [one for one in utterances if one.clip.split == "train"]
        valid = [one for one in utterances if one.clip.split == "valid"]
        if not self.train or not valid:
            raise ValueError(f"corpora {', '.join(recipe.corpora)} lack clips of split 'train' or 'valid'")
        # The reply voice first: pictures and generated mels are made from it.
        self.valid = sorted(valid, key=lambda one: one.clip.role != "reply")[: recipe.num_valid_clips]
        reply_voices = {one.clip.voice for one in utterances if one.clip.role == "reply"}
        self.voices = sorted({one.clip.voice for one in self.train} - reply_voices)
        self.flow = self._make_flow()
        torch.manual_seed(recipe.loop.seed)
        self.model = FlowModel(self.flow, len(self.voices))
        self.phases = {"flow": self.model}
        self.weights = {"velocity": 1.0, "coarse": recipe.coarse_weight}
        lengths = [min(one.num_tokens, recipe.max_tokens) / rates.TOKEN_RATE for one in self.train]
        self.batches = LengthBatches(np.array(lengths), recipe.batch_s, recipe.loop.seed)

    def batch(self, index: int) -> Batch:
        chosen, rng = self.batches(index)
        utterances = [self.train[i] for i in chosen]
        num_tokens = self.recipe.max_tokens
        prefix = rng.random() < self.recipe.prefix_probability
        if prefix:
            longest = min(max(one.num_tokens for one in utterances), num_tokens)
            num_tokens = rates.BLOCK_TOKENS * int(rng.integers(1, -(-longest // rates.BLOCK_TOKENS) + 1))
        starts = []
        for one in utterances:
            room = -(-max(one.num_tokens - num_tokens, 0) // rates.BLOCK_TOKENS)
            starts.append(0 if prefix else rates.BLOCK_TOKENS * int(rng.integers(room + 1)))
        batch = self._collate(utterances, starts, num_tokens)
        size, num_frames = len(utterances), batch["num_frames"]
        prompts = torch.from_numpy(rng.uniform(0, self.recipe.max_prompt, size)) * num_frames
        given = torch.from_numpy(rng.random(size) < self.recipe.prompt_probability)
        batch["prompt"] = prompts.long() * given
        batch["keep"] = torch.from_numpy(rng.random(size) >= self.recipe.guidance_dropout)
        unnamed = torch.from_numpy(rng.random(size) < self.recipe.speaker_dropout)
        batch["voice"] = torch.where(unnamed & (batch["voice"] > REPLY), REPLY, batch["voice"])
        return batch

    def losses(self, phase: str, batch: Batch, progress: float) -> dict[str, Tensor]:
        flow, start = self.flow, batch["start"]
        mel = flow.normalize(batch["mel"].float())  # (B, F, M)
        mask = torch.arange(mel.shape[1], device=mel.device) < batch["num_frames"][:, None]
        frame = torch.arange(mel.shape[1], device=mel.device)
        prompted = frame < batch["prompt"][:, None]
        # At a cut, the first frame may belong to the token before the cut, which is missing.
        mask = mask & (token_of_frame(frames_for_tokens(start)[:, None] + frame) >= start[:, None])
        speaker = self.model.speaker(batch["voice"])
        x0 = torch.randn_like(mel)
        time = torch.rand(len(start), device=mel.device)
        if self.recipe.time_sampling == "cosine":
            time = 1 - torch.cos(time * (math.pi / 2))
        x_t = torch.lerp(x0, mel, time[:, None, None])
        given = mel * prompted[:, :, None]
        tokens = Padded(batch["tokens"], batch["num_tokens"])
        velocity, coarse = flow.predict(tokens, start, speaker, given, x_t, time, batch["keep"])
        return {
            "velocity": _mean_square(velocity - (mel - x0), mask & ~prompted),
            "coarse": _mean_square(coarse - mel, mask),
        }

    def evaluate(self) -> dict[str, float]:
        """Losses on validation clips with fixed noise and times, and the L1 distance of generated natural-log mels."""
        sums = dict.fromkeys(self.weights, 0.0)
        ordered = sorted(self.valid, key=lambda one: one.num_tokens)
        parts = [ordered[at : at + 16] for at in range(0, len(ordered), 16)]
        device = self.model.speakers.weight.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for part in parts:
                batch = self._collate(part, [0] * len(part), self.recipe.max_tokens)
                batch["prompt"] = torch.zeros(len(part), dtype=torch.int64)
                batch["keep"] = torch.ones(len(part), dtype=torch.bool)
                losses = self.losses("flow", {name: value.to(device) for name, value in batch.items()}, 0)
                for name, loss in losses.items():
                    sums[name] += float(loss) * len(part) / len(ordered)
        chosen = self.valid[: self.recipe.num_generated]
        for name, scale in (("mel_l1_unguided", 0.0), ("mel_l1_guided", self.recipe.compare_guidance)):
            made = self._generate(chosen, scale)
            wanted = [self._mel(one) for one in chosen]
            error = torch.cat([(a - b).abs().mean(1) for a, b in zip(made, wanted, strict=True)])
            sums[name] = float(error.mean())
        return sums

    def sample(self, folder: Path) -> None:
        """Writes pictures of target and generated mels, and both as sound where the recipe names a vocoder."""
        chosen = self.valid[:3]
        made, wanted = self._generate(chosen, None), [self._mel(one) for one in chosen]
        _draw(folder / "mels.png", made, wanted, [one.clip.text for one in chosen])
        if not self.recipe.vocoder:
            return
        vocoder = load_component(self.recipe.vocoder, Vocoder, VocoderConfig)
        for number, pair in enumerate(zip(made, wanted, strict=True)):
            for name, mel in zip(("generated", "from-reference-mel"), pair, strict=True):
                wav = vocoder(Padded.full(mel[None].cpu())).values[0]
                save_audio(folder / f"{number}-{name}.wav", wav.numpy(), rates.SPEAK_SAMPLE_RATE)

    def save(self, folder: Path) -> None:
        """Writes `flow`, the component, and `speakers`, one vector (S,) per voice of the corpus."""
        save_component(folder / "flow", self.flow, self.flow.config, extra={"tokenizer": self.tokenizer_hash})
        if self.voices:
            table = self.model.speakers.weight.detach()
            save_tensors(folder / "speakers", {name: table[i].clone() for i, name in enumerate(self.voices)})

    def load_tokenizer(self) -> SpeechTokenizer:
        """Loads the frozen tokenizer."""
        return load_component(self.recipe.tokenizer, SpeechTokenizer, SpeechTokenizerConfig)

    def _open_corpora(self) -> tuple[list[CodeStore], list[TrainingUtterance]]:
        recipe = self.recipe
        stores, utterances = [], []
        for number, corpus in enumerate(recipe.corpora):
            roles = recipe.roles or None
            clips = Clips(corpus, roles=roles)
            folder = Path(recipe.store) / "-".join([Path(corpus).name, *sorted(recipe.roles)])
            store = build_store(
                corpus,
                recipe.tokenizer,
                folder,
                roles=roles,
                max_hours=recipe.max_hours,
                load_tokenizer=self.load_tokenizer,
            )
            stores.append(store)
            for i, name in enumerate(store.ids):
                clip = clips.records[i]
                if clip.id != name:
                    raise ValueError(f"{folder} does not belong to {corpus}: clip {i} is {name}, not {clip.id}")
                if store.num_tokens(i):
                    utterances.append(TrainingUtterance(number, (i,), clip, store.num_tokens(i)))
        return stores, join(utterances, recipe.joined_tokens) if recipe.joined_tokens else utterances

    def _make_flow(self) -> Flow | ReleasedFlow:
        recipe = self.recipe
        if recipe.start_from:
            start = Path(recipe.start_from) / "flow"
            if read_extra(start).get("tokenizer") != self.tokenizer_hash:
                raise ValueError(f"{start} was trained with another tokenizer than {recipe.tokenizer}")
            if recipe.released is not None:
                return load_component(start, ReleasedFlow, ReleasedFlowConfig)
            return with_styles(load_component(start, Flow, FlowConfig), recipe.styles)
        size = self.load_tokenizer().config.quantizer.codebook_size
        mels = np.concatenate([self._mel(one).numpy() for one in self.train[:_STATISTICS_CLIPS]])
        torch.manual_seed(recipe.loop.seed)
        if recipe.released is not None:
            return _begin_released(
                dataclasses.replace(recipe.released, vocab_size=size), torch.from_numpy(mels.mean(0))
            )
        return Flow(
            dataclasses.replace(
                recipe.flow,
                styles=recipe.styles,
                encoder=dataclasses.replace(recipe.flow.encoder, codebook_size=size),
                mel_mean=round(float(mels.mean()), 4),
                mel_std=round(float(mels.std()), 4),
            )
        )

    def _collate(self, utterances: Sequence[TrainingUtterance], starts: Sequence[int], num_tokens: int) -> Batch:
        """Tokens [start, start + num_tokens) of each clip and the frames that belong to them."""
        tokens, mels, voices = [], [], []
        for one, start in zip(utterances, starts, strict=True):
            end = min(start + num_tokens, one.num_tokens)
            codes = np.concatenate([self.stores[one.store].codes(index) for index in one.indices])
            tokens.append(torch.from_numpy(codes[start:end]))
            mels.append(self._mel(one)[rates.frames_for_tokens(start) : rates.frames_for_tokens(end)])
            voices.append(self._voice_number(one.clip))
        padded, mel = Padded.stack(tokens), Padded.stack(mels)
        return {
            "tokens": padded.values,
            "num_tokens": padded.lengths,
            "mel": mel.values,
            "num_frames": mel.lengths,
            "start": torch.tensor(starts),
            "voice": torch.tensor(voices),
        }

    def _voice_number(self, clip: Clip) -> int:
        """Returns the number that `FlowModel.speaker` takes for the voice or the reply style of a clip."""
        if clip.voice in self.voices:
            return self.voices.index(clip.voice)
        styles = self.recipe.styles
        return REPLY - 1 - styles.index(clip.style) if clip.style in styles else REPLY

    def _generate(self, utterances: Sequence[TrainingUtterance], guidance_scale: float | None) -> list[Tensor]:
        """Whole clips from their tokens: natural-log mels (F, M)."""
        longest = max(one.num_tokens for one in utterances)
        batch = self._collate(utterances, [0] * len(utterances), longest)
        device = self.model.speakers.weight.device
        speaker = self.model.speaker(batch["voice"].to(device))
        state = self.flow.init_state(len(utterances), guidance_scale=guidance_scale, speaker=speaker)
        tokens = Padded(batch["tokens"].to(device), batch["num_tokens"].to(device))
        return [mel.cpu() for mel in self.flow(tokens, state).rows()]

    def whole(self, utterances: Sequence[TrainingUtterance]) -> tuple[Padded, list[Tensor]]:
        """Tokens (B, T) and natural-log mels (F, M) of whole utterances."""
        batch = self._collate(utterances, [0] * len(utterances), max(one.num_tokens for one in utterances))
        return Padded(batch["tokens"], batch["num_tokens"]), [self._mel(one) for one in utterances]

    def _mel(self, one: TrainingUtterance) -> Tensor:
        """(F, M) with F = 441 T // 64 frames; where clips join, a frame may be repeated to reach F."""
        parts, num_frames, num_tokens = [], 0, 0
        for index in one.indices:
            mel = self.stores[one.store].mel(index)
            num_tokens += self.stores[one.store].num_tokens(index)
            missing = rates.frames_for_tokens(num_tokens) - num_frames - len(mel)
            parts.append(np.concatenate([mel, mel[len(mel) - missing :]]))
            num_frames += len(parts[-1])
        return torch.from_numpy(np.concatenate(parts))


def join(utterances: Sequence[TrainingUtterance], max_tokens: int) -> list[TrainingUtterance]:
    """Joins clips of one corpus, voice, role, style and split, in their order, up to a maximum number of tokens."""
    open_ones: dict[tuple[object, ...], TrainingUtterance] = {}
    joined = []
    for one in utterances:
        key = one.store, one.clip.voice, one.clip.role, one.clip.style, one.clip.split
        before = open_ones.get(key)
        if before is not None and before.num_tokens + one.num_tokens <= max_tokens:
            one = dataclasses.replace(
                before, indices=before.indices + one.indices, num_tokens=before.num_tokens + one.num_tokens
            )
        elif before is not None:
            joined.append(before)
        open_ones[key] = one
    return [*joined, *open_ones.values()]


def with_styles(flow: Flow, styles: tuple[str, ...]) -> Flow:
    """Returns the flow with a speaker vector for each style; new ones are zero, the plain voice."""
    if styles in ((), flow.config.styles):
        return flow
    wider = Flow(dataclasses.replace(flow.config, styles=styles))
    known = [flow.style_speaker(style) for style in styles]
    vectors = torch.cat([torch.zeros(1, flow.speaker_dim) if vector is None else vector for vector in known])
    wider.load_state_dict({**flow.state_dict(), "styles": vectors})
    return wider


def _begin_released(config: ReleasedFlowConfig, mean: Tensor) -> ReleasedFlow:
    """A random flow whose output starts at the mean mel (M,), because its mels are not normalized."""
    flow = ReleasedFlow(config)
    for layer in (flow.length_regulator.model[-1], flow.decoder["estimator"].get_submodule("final_proj")):
        assert isinstance(layer, nn.Conv1d)
        assert layer.bias is not None
        layer.bias.data.copy_(mean)
    return flow


def _mean_square(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, F, M) squared over the frames of the mask (B, F)."""
    return (error.square().mean(-1) * mask).sum() / mask.sum().clamp(min=1)


def _draw(path: Path, made: Sequence[Tensor], wanted: Sequence[Tensor], titles: Sequence[str]) -> None:
    from matplotlib.figure import Figure  # of the train extra; only pictures need it

    figure = Figure(figsize=(12, 3 * len(made)), layout="constrained")
    axes = figure.subplots(len(made), 2, squeeze=False)
    for row, title in enumerate(titles):
        for axis, mel, kind in zip(axes[row], (wanted[row], made[row]), ("wanted", "generated"), strict=True):
            axis.imshow(mel.T.numpy(), origin="lower", aspect="auto", vmin=-11.5, vmax=2.0)
            axis.set_title(f"{kind}: {title}"[:90], fontsize=8)
    figure.savefig(path, dpi=80)
