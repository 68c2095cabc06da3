"""Bodies of OpenAI's completions API: what is accepted, what is answered or streamed, and its errors.

After the API's published reference; what this server cannot do is refused by name, never ignored. Prompts are never
quoted.
"""

import json
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.serving.answers import Answer, ProblemError, check_text, provenance
from service.serving.replica import Pointer
from shards.engine.sampling import Sampling, Step

EXAMPLE = '{"model": "a name", "prompt": "a text"}'
DONE = b"data: [DONE]\n\n"
EVENTS = b"text/event-stream; charset=utf-8"
MAX_TOKENS = 16
"""Unless the caller says otherwise, as in the published API."""
MOST_TOKENS = 2**20
HOTTEST = 2
STOPS = 4
STOP_LENGTH = 256
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": (),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
"""Fields that are taken with a value that changes nothing (or null), and with no other."""
KNOWN = {"model", "prompt", "max_tokens", "temperature", "seed", "stop", "stream", "stream_options", "user"}


@dataclass(frozen=True, slots=True)
class Asked:
    """One completion call. Holds the prompt: it goes with the call."""

    model: str
    prompt: str
    sampling: Sampling
    stream: bool
    usage: bool
    """Whether a stream ends with an account of its tokens."""
    call_id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


def parse(body: dict[str, Any], *, input_limit: int) -> Asked:
    """A completion call from its JSON.

    Raises:
        ProblemError: 422 for what is not acceptable, 413 for a prompt that is too long.
    """
    for name, value in body.items():
        if name not in KNOWN and name not in NEUTRAL:
            raise _invalid(name, "is not known here; leave it out")
        if name in NEUTRAL and value is not None and not any(_same(value, each) for each in NEUTRAL[name]):
            raise _invalid(name, "is not supported here; leave it out")
    model = body.get("model")
    if not isinstance(model, str):
        raise _invalid("model", "must be the name of a model; GET /v1/models lists them")
    stream = _flag(body, "stream")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or (options and (not stream or set(options) != {"include_usage"})):
        raise _invalid("stream_options", "goes with stream, and has the one field include_usage")
    return Asked(
        model, _prompt(body.get("prompt"), input_limit), _sampling(body), stream, _flag(options, "include_usage")
    )


def render(asked: Asked, pointer: Pointer, steps: Sequence[Step]) -> Answer:
    """The whole answer."""
    body = _body(asked, pointer, "".join(step.text for step in steps), steps[-1].finish)
    return Answer(200, json.dumps(body | {"usage": _usage(steps[-1])}).encode(), headers=provenance(pointer))


def render_step(asked: Asked, pointer: Pointer, step: Step) -> bytes:
    """The events of one step, the last one's with the end of the stream; empty where there is nothing to tell."""
    if not step.text and step.finish is None:
        return b""
    account = {"usage": None} if asked.usage else {}
    events = event(_body(asked, pointer, step.text, step.finish) | account)
    if step.finish is None:
        return events
    if asked.usage:
        events += event(_head(asked, pointer) | {"choices": [], "usage": _usage(step)})
    return events + DONE


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def error_body(problem: ProblemError) -> dict[str, Any]:
    """A problem as the API's errors are written."""
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    return {"error": {"message": problem.detail, "type": kind, "param": None, "code": problem.slug}}


def refusal(problem: ProblemError) -> Answer:
    """A problem as a response; what is wrong with a body is a 400 there."""
    status = 400 if problem.status == 422 else problem.status
    return Answer(status, json.dumps(error_body(problem)).encode(), headers=problem.headers)


def listing(names: Sequence[str], since: int) -> Answer:
    """The models that this server completes or predicts with, which began at `since`."""
    return Answer(200, json.dumps({"object": "list", "data": [_model(name, since) for name in names]}).encode())


def entry(name: str, since: int) -> Answer:
    """One of them."""
    return Answer(200, json.dumps(_model(name, since)).encode())


def _model(name: str, since: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": since, "owned_by": "expunge"}


def _head(asked: Asked, pointer: Pointer) -> dict[str, Any]:
    return {
        "id": asked.call_id,
        "object": "text_completion",
        "created": asked.created,
        "model": asked.model,
        "system_fingerprint": pointer.assembly,
        "version": pointer.version,
        "shards": {"live": pointer.live, "of": pointer.of},
    }


def _body(asked: Asked, pointer: Pointer, text: str, finish: str | None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return _head(asked, pointer) | {"choices": [choice]}


def _usage(step: Step) -> dict[str, int]:
    return {
        "prompt_tokens": step.prompt_tokens,
        "completion_tokens": step.tokens,
        "total_tokens": step.prompt_tokens + step.tokens,
    }


def _invalid(name: str, what: str) -> ProblemError:
    known = name in KNOWN or name in NEUTRAL  # what a caller made up is not said again
    return ProblemError(422, "invalid-body", f"{name if known else 'a field of the body'} {what}")


def _same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ProblemError(422, "invalid-body", f"{name} must be true or false")
    return bool(value)


def _prompt(value: Any, limit: int) -> str:
    prompt = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(prompt, str):
        raise _invalid("prompt", "must be one text; send one call per prompt, and no token ids")
    check_text(prompt, "prompt", limit)
    return prompt


def _sampling(body: dict[str, Any]) -> Sampling:
    tokens, temperature, seed = body.get("max_tokens"), body.get("temperature"), body.get("seed")
    if tokens is not None and (type(tokens) is not int or not 1 <= tokens <= MOST_TOKENS):
        raise _invalid("max_tokens", f"must be between 1 and {MOST_TOKENS}")
    if temperature is not None and (type(temperature) not in {int, float} or not 0 <= temperature <= HOTTEST):
        raise _invalid("temperature", f"must be a number between 0 and {HOTTEST}")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise _invalid("seed", "must be a whole number between 0 and 2^63 - 1")
    return Sampling(
        max_new_tokens=tokens or MAX_TOKENS,
        stop=_stops(body.get("stop")),
        temperature=float(temperature or 0),
        seed=secrets.randbelow(2**63) if seed is None else seed,
    )


def _stops(value: Any) -> tuple[str, ...]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > STOPS:
        raise _invalid("stop", f"must be a text, or a list of at most {STOPS}")
    for each in found:
        if not isinstance(each, str) or not 1 <= len(each) <= STOP_LENGTH:
            raise _invalid("stop", f"must be of 1 to {STOP_LENGTH} characters each")
    return tuple(found)
