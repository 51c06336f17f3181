"""GGUF files of the architecture `mllama`, as Ollama and llama.cpp's tools write them."""
