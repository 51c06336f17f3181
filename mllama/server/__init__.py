"""The HTTP server: an interface in the form of OpenAI's, before an engine that knows nothing of HTTP.

What a request may say is in `schema` and `messages`, how the engine is asked in `protocol`. It needs the
extra `server`; nothing else in the package imports this one, but for the words in `protocol`.
"""
