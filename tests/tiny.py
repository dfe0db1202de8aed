"""A whole chatbot with random weights, made in a second, for tests of everything around the sound."""

from pathlib import Path

import torch

from duologue.checkpoint import file_hash, save_component
from duologue.decoder.encoder import TokenEncoderConfig
from duologue.decoder.flow import Flow, FlowConfig
from duologue.decoder.transformer import EstimatorConfig
from duologue.decoder.vocoder import Vocoder, VocoderConfig
from duologue.language.backbone import LanguageConfig, Provenance, new_glm, save_language
from duologue.language.sampling import Sampling
from duologue.models import Card
from duologue.tokenizer.encoder import EncoderConfig
from duologue.tokenizer.quantizer import QuantizerConfig
from duologue.tokenizer.recognizer import Recognizer, RecognizerConfig
from duologue.tokenizer.tokenizer import SpeechTokenizer, SpeechTokenizerConfig
from duologue.vocabulary import Vocabulary
from recipes.pocket.text import train_text_tokenizer

TEXTS = [
    "What is seven plus five?",
    "Seven plus five is twelve.",
    "The capital of France is Paris.",
    "Hello, how are you?",
]


def write_tiny_chatbot(folder: Path, max_positions: int = 1024, max_tokens: int = 120) -> Path:
    """Writes a model folder with a codebook of 32 and random weights."""
    torch.manual_seed(0)
    encoder = EncoderConfig(width=16, num_heads=2, ffn_dim=32, num_layers=1)
    tokenizer = SpeechTokenizer(SpeechTokenizerConfig(encoder=encoder, quantizer=QuantizerConfig(32)))
    save_component(folder / "tokenizer", tokenizer, tokenizer.config)
    recognizer = Recognizer(RecognizerConfig(width=16, num_heads=2, ffn_dim=32, num_layers=1, num_decoder_layers=1))
    save_component(folder / "recognizer", recognizer, recognizer.config)
    vocabulary = Vocabulary.extend(train_text_tokenizer(TEXTS, 300), 32)
    vocabulary.save(folder / "vocabulary")
    model = new_glm(vocabulary, LanguageConfig(32, 2, 2, 1, 16, 64, max_positions))
    save_language(folder / "language", model, Provenance(file_hash(folder / "tokenizer"), vocabulary.hash))
    flow = Flow(
        FlowConfig(
            encoder=TokenEncoderConfig(codebook_size=32, width=16, num_heads=2, ffn_dim=32, num_layers=1),
            estimator=EstimatorConfig(width=16, num_heads=2, ffn_dim=32, num_layers=1),
            num_steps=2,
        )
    )
    save_component(folder / "decoder" / "flow", flow, flow.config)
    vocoder = Vocoder(VocoderConfig(width=16, ffn_dim=32, num_layers=1))
    save_component(folder / "decoder" / "vocoder", vocoder, vocoder.config)
    Card("tiny", trained=False, sampling=Sampling(temperature=1.0, top_p=1.0, max_tokens=max_tokens)).save(folder)
    return folder
