"""The store of codes and mels, and stage `flow` over a corpus of a few synthetic clips."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.training import FLOW as TINY
from benchmarks.gpu.training import RELEASED
from duologue import rates
from duologue.audio import LogMelConfig, SpeakMel
from duologue.checkpoint import file_hash, load_component, read_extra, save_component
from duologue.config import load_config
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.layers import Padded
from duologue.released.decoder.flow import ReleasedFlow, ReleasedFlowConfig
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.training import codes
from duologue.training.codes import CodeStore, build_store, speak_mel
from duologue.training.data import Clips
from duologue.training.flow import REPLY, FlowModel, FlowRecipe, FlowStage
from duologue.training.loop import LoopConfig, run

RECIPES = Path(__file__).parent.parent / "recipes"


def write_corpus(folder: Path, seconds: list[float], shard: int = 0) -> None:
    """Tones of different heights; every second clip is the reply voice, every fifth is for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(shard)
    lines, samples, offset = [], [], 0
    for i, length in enumerate(seconds):
        size = int(length * 16000)
        voice = "slt" if i % 2 else f"voice-{i % 3}"
        tone = 0.2 * np.sin(np.arange(size) * rng.uniform(0.02, 0.4)) + rng.normal(0, 0.01, size)
        samples.append((tone * 32767).astype("<i2"))
        lines.append(
            {
                "id": f"clips-{shard:05d}-{i:06d}",
                "text": f"tone {i}",
                "role": "reply" if i % 2 else "user",
                "voice": voice,
                "language": "en",
                "style": "plain",
                "split": "valid" if i % 5 == 4 else "train",
                "intent": "free",
                "sample_rate": 16000,
                "offset": offset,
                "num_samples": size,
            }
        )
        offset += size
    np.concatenate(samples).tofile(folder / f"clips-{shard:05d}.pcm")
    (folder / f"clips-{shard:05d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_tokenizer(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    config = SpeechTokenizerConfig(
        features=LogMelConfig(num_mels=16),
        encoder=EncoderConfig(num_mels=16, width=16, num_heads=2, ffn_dim=16, num_layers=1),
        quantizer=QuantizerConfig(codebook_size=30),
    )
    save_component(folder, SpeechTokenizer(config), config)


@pytest.fixture
def recipe(tmp_path: Path) -> FlowRecipe:
    write_corpus(tmp_path / "corpus", [1.0, 0.7, 1.63, 0.33, 1.2, 2.1, 0.9, 1.4, 0.5, 1.1, 1.01, 0.8])
    write_tokenizer(tmp_path / "tokenizer")
    return FlowRecipe(
        corpora=(str(tmp_path / "corpus"),),
        tokenizer=str(tmp_path / "tokenizer"),
        store=str(tmp_path / "store"),
        loop=LoopConfig(num_steps=20, learning_rate=5e-3, warmup_steps=2, evaluate_every=10, sample_every=100),
        flow=TINY,
        batch_s=4.0,
        max_tokens=20,
        num_valid_clips=2,
        num_generated=2,
    )


def flow_of(stage: FlowStage) -> Flow:
    assert isinstance(stage.flow, Flow)
    return stage.flow


def store_of(recipe: FlowRecipe) -> CodeStore:
    return build_store(recipe.corpora[0], recipe.tokenizer, Path(recipe.store) / "corpus")


def test_store_holds_codes_and_mels_of_each_clip(recipe: FlowRecipe) -> None:
    store, clips = store_of(recipe), Clips(recipe.corpora[0])
    tokenizer = load_component(recipe.tokenizer, SpeechTokenizer, SpeechTokenizerConfig)
    assert store.ids == [clip.id for clip in clips.records]
    for i, clip in enumerate(clips.records):
        num_tokens = rates.tokens_for_samples(clip.num_samples)
        with torch.no_grad():
            alone = tokenizer.quantize_piece(Padded.full(torch.from_numpy(clips.wav(i))[None]))
        sure = alone.margin[0] > 1e-3
        assert sure.float().mean() > 0.5
        assert torch.equal(torch.from_numpy(store.codes(i))[sure], alone.codes.values[0][sure])
        assert store.num_tokens(i) == num_tokens
        assert store.mel(i).shape == (rates.frames_for_tokens(num_tokens), 80)
        assert np.abs(store.mel(i) - speak_mel(clips.wav(i), SpeakMel()).numpy()).max() < 0.01


