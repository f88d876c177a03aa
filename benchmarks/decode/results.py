"""The CSV of decoded text, the table on the screen, and the plot."""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path

MACHINE = ("date", "commit", "machine", "isa", "threads", "specdec_ops", "torch", "python")
VERSIONS = ("transformers", "economize", "xllamacpp", "openvino-genai")
COLUMNS = (
    *("model", "prompts", "batch", "temperature", "requests", "contestant", "role", "weights", "problem", "texts"),
    *("tokens", "tokens_per_call", "c", "rows", "t_rows", "pass_ms", "host_ms", "tokens_per_second"),
    *("ratio_hf", "ratio_hf_low", "ratio_hf_high", "ratio_plain", "ratio_plain_low", "ratio_plain_high"),
    *MACHINE,
    *VERSIONS,
    "command",
)
OURS, THEIRS, LINE = "#1f5fa8", "#d1661b", "#999999"


def versions() -> dict[str, str]:
    """Of the packages that take part; "" where one is not installed."""
    found = {}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def write(path: Path, rows: Iterable[dict], header: bool, columns: Sequence[str] = COLUMNS) -> None:
    """Start a file with the header, or append to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if header else "a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if header:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path) -> list[dict]:
    """Rows as they stand in the file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _number(value, form: str) -> str:
    return "" if value in ("", None) else format(float(value), form)


def _ratio(row: dict, name: str) -> str:
    text = _number(row.get(f"ratio_{name}"), ".2f")
    low, high = row.get(f"ratio_{name}_low"), row.get(f"ratio_{name}_high")
    return text if low in ("", None) else f"{text} ({float(low):.2f} to {float(high):.2f})"


def table(rows: list[dict]) -> list[str]:
    """Lines for the screen, of the rows over all prompts of each cell."""
    lines = [
        f"{'batch':>5} {'T':>4}  {'contestant':34} {'weights':8} {'tok/s':>7} {'per call':>8} {'c':>6} {'rows':>6} "
        f"{'t(rows)':>7} {'host ms':>7}  {'x generate':20} {'x ours plain':20} texts"
    ]
    for row in rows:
        if row["prompts"] not in ("all", "mixed"):
            continue
        start = f"{row['batch']:>5} {row['temperature']:>4}  {row['contestant']:34} {row['weights']:8}"
        if row["problem"]:
            lines.append(f"{start} {row['problem']}")
            continue
        forms = {"tokens_per_second": ">7.1f", "tokens_per_call": ">8.2f", "c": ">6.3f", "rows": ">6.1f"}
        forms |= {"t_rows": ">7.2f", "host_ms": ">7.2f"}
        widths = {"tokens_per_second": 7, "tokens_per_call": 8, "c": 6, "rows": 6, "t_rows": 7, "host_ms": 7}
        figures = " ".join(_number(row.get(name), form).rjust(widths[name]) for name, form in forms.items())
        lines.append(f"{start} {figures}  {_ratio(row, 'hf'):20} {_ratio(row, 'plain'):20} {row['texts']}")
    return lines


def draw(rows: list[dict], path: Path) -> str:
    """Tokens per second of all contestants, a panel for each cell."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    shown = [r for r in rows if r["prompts"] in ("all", "mixed") and r.get("tokens_per_second") not in ("", None)]
    if not shown:
        return "no plot: nothing was timed"
    cells = list(dict.fromkeys((str(row["batch"]), str(row["temperature"])) for row in shown))
    names = list(dict.fromkeys(f"{row['contestant']}, {row['weights']}" for row in shown))
    width, height = 3.2 * len(cells) + 3, 1.4 + 0.32 * len(names)
    figure, panels = pyplot.subplots(1, len(cells), figsize=(width, height), sharey=True, squeeze=False)
    for axes, (batch, temperature) in zip(panels[0], cells, strict=True):
        of_cell = [r for r in shown if (str(r["batch"]), str(r["temperature"])) == (batch, temperature)]
        for row in of_cell:
            place, value = names.index(f"{row['contestant']}, {row['weights']}"), float(row["tokens_per_second"])
            axes.barh(place, value, color=OURS if row["role"].startswith("ours") else THEIRS)
            axes.text(value, place, f" {value:.0f}", va="center", fontsize=7)
        axes.set_title(f"batch {batch}, T = {temperature}", fontsize=9)
        axes.set_xlabel("tokens per second", fontsize=8)
        axes.margins(x=0.15)
    panels[0][0].set_yticks(range(len(names)), labels=names, fontsize=8)
    panels[0][0].invert_yaxis()
    first = shown[0]
    figure.suptitle(
        f"{first['model']}: {first['machine']}, {first['isa']}, {first['threads']} threads, torch {first['torch']}, "
        f"commit {first['commit']}, {first['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot: {path.name}"
