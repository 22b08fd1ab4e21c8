"""The page as a parser sees it: complete, with inert model texts, and without requests to other addresses."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from hftlight.errors import InputError
from hftlight.report import read_result, verdict, write_report
from hftlight.report.html.answers import badges, differing_stages, ticked_stages
from hftlight.report.html.page import caveats, facts
from hftlight.report.html.render import render
from hftlight.report.result import Answer
from tests.helpers.run_folder import answer_rows, group_rows, harmful, metric_rows, write_run

VOID = {"meta", "input", "br", "use"}


class Page(HTMLParser):
    """A parser that collects start tags with their attributes, and texts with the elements around them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.stack, self.texts, self.unbalanced = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack[-1][0] != tag:
            self.unbalanced.append(tag)
        else:
            self.stack.pop()

    def handle_data(self, data):
        self.texts.append(([(tag, attrs.get("class", "")) for tag, attrs in self.stack], data))

    def text(self, tag, kind=""):
        """Return the texts below all elements of a tag with a class word."""
        return [data for path, data in self.texts if any(t == tag and (not kind or kind in c.split()) for t, c in path)]

    def all(self, tag, kind=""):
        """Return the attributes of all elements of a tag with a class word."""
        return [a for t, a in self.tags if t == tag and (not kind or kind in (a.get("class") or "").split())]


def written(folder):
    path = write_report(folder)
    return Page(path.read_text(encoding="utf-8"))


def answer(**changes):
    return {**answer_rows(("none",), prompts=1)[0], **changes}


def test_page_holds_verdict_table_figures_answers_and_provenance(tmp_path):
    folder = write_run(tmp_path)
    page = written(folder)
    assert page.unbalanced == []
    assert " ".join(page.text("div", "verdict")).replace("\xa0", " ") == verdict(read_result(folder))
    cells = page.text("td")
    assert "fine-tuned" in cells
    assert " (52.7-69.9)" in page.text("small")
    titles = {"Harmful score", "Finetune accuracy", "Over-refusal", "Cost", "Training loss", "Simulated attack step"}
    assert titles <= set(page.text("h3"))
    assert {"Alignment loss", "Harmful validation loss"} <= set(page.text("h3"))
    assert len(page.all("svg")) == 9
    assert len(page.all("article")) == 60
    assert len(page.all("div", "cell")) == len(answer_rows(("none", "booster")))
    everything = "".join(data for _, data in page.texts)
    for fact in ("sha256:5d1f0c93aa17", "9f2c41d0a7be", "2.13.0", "alignment / test", "harmful_ratio: 0.1", "merge"):
        assert fact in everything


