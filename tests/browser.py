"""Runs a page in Chromium."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run --enable-logging=stderr --dump-dom"
)


def run_in_browser(page: str, script: str, folder: Path, url_hash: str = "", width: int = 1280) -> str:
    """Opens a page, and returns what the body of a script returns, as text; ``folder`` keeps the browser's files.

    Checks that the page logs nothing to the console and sends no request.
    """
    file = folder / "page.html"
    result = f"<script>document.body.append(createElement('pre', {{id: 'result'}}, (() => {{{script}}})()))</script>"
    file.write_text(page.replace("</body>", f"{result}</body>"), encoding="utf-8")
    own = [f"--user-data-dir={folder}/profile", f"--log-net-log={folder}/net.json", f"--window-size={width},800"]
    command = [str(CHROMIUM), *_OPTIONS.split(), *own, file.as_uri() + url_hash]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "CONSOLE" not in done.stderr, done.stderr
    requested = set(re.findall(r'"url":"([a-z]+:[^"]*)"', (folder / "net.json").read_text()))
    assert not {url for url in requested if url.startswith("http") and "google" not in url}
    return html.unescape(done.stdout.partition('<pre id="result">')[2].partition("</pre>")[0])
