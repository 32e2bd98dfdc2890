"""OpenAI's Images API: what its clients send and expect."""
