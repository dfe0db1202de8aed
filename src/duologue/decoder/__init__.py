"""The speech decoder: speech tokens -> log-mel -> wav."""
