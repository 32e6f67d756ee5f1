"""An app whose module fails while it is imported."""

from eoframework import App

app = App(f"{1 / 0:g}")
