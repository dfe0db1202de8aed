"""A server for live conversations: the protocol of OpenAI's Realtime API, REST beside it, and a page to talk to."""
