"""The released decoder (glm-4-voice-decoder): speech tokens -> log-mel -> wav."""
