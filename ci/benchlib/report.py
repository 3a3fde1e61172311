"""The page: one HTML file with inline SVG and no outside resources."""

import html
import math

from .summary import median, number, rank, values

STYLE = """
:root { --ink:#1c2430; --soft:#5b6675; --line:#d9dee5; --page:#f6f7f9; --card:#fff;
  --ours:#0b6e99; --ours2:#7fb6cf; --peer:#b9c0ca; --peer2:#8a94a2; --good:#1f8a4c; --fair:#b7791f; --bad:#c53030; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6e9ee; --soft:#9aa5b4; --line:#333b47; --page:#14181e;
  --card:#1c222b; --ours:#4cb8e6; --ours2:#2b6c8a; --peer:#4a5462; --peer2:#78838f; --good:#4cc27d; --fair:#e0a94b;
  --bad:#f07178; } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,sans-serif }
main { max-width:1180px; margin:0 auto; padding:32px 20px 60px }
h1 { font-size:27px; margin:0 0 4px } h2 { font-size:19px; margin:38px 0 10px } h3 { font-size:16px; margin:0 } h3 code { font-weight:400; margin-left:8px }
p { margin:4px 0 } .soft { color:var(--soft) } code { font-size:12.5px; color:var(--soft); overflow-wrap:anywhere }
.tiles { display:flex; flex-wrap:wrap; gap:12px; margin:20px 0 }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px 18px; min-width:150px }
.tile b { display:block; font-size:25px; line-height:1.25 }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:16px 18px; margin:14px 0 }
.panels { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr)); gap:10px 26px; margin-top:12px }
.chips { display:flex; flex-wrap:wrap; gap:6px; margin:8px 0 }
.chip { border-radius:20px; padding:1px 10px; font-size:13px; border:1px solid currentColor }
.good { color:var(--good) } .fair { color:var(--fair) } .bad { color:var(--bad) }
svg { width:100%; height:auto; display:block } svg text { font:12px system-ui,sans-serif; fill:var(--ink) }
svg .soft { fill:var(--soft) } svg .strong { font-weight:600 } svg a:hover text { text-decoration:underline } svg .grid { stroke:var(--line) } svg .good { fill:var(--good) }
svg .fair { fill:var(--fair) } svg .bad { fill:var(--bad) }
table { border-collapse:collapse; font-size:13px } th,td { text-align:right; padding:3px 10px; border-bottom:1px solid var(--line) }
th:first-child,td:first-child { text-align:left } summary { cursor:pointer; color:var(--soft); font-size:13px; margin-top:8px }
.panels svg { max-width:430px } .scroll { overflow-x:auto } .scroll svg { min-width:860px } .key span { display:inline-block; width:11px; height:11px; border-radius:3px; margin:0 5px 0 14px }
"""

# A load average above this before the run is worth a warning.
BUSY_LOAD = 0.5
PANEL_WIDTH, LABEL_WIDTH, BAR_WIDTH, ROW, HEAD = 360, 168, 128, 22, 42


def escape(text):
    return html.escape(str(text))


def figure(value, unit):
    """A figure in the unit of its panel; long times in milliseconds, and then it says so."""
    return f"{number(value / 1000)} ms" if unit == "µs" and value >= 1000 else number(value)


