"""The style sheet of report.html: one column, quiet lines, figures that line up, light and dark."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f4f5f7; --sheet: #ffffff; --ink: #1a1f26; --soft: #5a6472; --rule: #dde1e7;
  --c1: #1f6fb2; --c2: #d9822b; --c3: #2a9d6f; --c4: #b0569c; --c5: #8a94a3; --warn: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1216; --sheet: #171b21; --ink: #e7eaee; --soft: #98a3b1; --rule: #2b323b;
  --c1: #5aa9e6; --c2: #f0a35e; --c3: #58c99b; --c4: #d98cc7; --c5: #6b7684; --warn: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 32px 20px 64px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
code { font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr));
  gap: 12px; margin: 24px 0; }
.tile, section { background: var(--sheet); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile .label { color: var(--soft); font-size: 12px; letter-spacing: 0.04em;
  text-transform: uppercase; }
.tile .value { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums;
  letter-spacing: -0.01em; overflow-wrap: anywhere; }
.tile .note { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
section { padding: 20px 22px; margin: 16px 0; overflow-x: auto; }
section h2 { margin: 0 0 2px; font-size: 18px; }
section h3 { margin: 18px 0 2px; font-size: 14px; }
section > p { margin: 0 0 10px; color: var(--soft); max-width: 68ch; }
section > p.legend { margin: 6px 0 0; max-width: none; }
table { border-collapse: collapse; width: 100%; margin: 8px 0 4px; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12px; }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: break-word; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; padding-right: 0; padding-left: 14px; white-space: nowrap; }
.scroll { overflow-x: auto; }
.warn { color: var(--warn); font-weight: 600; }
.empty { color: var(--soft); font-style: italic; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--c1); }
svg { display: block; width: 100%; height: auto; margin: 6px 0; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.line { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
.c1 { --own: var(--c1); } .c2 { --own: var(--c2); } .c3 { --own: var(--c3); }
.c4 { --own: var(--c4); } .c5 { --own: var(--c5); } .c0 { --own: var(--rule); }
.line { stroke: var(--own); } .dot, .bar { fill: var(--own); } .key { background: var(--own); }
.heat { fill: var(--c1); } .absent { fill: none; stroke: var(--rule); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px;
  color: var(--soft); }
.entry { display: inline-flex; align-items: center; gap: 6px; }
.key { width: 10px; height: 10px; border-radius: 2px; display: inline-block; }
footer { color: var(--soft); font-size: 13px; margin-top: 24px; }
@media print { body { background: none; } section, .tile { break-inside: avoid; } }
"""
