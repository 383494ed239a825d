"""The page's style sheet: one column of ink on paper, dark when the reader's system is."""

CSS = """
:root { color-scheme: light dark;
  --paper: #fcfcfb; --card: #ffffff; --ink: #16181d; --soft: #5b6270; --faint: #e6e7ea; --rule: #d3d6db;
  --good: #177245; --bad: #c02626; --unknown: #8a6100; --goodwash: #e9f5ee; --badwash: #fcecec; --unknownwash: #fbf3dd;
  --c0: #2a6fd0; --c1: #d9661f; --c2: #6b7280; --c3: #7c4dcc; --c4: #0e8f72; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #121417; --card: #1a1d21; --ink: #e8eaed; --soft: #9aa2ae; --faint: #2a2e35; --rule: #3a404a;
  --good: #58c48d; --bad: #f07b7b; --unknown: #e0b44c; --goodwash: #16291f; --badwash: #321c1d; --unknownwash: #2d2615;
  --c0: #5b9bf0; --c1: #ee8a4a; --c2: #9aa2ae; --c3: #a98bf0; --c4: #3fbf9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
p { margin: .3rem 0 .8rem; max-width: 80ch; overflow-wrap: anywhere; } h1 + p { max-width: none; }
a { color: var(--c0); text-decoration: none; } a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1rem 0 1.6rem; font-size: .9rem; }
.soft, .unit { color: var(--soft); } .unit { font-weight: 400; font-size: .85em; }
.missing { color: var(--unknown); } .bad { color: var(--bad); }
.verdict { border-radius: 10px; padding: 1.1rem 1.3rem .6rem; margin: 1rem 0; background: var(--unknownwash); }
.verdict.pass { background: var(--goodwash); } .verdict.fail { background: var(--badwash); }
.verdict > strong { font-size: 1.25rem; color: var(--unknown); }
.verdict.pass > strong { color: var(--good); } .verdict.fail > strong { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { text-align: left; padding: .42rem .9rem .42rem 0; border-top: 1px solid var(--faint); vertical-align: top; }
.verdict td, .verdict th { border-top-color: color-mix(in srgb, var(--ink) 9%, transparent); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: .85rem; }
th.n, td.n { text-align: right; white-space: nowrap; } td.n:last-child, th.n:last-child { padding-right: 0; }
td.n + td:not(.n), th.n + th:not(.n) { padding-left: 1.2rem; }
td small { display: block; color: var(--soft); font-size: .84rem; }
td.mark { width: 1%; white-space: nowrap; font-weight: 600; color: var(--unknown); }
tr.pass td.mark { color: var(--good); } tr.fail td.mark { color: var(--bad); } tr.fail td.n:nth-child(3) { color: var(--bad); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
.pair { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 2rem; align-items: start; }
.chart { display: flex; flex-direction: column; margin: 0; padding: .8rem .9rem .5rem; background: var(--card); border: 1px solid var(--faint); border-radius: 10px; min-width: 0; }
figcaption { font-weight: 600; font-size: .92rem; overflow-wrap: anywhere; }
.keys { display: flex; flex-wrap: wrap; gap: 0 .9rem; min-height: 1.3rem; font-size: .8rem; color: var(--soft); }
.key { white-space: nowrap; } .key::before { content: ""; display: inline-block; width: .8em; height: .2em; border-radius: 1px; background: var(--c, var(--soft)); vertical-align: .25em; margin-right: .4em; }
.key.reference::before { background: none; border-top: 2px dashed var(--soft); width: 1em; height: 0; }
.key b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; margin-left: .25em; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); } .s4 { --c: var(--c4); } .s5 { --c: var(--rule); }
svg { display: block; width: 100%; height: auto; margin-top: auto; }
svg text { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg path.raw { stroke-width: 1; opacity: .28; }
svg .grid { stroke: var(--faint); } svg .axis { stroke: var(--rule); }
svg line.reference { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .dot { fill: var(--c); } svg .mark { fill: var(--c); stroke: var(--card); stroke-width: 2; }
svg text.label { font-size: 12px; font-weight: 600; fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg path.frontier { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 3; } svg circle.frontier { fill: var(--soft); }
.bar { display: flex; height: 1.5rem; border-radius: 6px; overflow: hidden; gap: 2px; margin: .8rem 0 .5rem; }
.bar span { background: var(--c); min-width: 2px; }
.sample { border-top: 1px solid var(--faint); padding: .9rem 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: .8rem; margin-top: .5rem; }
.answer { background: var(--card); border: 1px solid var(--faint); border-left: 3px solid var(--c); border-radius: 6px; padding: .5rem .8rem .6rem; }
.answer header { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft); margin-bottom: .15rem; }
.answer header b { color: var(--ink); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 24em; overflow: auto; }
.prompt { color: var(--soft); }
details { margin: .8rem 0; } details > summary + * { margin-top: .6rem; } summary { cursor: pointer; color: var(--c0); font-size: .9rem; }
pre { background: var(--card); border: 1px solid var(--faint); border-radius: 8px; padding: .8rem 1rem; overflow: auto; max-height: 32rem; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 700px) { main { padding: 1.4rem 1rem 3rem; } .pair { grid-template-columns: minmax(0, 1fr); gap: 1rem; } th, td { padding-right: .6rem; } h1 { font-size: 1.5rem; }
  .verdict { padding: 1rem 1rem .3rem; } .verdict thead { display: none; }
  .verdict tr { display: grid; grid-template-columns: 6.4rem 1fr auto; padding: .45rem 0; border-top: 1px solid color-mix(in srgb, var(--ink) 9%, transparent); }
  .verdict td { border: 0; padding: 0; width: auto !important; } .verdict td:nth-child(2) { grid-column: 2 / 4; }
  .verdict td:nth-child(3) { grid-column: 2; text-align: left; font-weight: 600; } .verdict td.n:nth-child(4) { padding: 0; color: var(--soft); } }
@media print { body { background: none; } .chart, .sample, tr { break-inside: avoid; } nav { display: none; } }
"""