def overview(document):
    """All aims in one picture: how many times better than the peer, on a logarithmic scale."""
    rows = [(case, entry) for case in document["cases"] for entry in case["verdicts"] if entry["ratio"]]
    if not rows:
        return "<p class=soft>No aim could be judged: that needs runs of this project's daemon and of a peer.</p>"
    seen = [value for _, entry in rows for value in (*entry["ratios"], entry["factor"]) if value > 0]
    low, high = math.floor(math.log2(min(0.5, *seen))), math.ceil(math.log2(max(4, *seen)))
    left, width, row = 430, 560, 26
    height = len(rows) * row + 46

    def x(ratio):
        return left + width * (math.log2(max(ratio, 2.0**low)) - low) / (high - low)

    parts = [f'<svg viewBox="0 0 1130 {height}" role="img" aria-label="ratios to the peers">']
    for power in range(low, high + 1):
        at, label = x(2.0**power), f"{2**power}×" if power >= 0 else f"1/{2 ** -power}"
        weight = ' stroke-width="2"' if power == 0 else ""
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="18" y2="{height - 22}"{weight}/>')
        parts.append(f'<text class="soft" x="{at:.1f}" y="{height - 7}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="soft" x="{x(1) - 6:.1f}" y="12" text-anchor="end">worse</text>')
    parts.append(f'<text class="soft" x="{x(1) + 6:.1f}" y="12">better than the peer</text>')
    for index, (case, entry) in enumerate(rows):
        y, colour = 32 + index * row, rank(entry)
        aim = 1 if entry["at_most"] is not None else entry["factor"]
        title = f"{case['title']}: {entry['label']}"
        against = f"limit {number(entry['theirs'])} {entry['unit']}" if entry["against"] == "limit" else entry["against"]
        parts.append(f'<g><title>{escape(title)}: ours {number(entry["ours"])} {entry["unit"]}, {escape(against)} '
                     f'{number(entry["theirs"])}; aim {number(aim)}×</title>')
        parts.append(f'<a href="#{escape(case["name"])}"><text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(case["name"])} · '
                     f'{escape(entry["label"])} <tspan class="soft">vs {escape(against)}</tspan></text></a>')
        first, last = x(entry["ratios"][0]), x(entry["ratios"][-1])
        parts.append(f'<line x1="{first:.1f}" x2="{last:.1f}" y1="{y}" y2="{y}" stroke="var(--{colour})" stroke-width="3" opacity=".45"/>')
        parts.append(f'<circle cx="{x(entry["ratio"]):.1f}" cy="{y}" r="5.5" class="{colour}"/>')
        at = x(aim)
        parts.append(f'<path d="M{at:.1f} {y - 8}v16" stroke="var(--ink)" stroke-width="2.5"/>')
        parts.append(f'<text x="1000" y="{y + 4}" class="{colour}">{number(entry["ratio"])}×  <tspan class="soft">aim {number(aim)}×</tspan></text></g>')
    parts.append("</svg>")
    return "".join(parts)


def panel(document, case, metric):
    """Bars of one figure for every server, a dot for each round."""
    key = metric["key"]
    rows = [server for server in document["servers"] if values(case, server["name"], key)]
    if not rows:
        return ""
    top = max(max(values(case, server["name"], key).values()) for server in rows) or 1
    peers = [median(case, server["name"], key) for server in rows if server["group"] == "peer"]
    best = (max if metric["better"] == "more" else min)(peers) if peers else None
    height = len(rows) * ROW + HEAD
    arrow = "more is better" if metric["better"] == "more" else "less is better"
    parts = [f'<svg viewBox="0 0 {PANEL_WIDTH} {height}" role="img" aria-label="{escape(metric["label"])}">'
             f'<text x="0" y="13" class="strong">{escape(metric["label"])}, {escape(metric["unit"])}</text>'
             f'<text class="soft" x="0" y="29">{arrow}</text>']
    for index, server in enumerate(rows):
        figures, middle = values(case, server["name"], key), median(case, server["name"], key)
        y = HEAD - 6 + index * ROW
        if server["group"] == "ours":
            colour = "--ours" if server["name"] == "ours" else "--ours2"
        else:
            colour = "--peer2" if middle == best else "--peer"
        spread = ", ".join(number(value) for _, value in sorted(figures.items()))
        parts.append(f"<g><title>{escape(server['label'])}: {number(middle)} {escape(metric['unit'])} (rounds: {spread})</title>")
        weight = ' class="strong"' if server["name"] == "ours" else ""
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{y + 14}" text-anchor="end"{weight}>{escape(server["label"])}</text>')
        parts.append(f'<rect x="{LABEL_WIDTH}" y="{y + 3}" width="{max(1, BAR_WIDTH * middle / top):.1f}" height="15" rx="2.5" fill="var({colour})"/>')
        for value in figures.values():
            parts.append(f'<circle cx="{LABEL_WIDTH + BAR_WIDTH * value / top:.1f}" cy="{y + 10.5}" r="2" fill="var(--ink)" opacity=".55"/>')
        parts.append(f'<text x="{LABEL_WIDTH + BAR_WIDTH + 12}" y="{y + 14}"{weight}>{figure(middle, metric["unit"])}</text></g>')
    parts.append("</svg>")
    return "".join(parts)


def raw_table(document, case):
    """Every run's figures."""
    labels = {server["name"]: server["label"] for server in document["servers"]}
    head = "".join(f"<th>{escape(metric['label'])}, {escape(metric['unit'])}</th>" for metric in case["metrics"])
    rows = []
    for run in sorted(case["runs"], key=lambda run: (list(labels).index(run["server"]), run["round"])):
        if "failed" in run:
            cells = f'<td colspan="{len(case["metrics"])}" class="bad">failed: {escape(run["failed"])}</td>'
        else:
            cells = "".join(f"<td>{run['values'].get(metric['key'], math.nan):.5g}</td>" for metric in case["metrics"])
        load = f"{run['load_before']:.1f}" if "load_before" in run else "–"
        rows.append(f"<tr><td>{escape(labels[run['server']])}</td><td>{run['round'] + 1}</td><td>{load}</td>{cells}</tr>")
    return (f"<details><summary>every run</summary><div class=scroll><table><tr><th>server</th><th>round</th>"
            f"<th>load average before</th>{head}</tr>{''.join(rows)}</table></div></details>")


