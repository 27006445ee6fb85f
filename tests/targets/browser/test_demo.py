"""The browser demo, in headless Chromium: the page says what plain onnxruntime says, asks nobody else, and can be stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest
from chromium import Page, open_chromium
from onnx_folder import greedy, regrets, write_folder
from reports import make_report
from tiny import EXAMPLES

from edgemoe.base.storage import save_record
from edgemoe.ir import Unit
from edgemoe.report.model_card import render_card

DEMO = EXAMPLES / "browser"
sys.path.insert(0, str(DEMO))
PROMPT, IDS = "The little dog was", [1163, 957, 632, 71, 414]
KEPT = [list(range(16)), [0, 1, 2, 4, 7, 8, 9, 11, 15], list(range(2, 16)), [3, 5, 6, 9, 10, 12]]
OFFLINE = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "EAI_AGAIN", "ETIMEDOUT", "ENETUNREACH", "ERR_SOCKET_TIMEOUT")


@pytest.fixture(scope="module")
def modules() -> Path:
    """The demo's packages, from the lock file, installed once."""
    wanted = json.loads((DEMO / "package.json").read_text())["dependencies"]
    folder = DEMO / "node_modules"
    found = {name: folder / name / "package.json" for name in wanted}
    if all(path.exists() and json.loads(path.read_text())["version"] == wanted[name] for name, path in found.items()):
        return folder
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("npm is not installed: apt-get install npm")
    command = [npm, "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=DEMO, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and any(code in done.stderr for code in OFFLINE):
        pytest.skip("the npm registry cannot be reached")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed: apt-get install chromium")
    with open_chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@contextmanager
def serve(folder: Path, modules: Path) -> Iterator[str]:
    """The demo's own server."""
    from serve import make_server

    with make_server(folder, modules, port=0, quiet=True) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def open_demo(browser: Page, url: str, query: str, state: str) -> None:
    """Open the page afresh and wait until it is so far."""
    browser.log.clear()
    browser.asked.clear()
    browser.open(f"{url}?{query}")
    browser.wait(f"['{state}', 'error'].includes(document.body.dataset.state)", 120)


def text_of(browser: Page, name: str) -> str:
    return str(browser.run(f"document.getElementById('{name}').textContent"))


def without_three(unit: Unit) -> str:
    """Every width but 3."""
    if unit.expert >= 0:
        return ("INT4_32", "INT2_32", "INT8_32", "INT4_64", "INT2_64")[unit.expert % 5]
    return "INT4_32" if unit.role in ("token_embd", "attn_output") else "INT8_64"


@pytest.mark.parametrize(
    ("choose", "target", "kept", "shown"),
    [("INT4_32", "onnx", None, "64 of 64"), (without_three, "browser", KEPT, "45 of 64")],
    ids=["4 bits", "every width"],
)
def test_the_page_says_what_plain_onnxruntime_says(
    choose: Callable[[Unit], str] | str,
    target: str,
    kept: list[list[int]] | None,
    shown: str,
    browser: Page,
    modules: Path,
    tmp_path: Path,
) -> None:
    plan, artifact = write_folder(EXAMPLES / "tiny-moe", tmp_path / "out", choose, kept, target)
    save_record(tmp_path / "out" / "plan.json", plan)
    count = 24
    with serve(tmp_path / "out", modules) as url:
        open_demo(browser, url, f"prompt={quote(PROMPT)}&tokens={count}&temperature=0&go", "done")
        assert text_of(browser, "problem") == ""
        made = [int(token) for token in browser.run("document.getElementById('output').dataset.tokens").split(",")]
        if choose == "INT4_32":
            assert made == greedy(artifact.path, IDS, count)
        # wasm computes 8 and 2 bits without rounding inputs to int8 first (logits of std 5 differ by less than 1 %), so a near tie may fall
        # to the other side.  Not more: router columns that are off by one in one layer make tokens that are worse by up to 0.85.
        assert len(made) == count and regrets(artifact.path, IDS, made).max() < 0.3
        from tokenizers import Tokenizer

        whole = Tokenizer.from_file(str(EXAMPLES / "tiny-moe" / "tokenizer.json")).decode([*IDS, *made])
        assert text_of(browser, "given") + text_of(browser, "text") == whole
        assert f"{count} tokens" in text_of(browser, "figures") and "tokens/s" in text_of(browser, "figures")
        assert all(asked.startswith(url) for asked in browser.asked)
        assert any(asked.endswith("ort-wasm-simd-threaded.wasm") for asked in browser.asked)  # workers were watched, too
        assert browser.log == []
    tiles = text_of(browser, "tiles")
    assert shown in tiles and f"{plan.file_size / 1e6:.2f} MB" in tiles
    names = {name for unit, name in plan.formats.items() if "exps" in unit}
    assert all(name in text_of(browser, "legend") for name in names)
    assert ("dropped" in text_of(browser, "legend")) == (kept is not None)


def test_a_long_text_can_be_stopped_and_another_begun(browser: Page, modules: Path, tmp_path: Path) -> None:
    _, artifact = write_folder(EXAMPLES / "tiny-moe", tmp_path / "out", "INT4_32")
    expected = greedy(artifact.path, IDS, 6)
    with serve(tmp_path / "out", modules) as url:
        open_demo(browser, url, f"prompt={quote(PROMPT)}&tokens=500&temperature=0", "ready")
        assert browser.run("document.getElementById('stop').disabled")
        browser.run("document.getElementById('go').click()")
        browser.wait("document.getElementById('text').textContent.length > 5")
        browser.run("document.getElementById('stop').click()")
        browser.wait("document.body.dataset.state === 'done'")
        assert text_of(browser, "figures").endswith("stopped")
        made = [int(token) for token in browser.run("document.getElementById('output').dataset.tokens").split(",")]
        assert len(made) < 500 and made[:2] == expected[:2]
        browser.run("document.getElementById('limit').value = 6; document.getElementById('go').click()")
        browser.wait("document.body.dataset.state === 'done'")
        assert browser.run("document.getElementById('output').dataset.tokens") == ",".join(map(str, expected))
        # no plan.json here: the graph's own metadata says what was kept
        assert "64 of 64" in text_of(browser, "tiles")
        for width in (390, 1200):
            browser.look(tmp_path / "page.png", width, 844, phone=width < 1000)
            assert browser.run("document.documentElement.scrollWidth") == width


def test_three_bits_are_refused_in_words(browser: Page, modules: Path, tmp_path: Path) -> None:
    write_folder(EXAMPLES / "tiny-moe", tmp_path / "out", lambda unit: "INT3_32" if unit.expert >= 0 else "INT4_32")
    with serve(tmp_path / "out", modules) as url:
        open_demo(browser, url, "", "ready")
        assert browser.run("document.body.dataset.state") == "error"
        assert "--target browser" in text_of(browser, "problem")
        assert browser.run("document.getElementById('go').disabled")


def test_the_model_card_says_how_javascript_runs_it() -> None:
    report = make_report()
    report = replace(report, plan=replace(report.plan, target="browser"))
    card = render_card(report)
    assert "library_name: transformers.js" in card and "```js" in card
    assert 'await pipeline("text-generation", path.basename(import.meta.dirname))' in card
    assert "llama" not in card.split("## Run it")[1].split("## ")[0]


def test_the_server_gives_away_nothing_but_the_demo_and_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_bytes(b"graph")
    with serve(tmp_path / "out", tmp_path / "none") as url:
        types = {}
        for name in ("", "page.js", "style.css", "model/model.onnx"):
            with urllib.request.urlopen(url + name) as answer:
                types[name] = answer.headers["content-type"]
                assert "connect-src 'self'" in answer.headers["content-security-policy"]
        assert types == {
            "": "text/html; charset=utf-8",
            "page.js": "text/javascript",
            "style.css": "text/css",
            "model/model.onnx": "application/octet-stream",
        }
        port = int(url.rsplit(":", 1)[1].strip("/"))
        for path in (
            "/model/../secret",
            "/model/%2e%2e/secret",
            "/../../README.md",
            "/model/",
            "/npm/x",
            "//etc/passwd",
            "/model//etc/passwd",
            "/model/%00",
        ):
            connection = HTTPConnection("127.0.0.1", port)
            connection.request("GET", path)
            assert connection.getresponse().status == 404, path
            connection.close()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + "model/plan.json")
