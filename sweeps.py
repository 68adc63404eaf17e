"""Accuracy over a setting: the lines of a suite's runs, with intervals over seeds, as a picture.

results = collect("runs")
figure = draw_sweep(read_sweep(results, "mask_prob"), "mask_prob")
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import data
from baselines import METHODS
from figures import LOOKS, PAGE, fold, tile
from files import RunError
from flags import shown
from runs import Result
from stats import interval, natural
from table import label

NO_SETTINGS = ("seed", "val", "dataset", "checkpoint")
LINES = ("method", "model")  # always told apart
WIDE = ("lr", "rank", "batch_size", "weight_decay", "lambda_lr")  # settings for a log axis


def read_sweep(results: list[Result], setting: str) -> dict[tuple, dict]:
    """{(dataset, split): {line: {value of the setting: {seed: top-1}}}} of finished runs.

    A line is a configuration without the setting, and without what goes with it, as a learning rate
    chosen for each value. Runs whose method has no such setting have the value None. Raises
    RunError if nowhere a line has two values.
    """
    panels: dict[tuple, list] = {}
    for result in results:
        _, task = data.place_in_table(result.metrics["dataset"], result.identity)
        key = task, result.split
        panels.setdefault(key, []).append(result)
    sweeps = {}
    for panel, members in sorted(panels.items()):  # not by which ran first
        others = apart(members, setting)
        rivals = [settings_of(result, others) for result in members]
        lines: dict[str, dict] = {}
        for result in members:
            given = settings_of(result, others)
            name = label(result.arguments, given, rivals)
            points = lines.setdefault(name, {})
            scores = points.setdefault(value_of(result, setting), {})
            scores[result.metrics["seed"]] = result.top1
        if any(len(points) > 1 for points in lines.values()):
            names = sorted(lines, key=natural)
            sweeps[panel] = {name: lines[name] for name in names}
    if not sweeps:
        names = set()
        for result in results:
            names.update(result.identity)
        listing = ", ".join(sorted(names.difference(NO_SETTINGS, LINES)))
        raise RunError(
            f"--sweep {setting}: no run was repeated with another value; their settings: {listing}"
        )
    return sweeps


def value_of(result: Result, setting: str):
    """The value of a setting, a list as text; None if the run's method has none."""
    row = METHODS[result.arguments["method"]]
    value = result.arguments.get(setting, row.settings.get(setting))
    return shown(value) if isinstance(value, list | dict) else value


def settings_of(result: Result, names: list[str]) -> dict:
    """Those of these settings that a run's identity has."""
    own = result.identity
    return {name: own[name] for name in names if name in own}


def apart(results: list[Result], setting: str) -> list[str]:
    """The settings that tell lines of a sweep apart: neither `setting`, nor what is decided by it
    and the others."""
    names = {}  # in order, each once
    for result in results:
        names.update(dict.fromkeys(result.identity))
    kept = [name for name in names if name not in NO_SETTINGS]
    kept = [name for name in kept if name != setting]
    for name in list(kept):
        rest = [other for other in kept if other != name]
        if name not in LINES and decided(results, name, [setting, *rest]):
            kept = rest
    return kept


def decided(results: list[Result], name: str, others: list[str]) -> bool:
    """Whether runs that agree in all other settings agree in this one."""
    found: dict[str, set] = {}
    for result in results:
        agreed = [value_of(result, other) for other in others]
        values = found.setdefault(json.dumps(agreed), set())
        values.add(json.dumps(value_of(result, name)))
    return all(len(values) == 1 for values in found.values())


@dataclass
class Ruler:
    """Where the values of a setting are on an axis: numbers as they are, words one by one."""

    values: list
    logarithmic: bool = False

    @property
    def numeric(self) -> bool:
        return all(isinstance(value, int | float) for value in self.values)

    def place(self, value, shift: float = 0.0) -> float:
        """The place of a value, moved by that share of the axis."""
        places = self.values if self.numeric else range(len(self.values))
        low, high = places[0], places[-1]
        here = places[self.values.index(value)]
        if self.logarithmic:
            return here * (high / low) ** shift
        return here + shift * (high - low)


def ruler(lines: dict[str, dict], setting: str) -> Ruler:
    """The ruler of all values in these lines."""
    values = set()
    for points in lines.values():
        values.update(points)
    made = Ruler(list(values - {None}))
    made.values.sort(key=None if made.numeric else str)
    made.logarithmic = made.numeric and setting in WIDE and min(made.values, default=0) > 0
    return made


def draw_sweep(sweeps: dict[tuple, dict], setting: str):
    """Top-1 over the setting, a plot for each data set and split: the mean of the seeds and its
    95 % interval, and for methods without the setting a level line."""
    most = max(map(len, sweeps.values()))  # lines of a plot
    width = 5.0 if len(sweeps) == 1 else PAGE / 2
    height = 2.8 + 0.17 * most
    figure, axes = tile(len(sweeps), (width, height))
    for axis, panel in zip(axes, sweeps, strict=True):
        dataset, split = panel
        lines = sweeps[panel]
        along = ruler(lines, setting)
        ends = []
        step = min(0.012, 0.04 / len(lines))  # of the axis; else bars hide each other
        for number, (name, points) in enumerate(lines.items()):
            look = LOOKS[number % len(LOOKS)]
            shift = step * (number - (len(lines) - 1) / 2)
            ends += draw_line(axis, name, points, look, along, shift)
        if along.logarithmic:
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.set_ylim(*limits(ends))
        places = list(map(along.place, along.values))
        names = map("{:g}".format if along.numeric else str, along.values)
        axis.set_xticks(places, list(names))
        axis.set_title(dataset)
        axis.set_xlabel(setting)
        words = f"{split} top-1 (%)"
        if any(low is not None for _, low, _ in ends):
            words += ", mean and 95 % interval"
        axis.set_ylabel(words)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return figure


def draw_line(axis, name: str, points: dict, look: str, along: Ruler, shift: float) -> list:
    """A line of {value: {seed: top-1}}, level for the value None; returns (mean, low, high) of
    each value."""
    ends = {}
    for value, scores in points.items():
        ends[value] = interval(list(scores.values()))
    counts = list(map(len, points.values()))
    fewest, n = min(counts), max(counts)
    if fewest < n:
        n = f"{fewest} to {n}"
    words = fold(f"{name} (n = {n})", 60)
    (line,) = axis.plot([], [], look, label=words, markersize=4)
    color, style = line.get_color(), line.get_linestyle()
    if None in points:
        mean, low, high = ends[None]
        axis.axhline(mean, color=color, linestyle=style)
        if low is not None:
            axis.axhspan(low, high, color=color, alpha=0.15)
    values = [value for value in along.values if value in points]
    if not values:
        line.set_marker("None")
    else:
        places, means, halves = [], [], []
        for value in values:
            mean, _, high = ends[value]
            places.append(along.place(value, shift))
            means.append(mean)
            halves.append(0.0 if high is None else high - mean)
        looks = {"fmt": look, "color": color, "markersize": 4}
        axis.errorbar(places, means, halves, capsize=2.5, **looks)
    return list(ends.values())


def limits(ends: list[tuple]) -> tuple[float, float]:
    """The ends of the axis for these (mean, low, high): wide intervals of few seeds leave it."""
    means, lows, highs = [], [], []
    for mean, low, high in ends:
        means.append(mean)
        lows.append(mean if low is None else low)
        highs.append(mean if high is None else high)
    room = max(1.0, max(means) - min(means))
    bottom = max(0, min(lows), min(means) - room)
    top = min(100, max(highs), max(means) + room)
    margin = 0.05 * room
    return bottom - margin, top + margin
