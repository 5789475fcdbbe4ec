"""The page: one HTML file with its figures inside, without scripts or network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from powerflow_lit.reporting.figures import counted
from powerflow_lit.reporting.tables import Row

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.2rem; font-size: 1.25rem;
  border-bottom: 1px solid var(--line); } h3 { margin: 1.2rem 0 .3rem; font-size: 1.05rem; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; opacity: .8; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; border-radius: 4px;
  font-size: .82rem; }
ul { padding-left: 1.2rem; } li { margin: .2rem 0; overflow-wrap: anywhere; }
.warn { border-left: 4px solid #D55E00; padding: .2rem .8rem; background: var(--soft); }
.chip { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.bad::before { content: "\\2717\\00a0"; color: #D55E00; } /* cross */
.good::before { content: "\\2713\\00a0"; color: #009E73; } /* tick */
.open::before { content: "\\2013\\00a0"; }
small { opacity: .8; } .sd, .ci { opacity: .75; } .ci { display: block; font-size: .8em; }
"""
GUIDE = (
    "Curves are means over the runs (seeds) of a group, bands go from the least to the greatest "
    "run; thin lines that end in a cross are runs that did not finish, and are in no mean. Figures "
    "are of sampling at temperature 1. In tables, ± is the standard deviation over seeds and "
    "brackets hold the interval over evaluation problems, where it is known. A falling residual "
    "spread on samples of the base is the evidence of convergence; a small loss alone is not."
)


@dataclass
class Page:
    """Sections in the order in which they are added."""

    title: str
    note: str | None = None
    parts: list[str] = field(default_factory=list)

    def section(self, title: str, *parts: str) -> None:
        """A heading and its parts; nothing where all parts are empty."""
        if any(parts):
            self.parts.append(f"<h2>{escape(title)}</h2>")
            self.parts += [p for p in parts if p]

    def html(self) -> str:
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self.title)}</h1>\n{note}\n<p>{escape(GUIDE)}</p>\n"
            + "\n".join(self.parts)
            + "\n</body>\n</html>\n"
        )


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>" if text else ""


def warnings(lines: Sequence[str]) -> str:
    """A marked list, folded where it is long."""
    if not lines:
        return ""
    items = [f"<li>{escape(line)}</li>" for line in lines]
    shown, rest = items[:12], items[12:]
    more = (f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>"
            if rest else "")  # fmt: skip
    return f'<div class="warn"><ul>{"".join(shown)}</ul>{more}</div>'


def verdict(
    label: str, count: str, colour: str, said: Sequence[tuple[str, str, list[str]]], runs: int
) -> str:
    """A group's findings: words, tone and the numbers of each run."""
    items = []
    for words, tone, lines in said:
        of = f" ({len(lines)} of {runs} runs)" if runs > 1 else ""
        shown = "; ".join(lines[:1])
        rest = lines[1:]
        more = (f"<details><summary>{len(rest)} more</summary>{escape('; '.join(rest))}</details>"
                if rest else "")  # fmt: skip
        items.append(f'<li class="{tone}"><b>{escape(words)}</b>{of}: {escape(shown)}{more}</li>')
    return (
        f'<h3><span class="chip" style="background:{colour}"></span>{escape(label)} '
        f"<small>{escape(counted(count))}</small></h3>"
        f"<ul style='list-style:none;padding-left:.4rem'>{''.join(items)}</ul>"
    )


def figure(path: Path, caption: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)} <small>({escape(path.name)})</small></figcaption></figure>"
    )


def table(names: Sequence[str], rows: Sequence[Row], what: str = "runs") -> str:
    """The table, scrolling sideways on a narrow screen."""
    head = "".join(f"<th>{escape(n)}</th>" for n in ("", what, *names))
    body = []
    for row in rows:
        figures = "".join(f"<td>{_cell(str(row.cells[n]))}</td>" for n in names)
        body.append(f"<tr><td>{escape(row.label)}</td><td>{escape(row.count or '-')}</td>"
                    f"{figures}</tr>")  # fmt: skip
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>'
        f"{''.join(body)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    figures, bracket, interval = text.partition(" [")
    value, plus, sd = figures.partition(" ± ")
    found = escape(value)
    if plus:
        found += f' <span class="sd">± {escape(sd)}</span>'
    if bracket:
        found += f'<span class="ci">[{escape(interval)}</span>'
    return found


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    rows = "".join(
        f'<tr><td>{escape(k)}</td><td style="text-align:left;white-space:normal">{escape(v)}</td>'
        "</tr>"
        for k, v in pairs
        if v
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def commands(lines: Sequence[str], title: str = "") -> str:
    """Commands to copy, folded where they are many."""
    if not lines:
        return ""
    block = f"<pre>{escape(chr(10).join(lines))}</pre>"
    if len(lines) > 12:
        block = f"<details><summary>{len(lines)} commands</summary>{block}</details>"
    return (f"<p>{escape(title)}</p>" if title else "") + block