def card(document, case):
    chips = []
    for entry in case["verdicts"]:
        aim = f"aim {number(entry['factor'])}×" if entry["at_most"] is None else f"aim ≤ {number(entry['at_most'])} {entry['unit']}"
        against = "" if entry["against"] == "limit" else f" {number(entry['ratio'])}× {entry['against']}"
        chips.append(f'<span class="chip {rank(entry)}">{escape(entry["label"])}: {number(entry["ours"])} '
                     f"{escape(entry['unit'])}{',' if against else ''}{escape(against)} ({escape(aim)})</span>")
    best = case["against_best"]
    if best:
        colour = "soft" if best["ratio"] >= 1 else "bad"
        chips.append(f'<span class="chip {colour}">{escape(best["label"])}: {number(best["ratio"])}× the best peer '
                     f"({escape(best['peer'])})</span>")
    command = f"<code>{escape(case['command'])}</code>" if "command" in case else ""
    panels = "".join(f"<div>{panel(document, case, metric)}</div>" for metric in case["metrics"])
    return (f'<section class=card id="{escape(case["name"])}"><h3>{escape(case["title"])}<code>{escape(case["name"])}</code></h3>'
            f"<p class=soft>{escape(case['about'])} {command}</p><div class=chips>{''.join(chips)}</div>"
            f"<div class=panels>{panels}</div>{raw_table(document, case)}</section>")


def tiles(document):
    entries = [entry for case in document["cases"] for entry in case["verdicts"]]
    met = sum(entry["met"] for entry in entries)
    worse = sum(rank(entry) == "bad" for entry in entries)
    shown = [
        (f"{met} of {len(entries)}", "aims met"),
        (str(worse), "figures worse than the peer or over the limit"),
        (str(len(document["cases"])), "cases"),
        (str(document["meta"]["rounds"]), "rounds, interleaved"),
    ]
    return "".join(f'<div class=tile><b>{escape(value)}</b><span class=soft>{escape(label)}</span></div>' for value, label in shown)


def page(document):
    """The whole page."""
    meta = document["meta"]
    used = {run["server"] for case in document["cases"] for run in case["runs"]}
    details = "".join(
        f"<tr><td>{escape(server['label'])}</td><td style='text-align:left'>{escape(server['detail'])}</td></tr>"
        for server in document["servers"] if server["name"] in used
    )
    crowd = ""
    if meta["load_before"] > BUSY_LOAD:
        shielded = ", but the benchmark had priority" if meta["priority"] else ": take the figures with care"
        crowd = (f"<p class={'fair' if meta['priority'] else 'bad'}>The machine had other things to do (load average "
                 f"{meta['load_before']:.1f}){shielded}.</p>")
    cards = "".join(card(document, case) for case in document["cases"])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>vhost-user-blk: benchmark</title>
<style>{STYLE}</style></head><body><main>
<h1>vhost-user-blk beside qemu-storage-daemon</h1>
<p class=soft>{escape(meta["date"].replace("T", " ").replace("+00:00", " UTC"))} · revision {escape(meta["revision"])} · {escape(meta["cpus"])} × {escape(meta["cpu"])},
{escape(meta["memory_gib"])} GiB, Linux {escape(meta["kernel"])} · {escape(meta["qemu"])}</p>
{crowd}<div class=tiles>{tiles(document)}</div>
<h2>Aims</h2><p class=soft>How many times better than the peer, in pairs of the same round: the dot is the median, the line
spans the rounds, the upright mark is the aim.</p>
<div class="card scroll">{overview(document)}</div>
<h2>Cases</h2><p class="soft key">Bars are medians, dots single rounds.
<span style="background:var(--ours)"></span>vhost-user-blk<span style="background:var(--ours2)"></span>… otherwise configured
<span style="background:var(--peer2)"></span>the best peer<span style="background:var(--peer)"></span>other peers</p>
{cards}
<h2>Method</h2>
<p>Each run starts the daemon on a fresh image over the same base ({escape(meta["seconds"])} s of load after 0.3 s of warm-up)
and is driven by <code>blk-bench</code>, a vhost-user frontend without a guest, on the same machine: with few CPUs the client
takes a part of them. In every round each server has its turn, in an order that changes; ratios are made within a round, so
that what slows the machine down for a while slows both. Server CPU is the scheduler's account of all threads of the daemon,
polling included; latencies run from the store of avail.idx to the look at used.idx that finds the answer.</p>
<div class="card scroll"><table><tr><th>server</th><th style="text-align:left">configuration</th></tr>{details}</table></div>
</main></body></html>
"""
