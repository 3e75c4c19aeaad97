"""The configuration of the documentation site. `make docs` builds it without a network."""

import django
from django.conf import settings
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import django_eventsource

# autodoc imports the package, which needs the settings of a project.
settings.configure(
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django_eventsource",
    ],
)
django.setup()

project = "django-eventsource"
author = "The django-eventsource authors"
copyright = author  # noqa: A001
release = django_eventsource.__version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"django-eventsource {release}"
html_copy_source = False
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"

nitpicky = True
# Objects of other packages. Links to them would need their inventories from the network.
nitpick_ignore_regex = [
    (r"py:class", r"Application|AsyncClient"),
    (r"py:.*", r"(collections|typing|django|channels|httpx2|asyncio|datetime|ssl)\..*"),
    (
        r"py:exc",
        r"Http404|ImproperlyConfigured|NoReverseMatch|PermissionDenied|TemplateDoesNotExist"
        r"|AppRegistryNotReady|TransactionManagementError",
    ),
    # Type variables, which have no entry.
    (r"py:class", r"django_eventsource\.\w+\.[A-Z]"),
]


def resolve_links_to_pages(app: Sphinx, tree: nodes.document) -> None:
    """Let Sphinx resolve and check a link to ``page.rst``, the form of link that forges follow."""
    for link in list(tree.findall(nodes.reference)):
        uri = link.get("refuri", "")
        if uri.endswith(".rst") and "://" not in uri:
            page = pending_xref(
                "",
                *link.children,
                refdoc=app.env.docname,
                refdomain="std",
                refexplicit=True,
                reftarget=uri.removesuffix(".rst"),
                reftype="doc",
                refwarn=True,
            )
            link.replace_self(page)


def setup(app: Sphinx) -> None:
    """Connect the function above."""
    app.connect("doctree-read", resolve_links_to_pages)
