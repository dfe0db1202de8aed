"""A spoken conversation in the terminal or between audio files: a client of the real-time server."""
