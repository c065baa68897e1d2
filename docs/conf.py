"""Settings for Sphinx; `make docs` builds the site into docs/_build/html and treats every warning as an error."""

from mmseg_volo import __version__

project = 'mmseg_volo'
copyright = 'mmseg_volo contributors'
release = __version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['_build']
suppress_warnings = ['config.cache']

myst_heading_anchors = 3  # links to #headings are checked
myst_enable_extensions = ['colon_fence', 'dollarmath']

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
napoleon_numpy_docstring = False

html_theme = 'furo'
html_title = f'mmseg_volo {release}'
html_theme_options = dict(
    source_repository='https://github.com/mmseg-volo/mmseg-volo/', source_branch='main', source_directory='docs/'
)