def test_store_goes_on_where_it_was_and_grows_with_the_corpus(
    recipe: FlowRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "PART_CLIPS", 5)
    before = store_of(recipe)
    parts = sorted((Path(recipe.store) / "corpus").glob("part-*.json"))
    assert len(parts) == 3
    parts[1].unlink()  # as a run leaves it that was stopped in the middle of this part
    write_corpus(Path(recipe.corpora[0]), [0.6, 1.0], shard=1)
    written: list[str] = []
    original = codes._write_part

    def counted(part: Path, *rest: object) -> None:
        written.append(part.name)
        original(part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(codes, "_write_part", counted)
    after = store_of(recipe)
    assert written == ["part-00001.json", "part-00002.json"]
    assert after.ids[:12] == before.ids
    assert len(after) == 14
    assert all(np.array_equal(before.codes(i), after.codes(i)) for i in range(12))
    assert len(build_store(recipe.corpora[0], recipe.tokenizer, recipe.store + "-short", max_hours=5 / 3600)) == 5


def test_store_of_another_tokenizer_is_refused(recipe: FlowRecipe, tmp_path: Path) -> None:
    store_of(recipe)
    write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="holds the codes of another tokenizer"):
        build_store(recipe.corpora[0], tmp_path / "other", Path(recipe.store) / "corpus")
    with pytest.raises(ValueError, match="holds the codes of another tokenizer"):
        CodeStore(Path(recipe.store) / "corpus", file_hash(tmp_path / "other"))


def test_batches_are_pure_and_their_frames_belong_to_their_tokens(recipe: FlowRecipe) -> None:
    stage = FlowStage(dataclasses.replace(recipe, prefix_probability=0.3))
    prompts, kept, starts, voices, prefixes = [], [], [], set(), 0
    for index in range(60):
        batch, again = stage.batch(index), stage.batch(index)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        start, size = batch["start"], batch["num_tokens"]
        assert (start % 10 == 0).all()
        assert (size <= 20).all()
        first, last = (torch.tensor([rates.frames_for_tokens(int(n)) for n in x]) for x in (start, start + size))
        assert torch.equal(batch["num_frames"], last - first)
        share = batch["prompt"] / batch["num_frames"]
        assert (share <= 0.8).all()
        prompts += (batch["prompt"] > 0).tolist()
        kept += batch["keep"].tolist()
        starts += start.tolist()
        voices |= set(batch["voice"].tolist())
        prefixes += int(bool((size <= 10).all()))
    assert 0.4 < np.mean(prompts) < 0.6
    assert 0.7 < np.mean(kept) < 0.9
    assert max(starts) > 0
    assert voices == {REPLY, 0, 1, 2}
    assert prefixes > 3


def test_reply_voice_is_the_zero_speaker(recipe: FlowRecipe) -> None:
    stage = FlowStage(recipe)
    assert "slt" not in stage.voices
    assert len(stage.voices) == 3
    assert not stage.model.speaker(torch.tensor([REPLY, 0]))[0].any()
    assert stage.model.speaker(torch.tensor([REPLY, 0]))[1].any()
    for batch in map(stage.batch, range(20)):
        speakers = stage.model.speaker(batch["voice"])
        assert torch.equal(speakers.any(1), batch["voice"] >= 0)


def fixed_losses(stage: FlowStage, batch: dict[str, Tensor]) -> dict[str, float]:
    torch.manual_seed(0)
    with torch.no_grad():
        return {name: float(loss) for name, loss in stage.losses("flow", batch, 0).items()}


def test_loss_is_on_what_is_not_given_and_padding_does_not_count(recipe: FlowRecipe) -> None:
    stage = FlowStage(recipe)
    batch = next(batch for batch in map(stage.batch, range(50)) if int(batch["start"].max()) == 0)
    batch["prompt"] = batch["num_frames"] // 2
    batch["keep"] = torch.ones_like(batch["keep"])
    frame = torch.arange(batch["mel"].shape[1])
    behind = frame >= batch["num_frames"][:, None]
    assert behind.any()
    plain = fixed_losses(stage, batch)
    garbage = {**batch, "mel": torch.where(behind[:, :, None], 50.0, batch["mel"])}
    assert fixed_losses(stage, garbage) == pytest.approx(plain, rel=1e-4)
    # What is given counts for the coarse loss only: the velocity at the given frames is not asked for.
    hidden = flow_of(stage).estimator.out
    masked: list[Tensor] = []
    handle = hidden.register_forward_hook(lambda module, args, out: masked.append(out))
    fixed_losses(stage, batch)
    handle.remove()
    given = frame < batch["prompt"][:, None]

    def shifted(where: Tensor) -> dict[str, float]:
        moved = hidden.register_forward_hook(lambda module, args, out: out + 9.0 * where[:, :, None, None])
        losses = fixed_losses(stage, batch)
        moved.remove()
        return losses

    assert masked[0].shape[:2] == given.shape
    assert shifted(given) == pytest.approx(plain, rel=1e-5)
    assert shifted(~given & ~behind)["velocity"] > plain["velocity"] + 10


