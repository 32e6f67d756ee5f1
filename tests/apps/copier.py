"""An app that copies a topic, as Kafka's own system test of transactions does."""

from __future__ import annotations

import os

from pydantic import BaseModel

from eoframework import App, Topic


class Number(BaseModel):
    n: int


source = Topic(os.environ.get("COPIER_SOURCE", "copier.source"), Number)
target = Topic(os.environ.get("COPIER_TARGET", "copier.target"), Number)
# Groups are the broker's, which tests share.
app = App(f"copier-{source.name}")


@app.transform(source, to=target)
def copy(batch: list[Number]) -> list[Number]:
    return list(batch)
