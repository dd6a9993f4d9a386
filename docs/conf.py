"""Sphinx configuration; `python -m yokolab site` writes the pages and calls Sphinx with it."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGE = HERE / "_stage"
SITE = json.loads((STAGE / "conf" / "site.json").read_text(encoding="utf-8"))

project = SITE["title"]
author = f"{project} contributors"
copyright = f"{author}, Apache-2.0"
release = version = SITE["version"]
language = "en"

extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "sphinxcontrib.katex"]
exclude_patterns = ["**/.*"]
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

# notebooks and Markdown: outputs are shown as they are stored, nothing is run
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_code_prompt_show = "Code"
nb_code_prompt_hide = "Code"
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block",
                          "deflist",
                          "tasklist", "strikethrough"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
add_module_names = False
python_maximum_signature_line_length = 84
toc_object_entries_show_parents = "hide"

# formulas: left to KaTeX in the browser; the build draws them afterwards if Node is here
katex_css_path = "katex.css"
katex_options = r"""delimiters: [
  {left: "\\(", right: "\\)", display: false}, {left: "\\[", right: "\\]", display: true},
  {left: "\\begin{align}", right: "\\end{align}", display: true},
  {left: "\\begin{align*}", right: "\\end{align*}", display: true},
  {left: "\\begin{equation}", right: "\\end{equation}", display: true},
  {left: "\\begin{gather}", right: "\\end{gather}", display: true}], strict: "ignore" """

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = [str(HERE / "_static")]
html_extra_path = [str(STAGE / "extra")]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = str(HERE / "_static" / "mark.svg")
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = False
html_permalinks_icon = "#"
html_context = {"default_mode": "auto"}
html_sidebars = {"**": ["sidebar-nav-bs"], "index": [], "claims": [], "changelog": [],
                 "search": [], "genindex": []}
html_theme_options = {
    "logo": {"text": project, "image_light": str(HERE / "_static" / "mark.svg"),
             "image_dark": str(HERE / "_static" / "mark.svg"), "alt_text": ""},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher", "navbar-icon-links"],
    "navbar_persistent": ["search-button-field"],
    "header_links_before_dropdown": 6,
    "icon_links": [{"name": "Repository", "url": SITE["repository"], "icon": "fa-brands fa-github"}]
                  if SITE["repository"] else [],
    "show_nav_level": 1,
    "navigation_depth": 3,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "article_header_start": ["breadcrumbs"],
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": [],
    "pygments_light_style": "github-light",
    "pygments_dark_style": "github-dark",
    "back_to_top_button": False,
    "search_as_you_type": True,
    "search_bar_text": "Search",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"


def one_target(app, document):
    """A short name that several modules define means the one of the page's own module, or none."""
    from sphinx import addnodes
    domain = app.env.domains.python_domain
    for node in list(document.findall(addnodes.pending_xref)):
        if node.get("refdomain") != "py" or not node.hasattr("refspecific"): continue
        here = node.get("py:module")
        found = domain.find_obj(app.env, here, node.get("py:class"), node["reftarget"],
                                node.get("reftype"), 1)
        if len(found) < 2: continue
        own = [name for name, _ in found if here and name.startswith(f"{here}.")]
        if len(own) == 1:
            node["reftarget"] = own[0]
            node.attributes.pop("refspecific")
        else:
            node.replace_self(node.children)


def setup(app):
    """Called by Sphinx."""
    from sphinx.transforms.post_transforms import SphinxPostTransform

    class OneTarget(SphinxPostTransform):
        """Before references are resolved."""
        default_priority = 5

        def run(self, **kwargs): one_target(app, self.document)

    app.add_post_transform(OneTarget)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
