"""Steps of a language model in llama.cpp, from a GGUF file (`duologue convert FOLDER -o x.gguf`).

llama.cpp computes scores; the draw is that of all engines (`drawing.py`). So the scheduler, prefix reuse and barge-in
stay the same, and a laptop or a Mac runs the 9B in 4 bits. The low-level API of llama-cpp-python is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duologue.language.drawing import DrawMasks, DrawRow, draw_exactly, rows_of
from duologue.language.stepping import Stepped, StepRow
from duologue.layers import num_threads_for
from duologue.vocabulary import Vocabulary

MAX_CACHED_TOKENS = 16384
"""Default ids in the KV cache, 0.6 GB for the 9B."""

_CELL_BLOCK = 256  # llama.cpp rounds its cache up to these
_BATCH = 512  # ids of one call; a step with more takes several


class LlamaStepper:
    """A stepper over a GGUF file. All slots share one KV cache, and a copied prefix takes no memory.

    Args:
        path: a GGUF file over the joint vocabulary.
        num_slots: number of conversations in the cache.
        num_cells: ids in the cache, those of all slots together.
        uses_gpu: puts all layers on the GPU that llama.cpp was built for, if any.
        full_precision: keeps keys and values in float32, otherwise in float16.

    Attributes:
        max_positions: maximum ids of one conversation, those of the training or the cache.

    Raises:
        ValueError: llama-cpp-python is missing, the file cannot be read, or belongs to another vocabulary.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary,
        num_slots: int = 64,
        num_cells: int = MAX_CACHED_TOKENS,
        uses_gpu: bool = True,
        full_precision: bool = False,
    ) -> None:
        self._model = self._context = None
        self._library = library = _library()
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist or is no file")
        settings = library.llama_model_default_params()
        settings.n_gpu_layers = 2**15 if uses_gpu and library.llama_supports_gpu_offload() else 0
        self._model = library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ValueError(f"{path} is no GGUF file that llama.cpp can read: {_last_fault()}")
        self._width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        made_for = self._metadata("duologue.vocabulary")
        if made_for not in (None, vocabulary.hash):
            raise ValueError(
                f"{path} was made for another vocabulary than this model's ({made_for} and {vocabulary.hash}): "
                "convert the language model of the same folder"
            )
        self.masks = DrawMasks(vocabulary, self._width, torch.device("cpu"))
        self.num_slots: int | None = num_slots
        num_threads = num_threads_for(library.llama_model_n_params(self._model))
        context = library.llama_context_default_params()
        context.n_ctx = -(-num_cells // _CELL_BLOCK) * _CELL_BLOCK
        context.n_seq_max, context.kv_unified = num_slots, True
        context.n_batch = context.n_ubatch = _BATCH
        context.n_threads = context.n_threads_batch = num_threads
        if full_precision:
            context.type_k = context.type_v = library.GGML_TYPE_F32
        self._context = library.llama_init_from_model(self._model, context)
        if not self._context:
            raise ValueError(
                f"llama.cpp has no room for {num_cells} ids in the cache of {path}: lower max_cached_tokens "
                f"({_last_fault()})"
            )
        self.max_positions = min(library.llama_model_n_ctx_train(self._model), num_cells)
        self._memory = library.llama_get_memory(self._context)
        self._batch = library.llama_batch_init(_BATCH, 0, 1)

    def __del__(self) -> None:
        if self._context:
            self._library.llama_batch_free(self._batch)
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)

    def step(self, rows: Sequence[StepRow]) -> list[Stepped]:
        wanted: dict[int, Tensor] = {}
        waiting: list[tuple[int, int, int, int, bool]] = []  # (row, id, position, slot, whether scores are needed)
        for index, row in enumerate(rows):
            self._library.llama_memory_seq_rm(self._memory, row.slot, row.start, -1)
            for place, token in enumerate(row.ids):
                scored = place == len(row.ids) - 1 and (row.draw is not None or row.wants_scores)
                waiting.append((index, token, row.start + place, row.slot, scored))
        for first in range(0, len(waiting), _BATCH):
            self._run(waiting[first : first + _BATCH], wanted)
        drawn = [index for index, row in enumerate(rows) if row.draw is not None]
        tokens: dict[int, int] = {}
        if drawn:
            draws = [row.draw for row in rows if row.draw is not None]
            tokens = dict(zip(drawn, self.draw([wanted[index] for index in drawn], draws), strict=True))
        return [
            Stepped(tokens.get(index), wanted[index].clone() if row.wants_scores else None)
            for index, row in enumerate(rows)
        ]

    def draw(self, scores: Sequence[Tensor], rows: Sequence[DrawRow]) -> list[int]:
        return draw_exactly(torch.stack(list(scores)), self.masks.table, rows_of(rows))

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._library.llama_memory_seq_rm(self._memory, target, 0, -1)
        self._library.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def release(self, slot: int) -> None:
        self._library.llama_memory_seq_rm(self._memory, slot, 0, -1)

    def keep_only(self, slots: Sequence[int]) -> None:
        for slot in set(range(self.num_slots or 0)) - set(slots):
            self.release(slot)

    def _run(self, ids: list[tuple[int, int, int, int, bool]], wanted: dict[int, Tensor]) -> None:
        """Runs at most `_BATCH` ids and adds the scores (V,) float32 that are needed, by row."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for place, (_, token, position, slot, scored) in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, scored
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, slot
        failure = self._library.llama_decode(self._context, batch)
        if failure == 1:
            raise torch.OutOfMemoryError("the KV cache of llama.cpp is full")
        if failure:
            raise RuntimeError(f"llama.cpp failed with code {failure}: {_last_fault()}")
        for place, (index, *_, scored) in enumerate(ids):
            if scored:
                pointer = self._library.llama_get_logits_ith(self._context, place)
                wanted[index] = torch.from_numpy(np.ctypeslib.as_array(pointer, (self._width,)).copy())

    def _metadata(self, key: str) -> str | None:
        value = ctypes.create_string_buffer(256)
        size = self._library.llama_model_meta_val_str(self._model, key.encode(), value, len(value))
        return value.value.decode(errors="replace") if size >= 0 else None


_faults: list[str] = []


def _last_fault() -> str:
    return _faults[-1] if _faults else "no reason given"


def _library() -> Any:
    """Returns the module llama_cpp, whose messages are kept instead of printed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ValueError(
            "GGUF files run by llama-cpp-python: install Duologue with its extra 'gguf' (it compiles for minutes)"
        ) from error
    llama_cpp.llama_log_set(_keep_fault, ctypes.c_void_p(0))
    return llama_cpp


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _keep_fault(level: int, text: bytes, _: object) -> None:
    error = 4  # GGML_LOG_LEVEL_ERROR
    if level == error:
        _faults[:] = [text.decode(errors="replace").strip()]
