"""Text in, text out with onnxruntime-genai, from a folder that edgemoe wrote for ONNX.

    python examples/onnx_genai.py OUT "The little dog was" --tokens 64

Samples as the checkpoint's generation_config.json says; --greedy takes the most likely token each time.
"""

from __future__ import annotations

import argparse
import time


def generate(folder: str, prompt: str | list[int], tokens: int, *, greedy: bool = False, on_text=None) -> list[int]:
    """Token ids that follow a prompt, given as text or as ids; `on_text` hears of each new piece of text."""
    import onnxruntime_genai as og

    model = og.Model(folder)
    tokenizer = og.Tokenizer(model) if isinstance(prompt, str) or on_text else None
    ids = [int(i) for i in tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + tokens)
    if greedy:
        params.set_search_options(do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    stream = tokenizer.create_stream() if on_text else None
    while not generator.is_done():
        generator.generate_next_token()
        if stream:
            on_text(stream.decode(generator.get_next_tokens()[0]))
    return [int(i) for i in generator.get_sequence(0)][len(ids) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUT")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--greedy", action="store_true")
    args = parser.parse_args()
    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    made = generate(args.folder, args.prompt, args.tokens, greedy=args.greedy, on_text=lambda text: print(text, end="", flush=True))
    print(f"\n{len(made)} tokens in {time.perf_counter() - start:.1f} s, loading included")


if __name__ == "__main__":
    main()