def test_hidden_condition_reaches_neither_tokens_nor_voice_nor_prompt(recipe: FlowRecipe) -> None:
    stage = FlowStage(recipe)
    batch = stage.batch(1)
    batch["keep"] = torch.zeros_like(batch["keep"])
    plain = fixed_losses(stage, batch)["velocity"]
    other = {**batch, "tokens": (batch["tokens"] + 1) % 30, "voice": torch.zeros_like(batch["voice"])}
    assert fixed_losses(stage, other)["velocity"] == pytest.approx(plain, rel=1e-6)
    batch["keep"], other["keep"] = ~batch["keep"], ~batch["keep"]
    assert fixed_losses(stage, other)["velocity"] != pytest.approx(fixed_losses(stage, batch)["velocity"], rel=1e-4)


def test_training_lowers_the_loss_and_writes_a_flow_that_streams(recipe: FlowRecipe, tmp_path: Path) -> None:
    vocoder = VocoderConfig(width=8, ffn_dim=8, num_layers=1)
    save_component(tmp_path / "vocoder", Vocoder(vocoder), vocoder)
    stage = FlowStage(dataclasses.replace(recipe, vocoder=str(tmp_path / "vocoder")))
    stage.model.eval()
    with torch.no_grad():
        before = stage.evaluate()
        assert stage.evaluate() == before  # nothing random is left in it
        untrained = fixed_losses(stage, stage.batch(0))
    loop = dataclasses.replace(recipe.loop, num_steps=40, learning_rate=1e-2, evaluate_every=100)
    after = run(stage, loop, tmp_path / "run")
    trained = fixed_losses(stage, stage.batch(0))
    assert trained["velocity"] < 0.9 * untrained["velocity"]
    assert trained["coarse"] < 0.9 * untrained["coarse"]
    assert after["velocity"] < before["velocity"]
    assert after["mel_l1_unguided"] < before["mel_l1_unguided"]
    names = {path.name for path in (tmp_path / "run" / "samples" / "step-0000040").iterdir()}
    assert {"mels.png", "0-generated.wav", "0-from-reference-mel.wav"} <= names
    flow = load_component(tmp_path / "run" / "final" / "flow", Flow, FlowConfig)
    assert flow.config.encoder.codebook_size == 30
    assert flow.config.mel_mean == flow_of(stage).config.mel_mean != TINY.mel_mean
    assert read_extra(tmp_path / "run" / "final" / "flow")["tokenizer"] == file_hash(recipe.tokenizer)
    tokens = Padded.full(torch.randint(0, 30, (1, 23)))
    with torch.no_grad():
        assert torch.equal(flow(tokens).values, flow_of(stage).eval()(tokens).values)

    second = dataclasses.replace(
        recipe, start_from=str(tmp_path / "run" / "final"), roles=("reply",), prefix_probability=0.5
    )
    voice = FlowStage(second)
    assert voice.voices == []
    assert {one.clip.role for one in voice.train} == {"reply"}
    assert (voice.batch(3)["voice"] == REPLY).all()
    assert flow_of(voice).config == flow.config
    assert all(torch.equal(a, b) for a, b in zip(voice.flow.parameters(), flow.parameters(), strict=True))
    short = dataclasses.replace(recipe.loop, num_steps=2)
    assert np.isfinite(run(voice, short, tmp_path / "voice")["velocity"])


