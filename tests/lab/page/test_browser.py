"""The page in a real browser: desktop, phone, dark mode and print."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.lab.page.test_page import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
BROWSE_S = 50
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"

PROBE = """
<script>addEventListener("load", () => {
  const seen = [...document.querySelectorAll("svg[role=img]")].map(e =>
    e.getBoundingClientRect());
  const text = document.querySelector("svg text").getBoundingClientRect();
  document.body.dataset.found = JSON.stringify({
    width: document.documentElement.clientWidth,
    needed: document.documentElement.scrollWidth,
    plots: seen.filter(r => r.width > 100 && r.height > 10).length,
    all: seen.length,
    outside: seen.filter(r => r.right > document.documentElement.clientWidth).length,
    cut: [...document.querySelectorAll(".chip")].filter(e => {
      const box = e.closest(".box");
      return box && e.getBoundingClientRect().right > box.getBoundingClientRect().right;
    }).length,
    text: text.height,
    paper: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").length,
  });
});</script>
"""
"""Script added to a copy of the page without its policy; reports the layout."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium: `make browser` has it"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A page of two sides."""
    path = tmp_path / "report.html"
    path.write_text(page(1.0, 1.3))
    return path


def run_browser(*arguments: str) -> str:
    """Run the browser headless and return its output."""
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu",
        "--virtual-time-budget=5000", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_layout(file: Path, width: int, *flags: str) -> dict[str, Any]:
    """Return the layout of the page at this width, shown in a frame."""
    text = file.read_text().replace("default-src 'none'", "default-src 'unsafe-inline'")
    probed = file.with_name("probed.html")
    probed.write_text(text.replace("</body>", PROBE + "</body>"))
    frame = file.with_name("frame.html")
    frame.write_text(
        f'<body><iframe src="{probed.name}" style="width:{width}px;height:900px">'
        '</iframe><script>addEventListener("load", () => setTimeout(() => {'
        'document.body.dataset.found = document.querySelector("iframe")'
        ".contentDocument.body.dataset.found}, 500))</script>"
    )
    shown = run_browser(
        "--allow-file-access-from-files", *flags, "--dump-dom", f"file://{frame}"
    )
    match = re.search(r'data-found="([^"]+)"', shown)
    assert match is not None, shown[:2000]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_every_plot_is_visible_and_nothing_overflows(file: Path, width: int) -> None:
    """On a desktop, a tablet and a phone; text has a readable size."""
    found = read_layout(file, width, LIGHT)
    assert found["width"] <= width
    assert found["needed"] <= found["width"]
    assert found["plots"] == found["all"] > 8
    assert found["outside"] == found["cut"] == 0
    assert found["text"] >= 9
    assert found["requests"] == 0


def test_dark_mode_follows_the_browser(file: Path) -> None:
    """The browser's colour scheme selects the colours."""
    assert read_layout(file, 1280, LIGHT)["paper"] == "rgb(251, 251, 250)"
    assert read_layout(file, 1280, DARK)["paper"] == "rgb(20, 24, 27)"


def test_page_can_be_printed_and_captured(file: Path) -> None:
    """The PDF has several pages; the screenshot is not blank."""
    paper, screen = file.with_suffix(".pdf"), file.with_suffix(".png")
    run_browser(f"--print-to-pdf={paper}", f"file://{file}")
    assert paper.read_bytes().startswith(b"%PDF")
    run_browser(f"--screenshot={screen}", "--window-size=1280,2000", f"file://{file}")
    assert screen.stat().st_size > 50_000
