"""The server for live conversations: OpenAI's Realtime protocol, REST routes and a web page."""
