"""The pocket recipe: its curriculum as text, the synthesis of all its audio, and the configurations of its stages."""
