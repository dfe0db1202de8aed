"""A client of the real-time protocol, and a conversation over it."""
