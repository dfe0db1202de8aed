"""Speech tokens -> log-mel -> wave."""
