"""Results as HTML pages: one file, nothing from outside, the same bytes for the same input.

`comparison` is the page about files of one LoRA, `fleet` the one about many adapters. `page.html` and `fleet.html` are
the templates, `macros.html` what both use, `page.css` their style sheet, `sort.js` the only script, which sorts the
table of a fleet. `measures` writes the numbers; `plots`, `lines` and `labels` place the marks of the plots, and
`layers` arranges the targets of a file as a map. Names come from strangers' files: jinja2 escapes each, and a content
security policy forbids loads, and scripts but that one, by its digest. The pages are well-formed XML, so that any
parser can check them.
"""

from lrconvert.report.html.comparison import About, page
from lrconvert.report.html.fleet import Adapter, fleet_page
from lrconvert.report.html.lines import Curve, read_curves

__all__ = ["About", "Adapter", "Curve", "fleet_page", "page", "read_curves"]
