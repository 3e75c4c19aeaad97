"""The template tag that finds the example of a page."""

from __future__ import annotations

from django import template
from django.template import RequestContext

from testproject.examples import EXAMPLES, Example

register = template.Library()


@register.simple_tag(takes_context=True)
def example(context: RequestContext) -> Example | None:
    """Return the example whose page is rendered; ``None`` on the start page."""
    name = context["request"].resolver_match.url_name
    return next((one for one in EXAMPLES if one.name == name), None)
