"""Text models that answer for the talker: a chat endpoint over HTTP, or a model of transformers in this process.

A model gets messages of the chat completions API and writes text piece by piece. Calls of tools follow the text.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import struct
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlsplit

from duologue.language.event_stream import event_data
from duologue.language.tools import ToolCall, ToolUse

ChatMessage: TypeAlias = dict[str, Any]

KEY_VARIABLE = "DUOLOGUE_TEXT_MODEL_KEY"
CONNECT_S = 5.0
SILENCE_S = 120.0
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"


class TextModelError(RuntimeError):
    """The text model is missing, refused a request, or answered something else than a chat completion."""


class TextModel(Protocol):
    """The interface of text models. No method blocks the event loop."""

    @property
    def name(self) -> str: ...

    def stream(
        self, messages: Sequence[ChatMessage], tools: ToolUse | None = None, max_tokens: int = 512
    ) -> AsyncGenerator[str | ToolCall, None]:
        """Yields the pieces of one answer, then its calls. Closing it ends the answer.

        Raises:
            TextModelError: the model gave no answer.
        """
        ...


def open_text_model(place: str, name: str = "", device: str = "cpu") -> TextModel:
    """Opens a text model.

    Args:
        place: URL of an OpenAI-compatible endpoint (`http://127.0.0.1:8080/v1`), a transformers folder or a GGUF file.
        name: model of an endpoint; by default the first that it lists.

    Raises:
        ValueError: the place holds no such model, or a library is missing.
    """
    if urlsplit(place).scheme in ("http", "https"):
        return EndpointTextModel(place, name, os.environ.get(KEY_VARIABLE, ""))
    if not Path(place).exists():
        raise ValueError(f"{place} is neither the URL of a chat endpoint, nor a transformers folder, nor a GGUF file")
    return TransformersTextModel(Path(place), device)


class EndpointTextModel:
    """A model behind `/chat/completions`, streamed as server-sent events.

    Args:
        url: with or without `/v1`.
        name: empty for the first model that the endpoint lists.
        key: sent as bearer token, if any.

    Raises:
        ValueError: httpx is missing.
    """

    def __init__(self, url: str, name: str = "", key: str = "") -> None:
        try:
            import httpx
        except ImportError:
            raise ValueError("a text model over HTTP needs the package httpx: pip install 'duologue[talker]'") from None
        self._httpx = httpx
        base = url.rstrip("/").removesuffix("/chat/completions")
        self._base = base if urlsplit(base).path else f"{base}/v1"
        self._name = name
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._is_local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")

    @property
    def name(self) -> str:
        return self._name or self._base

    async def stream(
        self, messages: Sequence[ChatMessage], tools: ToolUse | None = None, max_tokens: int = 512
    ) -> AsyncGenerator[str | ToolCall, None]:
        httpx = self._httpx
        timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        calls: dict[int, dict[str, str]] = {}
        try:
            async with httpx.AsyncClient(
                headers=self._headers, timeout=timeout, trust_env=not self._is_local
            ) as client:
                if not self._name:
                    self._name = await self._first_model(client)
                body = {"model": self._name, "messages": list(messages), "stream": True, "max_tokens": max_tokens}
                body |= {} if tools is None else tools.request()
                async with client.stream("POST", f"{self._base}/chat/completions", json=body) as response:
                    if response.status_code != 200:
                        text = " ".join((await response.aread()).decode("utf-8", "replace").split())[:300]
                        raise TextModelError(f"the text model answered with status {response.status_code}: {text}")
                    async for data in event_data(response.aiter_bytes()):
                        delta = _delta(data)
                        if delta.get("content"):
                            yield str(delta["content"])
                        for part in delta.get("tool_calls") or ():
                            _add_call(calls, part)
        except httpx.HTTPError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TextModelError(f"the text model at {self._base} did not answer: {reason}") from None
        except ValueError as error:
            raise TextModelError(f"the text model at {self._base} sent something else than events: {error}") from None
        for call in calls.values():
            yield ToolCall(call["id"] or _call_id(), call["name"], call["arguments"])

    async def _first_model(self, client: Any) -> str:
        response = await client.get(f"{self._base}/models")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise TextModelError(f"{self._base}/models lists no model: name one with --text-model-name") from None


def _delta(data: bytes) -> dict[str, Any]:
    """Returns the delta of a chunk. Raises TextModelError for an error or something else."""
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise TextModelError(f"the text model failed: {str(chunk['error'])[:300]}")
        choices = chunk.get("choices") or [{}]  # a chunk of usage has none
        return dict(choices[0].get("delta") or {})
    except (ValueError, AttributeError, IndexError, TypeError):
        raise TextModelError(
            f"the text model sent something else than chunks of a chat completion: {data[:80].decode(errors='replace')}"
        ) from None


def _add_call(calls: dict[int, dict[str, str]], part: dict[str, Any]) -> None:
    """Adds a fragment of a call to the call of its index."""
    call = calls.setdefault(part.get("index", len(calls)), {"id": "", "name": "", "arguments": ""})
    function = part.get("function") or {}
    call["id"] = part.get("id") or call["id"]
    call["name"] += function.get("name") or ""
    call["arguments"] += function.get("arguments") or ""


def _call_id() -> str:
    return f"call_{secrets.token_hex(10)}"


class TransformersTextModel:
    """A chat model of transformers in this process; one thread answers one request at a time, greedily.

    Args:
        path: a folder, or a GGUF file, whose weights are dequantized.

    Raises:
        ValueError: there is no usable model, or it has no chat template.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from duologue.language.backbone import failure_sentence, quiet_transformers
        from duologue.language.pretrained import check_gguf_libraries, gguf_file

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        folder, gguf = path, gguf_file(path)
        if gguf is not None:
            check_gguf_libraries(gguf)
            folder, options["gguf_file"] = gguf.parent, gguf.name
        dtype = "float32" if device == "cpu" else "auto"
        try:
            with quiet_transformers():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
                model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        except (ValueError, KeyError, OSError, RuntimeError, ImportError, IndexError, struct.error) as error:
            raise ValueError(f"{path} cannot be loaded as a text model: {failure_sentence(error)}") from None
        if not self._tokenizer.chat_template:
            raise ValueError(f"the text model {path} has no chat template")
        self._model = model.to(device).eval()
        self._name = path.stem
        self._executor = ThreadPoolExecutor(1, "text-model")

    @property
    def name(self) -> str:
        return self._name

    async def stream(
        self, messages: Sequence[ChatMessage], tools: ToolUse | None = None, max_tokens: int = 512
    ) -> AsyncGenerator[str | ToolCall, None]:
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

        def send(piece: str | BaseException | None) -> None:
            if not stopped.is_set() or piece is None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        definitions = None
        if tools is not None and tools.choice != "none":
            definitions = tools.request().get("tools")
        work = self._executor.submit(self._generate, list(messages), definitions, max_tokens, send, stopped)
        reader = CallReader()
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise TextModelError(f"the text model failed: {piece}") from piece
                if text := reader.push(piece):
                    yield text
            if text := reader.flush():
                yield text
            for call in reader.calls:
                yield call
        finally:
            stopped.set()
            work.cancel()

    def _generate(
        self, messages: list[ChatMessage], tools: Any, max_tokens: int, send: Any, stopped: threading.Event
    ) -> None:
        """Runs in the model's thread."""
        import torch
        from transformers import StoppingCriteriaList

        from duologue.layers import num_step_threads

        try:
            torch.set_num_threads(num_step_threads(self._model))
            inputs = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self._model.device)
            stop = StoppingCriteriaList([_Stop(stopped)])
            with torch.inference_mode():
                self._model.generate(
                    **inputs,
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    streamer=_Streamer(self._tokenizer, send),
                    stopping_criteria=stop,
                )
        except Exception as error:
            _quietly(send, error)
        _quietly(send, None)


