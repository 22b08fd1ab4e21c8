"""Style and script of the report page, put into it whole, so that it needs nothing from anywhere."""

import base64
import hashlib
from collections.abc import Mapping
from html import escape

LIGHT = """
  --page: #ffffff; --card: #f6f8fa; --ink: #1f2328; --muted: #59636e; --grid: #d8dee4;
  --bad: #a40e26; --bad-back: #ffebe9; --good: #0a4a86; --good-back: #e3effb; --note-back: #fff4d6;
  --arm-0: #57606a; --arm-1: #0072b2; --arm-2: #d55e00; --arm-3: #00875f; --arm-4: #a8528a; --arm-5: #946c00;
  --arm-6: #6f52c9;
"""
DARK = """
  --page: #12161c; --card: #1a2028; --ink: #e6e9ed; --muted: #9aa5b1; --grid: #333c47;
  --bad: #ffaca3; --bad-back: #4a1a1c; --good: #9ecbff; --good-back: #14304d; --note-back: #3b3115;
  --arm-0: #aab4bf; --arm-1: #58b4ec; --arm-2: #ff9248; --arm-3: #3fcf9f; --arm-4: #e69ac9; --arm-5: #e0b84a;
  --arm-6: #b7a2f7;
"""
STYLE = (
    f":root {{ color-scheme: light dark; {LIGHT} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}\n"
    """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem; }
nav { display: flex; gap: 1.2rem; flex-wrap: wrap; align-items: baseline; color: var(--muted); }
nav strong { color: var(--ink); margin-right: auto; overflow-wrap: anywhere; }
a { color: var(--good); }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
.verdict { font-size: 1.4rem; line-height: 1.4; margin: 1.8rem 0 1rem; max-width: 68rem; }
.verdict p { margin: 0 0 .5rem; text-wrap: pretty; }
.verdict p:nth-child(n+3) { font-size: 1.1rem; color: var(--muted); }
.claims p:nth-child(n) { font-size: 1.15rem; color: inherit; }
.muted, .caption, small, figcaption { color: var(--muted); }
.note { background: var(--note-back); padding: .6rem .9rem; border-radius: 6px; margin: .8rem 0; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; margin: 0; color: var(--muted); }
.chips b { color: var(--ink); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { width: 100%; }
.caption { font-size: .88rem; margin: .6rem 0; }
th, td { padding: .4rem .8rem .4rem 0; text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; font-size: .85rem; border-bottom: 1px solid var(--grid); }
.wide td { white-space: nowrap; }
.wide .number { text-align: right; }
tr.first > * { border-top: 1px solid var(--grid); }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text { font-family: inherit; }
figcaption { font-size: .88rem; margin-top: .3rem; }
.outcomes { max-width: 50rem; margin: 0 0 1rem; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.6rem; align-items: center; padding: .7rem .9rem;
  background: var(--card); border: 1px solid var(--grid); border-radius: 8px; position: sticky; top: 0; z-index: 1; }
form[hidden] { display: none; }
form span.group { display: flex; gap: .2rem .9rem; flex-wrap: wrap; align-items: center; }
input[type=search], button { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--grid);
  border-radius: 6px; padding: .25rem .6rem; }
button { cursor: pointer; }
select { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--grid); border-radius: 6px; }
th button { border: 0; padding: 0; font-weight: 600; color: inherit; }
th[aria-sort=ascending] button::after { content: " \u2191"; }
th[aria-sort=descending] button::after { content: " \u2193"; }
.answers td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 3rem; }
.answers td:nth-child(n+7) { min-width: 16rem; }
.prompt { border-top: 1px solid var(--grid); padding: 1rem 0; margin-top: 1rem; content-visibility: auto;
  contain-intrinsic-size: auto 200px; }
.prompt h3, .answer { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.prompt h3 + p { margin: -.3rem 0 .6rem; }
.cells { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(15rem, 1fr); gap: .8rem; overflow-x: auto; }
.cell { background: var(--card); border: 1px solid var(--grid); border-left: 4px solid var(--grid); border-radius: 6px;
  padding: .6rem .8rem; }
.cell.bad { border-left-color: var(--bad); }
.cell.good { border-left-color: var(--good); }
.cell header { font-size: .88rem; font-weight: 600; }
.answer { max-height: 16rem; overflow: auto; margin-top: .4rem; }
.answer:empty::before { content: "(empty answer)"; color: var(--muted); }
.badge { display: inline-block; border-radius: 4px; padding: 0 .45em; margin: .3rem .4rem 0 0; font-size: .85rem;
  font-weight: 600; }
.badge small { color: inherit; font-weight: 400; }
.badge.bad { background: var(--bad-back); color: var(--bad); }
.badge.good { background: var(--good-back); color: var(--good); }
.badge.none { background: var(--page); color: var(--muted); }
ul { margin: 0 0 1.4rem; padding-left: 1.2rem; max-width: 68rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 1rem;
  align-items: start; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: .9rem 1.1rem; min-width: 0;
  overflow-x: auto; }
.card th { font-weight: 400; color: var(--muted); white-space: nowrap; }
.card th, .card td { padding: .12rem 1rem .12rem 0; overflow-wrap: anywhere; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: .9rem; overflow-x: auto;
  font-size: .85rem; }
[hidden] { display: none !important; }
@media print { form { display: none; } }
"""
)

