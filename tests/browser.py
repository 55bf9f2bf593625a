"""Any real browser of this machine, to see pages as people do."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PHONE = 360


def find() -> str | None:
    """What RAYTUNE_BROWSER names, else the first of NAMES on the path: all of them take Chromium's options."""
    named = os.environ.get("RAYTUNE_BROWSER")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page at a time, without a window and without a network."""

    def __init__(self, program: str, folder: Path) -> None:
        """`folder` is for its own files."""
        self._program, self._folder = program, folder

    def screenshot(self, page: Path, image: Path, width: int, dark: bool = False) -> None:
        """What is seen first of a page."""
        self._run(
            page,
            f"--screenshot={image}",
            f"--window-size={width},1600",
            *(["--force-dark-mode"] if dark else []),
        )

    def asked(self, page: Path, question: str, width: int) -> str:
        """What a JavaScript expression says of a page that is `width` wide; the page is its `page`.

        It is asked from outside, from a page around it, so that nothing of the page is changed.
        """
        around = self._folder / "around.html"
        around.write_text(
            f'<!DOCTYPE html><meta charset="utf-8"><p id="answer"></p>'
            f'<iframe id="frame" style="width: {width}px; height: 800px; border: 0" '
            f'srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe><script>'
            'const frame = document.getElementById("frame");'
            "frame.onload = () => { const page = frame.contentDocument, view = frame.contentWindow;"
            f'document.getElementById("answer").textContent = {question}; frame.remove() }};</script>',
            encoding="utf-8",
        )
        dumped = self._run(around, "--dump-dom", "--window-size=1400,1000")
        found = re.search(r'<p id="answer">(.*?)</p>', dumped, re.DOTALL)
        assert found, dumped[:2000]
        return html.unescape(found[1])

    def _run(self, page: Path, *options: str) -> str:
        command = [
            self._program,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={self._folder / 'profile'}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            *options,
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout.decode()
