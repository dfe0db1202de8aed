"""Training of every part: one small loop, one readable file per stage."""