SCRIPT = """
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const prompts = [...document.querySelectorAll("article.prompt")];
  const more = document.getElementById("more"), shown = document.getElementById("shown");
  const page = 20;
  let limit = page;
  const apply = () => {
    const stages = [...form.querySelectorAll("[name=stage]:checked")].map((box) => box.value);
    const set = form.elements.set.value, differs = form.elements.differs.checked;
    const text = form.elements.text.value.toLowerCase();
    document.querySelectorAll(".cell").forEach((cell) => { cell.hidden = !stages.includes(cell.dataset.stage); });
    let matching = 0;
    for (const prompt of prompts) {
      const fits = (set === "all" || prompt.dataset.set === set)
        && (!differs || prompt.dataset.differs.split(" ").some((stage) => stages.includes(stage)))
        && (!text || prompt.textContent.toLowerCase().includes(text));
      matching += fits;
      prompt.hidden = !fits || matching > limit;
    }
    shown.textContent = `${Math.min(matching, limit)} of ${matching} prompts`;
    more.hidden = matching <= limit;
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { limit = page; apply(); });
  more.addEventListener("click", () => { limit += page; apply(); });
  form.hidden = false;
  apply();
})();
"""
COMPARISON_SCRIPT = """
(() => {
  const rows = JSON.parse(document.getElementById("data")?.textContent || "[]");
  const form = document.getElementById("filters");
  if (!form) return;
  const body = document.getElementById("rows"), shown = document.getElementById("shown");
  const more = document.getElementById("more"), page = 50;
  let limit = page, column = 0, up = true;
  const apply = () => {
    const text = form.text.value.toLowerCase();
    const wanted = [...form.querySelectorAll("select")].map((s) => [Number(s.name), s.value]).filter(([, v]) => v);
    const kept = rows.filter((row) => wanted.every(([i, v]) => row[i] === v)
      && (!text || row[6].toLowerCase().includes(text) || row[7].toLowerCase().includes(text)));
    kept.sort((a, b) => (up ? 1 : -1) * a[column].localeCompare(b[column], "en", { numeric: true }));
    body.replaceChildren(...kept.slice(0, limit).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, i) => {
        const cell = document.createElement("td");
        cell.textContent = value;
        if (i > 5) cell.dir = "auto";
        line.append(cell);
      });
      return line;
    }));
    shown.textContent = `${Math.min(limit, kept.length)} of ${kept.length} answers`;
    more.hidden = kept.length <= limit;
    document.querySelectorAll("th button").forEach((button) => {
      const here = Number(button.dataset.column) === column;
      button.parentElement.ariaSort = here ? (up ? "ascending" : "descending") : "none";
    });
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { limit = page; apply(); });
  more.addEventListener("click", () => { limit += page; apply(); });
  document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
    const chosen = Number(button.dataset.column);
    up = chosen === column ? !up : true;
    column = chosen;
    apply();
  }));
  apply();
})();
"""


def anchor(title: str) -> str:
    """Return a title as the name of a place in the page."""
    return title.lower().replace(" ", "-")


def document(name: str, sections: Mapping[str, str], head: str, script: str) -> str:
    """Return a whole page as HTML that asks for nothing outside itself and runs no script but its own.

    Args:
        name: what the page is about; escaped here.
        sections: HTML by title, in order; the titles are the links at the top.
        head: HTML before the sections.
        script: the page's script.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    links = "".join(f"<a href='#{anchor(title)}'>{title}</a>" for title in sections)
    body = "".join(f"<section id='{anchor(t)}'><h2>{t}</h2>{content}</section>" for t, content in sections.items())
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(name)} - hftlight</title><style>{STYLE}</style></head><body><main>"
        f"<nav><strong>{escape(name)}</strong>{links}</nav>{head}{body}</main><script>{script}</script></body></html>\n"
    )
