"""The logits processor that vLLM loads: `--logits-processors duologue.vllm_processor:Interleave`.

It needs the vocabulary of the served model, which lies in its folder (docs/engines.md, `language/vllm_plugin.py`).
"""

from __future__ import annotations

from pathlib import Path

from duologue.language.vllm_plugin import make_processor
from duologue.released.text import RANKS_FILE, load_released_vocabulary
from duologue.vocabulary import Vocabulary


def find_vocabulary(folder: Path) -> Vocabulary:
    """Reads the vocabulary of a language model: an original checkpoint, a converted one, or a part of our own folder.

    Raises:
        ValueError: there is none.
    """
    if (folder / "vocabulary.json").is_file():
        return Vocabulary.load(folder)
    if (folder / RANKS_FILE).is_file():
        return load_released_vocabulary(folder)
    beside = folder.parent / "vocabulary"
    if (beside / "vocabulary.json").is_file():
        return Vocabulary.load(beside)
    raise ValueError(f"{folder} has no vocabulary of a speech model: give vLLM the model's folder, not its name")


Interleave = make_processor(find_vocabulary)
