"""Makes the text of SVG elements, such as lines and circles, with all content escaped."""

from __future__ import annotations

from markupsafe import Markup


def element(name: str, content: str | Markup = "", **attributes: str | float | None) -> Markup:
    """Returns one element; content and attributes are escaped.

    Args:
        name: the element's name, such as `circle`.
        content: plain text, or elements as `Markup`, which are not escaped a second time.
        attributes: `text_anchor` becomes `text-anchor`, and `class_` becomes `class`. An attribute
            that is None is left out.

    >>> element("text", "a < b", x=2.04, text_anchor="end", class_="label")
    Markup('<text x="2" text-anchor="end" class="label">a &lt; b</text>')
    """
    written = Markup("")
    for key, value in attributes.items():
        if value is not None:
            # `format` of Markup escapes its arguments.
            written += Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _text(value))
    return Markup("<{}{}>{}</{}>").format(Markup(name), written, content, Markup(name))


def pixels(value: float) -> str:
    """Returns a length or place in pixels, rounded to a tenth: nobody sees smaller differences.

    >>> pixels(12.0), pixels(12.34)
    ('12', '12.3')
    """
    return f"{value:.1f}".removesuffix(".0")


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else pixels(value)


def horizontal_line(start: float, end: float, y: float, look: str) -> Markup:
    """Returns a horizontal line from pixel `start` to pixel `end`, at the height `y` in pixels.

    `look` is its class in the style sheet, such as "grid".
    """
    return element("path", d=f"M{pixels(start)} {pixels(y)}H{pixels(end)}", class_=look)


def vertical_line(x: float, start: float, end: float, look: str) -> Markup:
    """Returns a vertical line from pixel `start` to pixel `end`, at the pixel `x`.

    `look` is its class in the style sheet, such as "grid".
    """
    return element("path", d=f"M{pixels(x)} {pixels(start)}V{pixels(end)}", class_=look)
