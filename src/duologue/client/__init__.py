"""The other side of the wire: a client of the real-time protocol and a conversation over it."""
