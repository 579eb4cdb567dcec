"""The looks of the page: light and dark, wide and narrow, on paper."""

from __future__ import annotations

from collections.abc import Sequence

from lrconvert.report.html.markup import Measure, best_measure

# Colours of methods, light and dark; shapes tell them apart as well.
_LIGHT = ("#0068b0", "#c24a00", "#007a58", "#a3427f", "#806000", "#00789a", "#5a4fb0", "#555555")
_DARK = ("#5cb3f5", "#ff8f4d", "#3fc79b", "#ee8fc9", "#e0b83a", "#5ed3ee", "#a9a0ff", "#bbbbbb")
# Cividis: even to the eye, in grey as well, and the same to colour-blind eyes. White stands on the first five.
_SCALE = ("#00204d", "#00336f", "#39486b", "#575c6d", "#707173", "#8a8779", "#a69d75", "#c4b56c", "#e4cf5b", "#ffea46")
_DARK_SCREEN = "@media screen and (prefers-color-scheme:dark)"


def sheet(methods: int, measures: Sequence[Measure]) -> str:
    """The style sheet of a page with so many methods and these measures."""
    light = "".join(f".k{n}{{fill:{_LIGHT[n % len(_LIGHT)]}}}" for n in range(methods))
    dark = "".join(f".k{n}{{fill:{_DARK[n % len(_DARK)]}}}" for n in range(methods))
    scale = "".join(
        f"b.c{n}{{background:{colour};color:{'#fff' if n < 5 else '#000'}}}" for n, colour in enumerate(_SCALE)
    )
    return f"{_BASE}{light}\n{_DARK_SCREEN}{{{dark}}}\n{scale}\n{_shown(measures)}\n{_PAPER}"


def _shown(measures: Sequence[Measure]) -> str:
    """One number of each cell is shown: the one that was chosen, or without :has() the first choice."""
    rules = [f".heat b{{display:none}}.heat b.{best_measure(measures).key}{{display:block}}"]
    for m in measures if len(measures) > 1 else ():
        chosen = f"main:has(#show-{m.key}:checked) .heat b"
        rules.append(f"{chosen}{{display:none}}{chosen}.{m.key}{{display:block}}")
    return "\n".join(rules)


_BASE = (
    f"""
:root{{color-scheme:light dark;--bg:#fff;--fg:#1c1e21;--soft:#5c6370;--line:#d9dce1;--pale:#f4f5f7;--bar:#0068b0}}
{_DARK_SCREEN}{{
:root{{--bg:#16181c;--fg:#e6e8eb;--soft:#a2a9b4;--line:#3a3f47;--pale:#20242a;--bar:#5cb3f5}}}}
"""
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1240px;margin:0 auto;padding:1rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .5rem}
h3{font-size:1rem;margin:0}
p{max-width:75ch}
header p,article p,caption,figcaption,dt,legend,thead th{color:var(--soft)}
article p{font-size:.85rem;margin:.1rem 0 .5rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:.8rem;margin:1rem 0}
.facts div{background:var(--pale);border-radius:6px;padding:.7rem .9rem}
dt{font-size:.85rem}
dd{margin:0;font-size:.9rem}
dd strong{display:block;font-size:1.35rem;line-height:1.3}
aside{border-left:3px solid var(--bar);padding:.1rem 0 .1rem .9rem}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:1rem 2rem}
figure{margin:0;max-width:640px;break-inside:avoid}
figcaption{font-size:.9rem}
figure svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
svg .label{fill:var(--fg);text-anchor:middle;unicode-bidi:isolate;paint-order:stroke;stroke:var(--bg);stroke-width:3px}
.grid,.zero,.lead,.front{fill:none;stroke:var(--line)}
.zero,.lead,.front{stroke:var(--soft)}
.front{stroke-width:1.5;stroke-dasharray:5 3}
.lead{stroke-width:.7}
path[class^=k]{stroke:var(--bg);stroke-width:1}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.6rem 0;font-size:.85rem}
.key li{display:flex;align-items:center;gap:.35rem}
.key b{display:inline-block;width:1.3rem;height:1rem;border-radius:2px}
.scroll{overflow-x:auto;max-width:100%}
.scroll:focus-visible{outline:2px solid var(--bar)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{text-align:left;padding:.2rem 0 .4rem;font-size:.85rem;max-width:75ch}
th{font-weight:600}
td,th{padding:.25rem .6rem;text-align:right;vertical-align:bottom;border-bottom:1px solid var(--line)}
.word{text-align:left}
tbody .word{font-weight:400}
tbody th.word{min-width:9rem;max-width:34rem;overflow-wrap:anywhere}
.bar{display:block;width:9rem;height:.4rem;background:var(--line);border-radius:2px}
.bar span{display:block;height:100%;background:var(--bar);border-radius:2px}
.maps{display:flex;flex-wrap:wrap;gap:1.6rem 2rem;align-items:flex-start}
article{max-width:100%;width:min-content;min-width:min(100%,20rem)}
.heat{border-collapse:separate;border-spacing:1px}
.heat td,.heat th{border:0;padding:0 .3rem 0 0}
.heat td{padding:0;min-width:2.2rem;height:1.5rem}
.heat tbody th{font-weight:400;color:var(--soft);white-space:nowrap}
.heat thead th{font-weight:400;padding:0 0 .3rem;text-align:center}
.heat thead span{writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap;unicode-bidi:isolate}
.heat caption{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.heat b{font-weight:400;font-size:.75rem;text-align:center;line-height:1.5rem;padding:0 .15rem}
b.neg{background:repeating-linear-gradient(135deg,#7d1128 0 5px,#96243b 5px 7px);color:#fff}
b.un{color:var(--soft)}
.heat td.loose{text-align:left;height:auto;min-width:14rem}
.loose ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem .9rem;margin:.2rem 0;padding:0;max-width:60rem}
.loose li{display:flex;gap:.4rem;align-items:center}
.loose b{min-width:2.2rem}
.switch{border:1px solid var(--line);border-radius:6px;margin:.6rem 0;padding:.3rem .8rem .5rem;font-size:.9rem}
.switch label{display:inline-block;margin-right:1.2rem}
legend{font-size:.85rem}
details{margin:.4rem 0}
summary{cursor:pointer}
b,.bar,.bar span{print-color-adjust:exact;-webkit-print-color-adjust:exact}
"""
)

_PAPER = """
@page{margin:15mm}
@media print{
:root{color-scheme:light}
body{font-size:11pt}
main{padding:0}
.scroll{overflow:visible}
article,tr,.facts div{break-inside:avoid}
h2,h3{break-after:avoid}
.panels{grid-template-columns:1fr 1fr}
.switch input,.switch label:has(input:not(:checked)){display:none}
}
"""