def _quietly(send: Any, piece: Any) -> None:
    try:
        send(piece)
    except RuntimeError:
        return  # the reader's loop is closed


class _Stop:
    """A stopping criterion of transformers: the reader has left."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((len(input_ids),), self._stopped.is_set(), dtype=torch.bool, device=input_ids.device)


class _Streamer:
    """A streamer of transformers that sends the new text after every id; incomplete characters are held back."""

    def __init__(self, tokenizer: Any, send: Any) -> None:
        self._tokenizer, self._send = tokenizer, send
        self._ids: list[int] = []
        self._sent, self._is_prompt = 0, True

    def put(self, ids: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += ids.reshape(-1).tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if len(text) > self._sent and not text.endswith("\ufffd"):
            self._send(text[self._sent :])
            self._sent = len(text)

    def end(self) -> None:
        """Called by transformers after the last id."""


class CallReader:
    """Separates the text of a stream from calls in the form `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    Attributes:
        calls: complete calls so far. A call that is no JSON is dropped.
    """

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._waiting = ""

    def push(self, piece: str) -> str:
        """Consumes a piece and returns the text that is certainly no part of a call."""
        self._waiting += piece
        return "".join(self._texts())

    def flush(self) -> str:
        """Returns the rest at the end of the stream; an incomplete call is dropped."""
        text, self._waiting = self._waiting, ""
        return "" if text.startswith(CALL_BEGIN) else text

    def _texts(self) -> Iterator[str]:
        while True:
            begin = self._waiting.find(CALL_BEGIN)
            if begin < 0:
                held = next((n for n in range(len(CALL_BEGIN), 0, -1) if self._waiting.endswith(CALL_BEGIN[:n])), 0)
                text, self._waiting = self._waiting[: len(self._waiting) - held], CALL_BEGIN[:held]
                yield text
                return
            yield self._waiting[:begin]
            self._waiting = self._waiting[begin:]
            end = self._waiting.find(CALL_END)
            if end < 0:
                return
            self._take(self._waiting[len(CALL_BEGIN) : end])
            self._waiting = self._waiting[end + len(CALL_END) :]

    def _take(self, text: str) -> None:
        try:
            call = json.loads(text)
            arguments = call.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            self.calls.append(ToolCall(_call_id(), str(call["name"]), text))
        except (ValueError, KeyError, AttributeError):
            return