def test_what_a_model_wrote_is_inert(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"</pre></article>&amp;"
    rows = [
        answer(
            prompt=evil, response=evil, reference=evil, id=evil, set="<i>", arm="<u>", verdicts={evil: {"flag": True}}
        )
    ]
    folder = write_run(tmp_path, [harmful("<u>", "finetuning", 50, judge=evil)], rows, arms=())
    (folder / "config.yaml").write_text(f"model: {evil!r}\n")
    page = written(folder)
    assert page.unbalanced == []
    assert len(page.all("script")) == 1
    assert page.all("img") == page.all("u") == page.all("i") == []
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert "".join(page.text("div", "answer")) == evil
    assert page.all("article")[0]["data-set"] == "<i>"
    assert page.all("input")[0]["value"] == "<i>"


def test_the_page_links_what_defenses_selected(tmp_path):
    folder = write_run(tmp_path)
    assert "What defenses selected before training" not in written(folder).text("h3")
    (folder / "booster" / "saft_selection.jsonl").parent.mkdir(exist_ok=True)
    (folder / "booster" / "saft_selection.jsonl").write_text("{}\n")
    page = written(folder)
    assert "What defenses selected before training" in page.text("h3")
    assert {"href": "booster/saft_selection.jsonl"} in page.all("a")


def test_page_asks_for_nothing_outside_itself(tmp_path):
    folder = write_run(tmp_path)
    page = written(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
    links = [attrs[name] for _, attrs in page.tags for name in ("href", "src") if name in attrs]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_ids_on_the_page_are_unique(tmp_path):
    page = written(write_run(tmp_path))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_flag_is_marked_in_words_and_colour(tmp_path):
    rows = [answer(id="1", verdicts={"builtin": {"flag": True}, "keyword": {"flag": False}})]
    page = written(write_run(tmp_path, [], rows))
    assert page.text("span", "bad") == ["▲ harmful ", "builtin"]
    assert page.text("span", "good") == ["○ not flagged ", "keyword"]
    assert page.all("div", "cell")[0]["class"] == "cell bad"


def test_badges_say_what_the_set_asks():
    def of(**kwargs):
        return badges(Answer("none", "finetuning", "task", "1", "p", "r", **kwargs))

    assert of(correct=True) == [("good", "✓ correct", "")]
    assert of(correct=False) == [("bad", "✗ wrong", "")]
    assert of(flags={"refusal": True}) == [("bad", "▲ refused", "refusal")]
    assert of(flags={"a": False, "b": False}) == [("good", "○ not flagged", "a, b")]
    assert of() == []


def test_differing_stages_compare_arms_at_the_same_stage():
    def one(arm, stage, flag, response="r"):
        return Answer(arm, stage, "harmful", "1", "p", response, flags={} if flag is None else {"builtin": flag})

    rows = [one("none", "alignment", False), one("booster", "alignment", False)]
    rows += [one("none", "finetuning", True), one("booster", "finetuning", False)]
    assert differing_stages(rows) == ["finetuning"]
    assert differing_stages([one("none", "base", True), one("booster", "alignment", False)]) == []
    assert differing_stages([one("none", "base", None, "a"), one("booster", "base", None, "b")]) == ["base"]


def test_the_last_stages_are_ticked_while_they_fit():
    two = [(stage, arm) for stage in ("alignment", "finetuning") for arm in ("none", "booster")]
    assert ticked_stages([("base", "none"), *two]) == ["finetuning", "alignment"]
    five = [(stage, str(arm)) for stage in ("alignment", "finetuning") for arm in range(5)]
    assert ticked_stages(five) == ["finetuning"]


def test_a_half_done_run_is_reported_as_far_as_it_got(tmp_path):
    rows = [row for row in metric_rows(("none", "booster")) if row["arm"] == "none" and row["stage"] != "finetuning"]
    page = written(write_run(tmp_path, rows, answer_rows(("none",))[:6]))
    (note,) = page.text("p", "note")
    assert note == (
        "This run is not finished. Not measured yet: undefended (fine-tuned), booster (aligned), booster (fine-tuned)."
    )
    assert "Simulated attack step" not in page.text("h3")


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = written(write_run(tmp_path, [], []))
    assert page.unbalanced == []
    assert page.text("div", "verdict") == [verdict(read_result(tmp_path))]
    assert not page.all("svg")
    assert not page.all("form")


def test_a_cut_off_line_is_told_to_the_reader(tmp_path):
    folder = write_run(tmp_path)
    with (folder / "generations.jsonl").open("a") as file:
        file.write('{"arm": "no')
    assert any("generations.jsonl line" in note for note in written(folder).text("p", "note"))


def test_half_of_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    page = written(write_run(tmp_path, [], [answer(response="odd \ud83d end")]))
    assert "".join(page.text("div", "answer")) == "odd ? end"


def test_an_old_report_survives_a_failed_write(tmp_path, monkeypatch):
    folder = write_run(tmp_path, [], [])
    before = write_report(folder).read_bytes()

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    write_run(folder)
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_caveats_follow_from_what_the_run_holds(tmp_path):
    text = " ".join(caveats(read_result(write_run(tmp_path / "a"))))
    assert all(word in text for word in ("One seed", "Keyword judges", "made up", "task / test (3)"))
    assert "alignment / test" not in text
    other = caveats(read_result(write_run(tmp_path / "b", [harmful("none", "base", 40, "guard")], [], arms=())))
    assert not any("Keyword" in caveat or "made up" in caveat for caveat in other)


def test_facts_flatten_and_escape():
    value = {"model": {"name": "<x>", "parts": [1, 2]}, "seed": None, "command": ["a", "b c"], "empty": {}}
    page = Page(render("run/facts.html.j2", facts=facts(value)))
    assert page.text("th") == ["model name", "model parts", "seed", "command", "empty"]
    assert page.text("td") == ["<x>", "1, 2", "-", "a 'b c'", "none"]


def test_a_folder_that_is_no_run_gets_no_report(tmp_path):
    with pytest.raises(InputError, match="a run folder holds one of"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_report_loads_neither_torch_nor_matplotlib():
    code = "import sys, hftlight.report; print(sorted({'torch', 'matplotlib', 'lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_models_do_is_drawn_at_the_top(tmp_path):
    page = write_report(write_run(tmp_path / "a")).read_text(encoding="utf-8")
    assert page.index("class='outcomes'") < page.index("id='table'")
    assert "Refused, complied (flagged), broken" in page
    rows = [harmful("none", "finetuning", 50)]
    assert written(write_run(tmp_path / "b", rows, [])).all("figure", "outcomes") == []


def test_the_harmful_score_of_each_category_has_its_interval_and_count(tmp_path):
    groups = group_rows("none", "finetuning", "harmful_score_by_category", {"fraud": 20, "<theft>": 60})
    rows = [*metric_rows(("none",)), *groups, {**groups[0], "judge": "keyword", "value": 90.0}]
    folder = write_run(tmp_path, rows, [])
    page, source = written(folder), (folder / "report.html").read_text(encoding="utf-8")
    assert page.unbalanced == []
    assert "Harmful score by category" in page.text("summary")
    assert "Harmful score by language" not in page.text("summary")
    at = page.text("td").index("fraud")
    assert page.text("td")[at : at + 2] == ["fraud", "30"]
    assert "20.0<small> (9.5-37.3)</small>" in source
    assert "&lt;theft&gt;" in source
    assert "90.0<small>" not in source  # only the deciding judge's values
