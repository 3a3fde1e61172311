"""Medians, ratios in pairs, and verdicts on the aims."""

import statistics

# Two runs of the same thing differ by this much.
NOISE = 0.03


def values(case, server, metric):
    """The figures of a server by round."""
    runs = (run for run in case["runs"] if run["server"] == server and "values" in run)
    return {run["round"]: run["values"][metric] for run in runs if metric in run["values"]}


def median(case, server, metric):
    figures = values(case, server, metric)
    return statistics.median(figures.values()) if figures else None


def best_peer(document, case, metric, better):
    """The peer with the best median."""
    names = [server["name"] for server in document["servers"] if server["group"] == "peer"]
    medians = {name: median(case, name, metric) for name in names}
    medians = {name: value for name, value in medians.items() if value is not None}
    if not medians:
        return None
    pick = max if better == "more" else min
    return pick(medians, key=medians.get)


def ratios(case, ours, peer, metric, better):
    """How many times better ours is, round by round."""
    mine, theirs = values(case, ours, metric), values(case, peer, metric)
    result = []
    for number in mine.keys() & theirs.keys():
        good, bad = (mine[number], theirs[number]) if better == "more" else (theirs[number], mine[number])
        if bad > 0:
            result.append(good / bad)
    return sorted(result)


def verdict(document, case, aim):
    """An aim with what came of it; None if it was not measured."""
    metric = next(entry for entry in case["metrics"] if entry["key"] == aim["metric"])
    ours = median(case, aim["server"], aim["metric"])
    if ours is None:
        return None
    common = {**aim, "label": metric["label"], "unit": metric["unit"], "ours": ours}
    if aim["at_most"] is not None:
        limit = aim["at_most"]
        margins = sorted(limit / value for value in values(case, aim["server"], aim["metric"]).values() if value > 0)
        return {**common, "against": "limit", "theirs": limit, "ratio": limit / ours if ours else None,
                "ratios": margins, "met": ours <= limit}
    peer = aim["peer"] or best_peer(document, case, aim["metric"], metric["better"])
    paired = ratios(case, aim["server"], peer, aim["metric"], metric["better"]) if peer else []
    if not paired:
        return None
    ratio = statistics.median(paired)
    return {**common, "against": peer, "theirs": median(case, peer, aim["metric"]), "ratio": ratio,
            "ratios": paired, "met": ratio >= aim["factor"] * (1 - NOISE)}


def against_best(document, case):
    """Ours beside the best peer in what the case is about; None if one of them was not measured."""
    metric = next(entry for entry in case["metrics"] if entry["key"] == case["primary"])
    peer = best_peer(document, case, metric["key"], metric["better"])
    paired = ratios(case, "ours", peer, metric["key"], metric["better"]) if peer else []
    return {"peer": peer, "label": metric["label"], "ratio": statistics.median(paired)} if paired else None


def add_verdicts(document):
    """Adds to every case what came of its aims, and how ours does beside the best peer."""
    for case in document["cases"]:
        case["against_best"] = against_best(document, case)
        found = (verdict(document, case, aim) for aim in case["aims"])
        case["verdicts"] = [entry for entry in found if entry]


def rank(entry):
    """What a verdict comes to: the aim is met, at least no worse than the peer, or worse."""
    if entry["met"]:
        return "good"
    return "fair" if (entry["ratio"] or 0) >= 1 - NOISE else "bad"


def number(value):
    """Three digits that matter."""
    if value is None:
        return "–"
    if value >= 1_000_000:
        return f"{value / 1e6:.2f}M"
    if value >= 10_000:
        return f"{value / 1000:.0f}k"
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


WORDS = {"good": "met", "fair": "missed", "bad": "WORSE"}


def text(document):
    """The verdicts for a terminal."""
    lines = [f"{'case':15}{'figure':34}{'ours':>9}{'against':>14}{'theirs':>9}{'ratio':>8}{'aim':>7}"]
    for case in document["cases"]:
        for entry in case["verdicts"]:
            aim = 1 if entry["at_most"] is not None else entry["factor"]
            figure = f"{entry['label']}, {entry['unit']}"
            lines.append(
                f"{case['name']:15}{figure[:33]:34}{number(entry['ours']):>9}{entry['against']:>14}"
                f"{number(entry['theirs']):>9}{number(entry['ratio']):>7}×{number(aim):>6}×"
                f"  {WORDS[rank(entry)]}"
            )
    return "\n".join(lines)
