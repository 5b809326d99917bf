"""The page's style sheet (light, dark, print) and script. Neither loads anything."""

STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --card: #ffffff; --ink: #1a1a19;
  --soft: #5f5e59; --rule: #dddcd6; --lane: #f1f0ec; --strong: #1c5cab;
  --h0: #2a78d6; --h1: #d95926; --h2: #1a8a63; --h3: #b88600; --h4: #8a4fc4; --h5: #c2417c;
  --h6: #5b7a1f; --h7: #0f8aa0; --busy: #c9c7bf; --grey: #8f8d86; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #121211; --card: #1b1b1a;
  --ink: #f2f1ec; --soft: #aeaca4; --rule: #383735; --lane: #252523; --strong: #7fb4f0;
  --h0: #4a94e8; --h1: #ec7a4c; --h2: #35ad82; --h3: #d9aa2f; --h4: #ac7be0; --h5: #e26a9f;
  --h6: #8cb04a; --h7: #3fb3c8; --busy: #55534e; --grey: #86847c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 75ch; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 18px 22px; margin: 18px 0; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
td { white-space: nowrap; }
details td.words { white-space: normal; overflow-wrap: anywhere; }
tr.best td { font-weight: 600; color: var(--strong); }
tr.differs td { background: color-mix(in srgb, var(--h3) 14%, transparent); }
summary { cursor: pointer; font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 14px; }
svg { display: block; max-width: 100%; height: auto; margin: 8px 0; font: inherit; }
svg text { fill: var(--ink); font-size: 12px; }
svg .tick { fill: var(--soft); font-size: 11px; } svg .label { fill: var(--soft); }
svg .chart-title { font-weight: 600; font-size: 13px; }
svg .inside { font-size: 10px; pointer-events: none; } svg .inside.deep { fill: #fff; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.lane { fill: var(--lane); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1; }
.bar, .part { fill: var(--c); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0;
  padding: 0; color: var(--soft); font-size: 13px; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 6px; vertical-align: -1px; background: var(--c); }
.swatch.wide { width: 20px; height: 16px; vertical-align: -3px; color: var(--ink);
  font-size: 10px; line-height: 16px; text-align: center; }
.swatch.thin { width: 20px; height: 7px; vertical-align: 1px; }
.swatch.fore { background: color-mix(in srgb, var(--c) 62%, var(--card)); }
.swatch.back.wide { color: #fff; }
.swatch.beside { background: color-mix(in srgb, var(--c) 22%, var(--card)); }
.hue0, .network, .activations { --c: var(--h0); }
.hue1, .device, .cotangents { --c: var(--h1); }
.hue2, .aggregation { --c: var(--h2); } .hue3 { --c: var(--h3); }
.hue4, .server { --c: var(--h4); } .hue5 { --c: var(--h5); }
.hue6, .data { --c: var(--h6); } .hue7 { --c: var(--h7); }
.busy, .weights { --c: var(--busy); } .other { --c: var(--grey); }
.bar { stroke: var(--card); stroke-width: 0.6; } .bar.fore { fill-opacity: 0.62; }
.bar.beside { fill-opacity: 0.22; } svg.picked [data-key]:not(.picked) { opacity: 0.2; }
footer { color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; font-size: 11pt; } main { max-width: none; padding: 0; }
  section { border: 0; padding: 8px 0; break-inside: avoid; overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

#: Hovering over a micro-batch fades the others; printing unfolds the details.
SCRIPT = """
for (const chart of document.querySelectorAll("svg")) {
  chart.addEventListener("pointerover", (event) => {
    const bar = event.target.closest("[data-key]");
    chart.classList.toggle("picked", Boolean(bar));
    for (const other of chart.querySelectorAll("[data-key]"))
      other.classList.toggle("picked", Boolean(bar) && other.dataset.key === bar.dataset.key);
  });
  chart.addEventListener("pointerleave", () => chart.classList.remove("picked"));
}
window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
"""
