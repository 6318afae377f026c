"""The page of a report in a browser: slider, legends, keyboard, looks, and no errors."""

import io
import json

import pytest
from chromium import Browser, require_chromium
from PIL import Image
from report_runs import make_run, write_rows

from training.run_report.write import write_report

SIZES = [(width, dark) for width in (1200, 360) for dark in (False, True)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(require_chromium(), tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "00000-digits-cond")
    row = dict(kimg=40, name="loss", message="The loss rises.", remedy="Lower --lr.", level="error")
    write_rows(run_dir / "watch.jsonl", [row])
    return run_dir


@pytest.fixture(scope="module")
def report(run_dir):
    path = run_dir / "report.html"
    write_report([run_dir], path)
    return path


@pytest.fixture(scope="module")
def comparison(run_dir, tmp_path_factory):
    base = tmp_path_factory.mktemp("others")
    others = [make_run(base / name, num_ticks=20) for name in ("00001-digits-a", "00002-digits-b")]
    write_report([run_dir, *others], base / "comparison.html")
    return base / "comparison.html"


def num_colours(png):
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return len(image.getcolors(image.width * image.height))


def brightness(png):
    image = Image.open(io.BytesIO(png)).convert("L").crop((0, 0, 5, 5))
    return image.getpixel((2, 2))


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_pages_fit_the_window_and_have_no_errors(browser, report, comparison, width, dark):
    for path in (report, comparison):
        page = browser.open(path, width=width, dark=dark)
        assert page.run("document.documentElement.scrollWidth") <= width
        shot = page.screenshot()
        assert num_colours(shot) > 200
        assert (brightness(shot) < 60) == dark
        assert page.run("document.querySelectorAll('.plot svg path.line').length") > 10
        assert page.problems == []
        assert page.requests == [path.as_uri()]


def test_without_chromium_these_tests_fail_under_ci_and_skip_elsewhere(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="Chromium is not installed"):
        require_chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        require_chromium()


def test_a_page_that_is_wrong_is_noticed(browser, report, tmp_path):
    for wrong in ("<script>alert(1)</script>", "<img src=https://example.invalid/x.png>"):
        path = tmp_path / "wrong.html"
        path.write_text(report.read_text().replace("</main>", f"{wrong}</main>"))
        assert browser.open(path).problems != []


def test_the_slider_moves_through_the_grids_by_keyboard(browser, report):
    page = browser.open(report)
    images = "[...document.querySelectorAll('.stack img')]"
    shown = f"{images}.filter((image) => image.offsetWidth).map((image) => image.alt)"
    caption = "document.querySelector('.grids .caption').textContent"
    page.run("document.querySelector('.stepper input').focus()")
    assert page.run(caption) == "kimg 64 (fakes-000064.png)"
    for key, name in (("ArrowLeft", "000032"), ("Home", "000000"), ("ArrowRight", "000008")):
        page.press(key)
        assert page.run(caption) == f"kimg {int(name)} (fakes-{name}.png)"
        (alt,) = page.run(shown)
        assert name in alt
    # Pictures are decoded, and the real ones are beside.
    assert page.run("document.querySelector('.stack img:not([hidden])').naturalWidth") == 160
    assert page.run("document.querySelector('.pair > div:last-child img').naturalWidth") == 160
    assert page.problems == []


def figure(title):
    return f"document.querySelector('figure[aria-label=\"{title}\"]')"


PLOT = f"{figure('Loss')}.querySelector('.plot')"
PLOT_BOX = f"(({{x, y, width, height}}) => [x, y, width, height])({PLOT}.getBoundingClientRect())"
LINES = f"{figure('Loss by noise level sigma')}.querySelectorAll('svg path.line').length"


def test_a_legend_toggles_lines_by_keyboard(browser, report):
    page = browser.open(report)
    assert page.run(LINES) == 5
    page.run(f"{figure('Loss by noise level sigma')}.querySelector('.legend button').focus()")
    pressed = "document.activeElement.getAttribute('aria-pressed')"
    assert page.run(pressed) == "true"
    page.press("Enter")
    assert (page.run(LINES), page.run(pressed)) == (4, "false")
    page.press("Enter")
    assert (page.run(LINES), page.run(pressed)) == (5, "true")
    buttons = f"{figure('Loss by noise level sigma')}.querySelectorAll('.legend button')"
    page.run(f"{buttons}.forEach((button) => button.click())")
    assert page.run(LINES) == 0
    assert page.problems == []


def test_a_run_that_is_hidden_in_one_chart_is_hidden_in_all(browser, comparison):
    page = browser.open(comparison)
    count = "document.querySelectorAll('#training svg path.line').length"
    before = page.run(count)
    page.run(f"{figure('Loss')}.querySelector('.legend button').click()")
    assert page.run(count) == before * 2 / 3
    assert page.problems == []


def test_values_are_read_by_keyboard_and_by_mouse(browser, report):
    page = browser.open(report)
    page.run(f"{figure('Loss')}.scrollIntoView(), {figure('Loss')}.querySelector('.plot').focus()")
    readout = f"{figure('Loss')}.querySelector('.readout').textContent"
    assert page.run(readout).startswith("kimg 80: loss = 0.4183")
    for key, start in (("Home", "kimg 2: loss = 1.305"), ("ArrowRight", "kimg 4: loss = 1.219")):
        page.press(key)
        assert page.run(readout).startswith(start)
        assert page.run("document.activeElement.getAttribute('aria-valuetext')").startswith(start)
    x, y, width, height = page.run(PLOT_BOX)
    page.mouse("mouseMoved", x + width / 2, y + height / 2)
    kimg = float(page.run(readout).split()[1].rstrip(":"))
    assert 30 < kimg < 50
    assert page.problems == []


def test_zoom_and_scales_change_what_is_drawn(browser, report):
    page = browser.open(report)
    path = f"{figure('Loss')}.querySelector('path.line').getAttribute('d')"
    whole = page.run(path)
    page.run("document.getElementById('log-kimg').click()")
    assert page.run(path) != whole
    page.run("document.getElementById('log-kimg').click()")
    assert page.run(path) == whole
    page.run(f"{figure('Loss')}.scrollIntoView()")
    x, y, width, height = page.run(PLOT_BOX)
    hidden = "document.getElementById('reset-zoom').hidden"
    assert page.run(hidden)
    middle = y + height / 2
    page.mouse("mousePressed", x + width * 0.3, middle)
    page.mouse("mouseMoved", x + width * 0.6, middle)
    page.mouse("mouseReleased", x + width * 0.6, middle)
    assert not page.run(hidden)
    assert page.run(path) != whole
    page.run("document.getElementById('reset-zoom').click()")
    assert page.run(path) == whole
    log = f"{figure('Loss')}.querySelector('figcaption button')"
    page.run(f"{log}.click()")
    assert page.run(f"{log}.getAttribute('aria-pressed')") == "false"
    assert page.run(path) != whole
    slider = "document.getElementById('smoothing')"
    page.run(f"{slider}.value = 0.9, {slider}.dispatchEvent(new Event('input'))")
    assert page.run(f"{figure('Loss')}.querySelectorAll('path.raw').length") == 1
    assert page.problems == []


def test_every_control_is_reached_by_tab_and_shows_its_focus(browser, report):
    page = browser.open(report)
    focus = "(document.activeElement.ariaLabel || document.activeElement.textContent).trim()"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    seen, outlines = [], []
    page.press("Tab")
    while page.run("document.activeElement !== document.body"):
        seen.append(page.run(focus))
        outlines.append(page.run(outline))
        page.press("Tab")
    assert seen[0] == "Skip to the content"
    for name in (
        "Generated images: snapshot",
        "Logarithmic kimg",
        "Log scale",
        "sigma 0.11 to 0.22",
    ):
        assert name in seen, seen
    assert sum("Arrow keys move along the axis" in name for name in seen) > 8
    assert set(outlines) == {"solid"}


def test_texts_of_files_stay_texts(browser, tmp_path):
    evil = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
    run_dir = make_run(tmp_path / "run", preset=evil)
    options = json.loads((run_dir / "training_options.json").read_text())
    options["changes"][0].update(setting=evil, run=[evil])
    options["next_steps"] = {evil: f"python {evil}"}
    (run_dir / "training_options.json").write_text(json.dumps(options))
    write_rows(run_dir / "watch.jsonl", [dict(message=evil, remedy=evil, name=evil, level=evil)])
    write_report([run_dir], tmp_path / "report.html")
    page = browser.open(tmp_path / "report.html")
    page.screenshot()
    assert page.run("window.hacked") is None
    assert "onerror=window.hacked" in page.run("document.querySelector('.notices').textContent")
    assert page.problems == []
