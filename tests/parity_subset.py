"""Makes `tests/fixtures/parity` from the full parity fixtures: `python -m tests.parity_subset`.

The subset fits into the repository, so parity is tested where the full fixtures are not. It holds weights and outputs
of the released code, trimmed to a few cases. Large floating point tensors are int16 with one scale each, which rounds
by at most 1.6e-5 of the largest value. tests/test_parity_subset.py says what it allows for that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "fixtures" / "parity"
POSITIONS = 100  # encoder frames of the tokenizer: 2 s
TOKENIZER_CASES = ("tiny", "one_second")
MEL_STRIDE = 5
STREAM, NUM_BLOCKS = "stream_block10", 2
DECODER_TENSORS = (
    *("oneshot.token", "oneshot.encoder_proj_out"),
    *("prompted.token", "prompted.prompt_token", "prompted.prompt_feat", "prompted.embedding", "prompted.mel"),
    *(f"{STREAM}.{k}.{name}" for k in range(NUM_BLOCKS) for name in ("token", "returned_mel")),
    f"{STREAM}.0.wave",
)
PACKED, SCALES = ":i", ":scales"


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating point matrices as int16 with one scale each; other tensors as they are."""
    packed, scales = {}, []
    for key, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.numel() < 1000:
            packed[key] = tensor.contiguous()
            continue
        scales.append(tensor.abs().max() / 32767)
        packed[key + PACKED] = (tensor / scales[-1]).round().to(torch.int16)
    return {**packed, SCALES: torch.stack(scales)}


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors again, up to rounding."""
    names = sorted(key for key in packed if key.endswith(PACKED))
    plain = {key: tensor for key, tensor in packed.items() if key not in names and key != SCALES}
    return plain | {
        key.removesuffix(PACKED): packed[key] * scale for key, scale in zip(names, packed[SCALES], strict=True)
    }


def make(parity: Path, released: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The packed tensors of each file, and the facts."""
    facts = {name: json.loads((parity / f"{name}.json").read_text()) for name in ("tokenizer", "llm", "decoder")}
    full = {
        f"{name}_{kind}": load_file(parity / f"{name}_{kind}.safetensors")
        for name, kind in [("tokenizer", "state"), ("tokenizer", "cases"), ("llm", "state"), ("llm", "cases")]
    }
    full |= {name: load_file(parity / f"{name}.safetensors") for name in ("flow_state", "hift_state", "decoder_cases")}
    kept = {
        **_tokenizer(facts["tokenizer"], full["tokenizer_state"], full["tokenizer_cases"]),
        **_language(facts["llm"], full["llm_state"], full["llm_cases"]),
        "flow_state": full["flow_state"],
        "hift_state": full["hift_state"],
        "decoder_cases": {key: full["decoder_cases"][key] for key in DECODER_TENSORS},
    }
    decoder = facts["decoder"]
    for case in decoder["cases"]:
        if case["name"] == STREAM:
            del case["blocks"][NUM_BLOCKS:], case["total_samples"]
    wanted = {key.split(".")[0] for key in DECODER_TENSORS}
    decoder["cases"] = [case for case in decoder["cases"] if case["name"] in wanted]
    texts = json.loads((released / "9b" / "expected_text_ids.json").read_text(encoding="utf-8"))
    added = json.loads((released / "9b" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {entry["content"]: int(token) for token, entry in added.items()}
    texts["controls"] = {name: token for name, token in ids.items() if not name.startswith("<|audio_")}
    texts["ranks"] = (released / "9b" / "tokenizer.model").read_text()
    facts["prompts"] = json.loads((parity / "prompts.json").read_text(encoding="utf-8"))
    facts["texts"] = texts
    for fixture in facts.values():
        for key in (
            "state_keys",
            "keys",
            "flow_keys",
            "hift_keys",
            "tensors",
            "state_file",
            "cases_file",
            "state_files",
        ):
            fixture.pop(key, None)
    return {name: pack(tensors) for name, tensors in kept.items()}, facts


def _tokenizer(
    facts: dict[str, Any], state: dict[str, Tensor], cases: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Fewer positions, and the codes that are nearest or second nearest in the kept cases."""
    facts["cases"] = [case for case in facts["cases"] if case["name"] in TOKENIZER_CASES]
    kept = {key: value for key, value in cases.items() if key.split(".")[0] in TOKENIZER_CASES}
    hidden = torch.cat([kept[f"{name}.hidden_before_vq"].flatten(0, 1) for name in TOKENIZER_CASES])
    nearest = torch.cdist(hidden, state["codebook.weight"]).topk(2, largest=False).indices
    codes = nearest.unique()  # in order, so ties go to the same code
    place = {int(code): index for index, code in enumerate(codes)}
    for key in list(kept):
        if "token_ids" in key:
            kept[key] = torch.tensor([place[int(code)] for code in kept[key].flatten()]).reshape(kept[key].shape)
        if key.endswith(".log_mel"):
            kept[f"{key}_every_{MEL_STRIDE}th_frame"] = kept.pop(key)[:, :, ::MEL_STRIDE]
    state = {key: value for key, value in state.items() if not key.startswith("ema_")}
    state["codebook.weight"] = state["codebook.weight"][codes]
    state["embed_positions.weight"] = state["embed_positions.weight"][:POSITIONS]
    state["embed_positions2.weight"] = state["embed_positions2.weight"][: POSITIONS // 4]
    facts["config"] |= {"max_source_positions": POSITIONS, "quantize_vocab_size": len(codes)}
    facts["feature_extractor"]["chunk_length"] = POSITIONS // 50
    return {"tokenizer_state": state, "tokenizer_cases": kept}


def _language(
    facts: dict[str, Any], state: dict[str, Tensor], cases: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The rows of the vocabulary that the cases use."""
    names = [key for key in cases if key.endswith("_ids") and "position" not in key]
    rows = torch.cat([cases[key].flatten() for key in names]).unique().long()
    place = {int(row): index for index, row in enumerate(rows)}
    kept = {key: value[..., rows] if "logits" in key else value for key, value in cases.items()}
    for key in names:
        kept[key] = torch.tensor([place[int(token)] for token in kept[key].flatten()]).reshape(kept[key].shape)
    state = dict(state)
    for key in ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"):
        state[key] = state[key][rows]
    facts["config"]["padded_vocab_size"] = len(rows)
    return {"llm_state": state, "llm_cases": kept}


if __name__ == "__main__":
    from tests.parity import PARITY, RELEASED

    FOLDER.mkdir(parents=True, exist_ok=True)
    files, facts = make(PARITY, RELEASED)
    for name, tensors in files.items():
        save_file(tensors, FOLDER / f"{name}.safetensors")
    (FOLDER / "facts.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{sum(path.stat().st_size for path in FOLDER.iterdir())} bytes -> {FOLDER}")
