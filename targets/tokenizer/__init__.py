"""This package turns a checkpoint's tokenizer into the token lists that runtimes need in their files."""
