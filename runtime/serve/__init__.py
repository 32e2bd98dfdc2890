"""The web service: models by name, the OpenAI and A1111 interfaces, operation and the page. A library first."""
