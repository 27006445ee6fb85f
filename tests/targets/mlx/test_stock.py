"""A folder runs where nothing but mlx and mlx-lm is installed: mlx_lm.generate, and mlx_lm.server with a chat template."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlx_folder import write_folder
from tiny import make_checkpoint

ROOT = Path(__file__).parents[3]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment that holds mlx and mlx-lm alone."""
    folder = tmp_path_factory.mktemp("stock")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = [folder / "bin" / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", "mlx[cpu]", "mlx-lm"]
    subprocess.run(command, check=True)
    assert not list(folder.glob("lib/python*/site-packages/torch"))
    return folder / "bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in few bits, with dropped experts and a chat template."""
    place = tmp_path_factory.mktemp("mlx")
    source = make_checkpoint(place / "in", "qwen3_moe", hidden=128, expert_size=128, n_experts=4)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    write_folder(source, place / "out", "INT4_64", [(0, 2, 3), (1, 2, 3)])
    return place / "out"


def without_edgemoe() -> dict[str, str]:
    """An environment in which no module of ours, and no hub, can be found."""
    left = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**left, "HF_HUB_OFFLINE": "1"}


def test_generate_runs(stock: Path, folder: Path) -> None:
    command = [stock / "mlx_lm.generate", "--model", folder, "--prompt", "def main", "--max-tokens", "8", "--ignore-chat-template"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without_edgemoe(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Generation:" in done.stdout


@pytest.fixture
def address(stock: Path, folder: Path, tmp_path: Path) -> Iterator[str]:
    """Where a server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [stock / "mlx_lm.server", "--model", folder, "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=without_edgemoe()) as server:
        try:
            for _ in range(600):
                if server.poll() is not None or _answers(port):
                    break
                time.sleep(0.2)
            assert server.poll() is None, (tmp_path / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def test_a_server_answers_a_chat(address: str) -> None:
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert 0 < answer["usage"]["completion_tokens"] <= 8
    assert answer["usage"]["prompt_tokens"] > 2  # the template wrote more than one word
