"""A checkpoint's tokenizer -> the token lists that runtimes want in their files."""
