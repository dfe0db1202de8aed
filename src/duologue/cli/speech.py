"""`duologue tokenize` and `duologue synthesize`: sound to speech tokens and back."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from duologue.cli.parser import add_command, add_decoder_dtype, checked_output, say_if_untrained


def add(commands: Any) -> None:
    """Adds `tokenize` and `synthesize`."""
    tokenize = add_command(commands, "tokenize", _tokenize, "sound -> speech tokens", model=True)
    tokenize.add_argument("audio", type=Path, help="a sound file")
    tokenize.add_argument("-o", "--output", type=Path, metavar="TOKENS", help="a JSON file for `synthesize`")

    synthesize = add_command(commands, "synthesize", _synthesize, "speech tokens -> sound", model=True)
    synthesize.add_argument(
        "tokens", help="a JSON file with a list of tokens or as `tokenize` writes it; - reads stdin"
    )
    synthesize.add_argument("-o", "--output", type=Path, required=True, metavar="SOUND", help="a sound file")
    synthesize.add_argument("--seed", type=int, default=0, help="of the decoder's noise")
    add_decoder_dtype(synthesize)


def _tokenize(args: argparse.Namespace) -> None:
    import torch

    from duologue import rates
    from duologue.audio import load_audio, resample
    from duologue.checkpoint import file_hash
    from duologue.config import write_json
    from duologue.conversation.chatbot import model_folder
    from duologue.layers import Padded
    from duologue.models import open_folder

    wav, sample_rate = load_audio(args.audio)
    folder = open_folder(model_folder(args.model))
    tokenizer = folder.load_tokenizer(args.device)
    heard = torch.from_numpy(resample(wav, sample_rate, rates.LISTEN_SAMPLE_RATE))[None].to(args.device)
    with torch.inference_mode():
        tokens = tokenizer(Padded.full(heard)).rows()[0].tolist()
    result = {
        "kind": "SpeechTokens",
        "version": 1,
        "tokenizer": file_hash(folder.tokenizer_path),
        "codebook_size": tokenizer.config.quantizer.codebook_size,
        "token_rate": rates.TOKEN_RATE,
        "audio_s": len(wav) / sample_rate,
        "tokens": tokens,
    }
    if args.output:
        write_json(args.output, result)
    if args.json:
        print(json.dumps(result))
    elif not args.output:
        print(*tokens)


def _synthesize(args: argparse.Namespace) -> None:
    import torch

    from duologue import rates
    from duologue.audio import save_audio
    from duologue.checkpoint import file_hash
    from duologue.conversation.chatbot import model_folder
    from duologue.layers import Padded
    from duologue.models import open_folder

    output = checked_output(args.output)
    tokens, tokenizer = _read_tokens(args.tokens)
    folder = open_folder(model_folder(args.model))
    card = folder.card
    if tokenizer is not None and tokenizer != (own := file_hash(folder.tokenizer_path)):
        raise ValueError(
            f"{args.tokens} was made with another tokenizer than that of {card.name} "
            f"({tokenizer[:12]} and {own[:12]}): its tokens mean something else there"
        )
    decoder = folder.load_decoder(args.device, args.decoder_dtype)
    say_if_untrained(card)
    with torch.inference_mode():
        state = decoder.init_state(1, card.num_steps, card.guidance_scale, args.seed)
        wav = decoder(Padded.full(torch.tensor([tokens], device=args.device)), state).rows()[0]
    samples = wav.clamp(-1.0, 1.0).float().cpu().numpy()
    save_audio(output, samples, rates.SPEAK_SAMPLE_RATE)
    seconds = len(samples) / rates.SPEAK_SAMPLE_RATE
    if args.json:
        result = {"audio": str(output), "audio_s": seconds, "sample_rate": rates.SPEAK_SAMPLE_RATE}
        print(json.dumps({**result, "num_tokens": len(tokens)}))
    else:
        print(f"{len(tokens)} tokens, {seconds:.2f} s -> {output}")


def _read_tokens(source: str) -> tuple[list[int], str | None]:
    """Tokens of a JSON file, and the hash of the tokenizer that made them, where it stands there."""
    name = "stdin" if source == "-" else source
    try:
        data = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{source}: there is no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{source} is a folder; give one file with tokens") from None
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not a text file; `duologue tokenize` makes tokens from sound") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON (line {error.lineno}: {error.msg})") from None
    tokens = data.get("tokens") if isinstance(data, dict) else data
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise ValueError(f"{name} must hold a list of whole numbers, alone or as 'tokens'")
    if not tokens:
        raise ValueError(f"{name} holds no tokens")
    return tokens, data.get("tokenizer") if isinstance(data, dict) else None
