"""The page's style sheet: one column of serif text, figures and tables in plain sans, quiet greys; it prints."""

CSS = """\
:root { color-scheme: light; --ink: #1c2127; --grey: #626b75; --line: #d8dde3; --pale: #f6f7f9;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 17px/1.55 var(--serif);
  text-rendering: optimizeLegibility; }
main { max-width: 50rem; margin: 0 auto; padding: 3.5rem 1.5rem 4rem; }
h1 { font-size: 2.1rem; font-weight: 600; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 1rem; }
h2 { font-size: 1.28rem; font-weight: 600; line-height: 1.3; margin: 3rem 0 0.9rem; }
h3 { font: 600 1rem/1.3 var(--sans); margin: 0 0 0.6rem; overflow-wrap: anywhere; }
h4 { font: 600 0.7rem/1.3 var(--sans); letter-spacing: 0.06em; text-transform: uppercase; color: var(--grey);
  margin: 0.8rem 0 0.25rem; }
p, ul, figcaption { max-width: 44rem; }
ul { margin: 0; padding-left: 1.1rem; }
li { margin: 0.3rem 0; }
.lead { font-size: 1.06rem; margin: 0; }
.caption, figcaption { font-size: 0.88rem; line-height: 1.5; color: var(--grey); margin: 0.8rem 0 0; }
figcaption b { color: var(--ink); font-weight: 600; }
figure { margin: 0; }
.wide { overflow-x: auto; }
.wide img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font: 0.82rem/1.35 var(--sans); font-variant-numeric: tabular-nums;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th, td { padding: 0.42rem 0.6rem; text-align: right; white-space: nowrap; vertical-align: top; }
thead th { font-weight: 600; border-bottom: 1px solid var(--ink); }
thead small { white-space: normal; max-width: 7rem; margin-left: auto; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tr > :first-child { text-align: left; padding-left: 0.1rem; font-weight: 600;
  position: sticky; left: 0; background: #fff; }
td small, th small { display: block; font-weight: 400; font-size: 0.86em; color: var(--grey); }
td strong { font-weight: 700; }
td b { color: #b3261e; }
i { display: inline-block; width: 0.62em; height: 0.62em; border-radius: 50%; margin-right: 0.5em; }
.notes { margin-top: 1rem; padding: 0.7rem 1rem; background: var(--pale); border-left: 3px solid var(--line);
  font-size: 0.92rem; max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: 1.2rem; }
article { border-top: 3px solid; padding: 0.8rem 0 0; break-inside: avoid; }
dl { display: grid; grid-template-columns: minmax(0, auto) minmax(0, 1fr); gap: 0.15rem 1rem; margin: 0;
  font: 0.82rem/1.45 var(--sans); }
dt { color: var(--grey); overflow-wrap: anywhere; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; border-top: 1px solid var(--line); }
footer h2 { margin-top: 1.5rem; font-size: 1rem; }
@media (max-width: 640px) {
  body { font-size: 16px; }
  main { padding: 1.8rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  .wide img { max-width: none; min-width: 34rem; }
}
@media print {
  @page { margin: 16mm 15mm; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 1.8rem; }
  figure, table, .notes { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 7.6pt; }
  th, td { padding: 0.3rem 0.35rem; }
}
"""
