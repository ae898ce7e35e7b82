"""Values as tables of HTML, as notebooks show them (IPython, ``_repr_html_``)."""

from collections.abc import Mapping


def html_table(members: Mapping[str, object]) -> str:
    """Return a table of two columns, names and values. Both may be anything: a job sends them."""
    from html import escape  # with tables of thousands of names, which no command line needs

    rows = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in members.items())
    return f"<table>{''.join(rows)}</table>"
