"""Accuracy over a setting: the lines of a suite's runs, with intervals over seeds, as a picture.

results = collect("runs", tasks=data.TASKS, methods=METHODS)
figure = draw_sweep(read_sweep(results, "mask_prob"), "mask_prob")
"""

from __future__ import annotations

import json

from baselines import METHODS
from figures import LOOKS, SMALL, fold, tile
from files import RunError
from runs import Result
from stats import interval
from table import label

APART = ("seed", "val", "dataset", "checkpoint")  # what is no setting of a line
WIDE = ("lr", "rank", "batch_size", "weight_decay", "lambda_lr")  # settings for a log axis


def read_sweep(results: list[Result], setting: str) -> dict[tuple, dict]:
    """{(dataset, split): {line: {value of the setting: {seed: top-1}}}} of finished runs.

    A line is a configuration without the setting, and without what goes with it, as a learning rate
    chosen for each value. Runs whose method has no such setting have the value None. Raises
    RunError if nowhere a line has two values.
    """
    panels: dict[tuple, list] = {}
    for result in results:
        key = result.metrics["dataset"], result.split
        panels.setdefault(key, []).append(result)
    sweeps = {}
    for panel, members in panels.items():
        others = without(members, setting)
        rivals = [settings_of(result, others) for result in members]
        lines: dict[str, dict] = {}
        for result in members:
            own = {"method": result.arguments["method"], **result.arguments}
            points = lines.setdefault(label(own, rivals), {})
            seeds = points.setdefault(value_of(result, setting), {})
            seeds[result.metrics["seed"]] = result.top1
        if any(len(points) > 1 for points in lines.values()):
            sweeps[panel] = lines
    if not sweeps:
        names = {name for result in results for name in result.identity if name not in APART}
        raise RunError(
            f"--sweep {setting}: no run was repeated with another value; "
            f"settings of these runs: {', '.join(sorted(names))}"
        )
    return sweeps


def value_of(result: Result, setting: str):
    """The value of a setting, a list as text; None if the run's method has none."""
    usual = METHODS[result.arguments["method"]].settings.get(setting)
    value = result.arguments.get(setting, usual)
    return ",".join(value) if isinstance(value, list) else value


def settings_of(result: Result, names: list[str]) -> dict:
    """Those of these settings that a run's identity has."""
    return {name: result.identity[name] for name in names if name in result.identity}


def without(results: list[Result], setting: str) -> list[str]:
    """The settings that tell lines of a sweep apart: neither `setting`, nor what is decided by it
    and the others."""
    names = dict.fromkeys(name for result in results for name in result.identity)
    kept = [name for name in names if name not in (*APART, setting)]
    for name in list(kept):
        rest = [other for other in kept if other != name]
        found: dict[str, set] = {}  # a point -> the setting's values there
        for result in results:
            point = [value_of(result, setting), settings_of(result, rest)]
            values = found.setdefault(json.dumps(point), set())
            values.add(json.dumps(result.identity.get(name)))
        if name not in ("method", "model") and all(len(values) == 1 for values in found.values()):
            kept = rest
    return kept


def draw_sweep(sweeps: dict[tuple, dict], setting: str):
    """Top-1 over the setting, a plot for each data set and split: the mean of the seeds and its
    95 % interval, and for methods without the setting a level line."""
    most = max(map(len, sweeps.values()))  # lines of a plot
    size = 3.6 if len(sweeps) > 1 else 5.0, 2.8 + 0.17 * most
    figure, axes = tile(len(sweeps), 2, size)
    for axis, ((dataset, split), lines) in zip(axes, sweeps.items(), strict=True):
        values = {value for points in lines.values() for value in points if value is not None}
        numbers = all(isinstance(value, int | float) for value in values)
        ticks = sorted(values, key=None if numbers else str)
        places = ticks if numbers else list(range(len(ticks)))
        logarithmic = numbers and setting in WIDE
        ends = []
        for number, (name, points) in enumerate(lines.items()):
            shift = 0.012 * (number - (len(lines) - 1) / 2)  # else bars hide each other
            own = {}
            for place, value in zip(places, ticks, strict=True):
                if value in points:
                    own[moved(place, places, shift, logarithmic)] = points[value]
            ends += draw_line(axis, name, LOOKS[number % len(LOOKS)], own, points.get(None))
        if logarithmic:
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.set_ylim(*limits(ends))
        names = [f"{value:g}" if numbers else str(value) for value in ticks]
        axis.set_xticks(places, names)
        axis.set_title(dataset, fontsize=8)
        axis.set_xlabel(setting, fontsize=8)
        axis.set_ylabel(f"{split} top-1 (%), mean and 95 % interval", fontsize=8)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), **SMALL)
    return figure


def moved(place: float, places: list, shift: float, logarithmic: bool) -> float:
    """A place on an axis, moved by that share of its length."""
    low, high = min(places), max(places)
    return place * (high / low) ** shift if logarithmic else place + shift * (high - low)


def draw_line(axis, name: str, look: str, points: dict, level: dict | None) -> list[tuple]:
    """A line of {place: {seed: top-1}}, and a level line of {seed: top-1} if there is one; returns
    (mean, low, high) of each."""
    counts = [len(seeds) for seeds in (*points.values(), level or {}) if seeds]
    n = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else counts[0]
    words = fold(f"{name} (n = {n})", 60)
    ends = [interval(list(seeds.values())) for seeds in points.values()]
    (line,) = axis.plot([], [], look, label=words, markersize=4, linewidth=1.2)
    color = line.get_color()
    if ends:
        means = [mean for mean, _, _ in ends]
        halves = [0 if high is None else high - mean for mean, _, high in ends]
        looks = {"color": color, "markersize": 4, "capsize": 2.5, "linewidth": 1.2}
        axis.errorbar(list(points), means, halves, fmt=look, **looks)
    if level:
        mean, low, high = interval(list(level.values()))
        ends.append((mean, low, high))
        axis.axhline(mean, color=color, linestyle=look[1:])
        if low is not None:
            axis.axhspan(low, high, color=color, alpha=0.15, linewidth=0)
    return ends


def limits(ends: list[tuple]) -> tuple[float, float]:
    """The ends of the axis for these (mean, low, high): wide intervals of few seeds leave it."""
    means = [mean for mean, _, _ in ends]
    room = max(1.0, max(means) - min(means))
    lows = [mean if low is None else low for mean, low, _ in ends]
    highs = [mean if high is None else high for mean, _, high in ends]
    low = max(min(lows), min(means) - room, 0)
    high = min(max(highs), max(means) + room, 100)
    return low - 0.05 * room, high + 0.05 * room
