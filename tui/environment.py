"""The switches that Textual reads while it is imported, and what the locale says of the terminal.

Nothing of Textual is imported here: the command line calls `prepare` before it imports `tui.app`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from tui.settings import ControlCenterSettings

_LOCALE_VARIABLES = ("LC_ALL", "LC_CTYPE", "LANG")  # the first that is set decides


def prepare(settings: ControlCenterSettings, environ: MutableMapping[str, str] = os.environ) -> None:
    """Cap the frame rate and switch off everything that moves by itself."""
    environ["TEXTUAL_FPS"] = str(settings.fps)
    environ["TEXTUAL_ANIMATIONS"] = "none"
    environ["TEXTUAL_SMOOTH_SCROLL"] = "0"
    environ.setdefault("ESCDELAY", "50")
    # ctrl+c would become a signal that ends the program at once, with every answer in flight
    environ.pop("TEXTUAL_ALLOW_SIGNALS", None)


def locale_is_utf8(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the terminal may be sent more than ASCII. No locale at all counts as UTF-8: bare containers have none,
    and the terminals they are seen through have long been UTF-8."""
    for name in _LOCALE_VARIABLES:
        value = environ.get(name, "")
        # Python itself sets LC_CTYPE=C.UTF-8 where it finds the C locale, or one that is not installed: LANG knows more
        if value and not (name == "LC_CTYPE" and value == "C.UTF-8" and environ.get("LANG")):
            return "utf-8" in value.lower() or "utf8" in value.lower()
    return True
