"""Text models of other projects as backbones: a transformers folder, or a GGUF file that transformers reads.

The text rows and the tokenizer of a backbone stay as they are. `Vocabulary.extend` appends controls and speech ids.
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from duologue.checkpoint import DTYPES, Dtype
from duologue.language.backbone import extend, failure_sentence, load_language, quiet_transformers
from duologue.vocabulary import Vocabulary


def load_backbone(path: str | Path, codebook_size: int, dtype: Dtype = "float32") -> tuple[PreTrainedModel, Vocabulary]:
    """Loads a causal LM and extends it by controls and speech ids.

    Args:
        path: a folder of transformers with safetensors and tokenizer, a .gguf file, or a folder with one such file.
        codebook_size: number of speech ids to append.
        dtype: of the loaded weights; a quantized GGUF file is dequantized.

    Returns:
        The model in evaluation mode on the CPU, whose new rows are the mean of its old ones, and the joint vocabulary.

    Raises:
        ValueError: as `backbone.load_language`; there is no tokenizer, or a GGUF file needs a missing library.
    """
    path = Path(path)
    gguf = gguf_file(path)
    if gguf is None:
        model = load_language(path, dtype)
        tokenizer = _read_tokenizer(path)
    else:
        model, tokenizer = _load_gguf(gguf, dtype)
    num_rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = Vocabulary.extend(tokenizer, codebook_size, num_rows=num_rows)
    extend(model, vocabulary)
    for config in (model.config, model.generation_config):
        if config is not None:
            config.eos_token_id = list(vocabulary.end_ids)
    return model, vocabulary


def gguf_file(path: Path) -> Path | None:
    """Returns the GGUF file that a path means; None for a folder of transformers."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir():
        raise ValueError(f"{path} is no backbone: give a folder of transformers or a .gguf file")
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} .gguf files; name one, such as {files[0]}")
    return files[0]


def check_gguf_libraries(path: Path) -> None:
    """Raises ValueError if a library is missing with which transformers reads a GGUF file."""
    for library in ("gguf", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(
                f"{path} is a GGUF file, which transformers reads with {library}, which is not installed: "
                "pip install gguf accelerate"
            )


def _read_tokenizer(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    return _fast_tokenizer(folder)


def _fast_tokenizer(folder: Path, **options: str) -> Tokenizer:
    try:
        with quiet_transformers():
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise ValueError(f"{folder} has no tokenizer that can be read: {failure_sentence(error)}") from None
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"{folder} has a tokenizer without a tokenizer.json, {type(loaded).__name__}")
    return tokenizer


def _load_gguf(path: Path, dtype: Dtype) -> tuple[PreTrainedModel, Tokenizer]:
    check_gguf_libraries(path)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}")
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False, dtype=DTYPES[dtype]
            )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, IndexError, struct.error) as error:
        raise ValueError(f"{path} cannot be loaded as a language model: {failure_sentence(error)}") from None
    return _without_quantizer(model).eval(), _fast_tokenizer(path.parent, gguf_file=path.name)


def _without_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a plain model with these dequantized weights; transformers would refuse to save the given one."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: PreTrainedModel = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain
