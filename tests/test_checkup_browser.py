"""The page of a checkup in a real browser: numbers, widths, both schemes."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
from checkup_variants import broken, deep
from checkups import checkup
from pages import Page, at, same

from conditioning.checkup.page import notebook, page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH"),
]
WIDTHS = (320, 390, 1280)
# Written into a page around the frames, not into the page that is tested.
MEASURE = """
<script>
addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")];
  const found = frames.map(frame => {
    const [inner, root] = [frame.contentWindow, frame.contentDocument.documentElement];
    const out = [...root.querySelectorAll("body *:not(.scroll *):not(svg *)")].filter(
      e => e.getBoundingClientRect().right > inner.innerWidth + 0.5);
    root.querySelector('a[href="#legend"]').click();
    return {inner: inner.innerWidth, scroll: root.scrollWidth,
            out: out.map(e => e.className || e.tagName)};
  });
  setTimeout(() => {
    frames.forEach((frame, i) => {
      found[i].place = frame.contentWindow.location.href;
      found[i].legend = frame.contentDocument.getElementById("legend").getBoundingClientRect().top;
    });
    document.body.dataset.found = JSON.stringify(found);
    console.error("planted");
  }, 200);
});
</script>
"""


def browse(tmp_path, file, *options):
    """Run the browser on a file; what it printed, and what it logged."""
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", *options, file.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def test_the_numbers_in_the_dom_are_those_of_the_json(tmp_path):
    report = broken()
    file = tmp_path / "page.html"
    file.write_text(page(report), encoding="utf-8")
    dom, log = browse(tmp_path, file, "--dump-dom")
    assert "CONSOLE" not in log
    read, plain = Page(dom), json.loads(report.to_json())
    assert len(read.numbers) > 100
    for attrs, _ in read.numbers:
        stored = at(plain, attrs["data-path"])
        ends = ("value", "low", "high") if "data-low" in attrs else ("value",)
        for end in ends:
            assert same(attrs[f"data-{end}"], stored[end] if len(ends) > 1 else stored)


def test_nothing_leaves_the_page_at_any_width_and_links_stay_in_the_frame(tmp_path):
    frames = "".join(
        f'<div style="width:{width}px">{frame}</div>'
        for frame in (notebook(deep(26), 800), notebook(broken(), 800))
        for width in WIDTHS
    )
    file = tmp_path / "frames.html"
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}{MEASURE}", encoding="utf-8")
    dom, log = browse(tmp_path, file, "--dump-dom", "--virtual-time-budget=5000")
    assert '"planted"' in log  # what a page logs is seen
    (body,) = [attrs for tag, attrs in Page(dom).tags if tag == "body"]
    found = json.loads(body["data-found"])
    assert [frame["inner"] for frame in found] == [*WIDTHS] * 2
    for frame in found:
        assert frame["scroll"] <= frame["inner"]
        assert frame["out"] == []
        assert frame["legend"] < 800
        assert frame["place"] == "about:srcdoc#legend"


@pytest.fixture(scope="module")
def usual():
    return page(checkup())


@pytest.mark.parametrize(("scheme", "background"), [(1, (255, 255, 255)), (0, (19, 23, 28))])
def test_the_page_is_drawn_in_light_and_in_dark(tmp_path, usual, scheme, background):
    from matplotlib.image import imread

    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(usual, encoding="utf-8")
    browse(
        tmp_path, file, f"--screenshot={shot}", "--window-size=1000,2400",
        f"--blink-settings=preferredColorScheme={scheme}",
    )  # fmt: skip
    pixels = (imread(shot)[..., :3] * 255).round().astype(int)
    assert tuple(pixels[3, 3]) == background
    assert len(np.unique(pixels @ np.array([65536, 256, 1]))) > 200
    # Every stretch of it holds something, figures included.
    contrast = np.abs(pixels - np.array(background)).max(axis=2)
    rows = (contrast > 100).sum(axis=1).reshape(-1, 200).sum(axis=1)
    assert (rows[:10] > 200).all()
