"""The style sheet of report.html: light and dark, without external fonts or images."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #22262b; --muted: #656a71; --rule: #e3e0da;
  --accent: #23678a; --faint: #23678a55; --wrong: #a8481a; --track: #ebe8e2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --card: #1c2024; --ink: #e7e5e1; --muted: #a0a5ab; --rule: #30353b;
    --accent: #7fc1de; --faint: #7fc1de55; --wrong: #f0a36c; --track: #2b3036;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1060px; margin: 0 auto; padding: 48px 24px 80px; }
h1 {
  font-size: 34px; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 8px;
  overflow-wrap: anywhere;
}
h2 { font-size: 20px; font-weight: 620; margin: 0 0 14px; }
h3 { font-size: 15px; font-weight: 620; margin: 26px 0 4px; }
section { margin-top: 52px; }
small, .note, .eyebrow, .legend, figcaption span, .verdict span { color: var(--muted); }
.note { margin: 0 0 12px; max-width: 75ch; }
.eyebrow { margin: 0 0 6px; font-size: 13px; letter-spacing: 0.04em; }
.tiles {
  --share: calc((100% - 12px * (var(--columns) - 1)) / var(--columns));
  display: grid; gap: 12px; margin-top: 28px;
  grid-template-columns: repeat(auto-fit, minmax(max(160px, var(--share)), 1fr));
}
.tile {
  display: flex; flex-direction: column; padding: 16px 18px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px;
}
.tile strong {
  font-size: 25px; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap;
}
.tile small { margin-top: 4px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td {
  padding: 7px 14px 7px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: middle;
  font-weight: 400;
}
thead th { color: var(--muted); font-size: 13px; }
tbody th { font-weight: 550; }
.n, thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.scores thead th { width: 13%; } .scores thead th:nth-child(2) { width: 30%; }
.bar { display: block; width: 100%; min-width: 150px; max-width: 260px; height: auto; overflow: visible; }
.track { fill: var(--track); } .fill { fill: var(--accent); }
line.solid { stroke: var(--ink); stroke-width: 2; }
line.dashed { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 2.5 1.5; }
.legend { font-size: 13px; margin: 0; }
.key { display: inline-block; height: 12px; margin: 0 3px 0 14px; vertical-align: -1px; }
.key.fill { width: 20px; background: var(--accent); border-radius: 2px; margin-left: 0; }
.key.solid { border-left: 2px solid var(--ink); } .key.dashed { border-left: 2px dashed var(--ink); }
.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 20px 28px;
  margin-top: 14px;
}
figure { margin: 0; } figcaption span { margin-left: 8px; font-size: 13px; }
figure svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); } .mark { stroke: var(--muted); stroke-dasharray: 2 3; }
.tick { fill: var(--muted); font-size: 10.5px; font-variant-numeric: tabular-nums; }
polyline { fill: none; stroke-linejoin: round; }
.raw { stroke: var(--faint); stroke-width: 1; } .smooth { stroke: var(--accent); stroke-width: 2; }
.dot { fill: var(--accent); stroke: none; }
#log:checked ~ .charts .linear, #log:not(:checked) ~ .charts .log { display: none; }
#log { accent-color: var(--accent); margin: 0 7px 0 0; vertical-align: -1px; }
label { color: var(--muted); font-size: 13px; }
details { margin-top: 20px; } summary { cursor: pointer; color: var(--muted); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 14px; }
.card {
  display: flex; flex-direction: column; padding: 14px; background: var(--card); border: 1px solid var(--rule);
  border-top: 3px solid var(--accent); border-radius: 10px;
}
.card.wrong { border-top: 3px dashed var(--wrong); }
.images {
  display: flex; flex-wrap: wrap; justify-content: center; gap: 6px; padding: 8px; background: #ffffff;
  border-radius: 6px;
}
.images img { width: 128px; max-width: 100%; height: auto; object-fit: contain; }
.images img:not(:only-child) { width: 80px; }
.images audio { width: 100%; }
.images:empty { display: none; }
.question { margin: 10px 0 8px; font-weight: 550; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 10px; margin: 0 0 10px; }
.verdict { margin: auto 0 0; font-size: 13px; } .verdict b { margin-right: 6px; }
.right .verdict b { color: var(--accent); } .wrong .verdict b { color: var(--wrong); }
.method { margin: 0; padding-left: 18px; max-width: 80ch; } .method li { margin-bottom: 8px; }
@media print { body { background: #ffffff; } section { break-inside: auto; } .card, figure { break-inside: avoid; } }
"""
