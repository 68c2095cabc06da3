"""The proxy's answers: which call of the upstream each address is."""

import json
from dataclasses import replace

from service.proxy.forms import CHAT_EXAMPLE, Tensors, Texts, refuse_other_adapters
from service.proxy.relay import Relay, Upstream
from service.serving import inference
from service.serving.answers import Answer, ProblemError
from service.serving.completions import EXAMPLE
from service.serving.fleet import Fleet
from service.serving.incoming import Call
from service.serving.metrics import ServingMetrics
from service.serving.probes import find
from service.serving.routes import Place, Route
from service.serving.shell import counted

SPOKEN = {
    "openai": {Route.COMPLETIONS, Route.CHAT},
    "oip": {Route.INFER, Route.METADATA},
}
"""The addresses that each kind of upstream answers."""


class App:
    """Calls of one process, passed on."""

    def __init__(self, fleet: Fleet, upstream: Upstream, speaks: str, metrics: ServingMetrics) -> None:
        """`speaks` is the upstream's protocol, a key of `SPOKEN`."""
        self._fleet = fleet
        self._upstream = upstream
        self._speaks = speaks
        self._metrics = metrics
        self._relay: Relay | None = None

    async def open(self) -> None:
        """Make the client, which belongs to the loop."""
        self._relay = Relay(self._upstream, self._upstream.client(), self._metrics)

    async def close(self) -> None:
        """Close its connections."""
        if self._relay is not None:
            await self._relay.client.aclose()

    async def answer(self, place: Place, call: Call) -> Answer | None:
        """The answer of an address; None where it was sent already, behind its final check.

        Raises:
            ProblemError: nothing was sent.
            DisconnectedError: the client went away.
        """
        relay = self._relay
        if relay is None:
            raise AssertionError("the lifespan starts before the first request")
        if place.route not in SPOKEN[self._speaks]:
            detail = f"the server behind this proxy speaks {self._speaks}; it has no such address"
            raise ProblemError(501, "not-spoken-here", detail)
        call = replace(call, version=place.version)
        _ = call.wish  # what is wrong with the headers is said first
        if place.route in {Route.COMPLETIONS, Route.CHAT}:
            example = CHAT_EXAMPLE if place.route is Route.CHAT else EXAMPLE
            texts = Texts.of(place.route, await call.document(example))
            served = find(self._fleet, texts.model)
            work = relay.stream(served, texts, call) if texts.stream else relay.whole(served, texts, call)
        else:
            if call.header(b"inference-header-content-length"):
                raise ProblemError(400, "invalid-body", "binary tensors are not spoken here; send data as JSON")
            served = find(self._fleet, place.model)
            body = b""
            if place.route is Route.INFER:
                document = await call.document(inference.EXAMPLE)
                refuse_other_adapters(document)
                body = json.dumps(document).encode()
            work = relay.whole(served, Tensors(place, body), call)
        await counted(served, self._metrics, work)
        return None
