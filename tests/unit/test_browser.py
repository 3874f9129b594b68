"""The pages in a real browser, on a desk and on a phone, in light, in dark and on paper."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_runs import make_run
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from data_prep.orders import ORDERS
from eval.__main__ import main
from eval.run_files import stage_names

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WIDTHS = {"desk": 1280, "phone": 390}
PAPER = 1046  # A4 across, 297 mm, without margins of 10 mm, at 96 pixels an inch
# Of each chart: whether it is shown, how many of its lines or marks have an extent, its words, its text's colour.
CHARTS = """
return [...document.querySelectorAll(".chart svg")].map(chart => {
  const drawn = [...chart.querySelectorAll("path, use")].filter(mark => mark.closest("defs") === null);
  const box = chart.getBoundingClientRect();
  const texts = [...chart.querySelectorAll("text")];
  return {
    title: chart.getAttribute("aria-label"),
    width: box.width, height: box.height,
    drawn: drawn.filter(mark => mark.getBoundingClientRect().width + mark.getBoundingClientRect().height > 1).length,
    coloured: drawn.filter(mark => mark.getAttribute("style").includes("--line-")).length,
    words: texts.map(text => text.textContent).join(" "),
    // As it is seen: the drawing is 480 wide and is scaled.
    smallest: Math.min(...texts.map(text => parseFloat(getComputedStyle(text).fontSize))) * box.width / 480,
    cut: texts.filter(text => text.getBoundingClientRect().right > box.right + 1
                              || text.getBoundingClientRect().left < box.left - 1).map(text => text.textContent),
    colours: [...new Set(texts.map(text => getComputedStyle(text).fill))],
  };
});
"""
COLOURS = """
const probe = document.body.appendChild(document.createElement("i"));
const seen = name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
const found = {ink: seen("ink"), faint: seen("faint"), paper: getComputedStyle(document.body).backgroundColor};
probe.remove();
return found;
"""

pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="no Chromium with its driver on this machine: no page is opened in it"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in [*QUIET.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(executable_path=DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / "one"), make_run(folder / "other", method="inclora")]
    assert main([*map(str, runs), "--out", str(folder / "compared")]) == 0
    fifteen = make_run(folder / "fifteen")
    lengthen(fifteen, ORDERS["order4"])
    return {
        "report": runs[0] / "report.html",
        "fifteen": fifteen / "report.html",
        "comparison": folder / "compared" / "comparison.html",
    }


def lengthen(run_dir: Path, order: tuple[str, ...]) -> None:
    """Let the run be one of these tasks, each scored after its own training and after the last."""
    run = json.loads((run_dir / "run.json").read_text())
    run |= {"order": list(order), "data": dict.fromkeys(order, run["data"]["soil"])}
    (run_dir / "run.json").write_text(json.dumps(run))
    written = (run_dir / "predictions" / "01-soil" / "soil.jsonl").read_text()
    for after, own in zip(stage_names(order)[1:], order, strict=True):
        for task in order if own == order[-1] else [own]:
            path = run_dir / "predictions" / after / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(written)
    assert main([str(run_dir)]) == 0


def show(browser: Chrome, page: Path, *, width: int = 1280, scheme: str = "light", media: str = "screen") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    preferred = {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    browser.get("about:blank")
    browser.get(page.as_uri())


@pytest.mark.parametrize("place", WIDTHS)
@pytest.mark.parametrize("name", ["report", "fifteen", "comparison"])
def test_a_page_loads_and_its_charts_have_content(
    browser: Chrome, pages: dict[str, Path], name: str, place: str
) -> None:
    show(browser, pages[name], width=WIDTHS[place])
    assert browser.get_log("browser") == [], "nothing on the console"
    assert browser.execute_script("return innerWidth") == WIDTHS[place]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= WIDTHS[place], "no sideways scroll"
    charts: list[dict[str, Any]] = browser.execute_script(CHARTS)
    assert len(charts) >= {"report": 6, "fifteen": 5, "comparison": 4}[name]
    for chart in charts:
        assert chart["width"] > 300, chart
        assert chart["height"] > 80, chart
        assert chart["drawn"] > 5, chart
        assert chart["coloured"] > 0, chart
        assert chart["words"].strip(), chart
        assert chart["smallest"] > 8, chart
        assert chart["cut"] == [], chart


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_take_the_colours_of_the_scheme(browser: Chrome, pages: dict[str, Path], scheme: str) -> None:
    show(browser, pages["report"], scheme=scheme)
    page = browser.execute_script(COLOURS)
    assert (page["paper"] == "rgb(255, 255, 255)") == (scheme == "light")
    for chart in browser.execute_script(CHARTS):
        assert set(chart["colours"]) <= {page["ink"], page["faint"]}, chart["title"]


@pytest.mark.parametrize(("media", "width"), [("screen", WIDTHS["desk"]), ("print", PAPER)])
def test_the_matrix_of_fifteen_tasks_is_seen_whole(
    browser: Chrome, pages: dict[str, Path], media: str, width: int
) -> None:
    show(browser, pages["fifteen"], width=width, media=media)
    ends = "return [...document.querySelectorAll('#matrix table')].map(t => t.getBoundingClientRect().right)"
    found: list[float] = browser.execute_script(ends)
    assert len(found) == 3, "two scores and their summary"
    assert max(found) <= width - (0 if media == "print" else 24), found
    if media == "print":
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "nothing is cut"


def test_on_paper_a_dark_screen_prints_in_light(browser: Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["report"], scheme="dark", media="print")
    assert browser.execute_script(COLOURS)["paper"] == "rgb(255, 255, 255)"
    assert browser.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    closed = (
        "return [...document.querySelectorAll('details:not([open])')].map(d => d.lastElementChild.checkVisibility())"
    )
    opened: list[bool] = browser.execute_script(closed)
    assert opened
    assert all(opened), "what is folded on a screen is printed"


def test_a_cell_of_the_matrix_opens_what_was_written_in_it(browser: Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["report"])
    shown = "return [...document.querySelectorAll('.chosen article')].filter(a => a.offsetHeight > 0).map(a => a.id)"
    assert browser.execute_script(shown) == ["cell-2"], "the last one, while none is chosen"
    browser.execute_script("document.querySelector('#matrix a[href=\"#cell-1\"]').click()")
    assert browser.execute_script(shown) == ["cell-1"]
