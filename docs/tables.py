"""Tables of the documentation, from the committed results of benchmarks/results and nothing else.

A hook of mkdocs: a line ``<!-- table: NAME FILE ... -->`` of a page becomes the table NAME of
benchmarks/results/FILE.json.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"^<!-- table: (\S+) (.+) -->$", re.MULTILINE)


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(machine: dict[str, Any]) -> str:
    load = machine["load_average"]
    return (
        f"{machine['cpu']}, {machine['logical_cpus']} processors, {machine['torch_threads']} threads, "
        f"{machine['isa']}, torch {machine['torch']}, load {load} at the start, {machine['date'][:10]}."
    )


def medians(path: Path) -> str:
    """The README's table: a row a side, a column a workload."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table, _, _ = module.table(path).rpartition("\n\n")
    return f"{table}\n\n{_machine(_load(path)['machine'])}"


def rates(*paths: Path) -> str:
    """Tasks a second of each side, a column a workload."""
    workloads = [w for path in paths for w in _load(path)["workloads"]]
    sides = list(dict.fromkeys(side["side"] for w in workloads for side in w["sides"]))
    rows = []
    for name in sides:
        medians = [
            next((s["median_seconds"] for s in w["sides"] if s["side"] == name and "median_seconds" in s), None)
            for w in workloads
        ]
        cells = ["-" if m is None else f"{w['workload']['tasks'] / m:,.3g}" for w, m in zip(workloads, medians)]
        rows.append([name, *(cell if "e" not in cell else f"{float(cell):,.0f}" for cell in cells)])
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    return _rows(["tasks a second", *(w["workload"]["name"] for w in workloads)], rows)


def errors(path: Path) -> str:
    """Relative errors of each side's meta-gradient from the float64 reference: in float64, and as it was timed."""
    workloads = _load(path)["workloads"]
    sides = list(dict.fromkeys(side["side"] for w in workloads for side in w["sides"]))
    rows = []
    for name in sides:
        cells = []
        for w in workloads:
            found = [s for s in w["sides"] if s["side"] == name and "median_seconds" in s]
            cells.append(" / ".join(_error(found[0][f"error_{t}"]) for t in ("float64", "float32")) if found else "-")
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    return _rows(["float64 / float32", *(w["workload"]["name"] for w in workloads)], rows)


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.0e}"


def sinusoid(path: Path) -> str:
    """Errors of the MAML paper's sinusoid experiment by inner steps."""
    document = _load(path)
    paper, runs = document["paper"], document["runs"]
    steps = [row["steps"] for row in next(iter(runs.values()))["losses"]]
    rows = []
    for name, result in runs.items():
        found = {row["steps"]: f"{row['mean']:.2f} ± {row['interval']:.2f}" for row in result["losses"]}
        rows.append([f"{name}, trained in {result['train_seconds']:.0f} s", *(found[k] for k in steps)])
    rows.append(["the paper's 5-shot", *(str(paper.get(str(k), "")) for k in steps)])
    return _rows(["inner steps", *map(str, steps)], rows) + f"\n\n{_machine(document['machine'])}"


def quadratics(path: Path) -> str:
    """Mean loss of every optimiser after some of the steps."""
    document = _load(path)
    last = document["settings"]["steps"]
    steps = [k for k in (0, 10, 20, 50, 100) if k <= last]
    optimizers = sorted(document["optimizers"].items(), key=lambda item: item[1]["curve"][-1])
    rows = [
        [name, "as trained" if name == "LSTM" else f"{found['lr']:.2g}", *(f"{found['curve'][k]:.3f}" for k in steps)]
        for name, found in optimizers
    ]
    settings, machine = document["settings"], _machine(document["machine"])
    trained = f"The LSTM was trained by {settings['iterations']:,} meta-steps in {document['train_seconds']:,.0f} s."
    return _rows(["optimiser", "rate", *(f"after {k}" for k in steps)], rows) + f"\n\n{trained} {machine}"


def lomaml_sinusoid(path: Path) -> str:
    """Errors on unseen waves of MAML and LOMAML, a column a seed."""
    document = _load(path)
    seeds = sorted({run["seed"] for run in document["runs"]})
    rows = {(run["learner"], f"{run['iterations']:,}"): {} for run in document["runs"]}
    for run in document["runs"]:
        rows[run["learner"], f"{run['iterations']:,}"][run["seed"]] = f"{run['mean']:.3f} ± {run['interval']:.3f}"
    table = [[*names, *(found.get(seed, "-") for seed in seeds)] for names, found in rows.items()]
    header = ["learner", "meta-steps", *(f"seed {seed}" for seed in seeds)]
    return _rows(header, table) + f"\n\n{_machine(document['machine'])}"


