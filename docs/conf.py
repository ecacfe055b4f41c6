# SPDX-License-Identifier: Apache-2.0
"""Configuration of Sphinx.  Nothing here needs a network, in the build or in the pages."""

import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import options

from irem_bids import __version__

project = "irem-bids"
author = "The irem-bids developers"
copyright = "The irem-bids developers"
release = version = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"irem-bids {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
suppress_warnings = ["misc.highlighting_failure"]
smartquotes = False


class OptionTable(SphinxDirective):
    """``options-table SECTION``: the options of a section of the settings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(options.markdown_table(self.arguments[0]))


def visit_math(translator, node):
    """Inline formula as MathML, which browsers draw by themselves."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator, node):
    """Displayed formula as MathML."""
    formula = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_directive("options-table", OptionTable)
    nothing = (None, None)
    app.add_html_math_renderer("mathml", (visit_math, nothing[0]), (visit_math_block, nothing[1]))


html_math_renderer = "mathml"
