"""The style sheet of report.html: light and dark, from a phone's width to a desk's, without scripts and without a network."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #ffffff; --ink: #1b1f24; --faint: #5a6470; --line: #dcdfe3;
  --good: #1a7f4b; --doubt: #a15c00; --bad: #b3261e; --open: #5a6470; --link: #0b5cad;
  --c0: #0063b1; --c1: #c2470a; --c2: #00806a; --c3: #9a3f86; --c4: #7a6300; --c5: #2b8fc7; --c6: #5b4bb7; --c7: #555555; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e8eaed; --faint: #a3adb8;
  --line: #343a42; --good: #5fd399; --doubt: #f0b35a; --bad: #ff8a80; --open: #a3adb8; --link: #7ab8f5;
  --c0: #6db3f2; --c1: #f5915a; --c2: #4ccfb0; --c3: #dd8fca; --c4: #dcc15a; --c5: #8fd3f7; --c6: #a99cf5; --c7: #b5b5b5; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
header, nav, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.3rem; margin: 44px 0 10px; padding-top: 12px; border-top: 1px solid var(--line); scroll-margin-top: 48px; }
section:first-child h2 { border-top: 0; margin-top: 8px; }
h3 { font-size: 1.05rem; margin: 26px 0 8px; }
p { margin: 6px 0 12px; max-width: 75ch; }
.faint, small { color: var(--faint); font-size: .875rem; }
a { color: var(--link); text-underline-offset: 2px; }
code, pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; margin: 8px 0;
  white-space: pre-wrap; }
nav { position: sticky; top: 0; z-index: 2; background: var(--paper); border-bottom: 1px solid var(--line); }
nav ul { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 12px 0 0; padding: 8px 0; }
nav a { text-decoration: none; font-size: .925rem; }
@media (max-width: 640px) { nav { position: static; } }
.state { display: inline-block; padding: 1px 10px; border-radius: 99px; border: 1px solid; font-size: .875rem;
  font-weight: 600; margin-right: 8px; }
.good { color: var(--good); } .doubt { color: var(--doubt); } .bad { color: var(--bad); } .open { color: var(--open); }

.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 10px; margin: 18px 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 8px 12px; }
.facts dt { color: var(--faint); font-size: .8rem; } .facts dd { margin: 0; font-size: 1.25rem; font-weight: 600;
  font-variant-numeric: tabular-nums; line-height: 1.3; }
.verdicts { list-style: none; padding: 0; margin: 12px 0; display: grid; gap: 10px; }
@media (min-width: 900px) { .verdicts { grid-template-columns: 1fr 1fr; } }
.verdicts li { background: var(--card); border: 1px solid var(--line); border-left: 5px solid currentColor;
  border-radius: 8px; padding: 8px 14px; }
.verdicts p { color: var(--ink); margin: 2px 0 4px; font-size: .95rem; }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px 4px; margin: 0;
  min-width: 0; }
.chart figcaption { font-size: .95rem; } .chart p { font-size: .8rem; margin: 0 0 4px; }
.chart svg { display: block; width: 100%; height: auto; }
.chart > svg { overflow: visible; }
.chart text { font-size: 12px; fill: var(--faint); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .zero { stroke: var(--faint); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.line, .dashed { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 4; } .band { fill: var(--c); opacity: .16; } circle { fill: var(--c); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 14px; margin: 2px 0 4px; padding: 0; font-size: .85rem; }
.key { display: inline-block; width: 18px; border-top: 3px solid var(--c); vertical-align: middle; margin-right: 6px; }
.key.dashes { border-top-style: dashed; }
.readout rect { fill: transparent; } .readout g { display: none; } .readout:hover g { display: block; }
.readout line { stroke: var(--faint); } .readout text { fill: var(--ink); font-weight: 600; paint-order: stroke;
  stroke: var(--card); stroke-width: 4px; }

.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
td.number, th.number { text-align: right; white-space: nowrap; } th { color: var(--faint); font-weight: 600; }
tbody th { font-weight: 500; color: var(--ink); }
td.wrap { overflow-wrap: anywhere; min-width: 12ch; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 4px 28px; }
.groups h3 { margin-top: 8px; }
.groups ul, .samples { list-style: none; padding: 0; margin: 0; }
.groups li { padding: 4px 0; border-bottom: 1px solid var(--line); font-size: .9rem; }
.bar { display: block; height: 5px; border-radius: 3px; background: var(--c1); margin: 3px 0; }
.samples { columns: 2 420px; column-gap: 32px; } .samples li { break-inside: avoid; padding: 8px 0; border-bottom: 1px solid var(--line); font-size: .9rem; scroll-margin-top: 48px; }
.samples li:target { background: color-mix(in srgb, var(--c4) 18%, transparent); }
.samples p { margin: 2px 0; }

.clips { display: grid; gap: 26px; margin: 14px 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--n) * 105px)), 1fr)); }
.clip { margin: 0; min-width: 0; } .clip h3, .neighbours h4 { margin: 0 0 6px; font-size: .95rem; } .neighbours { margin: 0 0 30px; }
.neighbours p { margin: 10px 0 4px; }
.strips { display: grid; gap: 6px; }
.strip { margin: 0; position: relative; min-width: 0; }
.strip figcaption { font-size: .8rem; color: var(--faint); }
.strip img { display: block; width: 100%; aspect-ratio: var(--n) / 1; object-fit: cover; border-radius: 4px; }
.strip div { position: relative; max-width: calc(var(--n) * 140px); }
.strip div::after { content: ""; position: absolute; inset: 0; pointer-events: none; background:
  repeating-linear-gradient(90deg, transparent 0 calc(100% / var(--n) - 2px), var(--paper) calc(100% / var(--n) - 2px)
  calc(100% / var(--n))); }
.tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: 10px; }
@media (max-width: 640px) { .tiles { grid-template-columns: repeat(3, 1fr); } }
.play { margin: 0; min-width: 0; } .play img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover;
  object-position: 50%; border-radius: 4px; }
.play.query img { outline: 3px solid var(--c0); outline-offset: 1px; }
.play figcaption { font-size: .78rem; line-height: 1.3; margin-top: 4px; }
@keyframes play { from { object-position: 0% 50%; } to { object-position: 100% 50%; } }
@media (prefers-reduced-motion: no-preference) {
  .play img { animation: play calc(var(--n) * .25s) steps(var(--n), jump-none) infinite; }
  .play img:hover { animation-play-state: paused; }
  main:has(.pause:checked) img { animation-play-state: paused; }
}
@media (prefers-reduced-motion: no-preference) and (max-width: 640px) {
  .strips { grid-template-columns: 1fr 1fr; gap: 10px; } .strip div::after { content: none; }
  .strip img { aspect-ratio: 1; animation: play calc(var(--n) * .25s) steps(var(--n), jump-none) infinite; }
}
@media (prefers-reduced-motion: reduce) { .switch { display: none; } }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 12px; }
.picture { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.missing { border: 1px dashed var(--doubt); border-radius: 8px; padding: 8px 14px; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--link); }
.toml { columns: 380px auto; column-gap: 28px; }
footer { margin-top: 48px; padding-bottom: 32px; color: var(--faint); font-size: .875rem; border-top: 1px solid var(--line); }
@media print { nav, .switch { display: none; } .play img, .strip img { animation: none; } }
"""
