"""Debian's Chromium, where it is installed."""

import shutil

CHROMIUM = shutil.which("chromium")


# Nothing but the page is asked for; a container's root has no sandbox.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
