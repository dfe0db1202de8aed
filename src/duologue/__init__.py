"""Duologue: a spoken chatbot that listens, thinks and answers aloud."""

__version__ = "0.1.0"
