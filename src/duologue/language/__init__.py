"""The language model and its engine: token ids -> token ids."""
