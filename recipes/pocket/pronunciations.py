"""Pronunciations of all words of the corpus, as phones of flite: a second training target of the tokenizer's frames.

    python -m recipes.pocket.pronunciations --corpora runs/pocket/corpus/free ... --out runs/pocket/pronunciations.json

English spelling is irregular, but phones are nearly one to one with sound, so an encoder learns them sooner.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

PAUSE = "pau"


def words_of(text: str) -> list[str]:
    """The words of an English text in lower case, with inner apostrophes."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def pronounce(word: str) -> list[str]:
    """Phones of one word, by flite's lexicon and letter-to-sound rules."""
    command = ["flite", "-voice", "kal", "-ps", "-o", "none", "-t", word]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [phone for phone in output.split() if phone != PAUSE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    words: set[str] = set()
    for corpus in args.corpora:
        for shard in sorted(corpus.glob("clips*.jsonl")):
            for line in shard.read_text().splitlines():
                words.update(words_of(json.loads(line)["text"]))
    ordered = sorted(words)
    with ThreadPoolExecutor(2) as pool:
        phones = list(tqdm(pool.map(pronounce, ordered), total=len(ordered), desc="pronunciations", unit="word"))
    args.out.write_text(json.dumps(dict(zip(ordered, phones, strict=True))))
    print(f"{args.out}: {len(ordered)} words, {len({phone for word in phones for phone in word})} phones")


if __name__ == "__main__":
    main()
