"""Commands on model folders and their parts: `tokenize`, `synthesize`, `convert`, `export`, `init-random`, `doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duologue.cli.parser import DTYPES, FAILED, add_command, add_decoder_dtype, checked_output, warn_if_untrained

RANDOM_PRESETS = ("tiny", "9b")
EXPORT_FORMATS = ("released", "transformers", "gguf")
FORMATS = ("glm-4-voice", "whisper-ct2")
EXAMPLES = {
    "tokenize": ("duologue tokenize question.wav -o tokens.json",),
    "synthesize": ("duologue synthesize tokens.json -o speech.wav",),
    "convert": ("duologue convert glm-4-voice-9b -o converted", "duologue convert whisper-ct2 whisper-base -o whisper"),
    "export": ("duologue export runs/chat/final -o exported",),
    "init-random": ("duologue init-random tiny -o random",),
    "doctor": ("duologue doctor", "duologue doctor --model glm-4-voice-9b"),
}


def add(commands: Any) -> None:
    """Adds the commands."""
    tokenize = add_command(
        commands, "tokenize", _tokenize, "audio -> speech tokens", model=True, examples=EXAMPLES["tokenize"]
    )
    tokenize.add_argument("audio", type=Path, help="an audio file")
    tokenize.add_argument("-o", "--output", type=Path, metavar="TOKENS", help="a JSON file for `synthesize`")

    text = "speech tokens -> audio"
    synthesize = add_command(commands, "synthesize", _synthesize, text, model=True, examples=EXAMPLES["synthesize"])
    synthesize.add_argument("tokens", help="a JSON list of tokens or the output of `tokenize`; - reads stdin")
    synthesize.add_argument("-o", "--output", type=Path, required=True, metavar="AUDIO", help="an audio file")
    synthesize.add_argument("--seed", type=int, default=0, help="seed of the decoder's noise")
    add_decoder_dtype(synthesize)

    text = "convert a released language model, or a CTranslate2 Whisper"
    convert = add_command(commands, "convert", _convert, text, examples=EXAMPLES["convert"])
    convert.add_argument(
        "format", nargs="?", choices=FORMATS, default=FORMATS[0], help=f"format of the folder (default: {FORMATS[0]})"
    )
    convert.add_argument("folder", type=Path, help="folder of the language model, the whole released set, or Whisper")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a new folder, or x.gguf")
    convert.add_argument("--dtype", choices=DTYPES, help="dtype of the new weights (default: unchanged)")
    convert.add_argument(
        "--gguf", metavar="TYPE", help="write a GGUF file for llama.cpp with matrices in f32, f16, bf16, q8_0 or q4_0"
    )

    export = add_command(
        commands, "export", _export, "write trained parts in the layouts of other tools", examples=EXAMPLES["export"]
    )
    export.add_argument("folder", type=Path, help="`final` of a training run, or the folder of a language model")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a new folder or file")
    export.add_argument("--format", choices=EXPORT_FORMATS, default=EXPORT_FORMATS[0], help="default: released")
    export.add_argument("--dtype", choices=DTYPES, help="dtype of the language model (default: unchanged)")
    export.add_argument("--base", type=Path, help="where the base of a LoRA adapter is now (default: where it was)")
    export.add_argument("--decoder", type=Path, help="a released decoder, whose vocoder stands beside a trained flow")

    text = "write a released set with random weights, for load tests"
    random = add_command(commands, "init-random", _init_random, text, examples=EXAMPLES["init-random"])
    random.add_argument("preset", choices=RANDOM_PRESETS, metavar="PRESET", help="tiny, or 9b: the published sizes")
    random.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    random.add_argument("--seed", type=int, default=0)

    text = "check this machine and suggest fixes"
    doctor = add_command(commands, "doctor", _doctor, text, examples=EXAMPLES["doctor"])
    doctor.add_argument("--model", default="pocket", help="a preset or a model folder (default: pocket)")


def _tokenize(args: argparse.Namespace) -> None:
    import torch

    from duologue import rates
    from duologue.audio import resample
    from duologue.checkpoint import file_hash
    from duologue.config import write_json
    from duologue.conversation.chatbot import model_folder
    from duologue.layers import Padded
    from duologue.models import open_folder
    from duologue.sound_files import load_audio

    wav, sample_rate = load_audio(args.audio)
    folder = open_folder(model_folder(args.model))
    tokenizer = folder.load_tokenizer(args.device)
    samples = torch.from_numpy(resample(wav, sample_rate, rates.LISTEN_SAMPLE_RATE))[None].to(args.device)
    with torch.inference_mode():
        tokens = tokenizer(Padded.full(samples)).rows()[0].tolist()
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
    from duologue.checkpoint import file_hash
    from duologue.conversation.chatbot import model_folder
    from duologue.layers import Padded
    from duologue.models import open_folder
    from duologue.sound_files import save_audio

    output = checked_output(args.output)
    tokens, tokenizer = _read_tokens(args.tokens)
    folder = open_folder(model_folder(args.model))
    card = folder.card
    if tokenizer is not None and tokenizer != (own := file_hash(folder.tokenizer_path)):
        raise ValueError(
            f"{args.tokens} was made with another tokenizer than that of {card.name} "
            f"({tokenizer[:12]} and {own[:12]}): its tokens have another meaning there"
        )
    decoder = folder.load_decoder(args.device, args.decoder_dtype)
    warn_if_untrained(card)
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
    """Reads the tokens of a JSON file, and the hash of their tokenizer if the file holds it."""
    name = "stdin" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        data = json.loads(text.removeprefix("\ufeff"))
    except FileNotFoundError:
        raise ValueError(f"{source}: there is no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{source} is a folder; give one file with tokens") from None
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not a text file; `duologue tokenize` makes tokens from audio") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON (line {error.lineno}: {error.msg})") from None
    tokens = data.get("tokens") if isinstance(data, dict) else data
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise ValueError(f"{name} must hold a list of whole numbers, alone or as 'tokens'")
    if not tokens:
        raise ValueError(f"{name} holds no tokens")
    return tokens, data.get("tokenizer") if isinstance(data, dict) else None


def _convert(args: argparse.Namespace) -> None:
    if args.format == "whisper-ct2":
        from duologue.tokenizer.ctranslate2 import convert_whisper_ct2

        sizes = convert_whisper_ct2(args.folder, args.output)
        print(json.dumps({"folder": str(args.output), **sizes}) if args.json else f"{args.folder} -> {args.output}")
        return
    from duologue.language.backbone import known_provenance
    from duologue.released.convert import convert
    from duologue.released.folder import ReleasedFolder
    from duologue.released.gguf import write_gguf

    released = ReleasedFolder.find(args.folder)
    folder = released.language_path if released is not None else args.folder
    if (folder / "duologue.json").is_file():
        folder = folder / "language"
    if args.gguf is not None or args.output.suffix == ".gguf":
        if args.dtype is not None:
            raise ValueError("a GGUF file takes its dtype from --gguf: leave --dtype out")
        write_gguf(folder, args.output, args.gguf or "f16", known_provenance(folder), progress=sys.stderr.isatty())
    else:
        convert(folder, args.output, args.dtype, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({"folder": str(args.output)}))
    else:
        print(f"{folder} -> {args.output}")


def _export(args: argparse.Namespace) -> None:
    from duologue.training.adapter_folder import whole_language
    from duologue.training.export import export_gguf, export_released, export_transformers

    with whole_language(args.folder, args.dtype, args.base) as folder:
        if args.format != "released":
            write = export_gguf if args.format == "gguf" else export_transformers
            write(folder, args.output, args.dtype)
            parts = ["language"]
        else:
            parts = export_released(folder, args.output, args.dtype, args.decoder)
    if args.json:
        print(json.dumps({"folder": str(args.output), "format": args.format, "parts": parts}))
    else:
        print(f"{args.folder}: {', '.join(parts)} -> {args.output}")


def _init_random(args: argparse.Namespace) -> None:
    from duologue.released.random_weights import init_random

    init_random(args.preset, args.output, args.seed, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({"folder": str(args.output), "preset": args.preset}))
    else:
        print(f"{args.preset}, random weights, meaningless answers -> {args.output}")


def _doctor(args: argparse.Namespace) -> int:
    from duologue.doctor import CheckState, examine, format_checks

    checks = examine(args.model)
    print(json.dumps([asdict(check) for check in checks]) if args.json else format_checks(checks))
    return FAILED if any(check.state is CheckState.BROKEN for check in checks) else 0
