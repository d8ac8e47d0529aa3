"""The report of a run: one HTML file with its figures inside, which opens anywhere and can be sent as it is."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from resode.runs import Run


@dataclass(frozen=True)
class Picture:
    """A figure with its title, a sentence that says what to see in it, and the name of its file."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Table:
    """A table with its title, a sentence that says what to see in it, column heads, and rows of text."""

    title: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


Section = Picture | Table


def png(figure: Figure) -> bytes:
    """``figure`` as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def write_report(run: Run, title: str, introduction: Sequence[str], sections: Sequence[Section]) -> list[Path]:
    """Write ``report.html`` and a PNG of each picture (``figures/NAME.png``) into the folder of ``run``.

    Returns:
        The paths written, the report's first.
    """
    images = {section.name: png(section.figure) for section in sections if isinstance(section, Picture)}
    pictures = [run.write(f"figures/{name}.png", image) for name, image in images.items()]
    parts = [f"<p>{html.escape(paragraph)}</p>" for paragraph in introduction]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts.append(_table(section) if isinstance(section, Table) else _picture(section, images[section.name]))
    page = _PAGE.format(title=html.escape(title), body="\n".join(parts))
    return [run.write("report.html", page), *pictures]


def _picture(picture: Picture, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.heads)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    caption = html.escape(table.caption)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><p class='caption'>{caption}</p>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem; }}
th, td {{ text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 0; }} img {{ max-width: 100%; height: auto; }}
figcaption, .caption {{ color: #444; font-size: .92rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
