"""Numbers of the released tokenizer and language model stay what they were when they equalled the released code."""

import torch
from safetensors.torch import load_file

from tests.golden_released import FILE, compute
from tests.parity import assert_close

MARGIN = 1e-2  # codes must be equal where the second choice is further away


def test_released_numbers_stay_what_they_were() -> None:
    stored, ours = load_file(FILE), compute()
    assert stored.keys() == ours.keys()
    sure = stored["tokenizer.margin"] > MARGIN
    assert sure.float().mean() > 0.9
    assert torch.equal(ours["tokenizer.codes"][sure], stored["tokenizer.codes"][sure])
    for key in ("tokenizer.hidden", "resampled", "language.logits"):
        assert_close(ours[key], stored[key], 1e-4, 1e-4)


def test_the_file_is_small_and_tells_codes_apart() -> None:
    assert FILE.stat().st_size < 500_000
    assert len(load_file(FILE)["tokenizer.codes"].unique()) > 20
