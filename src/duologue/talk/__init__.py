"""A spoken conversation in the terminal, or from one sound file into another: a client of the real-time server."""
