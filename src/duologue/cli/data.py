"""`duologue data`: imports and checks training data."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.cli.parser import FAILED, add_command, add_device, add_group, positive
from duologue.training.sources import KINDS

if TYPE_CHECKING:
    from duologue.training.checking import Transcribe

IMPORT_EXAMPLES = (
    "duologue data import ljspeech LJSpeech-1.1 -o corpus",
    "duologue data import datasets sentences -o corpus --columns text=sentence",
)
CHECK_EXAMPLES = ("duologue data check corpus", "duologue data check corpus --recognizer pocket --limit 500")


def add(commands: Any) -> None:
    text = "import and check training data"
    actions = add_group(commands, "data", text, "actions", "ACTION", (IMPORT_EXAMPLES[0], CHECK_EXAMPLES[0]))

    text = "import a data set as an audio corpus; resumes if stopped"
    importing = add_command(actions, "import", _import, text, examples=IMPORT_EXAMPLES)
    kinds = "; ".join(f"{name}: {what}" for name, (_, what) in KINDS.items())
    importing.add_argument("kind", choices=KINDS, metavar="KIND", help=kinds)
    importing.add_argument("source", type=Path, help="file or folder of the data set")
    importing.add_argument("-o", "--output", type=Path, required=True, metavar="CORPUS", help="folder of the corpus")
    importing.add_argument("--language", default="en", help="where the source names none (default: en)")
    importing.add_argument("--voice", default="", help="name of the voice, where the source names none")
    importing.add_argument(
        "--role", choices=("free", "user", "reply"), default="free", help="of single utterances (default: free)"
    )
    importing.add_argument(
        "--columns", nargs="+", default=[], metavar="WHAT=NAME", help="names of columns, such as text=sentence"
    )
    importing.add_argument("--audio-root", type=Path, metavar="FOLDER", help="where paths of sound files start")
    importing.add_argument("--sample-rate", type=positive, metavar="HZ", help="of sound stored as bare numbers")
    importing.add_argument(
        "--transcripts", action="store_true", help="text beside the sound of a user's turn is its transcript"
    )
    importing.add_argument("--max-s", type=float, default=120.0, help="skip longer sounds (default: 120)")
    importing.add_argument("--valid", type=float, default=0.02, help="share of the split valid (default: 0.02)")
    importing.add_argument("--workers", type=positive, default=2, help="threads that decode (default: 2)")

    text = "find faulty clips in an audio corpus and draw the distributions"
    check = add_command(actions, "check", _check, text, examples=CHECK_EXAMPLES)
    check.add_argument("corpus", type=Path, help="folder of the corpus")
    check.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="for check.json, check.png (default: corpus)"
    )
    check.add_argument("--limit", type=positive, metavar="N", help="check only N clips, spread evenly")
    check.add_argument(
        "--recognizer",
        metavar="MODEL",
        help="compare the text with what is heard: a preset or folder of a model, or a CTranslate2 folder of Whisper",
    )
    add_device(check)


def _import(args: argparse.Namespace) -> int:
    from duologue.training.sources.items import ImportOptions
    from duologue.training.sources.writer import import_source

    columns = dict(each.partition("=")[::2] for each in args.columns)
    if bad := [each for each in args.columns if "=" not in each]:
        raise ValueError(f"--columns {bad[0]} is not WHAT=NAME")
    options = ImportOptions(
        language=args.language,
        voice=args.voice,
        role=args.role,
        columns=columns,
        audio_root=args.audio_root,
        sample_rate=args.sample_rate,
        transcripts=args.transcripts,
        max_s=args.max_s,
    )
    done = import_source(args.kind, args.source, args.output, options, args.valid, workers=args.workers)
    if args.json:
        print(json.dumps({"folder": str(args.output), "hours": done.hours, **asdict(done)}))
    else:
        print(f"{done.num_clips} clips ({done.hours:.2f} h), {done.num_dialogues} dialogues -> {args.output}")
        for reason, count in done.skipped.items():
            print(f"  skipped {count}: {reason}")
        for name, reason in done.left_out.items():
            print(f"  left out {name}: {reason}")
        if done.skipped:
            print(f"  each one with its reason: {args.output}/skipped-*.jsonl")
    return 0 if done.num_clips or done.num_dialogues else FAILED


def _check(args: argparse.Namespace) -> None:
    from duologue.training.checking import FAULTS, check_corpus, save

    transcribe, why_not = None, "no recognizer was named: --recognizer pocket"
    if args.recognizer is not None:
        transcribe = _recognizer(args.recognizer, args.device)
    report = check_corpus(args.corpus, None, transcribe, why_not, args.limit)
    written = save(report, args.output or args.corpus)
    if args.json:
        print(json.dumps({**report.to_json(), "written": list(map(str, written))}))
        return
    found = report.to_json()
    print(f"{found['num_clips']} clips, {found['hours']:.2f} h, {found['num_faulty']} with a fault")
    for fault, count in report.faults.items():
        shown = f"- ({report.skipped[fault]})" if fault in report.skipped else str(count)
        print(f"  {fault:<14} {shown:>6}  {FAULTS[fault]}")
    for path in written:
        print(f"-> {path}")


def _recognizer(name: str, device: str) -> Transcribe:
    """The recognizer of a model folder, or Whisper in a CTranslate2 folder."""
    if (Path(name) / "model.bin").is_file():
        from duologue.evaluation.recognition import open_recognizer

        recognizer, _ = open_recognizer(Path(name))
        assert recognizer is not None  # it raises for a folder that was named
        return recognizer.transcribe
    from duologue.training.checking import model_recognizer

    return model_recognizer(name, device)
