"""The pages in a real browser, with clicks. Without a browser these tests are skipped."""

import shutil

import pytest

from hftlight.analysis.analysis import Picture, Row
from hftlight.analysis.page import write_study
from hftlight.analysis.study import Study
from hftlight.comparison.page import write_comparison_report
from hftlight.folders import ANALYSIS
from hftlight.report.figure import canvas
from hftlight.report.html.page import write_report
from tests.helpers.comparison_folder import write_comparison
from tests.helpers.run_folder import write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser starts here ({str(error).splitlines()[0]}); playwright install chromium gets one")
        yield launched
        launched.close()


@pytest.fixture
def page(browser):
    """Yield a page that fails its test on any error and on any request other than for a file."""
    opened = browser.new_page()
    complaints = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on(
        "request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None
    )
    yield opened
    opened.close()
    assert complaints == []


def column(page, number):
    return page.locator(f"#rows tr td:nth-child({number})").all_text_contents()


def test_answers_of_a_comparison_are_filtered_sorted_and_searched(page, tmp_path):
    page.goto(f"file://{write_comparison_report(write_comparison(tmp_path))}")
    shown = page.locator("#shown")
    assert shown.text_content() == "50 of 3240 answers"  # 27 cells, 3 sets of 40 prompts
    page.click("#more")
    assert shown.text_content() == "100 of 3240 answers"
    page.select_option("select[name='0']", "lisa")
    page.select_option("select[name='2']", "0.3")
    page.select_option("select[name='5']", "harmful")
    filtered_count = int(shown.text_content().split(" of ")[1].split()[0])
    assert 0 < filtered_count < 120
    assert set(column(page, 1)) == {"lisa"}
    assert set(column(page, 6)) == {"harmful"}
    # The first click sorts upwards, the second click sorts downwards.
    page.click("th button[data-column='3']")
    up = column(page, 4)
    page.click("th button[data-column='3']")
    down = column(page, 4)
    assert (up[0], down[0]) == ("0", "2")
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.fill("input[name=text]", "request 7 of")
    assert all("request 7 of" in text for text in column(page, 7))
    assert set(column(page, 8)) == {"answer 1 <b>&"}  # as text, not as markup
    assert page.locator("figure svg").count() >= 5


def test_answers_of_a_run_are_filtered(page, tmp_path):
    page.goto(f"file://{write_report(write_run(tmp_path, arms=('none', 'booster')))}")
    visible = page.locator("article.prompt:visible")
    before = visible.count()
    assert before > 0
    page.fill("input[name=text]", "murk lantern")
    assert 0 < visible.count() < before
    assert all("murk lantern" in text.lower() for text in visible.all_text_contents())


def test_numbers_of_an_analysis_are_searched_and_its_report_links_to_it(page, tmp_path):
    rows = [Row("odds", float(layer), layer=layer, position="harmful", model="none") for layer in range(30)]
    picture = Picture("tone", "Refusal tone", "What to read.", canvas(1, height=2)[0])
    done = Study({"tone": rows}, {"tone": [picture]}, {"tone": ["no aligned model"]}, {"tone": "About."})
    run = write_run(tmp_path)
    write_study(done, (run / ANALYSIS).parent, "Analysis of a run")
    page.goto(f"file://{write_report(run)}")
    page.click("text=Why safety broke")
    assert page.locator("h1, nav strong").first.text_content() == "Analysis of a run"
    assert page.locator("figure svg").count() == 1
    assert page.locator(".note").text_content() == "no aligned model"
    page.click("summary:has-text('30 numbers')")
    page.fill("details.numbers input", "harmful 29")
    assert page.locator("details.numbers tbody tr:visible").count() == 1
