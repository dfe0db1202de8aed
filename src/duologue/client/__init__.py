"""The other side of the wire: a client of the real-time protocol, the clock of a loudspeaker, a server of one's own."""
