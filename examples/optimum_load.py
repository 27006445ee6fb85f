"""Load a folder that edgemoe wrote for ONNX into optimum, in an environment of its own.

    python examples/optimum_load.py OUT --env /tmp/optimum-env

optimum-onnx 0.1.0 wants transformers below 4.58, so it cannot live beside the transformers 5 that edgemoe calibrates with.
Installs about 1 GB on the first run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

PINS = ("torch==2.13.0", "transformers==4.57.6", "optimum==2.1.0", "optimum-onnx==0.1.0", "onnxruntime==1.32.0")


def load(folder: str) -> None:
    """Runs inside that environment: greedy tokens with optimum's cache."""
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ORTModelForCausalLM.from_pretrained(folder, use_cache=True)
    inputs = tokenizer("The little dog was", return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    print(made.tolist()[inputs["input_ids"].shape[1] :])
    print(tokenizer.decode(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUT")
    parser.add_argument("--env", type=Path, metavar="DIR", help="where the environment is, or is made")
    args = parser.parse_args()
    if args.env is None:
        load(args.folder)
        return
    python = args.env / "bin" / "python"
    if not python.exists():
        venv.create(args.env, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS], check=True)
    sys.exit(subprocess.run([python, __file__, args.folder], check=False).returncode)


if __name__ == "__main__":
    main()
