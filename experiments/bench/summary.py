"""Of rows to ratios and tables.

A ratio is of medians: another's seconds over those of ours, so above 1 ours is the faster. Its spread is the smallest
and largest ratio within one round.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from experiments.bench.work import DEFAULT_LAYOUT, FLOOR, OUR_LAYOUT, OURS, SAME

Row = Mapping[str, Any]
DEFAULT, BEST = "default", "best"
WAYS = {
    DEFAULT: "each as its users feed it (table (b): ours channels-last, theirs contiguous; table (a): all contiguous)",
    BEST: "each in its own faster layout",
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and number."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(other: Row, ours: Row) -> dict[str, float]:
    """Seconds of ``other`` over those of ``ours``: of the medians, and the range over the rounds."""
    rounds = [a / b for a, b in zip(other["rounds"], ours["rounds"], strict=True)]
    return {
        "ratio": other["seconds"]["median"] / ours["seconds"]["median"],
        "min": min(rounds),
        "max": max(rounds),
        "n": len(rounds),
    }


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by table and case."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["table"], row["case"]), []).append(row)
    return found


def relate(rows: Sequence[dict[str, Any]]) -> None:
    """Write into each row its ratios to the floor and to torchdiffeq (contiguous), at its own number of evaluations."""
    for group in groups(rows).values():
        floor = lowest(row for row in group if row["peer"] == FLOOR)
        standard = next(
            (r for r in _timed(group) if r["peer"] == "torchdiffeq" and r["layout"] == DEFAULT_LAYOUT), None
        )
        for row in _timed(group):
            if floor is not None and row["peer"] != FLOOR:
                an_evaluation = floor["seconds"]["median"] / floor["evaluations"]
                row["to_floor"] = row["seconds"]["median"] / (an_evaluation * row["nfe_forward"])
            if standard is not None:
                row["to_torchdiffeq"] = row["seconds"]["median"] / standard["seconds"]["median"]


def lowest(rows: Iterator[Row] | Sequence[Row]) -> Row | None:
    """The row of the smallest median, of those that have one."""
    return min(_timed(rows), key=lambda row: row["seconds"]["median"], default=None)


def _timed(rows: Iterator[Any] | Sequence[Any]) -> Iterator[Any]:
    return (row for row in rows if "seconds" in row)


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For each table and case: the floor, ours, the ratios of the others to them, and peak memory."""
    summary: dict[str, dict[str, Any]] = {}
    for (table, case), group in groups(rows).items():
        by_label: dict[str, list[Row]] = {}
        for row in group:
            by_label.setdefault(row["label"], []).append(row)
        subjects = [label for label, those in by_label.items() if those[0]["subject"]]
        others = [label for label, those in by_label.items() if not those[0]["subject"] and label != FLOOR]
        ratios = []
        for mine in subjects:
            for other in others:
                ratios += _ratios(table, by_label[other], by_label[mine])
        found: dict[str, Any] = {"ratios": ratios, "nfe": _nfe(by_label)}
        found["to_floor"] = {
            label: {row["layout"]: row["to_floor"] for row in those if "to_floor" in row}
            for label, those in by_label.items()
            if any("to_floor" in row for row in those)
        }
        memory = {row["label"]: row["peak_mib"] for row in group if "peak_mib" in row}
        if memory:
            found["peak_mib"] = memory
        summary.setdefault(table, {})[case] = found
    return summary


def _nfe(by_label: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    return {label: those[0]["nfe_forward"] for label, those in by_label.items() if "nfe_forward" in those[0]}


def _ratios(table: str, theirs: Sequence[Row], mine: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """One label's ratios to one of ours, in both :data:`WAYS`."""
    for way in (DEFAULT, BEST):
        if way == BEST:
            pair = lowest(theirs), lowest(mine)
        else:
            ours_in = DEFAULT_LAYOUT if table == SAME else OUR_LAYOUT
            theirs_in = ours_in if theirs[0]["peer"] == OURS else DEFAULT_LAYOUT
            pair = _in(theirs, theirs_in), _in(mine, ours_in)
        if None in pair:
            continue
        other, ours = pair
        found = ratio(other, ours)
        yield {
            "way": way,
            "ours": ours["label"],
            "ours_layout": ours["layout"],
            "other": other["label"],
            "other_layout": other["layout"],
            **found,
            "per_evaluation": found["ratio"] * ours["nfe_forward"] / other["nfe_forward"],
        }


def _in(rows: Sequence[Row], layout: str) -> Row | None:
    return next((row for row in _timed(rows) if row["layout"] == layout), None)


def table(rows: Sequence[Row], summary: Mapping[str, Mapping[str, Any]], absent: Mapping[str, str]) -> str:
    """All rows and then the ratios, in Markdown."""
    lines = [f"{peer}: skipped, {why}" for peer, why in absent.items()]
    for (name, case), group in groups(rows).items():
        first = group[0]
        lines += ["", f"### {name}: {case}, batch {first['batch']} ({first['device']}, {first['arithmetic']})", ""]
        lines += ["| who | layout | seconds (range, n) | NFE | × floor | gradient off by | peak MiB |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [_line(row) for row in group]
        lines += [f"\n{why}." for why in dict.fromkeys(_excluded(row) for row in group) if why]
    lines += ["", "### Time of the others over ours (above 1: ours is faster)", ""]
    lines += [f"{way}: {said}." for way, said in WAYS.items()]
    lines += ["Per evaluation: the same, divided by each one's number of evaluations of f.", ""]
    lines += ["| table | case | other | ours | default (range) | best (range) | best, per evaluation |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, cases in summary.items():
        for case, found in cases.items():
            lines += _compact(name, case, found["ratios"])
    return "\n".join(lines).strip() + "\n"


def _line(row: Row) -> str:
    cells = [row["label"], row["layout"]]
    if "error" in row:
        return "| " + " | ".join([*cells, f"failed: {' '.join(row['error'].split())}", "", "", "", ""]) + " |"
    if "seconds" in row:
        said = row["seconds"]
        cells.append(f"{said['median']:.3g} ({said['min']:.3g}–{said['max']:.3g}, {said['n']})")
    else:
        cells.append("")
    back = f" + {row['nfe_backward']}" if row.get("nfe_backward") else ""
    cells.append(f"{row['nfe_forward']}{back}" if "nfe_forward" in row else "")
    cells.append(f"{row['to_floor']:.2f}" if "to_floor" in row else "")
    cells.append(_parity(row))
    cells.append(f"{row['peak_mib']:.0f}" if "peak_mib" in row else "")
    return "| " + " | ".join(cells) + " |"


def _parity(row: Row) -> str:
    if "gradient_difference" not in row:
        return ""
    return f"{row['gradient_difference']:.1e} ({row['parity'].partition(':')[0]})"


def _excluded(row: Row) -> str:
    parity = row.get("parity", "")
    return f"Gradient of {row['label']} {parity}" if parity.startswith("excluded") else ""


def _compact(name: str, case: str, ratios: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for each in ratios:
        pairs.setdefault((each["other"], each["ours"]), {})[each["way"]] = each
    for (other, ours), ways in pairs.items():
        cells = [name, case, other, ours]
        for way in (DEFAULT, BEST):
            found = ways.get(way)
            cells.append(f"{found['ratio']:.2f} ({found['min']:.2f}–{found['max']:.2f})" if found else "")
        cells.append(f"{ways[BEST]['per_evaluation']:.2f}" if BEST in ways else "")
        yield "| " + " | ".join(cells) + " |"
