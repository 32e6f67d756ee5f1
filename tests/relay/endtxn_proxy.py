"""The proxy that delivers an `EndTxn` late, told by a word which ones."""

from __future__ import annotations

from tests.protocol_proxy import LateEndTxn, ProtocolProxy


class EndTxnProxy(ProtocolProxy):
    """Holds commits or aborts once `hold` is set."""

    _kind = ""

    @property
    def hold(self) -> str:
        """ "commit" or "abort": which EndTxn is held; "" forwards everything."""
        return self._kind

    @hold.setter
    def hold(self, kind: str) -> None:
        self._kind = kind
        self.make_late(LateEndTxn("commit" if kind == "commit" else "abort") if kind else None)
