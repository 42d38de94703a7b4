"""The verdicts: a claim's folder (picture, paragraph), and one page of all."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from leanseek.errors import InputError
from leanseek.pages import card, drawn, page
from leanseek.plotting import Figure
from leanseek.reproduce.claims import SEEDS, Claim, Verdict
from leanseek.reproduce.results import Found
from leanseek.reproduce.runner import results_path
from leanseek.writing import replace_file, writing

_COLOR = {
    "held": "#10b981", "held in part": "#3b82f6", "not seen at this scale": "#a16207", "contradicted": "#ef4444",
    "one seed alone": "#7b8494", "not run": "#7b8494",
}  # fmt: skip


@dataclass(frozen=True)
class Judged:
    claim: Claim
    found: Found
    verdict: Verdict

    @property
    def begun(self) -> bool:
        return bool(self.found.seeds)

    def figure(self) -> Figure:
        """Raises nothing: only called where `begun`."""
        figure = Figure(figsize=(11, 3.6), layout="constrained", facecolor="none")
        self.claim.script.draw(figure, self.found)
        return figure

    @property
    def effort(self) -> str:
        """How it is run, and what it took."""
        seeds = len(self.found.seeds)
        machines = sorted({run.machine["cpu"] for runs in self.found.runs.values() for run in runs.values()})
        quick = " --quick" if self.claim.quick else ""
        missing = "" if seeds == len(SEEDS) else f" of {len(SEEDS)}"
        return (
            f"leanseek reproduce {self.claim.name}{quick}: {seeds}{missing} seed{'s' * (seeds != 1)}, "
            f"{self.found.hours:.1f} core hours on {' and '.join(machines)}"
        )


def judge(claim: Claim, runs: Path) -> Judged:
    found = Found(claim, results_path(claim, runs))
    if not found.seeds:
        return Judged(claim, found, Verdict("not run", "", f"Run it: `leanseek reproduce {claim.name}`"))
    verdict: Verdict = claim.script.judge(found)
    if claim.arms and len(found.seeds) < 2 and not claim.quick:  # nothing is called by one seed
        verdict = verdict._replace(word="one seed alone")
    return Judged(claim, found, verdict)


def write_folder(judged: Judged) -> None:
    """picture.png and README.md beside results.json; nothing of a quick look."""
    if judged.claim.quick or not judged.begun:
        return
    folder = judged.claim.folder
    with writing(folder):
        judged.figure().savefig(folder / "picture.png", dpi=110, facecolor="white")
        text = f"# {judged.claim.file.title}\n\n{_markdown(judged, 'picture.png')}\n"
        replace_file(folder / "README.md", text.encode())


def write_report(all_judged: list[Judged], out: Path) -> None:
    """One page with every claim, HTML or Markdown by the name's ending.

    Raises:
        InputError: `out` ends in neither.
    """
    if out.suffix not in (".html", ".md"):
        raise InputError(f"--report {out} must end in .html or .md")
    text = _page(all_judged) if out.suffix == ".html" else _document(all_judged, out)
    with writing(out):
        replace_file(out, text.encode())


# ---- HTML ----


def _page(all_judged: list[Judged]) -> str:
    return page("The paper's claims · leanseek", _HEAD + "".join(map(_section, all_judged)))


_HEAD = """<h1>The claims of DeepSeek-V3, reproduced</h1>
<p>Small networks on real text, a few minutes of a core each. Means over seeds with their 95 % intervals; a difference
is called one only where its interval, paired by seed, excludes zero. What does not show at this size is said to.</p>
"""


def _section(judged: Judged) -> str:
    verdict, escape = judged.verdict, html.escape
    badge = f'<b style="color:{_COLOR[verdict.word]}">{verdict.word}</b>'
    body = f"<p><i>The paper</i>: {escape(judged.claim.file.paper)}</p>"
    if judged.begun:
        body += (
            f"<p><i>Here</i>: {badge}. {escape(verdict.ours)}</p>{drawn(judged.figure())}<p>{escape(verdict.text)}</p>"
        )
        body += f"<pre>{escape(judged.effort)}</pre>"
    else:
        body += f"<p>{badge}. {escape(verdict.text)}</p>"
    return card(judged.claim.file.title, body)


# ---- Markdown ----


def _document(all_judged: list[Judged], out: Path) -> str:
    rows = "".join(f"| [{j.claim.file.title}](#{j.claim.name}) | {j.verdict.word} |\n" for j in all_judged)
    sections = "\n".join(_part(judged, out) for judged in all_judged)
    return f"# The claims, reproduced\n\n{_INTRODUCTION}\n| claim | |\n|---|---|\n{rows}\n{sections}"


_INTRODUCTION = """`leanseek reproduce` runs them all, `leanseek reproduce CLAIM` one, `--quick` a tenth of it, and
`leanseek reproduce --report docs/claims.md` wrote this page. Small networks on real text, a few minutes of a core each;
means over seeds with their 95 % intervals. A difference is called one only where its interval, paired by seed, excludes
zero. What does not show at this size is said to.
"""


def _part(judged: Judged, out: Path) -> str:
    picture = Path("..") / "experiments" / judged.claim.name / "picture.png"
    return (
        f'<a id="{judged.claim.name}"></a>\n\n## {judged.claim.file.title}\n\n{_markdown(judged, picture.as_posix())}\n'
    )


def _markdown(judged: Judged, picture: str) -> str:
    lines = [
        f"The paper: {judged.claim.file.paper}",
        f"**{judged.verdict.word.capitalize()}.** {judged.verdict.ours or judged.verdict.text}",
    ]
    if judged.begun:
        lines += [f"![{judged.claim.file.title}]({picture})", judged.verdict.text, f"`{judged.effort}`"]
    return "\n\n".join(lines)
