"""Serve the browser demo and a folder that edgemoe wrote for ONNX: `python examples/browser/serve.py OUT`.

Plain http on this machine alone; give `--host 0.0.0.0` to reach it from a phone in the same network.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
# Everything comes from here: neither the page nor its worker may ask anybody else.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; style-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Handler(SimpleHTTPRequestHandler):
    """Files under /model/ from OUT, under /npm/ from node_modules, all others from this folder."""

    extensions_map = {  # noqa: RUF012
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".css": "text/css",
        ".json": "application/json",
        ".wasm": "application/wasm",
        "": "application/octet-stream",
    }

    def __init__(self, *args: object, roots: dict[str, Path], quiet: bool, **kwargs: object) -> None:
        self.roots, self.quiet = roots, quiet
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        parts = PurePosixPath(unquote(urlsplit(path).path)).parts[1:]
        root = self.roots.get(parts[0] if parts else "")
        parts = parts[1:] if root else parts or ("index.html",)
        if any(part in ("..", ".") or "\\" in part or "\0" in part for part in parts):
            return str(HERE / "does-not-exist")
        return str((root or HERE).joinpath(*parts))

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")  # ask again: the folder may have been written anew
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        if not self.quiet:
            super().log_message(format, *args)


def make_server(folder: Path, modules: Path, host: str = "127.0.0.1", port: int = 8000, *, quiet: bool = False) -> ThreadingHTTPServer:
    """A server that is ready for `serve_forever`; port 0 takes a free one."""
    return ThreadingHTTPServer((host, port), partial(Handler, roots={"model": folder, "npm": modules}, quiet=quiet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT", help="a folder that edgemoe wrote for ONNX")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--modules", type=Path, default=HERE / "node_modules", help="where npm put the packages")
    args = parser.parse_args()
    if not (args.folder / "genai_config.json").is_file():
        sys.exit(f"{args.folder}: no genai_config.json: not a folder that edgemoe wrote for ONNX")
    if not (args.modules / "onnxruntime-web").is_dir():
        sys.exit(f"{args.modules}: no onnxruntime-web: run `npm ci --ignore-scripts` in {HERE} first")
    with make_server(args.folder.resolve(), args.modules.resolve(), args.host, args.port) as server:
        print(f"http://{args.host}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
