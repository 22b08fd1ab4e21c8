"""The READMEs: scripts work, generated parts are current, and named files, targets and commands exist."""

import re
from pathlib import Path

import pytest

from benchmarks.pages import PART, pages, parts
from hftlight.attacks.registry import ATTACKS
from hftlight.evaluation.judges import JUDGES
from hftlight.model_files import model_path
from tests.helpers import warm

ROOT = Path(__file__).parents[1]
OF_THE_PROJECT = ("benchmarks", "notebooks", "recipes", "src", "tests")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(page for folder in OF_THE_PROJECT for page in (ROOT / folder).rglob("README.md"))
FILES = [path.relative_to(ROOT) for folder in OF_THE_PROJECT for path in (ROOT / folder).rglob("*") if path.is_file()]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)]
FENCED = re.compile(r"```.*?```", flags=re.DOTALL)
ELSEWHERE = re.compile(r"\[[^\]]*\]\(http[^)]*\)")  # a link to another site, such as a file of an official repository


def block(words):
    return next(block for block in BLOCKS if words in block)


def of_root(path):
    return str(path.relative_to(ROOT))


def ran(script, **options):
    done = warm.run(["-c", script], timeout=300, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def own_trainer():
    """Return the README's script with a user's own module and Trainer, on a model that needs no network."""
    return block("class MyModule").replace("HuggingFaceTB/SmolLM2-135M-Instruct", model_path("tiny"))


def test_the_script_with_a_module_and_trainer_of_ones_own(tmp_path):
    summary = eval(ran(own_trainer(), cwd=tmp_path))
    assert summary["calls"] == 4
    assert summary["harmful_grad_norm"] > 0
    assert summary["zero_gradients"] == 0


def test_the_first_script_with_the_other_ones_module_and_loaders(tmp_path):
    head = own_trainer().partition("booster = ")[0]
    rows = "refusals, answers = (DataLoader(r, batch_size=4, collate_fn=collate) for r in (refusals, answers))\n"
    script = block("Vaccine(rho=")
    assert "max_steps=500" in script
    summary = eval(ran(head + rows + script.replace("max_steps=500", "max_steps=4"), cwd=tmp_path))
    assert summary["calls"] == 4
    assert summary["harmful_grad_norm"] > 0


def test_the_script_that_measures_while_it_trains(tmp_path):
    head = own_trainer()
    script = block("MeasureAt(")
    assert len(script.splitlines()) <= 20
    done = warm.run(["-c", f"{head}\n{script}"], timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = [line.split() for line in done.stdout.splitlines() if line[:2] in ("2 ", "4 ")]
    assert [(step, metric) for step, metric, *_ in shown] == [
        (step, metric) for step in "24" for metric in ("harmful_score", "refusal_rate", "collapsed_answers")
    ]


def test_the_script_that_watches_the_training(tmp_path):
    done = warm.run(["-c", f"{own_trainer()}\n{block('Watch(')}"], timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = [line.split() for line in done.stdout.splitlines() if line[:2] in ("2 ", "4 ")]
    assert [(step, metric) for step, metric, _ in shown] == [
        (step, metric) for step in "24" for metric in ("relative_drift", "direction_cosine", "refusal_log_odds")
    ]


def test_three_lines_for_data_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_task.csv").write_text("prompt,response\n" + "".join(f"add {i} and {i},{2 * i}\n" for i in range(500)))
    small = "RunConfig(model='tiny', num_samples=20, evaluation=Evaluation(2, 2, 2, 2), alignment=T, finetuning=T, "
    script = "from hftlight.config import Evaluation, Training\nT = Training(steps=2, batch_size=2)\n"
    head, call = (script + block("my_task.csv")).rsplit("RunConfig(", 1)
    assert (Path(ran(head + small + call)) / "report.html").is_file()


@pytest.mark.parametrize("name", ["overview", "pairs", "cards", "costs", "protocols"])
def test_generated_parts_are_those_of_the_code(name):
    """``make pages`` writes the generated parts."""
    known = parts()
    assert set(known) == set().union(*pages().values())
    texts = [text for page in pages() for _, of, text in _marked(page.read_text()) if of == name]
    assert texts == [known[name]]


def _marked(text):
    """Return start, name and content of each generated part of a page."""
    return [(m.start(), m[2], m[0].removeprefix(m[1]).removesuffix(m[3]).strip("\n")) for m in PART.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=of_root)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not heading or heading in _headings(file), target


def _headings(page):
    """Return the link anchors that GitHub makes from a page's headings."""
    lines = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=of_root)
def test_named_files_targets_and_commands_exist(page):
    text = ELSEWHERE.sub("", page.read_text())
    # A path from the root ends before a placeholder such as <stage> or a pattern's star.
    for named in re.findall(rf"(?<![\w./-])(?:{'|'.join(OF_THE_PROJECT)})/[\w./-]*", text):
        assert (ROOT / named.rstrip(".")).exists(), named
    for named in re.findall(r"(?<![\w./<>-])[\w/]+\.(?:py|ipynb|cff)\b", text):
        assert any(f"/{path}".endswith(f"/{named}") for path in [*FILES, *ROOT.glob("*.cff")]), named
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    shell, spans = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL), re.findall(r"`([^`]+)`", FENCED.sub("", text))
    code = "\n".join(["", *shell, *spans])
    for line in re.findall(r"\nmake ([a-z -]+)", code):
        assert set(line.split()) <= set(targets), line
    for command in re.findall(r"\n(?:\w+=\S+ )*hftlight ([a-z]+)\b", code):
        assert (ROOT / f"src/hftlight/cli/{command}.py").is_file(), command
        assert (ROOT / f"recipes/{command}.py").is_file(), command


def test_every_attack_and_judge_is_on_its_page():
    for page, names in (("attacks", ATTACKS), ("evaluation", JUDGES)):
        text = (ROOT / f"src/hftlight/{page}/README.md").read_text()
        assert [name for name in names if f"`{name}`" not in text] == []
