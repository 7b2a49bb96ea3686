"""The documentation site: `make docs`.

Everything that a page loads lies beside it: no fonts, scripts or badges from other hosts.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "hpsched"
author = "hpsched authors"
copyright = "hpsched authors, MIT license"
release = version = metadata.version("hpsched")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "hpsched_docs",
]
exclude_patterns = ["_build"]
nitpicky = True
smartquotes_action = "De"  # dashes and ellipses; quotes stay as they are typed

# -- pages -----------------------------------------------------------------------------------------

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

# -- the reference, from docstrings ----------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = [  # what hpsched.integrations is for; the pages do not depend on it
    "accelerate",
    "fastai",
    "fastcore",
    "ignite",
    "lightning",
    "mlflow",
    "tensorboard",
    "transformers",
    "wandb",
]
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Keras is asked for its backend as it is imported.
keras: Any = ModuleType("keras")
keras.config = SimpleNamespace(backend=lambda: "torch")
keras.callbacks = SimpleNamespace(Callback=object)
sys.modules["keras"] = keras

# Named in signatures and docstrings, but
# documented elsewhere (other libraries) or nowhere (inner parts).
nitpick_ignore_regex = [
    (r"py:.*", r"(accelerate|ignite)\..*"),
    (r"py:.*", r"(collections|contextlib|go|numpy|optuna|os|pathlib|plotly|torch|typing)\..*"),
    (
        r"py:.*",
        r"hpsched\.(compare|coordinates|evidence|figure_data|integrations|ledger|prestage|records|summary\.RungCount)(\..*)?",
    ),
    (r"py:(class|data)", r"(.*\.)?(Array|CycleRecord|OutOfMemory|RESULTS|T|Train|Trial)"),
]

# -- how it looks ----------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"hpsched {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
