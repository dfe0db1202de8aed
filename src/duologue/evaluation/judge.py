"""A language model as the judge: any server of OpenAI's chat completions. Its answers are cached on disk.

The prompts are in this package's own words; scales and what is judged are those of each benchmark.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from duologue.evaluation.benchmarks.items import BenchmarkItem, Scoring
from duologue.evaluation.runner import JsonLines, read_rows

KEY_VARIABLE = "DUOLOGUE_JUDGE_KEY"
_TRIES, _WAIT_S, _ANSWER_S = 4, 2.0, 120.0
_RETRIED = (408, 409, 429, 500, 502, 503, 504)

_RULES = {
    Scoring.CORRECT: (
        "Decide whether the reply answers the question correctly. The reference holds the accepted answer or answers. "
        "Another wording and more detail are fine; a contradiction, a missing answer or a refusal is not.",
        "Write one word: yes if it is correct, no if it is not.",
    ),
    Scoring.OPEN: (
        "Rate how good the reply is: 1 it misses the request or is wrong, 2 it helps in part and has large gaps or "
        "faults, 3 it is mostly right and has weak points, 4 it is right, clear and to the point, 5 it could hardly be "
        "better.",
        "Write one whole number from 1 to 5.",
    ),
    Scoring.REFERENCE: (
        "Rate how good the reply is. The reference shows one good answer; others are as good if they fit the request. "
        "1 it misses the request or is wrong, 2 it helps in part and has large gaps or faults, 3 it is mostly right "
        "and has weak points, 4 it is right, clear and to the point, 5 it could hardly be better.",
        "Write one whole number from 1 to 5.",
    ),
    Scoring.DIALOGUE: (
        "Rate the replies of the whole conversation together. 1 they miss the requests or forget what was said before, "
        "2 few of them help and the thread is often lost, 3 they mostly help and the thread is lost at times, 4 they "
        "help and keep the thread with small lapses, 5 every reply helps and builds on the earlier turns.",
        "Write one whole number from 1 to 5.",
    ),
    Scoring.CHAT: (
        "Rate the reply from 0 to 10: 0 it is useless or wrong, 5 it is acceptable with clear faults, 10 it is "
        "correct, helpful and fit to be heard. Where there is a reference, a contradiction to it gives at most 3.",
        "Write one number from 0 to 10.",
    ),
}
RANGES = {Scoring.OPEN: (1, 5), Scoring.REFERENCE: (1, 5), Scoring.DIALOGUE: (1, 5), Scoring.CHAT: (0, 10)}


def judge_prompt(item: BenchmarkItem, replies: Sequence[str], scoring: Scoring | None = None) -> str:
    """The request for one verdict on the text of the replies, one of each turn that was answered."""
    rule, form = _RULES[scoring or item.scoring]
    parts = ["A user talks to a voice assistant. You see transcripts.", rule]
    for number, (question, reply) in enumerate(zip(item.questions, replies, strict=False), start=1):
        turn = f" {number}" if len(item.questions) > 1 else ""
        parts.append(f"<question{turn}>\n{question.text}\n</question{turn}>")
        if question.references:
            parts.append(f"<reference{turn}>\n{' | '.join(question.references)}\n</reference{turn}>")
        parts.append(f"<reply{turn}>\n{reply}\n</reply{turn}>")
    return "\n\n".join([*parts, f"{form} Write nothing else."])


def read_verdict(text: str, scoring: Scoring) -> float | None:
    """What the judge wrote as a number: 1 or 0 for yes or no, or the rating; None if it is neither."""
    if scoring is Scoring.CORRECT:
        words = re.findall(r"\b(yes|no)\b", text.lower())
        return None if len(set(words)) != 1 else float(words[0] == "yes")
    low, high = RANGES[scoring]
    found = re.findall(r"(?<![\d.])\d+(?:\.\d+)?(?!\d)", text)
    return float(found[0]) if len(found) == 1 and low <= float(found[0]) <= high else None


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge is asked, and how.

    Attributes:
        url: base of the chat endpoint, such as http://host/v1.
        model: name of the judge.
        temperature, max_tokens, seed: of its answer.
    """

    url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 16
    seed: int = 0


class ChatJudge:
    """Judges by a chat endpoint.

    Args:
        cache: JSON Lines file of verdicts; what it holds costs no request.
        key: API key, or empty.
        wait: sleeps before another try.

    Attributes:
        num_requests: requests that were sent.
    """

    def __init__(
        self, settings: JudgeSettings, cache: Path, key: str = "", wait: Callable[[float], None] = time.sleep
    ) -> None:
        self.settings, self._cache, self._key, self._wait = settings, cache, key, wait
        self._known = {row["key"]: str(row["text"]) for row in read_rows(cache)}
        self._lock = threading.Lock()
        self.num_requests = 0

    def judge(self, prompts: Sequence[str], num_at_once: int = 4) -> list[str]:
        """What the judge writes to each prompt.

        Raises:
            ValueError: the endpoint refuses, or does not answer after several tries.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if self._hash(prompt) not in self._known]
        if missing:
            with JsonLines(self._cache) as lines, ThreadPoolExecutor(num_at_once) as pool:
                done = pool.map(lambda prompt: self._ask_and_keep(prompt, lines), missing)
                for _ in tqdm(done, "judge", total=len(missing), disable=None, leave=False):
                    pass
        return [self._known[self._hash(prompt)] for prompt in prompts]

    def _ask_and_keep(self, prompt: str, lines: JsonLines) -> None:
        text = self._ask(prompt)
        with self._lock:
            self._known[self._hash(prompt)] = text
            lines.append({"key": self._hash(prompt), "model": self.settings.model, "text": text})

    def _hash(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps(self._body(prompt), sort_keys=True).encode()).hexdigest()

    def _body(self, prompt: str) -> dict[str, Any]:
        one = self.settings
        messages = [{"role": "user", "content": prompt}]
        limits = {"temperature": one.temperature, "max_tokens": one.max_tokens, "seed": one.seed}
        return {"model": one.model, "messages": messages, **limits}

    def _ask(self, prompt: str) -> str:
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        reason = ""
        for attempt in range(_TRIES):
            if attempt:
                self._wait(_WAIT_S * 2 ** (attempt - 1))
            with self._lock:
                self.num_requests += 1
            try:
                with urlopen(Request(url, json.dumps(self._body(prompt)).encode(), headers), timeout=_ANSWER_S) as got:
                    return str(json.load(got)["choices"][0]["message"]["content"] or "")
            except HTTPError as error:
                reason = f"{error.code} {' '.join(error.read().decode('utf-8', 'replace').split())[:200]}"
                if error.code not in _RETRIED:
                    break
            except (URLError, OSError) as error:
                reason = str(error)
            except (ValueError, LookupError, TypeError):
                reason = "its answer is no chat completion"
        raise ValueError(f"the judge {url} did not answer: {reason}")
