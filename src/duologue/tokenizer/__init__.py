"""Waveform -> speech tokens."""
