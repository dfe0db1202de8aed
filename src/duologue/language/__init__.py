"""Token ids -> token ids."""