def test_the_released_architecture_is_trained_by_the_same_stage(recipe: FlowRecipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, released=RELEASED, joined_tokens=30, max_tokens=30)
    stage = FlowStage(recipe)
    batch = stage.batch(0)
    before = fixed_losses(stage, batch)
    batch["mel"][:, -1][batch["num_frames"] < batch["mel"].shape[1]] = 99.0  # behind the end
    assert fixed_losses(stage, batch) == pytest.approx(before, rel=1e-6)
    optimizer = torch.optim.Adam(stage.model.parameters(), 1e-2)
    for _ in range(20):  # one batch, learned by heart: clips of tones have little in common
        torch.manual_seed(0)
        optimizer.zero_grad()
        torch.stack(list(stage.losses("flow", batch, 0).values())).sum().backward()
        optimizer.step()
    after = fixed_losses(stage, batch)
    assert after["velocity"] < 0.9 * before["velocity"]
    assert after["coarse"] < 0.9 * before["coarse"]
    run(stage, dataclasses.replace(recipe.loop, num_steps=2, evaluate_every=100), tmp_path / "run")
    flow = load_component(tmp_path / "run" / "final" / "flow", ReleasedFlow, ReleasedFlowConfig)
    assert flow.config.vocab_size == 30
    again = FlowStage(dataclasses.replace(recipe, start_from=str(tmp_path / "run" / "final")))
    assert all(torch.equal(a, b) for a, b in zip(again.flow.parameters(), flow.parameters(), strict=True))
    tokens, mels = again.whole(again.valid)
    assert [len(mel) for mel in mels] == [rates.frames_for_tokens(n) for n in tokens.lengths.tolist()]


def test_clips_of_one_voice_are_joined(recipe: FlowRecipe) -> None:
    apart, joined = FlowStage(recipe), FlowStage(dataclasses.replace(recipe, joined_tokens=30))
    places = [index for one in joined.train for index in one.indices]
    assert sorted(places) == sorted(index for one in apart.train for index in one.indices)
    assert max(len(one.indices) for one in joined.train) > 1
    for one in joined.train:
        clips = [clip for clip in apart.train if clip.indices[0] in one.indices]
        assert len({(clip.clip.voice, clip.clip.role) for clip in clips}) == 1
        assert one.num_tokens == sum(clip.num_tokens for clip in clips) <= 30
    one = max(joined.train, key=lambda one: len(one.indices))
    tokens, (mel,) = joined.whole([one])
    store = store_of(recipe)
    assert tokens.values[0].tolist() == [code for index in one.indices for code in store.codes(index).tolist()]
    assert len(mel) == rates.frames_for_tokens(one.num_tokens)
    assert np.array_equal(mel[: len(store.mel(one.indices[0]))].numpy(), store.mel(one.indices[0]))
    assert np.array_equal(mel[-10:].numpy(), np.concatenate([store.mel(one.indices[-1])] * 2)[-10:])


def test_resumed_run_equals_an_uninterrupted_one(
    recipe: FlowRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = dataclasses.replace(recipe.loop, num_steps=4, evaluate_every=100, sample_every=100, schedule="constant")
    monkeypatch.setattr(FlowStage, "sample", lambda *_: None)
    whole = FlowStage(recipe)
    run(whole, loop, tmp_path / "whole")
    run(FlowStage(recipe), dataclasses.replace(loop, num_steps=2), tmp_path / "parts")
    resumed = FlowStage(recipe)
    run(resumed, loop, tmp_path / "parts")
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_start_from_another_tokenizer_is_refused(recipe: FlowRecipe, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, encoder=dataclasses.replace(TINY.encoder, codebook_size=30))
    save_component(tmp_path / "run" / "flow", Flow(config), config, extra={"tokenizer": "another"})
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        FlowStage(dataclasses.replace(recipe, start_from=str(tmp_path / "run")))


def test_gradient_reaches_every_weight(recipe: FlowRecipe) -> None:
    stage = FlowStage(recipe)
    model: FlowModel = stage.model
    # The time's modulation starts at zero; a step away from there shows whether everything is connected.
    torch.nn.init.normal_(flow_of(stage).estimator.time2.weight, std=0.1)
    for index in range(3):
        losses = stage.losses("flow", stage.batch(index), 0)
        torch.stack(list(losses.values())).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert missing == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 25}, "max_tokens is 25"),
        ({"corpora": ()}, "corpora is empty"),
        ({"corpora": ("a/free", "b/free")}, "must have names of their own, got free, free"),
    ],
)
def test_impossible_recipes_are_refused(recipe: FlowRecipe, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pocket/flow.yaml", "pocket/flow-voice.yaml", "released_context/flow.yaml"])
def test_recipes_are_valid(name: str) -> None:
    recipe = load_config(RECIPES / name, FlowRecipe)
    assert recipe.loop.num_steps > 100
    assert (recipe.start_from != "") == (name == "pocket/flow-voice.yaml")
