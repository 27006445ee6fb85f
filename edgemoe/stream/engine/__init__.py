"""This package runs llama.cpp as a layer executor: any GGUF, watched, stopped, restarted at any layer, and fed with other values."""
