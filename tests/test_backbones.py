"""A text model as a backbone: translation of the corpus, both stages, and the complete model folder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from duologue.checkpoint import file_hash
from duologue.conversation.chatbot import load, model_folder
from duologue.interleave import Kind, split, weave
from duologue.language.backbone import Provenance, load_language, load_provenance
from duologue.language.pretrained import load_backbone
from duologue.language.sampling import Sampling
from duologue.training.chat import ChatRecipe, ChatStage
from duologue.training.corpus import CorpusSample, LabeledTurn, TokenCorpus, write_manifest, write_shard
from duologue.training.loop import LoopConfig, run
from duologue.training.packing import losses
from duologue.training.pretrain import Mixture, PretrainRecipe, PretrainStage
from duologue.training.translation import TranslatedCorpus
from duologue.turns import Modality, Role, Turn
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer

WORDS = ("one", "two", "three", "four")
LOOP = LoopConfig(2, 1e-3, warmup_steps=1, evaluate_every=10**6, sample_every=10**6, log_every=1)
MIXTURE = Mixture(spans=0.0, speech=0.0, written=0.0)


def samples(vocabulary: Vocabulary, part: str) -> list[CorpusSample]:
    """A clip, a fact and a spoken dialogue for each word."""
    made = []
    for number, word in enumerate(WORDS):
        text = tuple(vocabulary.encode_text(f"it is {word}"))
        codes = vocabulary.speech_ids([(number * 7 + k) % 60 for k in range(40)])
        clip = LabeledTurn(Turn(Role.ASSISTANT, Modality.SPEECH, tuple(codes), "en", "reply"), text)
        fact = LabeledTurn(Turn(Role.ASSISTANT, Modality.TEXT, text))
        asked = LabeledTurn(Turn(Role.USER, Modality.SPEECH, tuple(codes[:9]), "en", "a"), text)
        said = LabeledTurn(Turn(Role.ASSISTANT, Modality.INTERLEAVED, tuple(weave(text, codes)), "en", "reply"))
        made += [
            CorpusSample(f"{part}-clip-{word}", "clip", part, "", (clip,)),
            CorpusSample(f"{part}-text-{word}", "text", part, "", (fact,)),
            CorpusSample(f"{part}-chat-{word}", "chat", part, "", (asked, said), (word,)),
        ]
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with pocket's speech tokens, and a small Llama with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("backbone")
    pocket = model_folder("pocket")
    vocabulary = Vocabulary.load(pocket / "vocabulary")
    provenance = Provenance(file_hash(pocket / "tokenizer"), vocabulary.hash)
    rows = [*samples(vocabulary, "train"), *samples(vocabulary, "valid")]
    write_shard(folder / "tokens", "all", rows, provenance, vocabulary.speech_offset)
    write_manifest(folder / "tokens", provenance)
    config = LlamaConfig(
        vocab_size=336, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    train_text_tokenizer(["it is one and two", "three or four"] * 3, 320).save(str(folder / "llama" / "tokenizer.json"))
    (folder / "text.txt").write_text("it is one and two or three. " * 30)
    return folder


def recipe(folder: Path, **changes: object) -> PretrainRecipe:
    fields = {"corpus": str(folder / "tokens"), "vocabulary": str(model_folder("pocket") / "vocabulary"), "loop": LOOP}
    fields |= {"backbone": str(folder / "llama"), "mixture": MIXTURE, "length": 96, "num_rows": 2, "num_valid_rows": 1}
    return PretrainRecipe(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_backbone_keeps_its_text(folder: Path) -> None:
    model, vocabulary = load_backbone(folder / "llama", 64)
    old = LlamaForCausalLM.from_pretrained(folder / "llama")
    table = model.get_input_embeddings().weight
    assert torch.equal(table[:336], old.get_input_embeddings().weight)
    torch.testing.assert_close(table[336:], table[:336].mean(0).expand(len(table) - 336, -1))
    assert vocabulary.speech_offset >= 336
    assert len(table) == vocabulary.size
    ids = vocabulary.encode_text("it is one")
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])).logits[..., :336], old(torch.tensor([ids])).logits)
    assert model.config.eos_token_id == [vocabulary.end_id]


def test_a_corpus_in_another_vocabulary_says_the_same(folder: Path) -> None:
    source = Vocabulary.load(model_folder("pocket") / "vocabulary")
    target = Vocabulary.extend(folder / "llama" / "tokenizer.json", source.codebook_size, num_rows=336)
    corpus = TokenCorpus(folder / "tokens")
    translated = TranslatedCorpus(corpus, source, target)
    assert len(translated) == len(corpus)
    for index in range(len(corpus)):
        for before, after in zip(corpus[index].turns, translated[index].turns, strict=True):
            assert target.decode_text(after.transcript) == source.decode_text(before.transcript)
            assert before.turn.modality == after.turn.modality
            old, new = (
                [[t for t in labeled.turn.ids if (owner.kind(t) is Kind.SPEECH) is spoken] for spoken in (True, False)]
                for labeled, owner in ((before, source), (after, target))
            )
            assert target.speech_codes(new[0]) == source.speech_codes(old[0])
            assert target.decode_text(new[1]) == source.decode_text(old[1])
            if after.turn.modality is Modality.INTERLEAVED:
                split(after.turn.ids, target.kind)
    with pytest.raises(ValueError, match="512 speech codes and the language model 64|need the same speech tokenizer"):
        TranslatedCorpus(corpus, source, Vocabulary.extend(folder / "llama" / "tokenizer.json", 64, num_rows=336))


def test_a_reply_with_more_text_than_its_speech_can_hold_is_written(folder: Path) -> None:
    source = Vocabulary.load(model_folder("pocket") / "vocabulary")
    corpus = TokenCorpus(folder / "tokens")
    target = Vocabulary.extend(train_text_tokenizer(["a"], 257), source.codebook_size)  # a letter an id
    chat = int(corpus.where("task", "chat")[0])
    said = "one two three four one two three four"
    ids = tuple(weave(source.encode_text(said), source.speech_ids([0] * 27)))
    long = replace(corpus[chat].turns[1].turn, ids=ids)
    translated = TranslatedCorpus(corpus, source, target)._translated(LabeledTurn(long))
    assert translated.turn.modality is Modality.TEXT
    assert target.decode_text(translated.turn.ids) == said


def test_both_stages_make_a_model_that_talks(folder: Path, tmp_path: Path) -> None:
    pretrain = recipe(folder, text_file=str(folder / "text.txt"), tokenizer=str(model_folder("pocket") / "tokenizer"))
    assert pretrain.loop.evaluate_first
    metrics = run(PretrainStage(pretrain), pretrain.loop, tmp_path / "pretrain")
    lines = (tmp_path / "pretrain" / "log.csv").read_text().splitlines()
    first = [line for line in lines if line.startswith("0,valid/perplexity,")]
    assert len(first) == 1
    assert metrics["perplexity"] != float(first[0].split(",")[2])
    trained = tmp_path / "pretrain" / "final" / "language"
    assert AutoTokenizer.from_pretrained(trained)("it is")["input_ids"] == Vocabulary.load(trained).encode_text("it is")

    chat = ChatRecipe(
        pretrain.corpus,
        pretrain.vocabulary,
        str(trained),
        loop=LOOP,
        parts_from="pocket",
        mixture=MIXTURE,
        length=128,
        num_rows=2,
        num_questions=1,
    )
    run(ChatStage(chat), LOOP, tmp_path / "chat")
    final = tmp_path / "chat" / "final"
    assert load_provenance(final / "language").vocabulary == Vocabulary.load(final / "vocabulary").hash
    assert load_language(final / "language").config.model_type == "llama"
    reply = load(final).chat(text="one", sampling=Sampling(max_tokens=30))
    assert reply.text or reply.speech_tokens


def test_scores_in_chunks_give_the_same_loss_and_gradient(folder: Path) -> None:
    stage = PretrainStage(recipe(folder))
    batch = stage.batch(0)
    gradients = []
    for chunk in (0, 7):
        stage.model.zero_grad()
        values = losses(stage.model, batch, chunk)
        (values["text"] + values["speech"]).backward()
        gradients.append(
            [parameter.grad.clone() for parameter in stage.model.parameters() if parameter.grad is not None]
        )
    # Sums over all positions in another order: elements that cancel out differ by more than their own rounding.
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(one.abs().max()), rtol=1e-4)


def test_what_cannot_start_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not from both"):
        PretrainStage(recipe(folder, start_from=str(folder / "llama")))
    with pytest.raises(ValueError, match="no backbone"):
        PretrainStage(recipe(folder, backbone=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="give start_from, or backbone"):
        ChatStage(ChatRecipe(recipe(folder).corpus, recipe(folder).vocabulary, loop=LOOP))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="0 ids of text"):
        PretrainStage(recipe(folder, text_file=str(tmp_path / "empty.txt")))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model\.gguf"):
        load_backbone(tmp_path, 64)
    assert np.isfinite(PretrainStage(recipe(folder)).evaluate()["text/text_nll"])


def write_gguf(path: Path, llama: Path) -> Path:
    """A Llama of transformers in the layout of llama.cpp, in float32."""
    import gguf

    model = LlamaForCausalLM.from_pretrained(llama)
    config, weights = model.config, model.state_dict()
    bpe = json.loads((llama / "tokenizer.json").read_text())["model"]
    tokens = [token for token, _ in sorted(bpe["vocab"].items(), key=lambda pair: pair[1])]
    tokens += ["<|endoftext|>", *(f"<|{number}|>" for number in range(config.vocab_size - len(tokens) - 1))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in weights.items():
        if "q_proj" in key or "k_proj" in key:  # llama.cpp turns the rotary halves of a head into pairs
            heads = tensor.view(config.num_attention_heads, 2, -1, config.hidden_size)
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(str(names.get_name(key, try_suffixes=(".weight",))), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_goes_through_both_stages(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = write_gguf(tmp_path / "llama.gguf", folder / "llama")
    model, _ = load_backbone(file, 60)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(folder / "llama")(ids).logits
        torch.testing.assert_close(model(ids).logits[..., : wanted.shape[-1]], wanted, atol=1e-5, rtol=1e-4)

    pretrain = recipe(folder, backbone=str(file), tokenizer=str(model_folder("pocket") / "tokenizer"))
    run(PretrainStage(pretrain), LOOP, tmp_path / "pretrain")
    trained = str(tmp_path / "pretrain" / "final" / "language")
    sizes = {"mixture": MIXTURE, "length": 128, "num_rows": 2, "num_questions": 1, "loop": LOOP}
    chat = ChatRecipe(pretrain.corpus, pretrain.vocabulary, trained, parts_from="pocket", **sizes)  # type: ignore[arg-type]
    run(ChatStage(chat), LOOP, tmp_path / "chat")
    reply = load(tmp_path / "chat" / "final").chat(text="one", sampling=Sampling(max_tokens=30))
    assert reply.text or reply.speech_tokens
