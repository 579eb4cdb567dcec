"""A comparison as one HTML page: no script, nothing from outside, the same bytes for the same input.

Names come from strangers' files: each goes through `markup.text`, and a content security policy forbids scripts and
loads besides. The page is well-formed XML, so that any parser can check it. No computing but of axes and of pooled
cells.

`markup` has words, numbers and tables, `frontier` the plots, `heatmap` the layers, `style` the looks, `document` the
rest.
"""

from lrconvert.report.html.document import page

__all__ = ["page"]