def accuracy(*paths: Path) -> str:
    """Accuracies of the demo's learners on letters of unseen scripts."""
    rows = []
    for document in map(_load, paths):
        recipe, found = document["recipe"], document["accuracy"]
        rows.append(
            [
                recipe["learner"],
                f"{recipe['ways']}-way {recipe['shots']}-shot",
                f"{100 * found['mean']:.1f} ± {100 * found['interval']:.1f} %",
                str(document["tasks"]),
            ]
        )
    return _rows(["learner", "tasks", "accuracy, 95 % interval", "number of tasks"], rows)


_LEARNERS = {"maml": "MAML", "fomaml": "FOMAML", "lomaml": "LOMAML", "protonets": "ProtoNets"}


def _percent(found: dict[str, float], unit: str = " %") -> str:
    return f"{100 * found['mean']:.1f} ± {100 * found['interval']:.1f}{unit}"


def omniglot(path: Path) -> str:
    """Accuracies of every row: transductive / inductive."""
    document = _load(path)
    done, rows = document["rows"], []
    tasks = list(dict.fromkeys(name.partition("-")[2] for name in done))
    for source, learner in dict.fromkeys((n.split("/")[0], n.split("/")[1].split("-")[0]) for n in done):
        cells = []
        for task in tasks:
            found = done.get(f"{source}/{learner}-{task}")
            both = found and (found["metafast"]["accuracy"], found["inductive"])
            cells.append(" / ".join(_percent(one, "") for one in both) if both else "-")
        rows.append([_LEARNERS[learner], source, *cells])
    header = ["%, transductive / inductive", "source", *(task.replace("-", " ") for task in tasks)]
    return _rows(header, rows) + f"\n\n{_machine(document['machine'])}"


def omniglot_alphabets(path: Path) -> str:
    """20-way 1-shot accuracies with tasks of one alphabet each."""
    rows = []
    for name, found in _load(path)["rows"].items():
        if "within_alphabet" in found:
            inside, recipe = found["within_alphabet"], found["recipe"]
            names = ", ".join(inside["alphabets"]).replace("_", " ")
            accuracies = (_percent(inside[how]) for how in ("transductive", "inductive"))
            rows.append([_LEARNERS[recipe["learner"]], name.split("/")[0], names, *accuracies])
    return _rows(["learner", "source", "alphabets", "transductive", "inductive"], rows)


def omniglot_reference(path: Path) -> str:
    """metafast beside the reference implementation: accuracies, and seconds of the same training."""
    rows = []
    for name, found in _load(path)["rows"].items():
        if "reference" in found:
            ours, plain = found["metafast"], found["reference"]
            seconds = [side["train_seconds"] for side in (ours, plain)]
            rows.append(
                [
                    name,
                    str(found["iterations"]),
                    *(_percent(side["accuracy"]) for side in (ours, plain)),
                    "yes" if plain["agrees"] else "no",
                    *(f"{s:.0f} s" for s in seconds),
                    f"{seconds[1] / seconds[0]:.1f}x",
                ]
            )
    header = ["row", "meta-steps", "metafast", "reference", "agree", "metafast", "reference", "ratio"]
    return _rows(header, rows)


def omniglot_agreement(path: Path) -> str:
    """Gradients' errors along the training, both float64 trainings, and the accuracies that float32 leaves open."""
    rows = []
    for name, found in _load(path)["rows"].items():
        double = found["float64"]
        means = [100 * one["accuracy"]["mean"] for one in found["float32"]]
        rows.append(
            [
                name,
                f"{found['gradients']['largest_error']:.0e} ({found['gradients']['steps']})",
                *(_percent(double[side]["accuracy"]) for side in ("metafast", "reference")),
                f"{double['weights_apart']:.0e}",
                f"{min(means):.1f} to {max(means):.1f} % ({len(means)})",
            ]
        )
    header = ["row", "gradient's error", "float64: metafast", "reference", "weights apart", "float32, by a rounding"]
    return _rows(header, rows)


TABLES: dict[str, Callable[..., str]] = {
    "medians": medians,
    "rates": rates,
    "errors": errors,
    "sinusoid": sinusoid,
    "quadratics": quadratics,
    "lomaml-sinusoid": lomaml_sinusoid,
    "accuracy": accuracy,
    "omniglot": omniglot,
    "omniglot-alphabets": omniglot_alphabets,
    "omniglot-reference": omniglot_reference,
    "omniglot-agreement": omniglot_agreement,
}


def fill(markdown: str) -> str:
    """The page with its tables.

    Raises:
        KeyError, FileNotFoundError: a table or a file that does not exist.
    """
    return _PLACE.sub(
        lambda place: TABLES[place[1]](*(RESULTS / f"{name}.json" for name in place[2].split())), markdown
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return fill(markdown)
