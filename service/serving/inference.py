"""The Open Inference Protocol v2 (KServe's), HTTP with JSON: tensors in, tensors out, errors as {"error": ...}.

After the protocol's required API. One input tensor, whose name and type follow the model's input; binary tensors are an
extension that this server does not have.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.domain.answers import Answers
from service.serving.answers import (
    BATCH_LIMIT,
    DIGITS,
    Answer,
    ProblemError,
    check_inputs,
    check_text,
    image_of,
    provenance,
    softmax,
    top1,
    values_of,
)
from service.serving.replica import Pointer
from shards.engine.interface import Input
from shards.logits import Logits
from shards.recipe import Recipe

EXAMPLE = '{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a text"]}]}'
ID_LIMIT = 200
DEPTH = 8
"""Nested lists in `data`; a tensor here has two dimensions at most."""
LARGEST = float(np.finfo(np.float32).max)
SERVER = {"name": "expunge", "version": importlib.metadata.version("expunge"), "extensions": []}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input tensor as it was sent, its data flat. Holds inputs: it goes with the call."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Inference:
    """One inference call."""

    tensor: Tensor
    wanted: frozenset[str]
    """Names of the outputs asked for; none: all."""
    call_id: str | None
    version: str | None
    """The version in the address: no other may answer."""
    input_limit: int

    def inputs(self, pointer: Pointer, answers: Answers) -> list[Input]:
        """The inputs as the model takes them.

        Raises:
            ProblemError: the tensor is not one for this model, or another version is served.
        """
        check_served(pointer, self.version)
        recipe = pointer.recipe
        check_inputs(recipe, ())  # the task; the inputs below are of the model's kind
        if self.tensor.name != recipe.input:
            raise _invalid(f'inputs[0].name must be "{recipe.input}", the model\'s input')
        if unknown := self.wanted - {name for name, _, _ in _outputs(recipe, answers)}:
            names = ", ".join(name for name, _, _ in _outputs(recipe, answers))
            raise _invalid(f"outputs asks for {len(unknown)} tensors that the model has not: it has {names}")
        if recipe.module is not None:
            return [*_vectors(self.tensor, recipe.module.width)]
        texts = self._texts()
        if recipe.input == "image":
            return [image_of(text, f"inputs[0].data[{place}]") for place, text in enumerate(texts)]
        return [*texts]

    def render(self, model: str, pointer: Pointer, found: Logits, answers: Answers) -> Answer:
        """The output tensors, with the version and how complete the ensemble is."""
        logits = found.astype(np.float64)
        data = _data(pointer.recipe, logits, answers)
        outputs = [
            {"name": name, "datatype": datatype, "shape": [len(logits), *shape], "data": data[name]}
            for name, datatype, shape in _outputs(pointer.recipe, answers)
            if not self.wanted or name in self.wanted
        ]
        body = {
            "model_name": model,
            "model_version": str(pointer.version),
            **({"id": self.call_id} if self.call_id is not None else {}),
            "parameters": {"shards_live": pointer.live, "shards_of": pointer.of},
            "outputs": outputs,
        }
        return Answer(200, json.dumps(body).encode(), headers=provenance(pointer))

    def _texts(self) -> list[str]:
        tensor = self.tensor
        if tensor.datatype != "BYTES" or tensor.shape not in {(len(tensor.data),), (len(tensor.data), 1)}:
            raise _invalid("inputs[0] must be of datatype BYTES and of shape [n] or [n, 1]")
        for place, text in enumerate(tensor.data):
            if not isinstance(text, str):
                raise _invalid(f"inputs[0].data[{place}] must be a string")
            check_text(text, f"inputs[0].data[{place}]", self.input_limit)
        return list(tensor.data)


def parse(body: Mapping[str, Any], *, version: str | None, input_limit: int) -> Inference:
    """An inference call from its JSON.

    Raises:
        ProblemError: 422.
    """
    inputs, outputs, call_id = body.get("inputs"), body.get("outputs"), body.get("id")
    if set(body) - {"id", "parameters", "inputs", "outputs"}:
        raise _invalid("the body has the fields id, parameters, inputs and outputs, and no other")
    if call_id is not None and not (isinstance(call_id, str) and len(call_id) <= ID_LIMIT):
        raise _invalid(f"id must be a string of at most {ID_LIMIT} characters")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise _invalid(f"inputs must be a list of one tensor: {EXAMPLE}")
    if outputs is not None and not (isinstance(outputs, list) and all(map(_is_named, outputs))):
        raise _invalid('outputs must be a list of tensors by name: [{"name": "label"}]')
    tensor = _tensor(inputs[0])
    if not 1 <= tensor.shape[0] <= BATCH_LIMIT:
        raise ProblemError(422, "invalid-batch", f"inputs[0] must hold between 1 and {BATCH_LIMIT} inputs")
    return Inference(tensor, frozenset(each["name"] for each in outputs or ()), call_id, version, input_limit)


def metadata(model: str, pointer: Pointer, versions: Sequence[int], answers: Answers) -> Answer:
    """The model's tensors, and which versions are served; `parameters.classes` are the columns of `probabilities`."""
    recipe = pointer.recipe
    if recipe.task == "completion":
        check_inputs(recipe, ())
    wide = [recipe.module.width if recipe.module else -1] if recipe.input == "vector" else []
    datatype = "FP32" if recipe.input == "vector" else "BYTES"
    body = {
        "name": model,
        "versions": [str(version) for version in versions],
        "platform": f"expunge_{recipe.engine}",
        "inputs": [{"name": recipe.input, "datatype": datatype, "shape": [-1, *wide]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": [-1, *shape]}
            for name, datatype, shape in _outputs(recipe, answers)
        ],
        "parameters": {"classes": list(recipe.classes), "shards_live": pointer.live, "shards_of": pointer.of},
    }
    return Answer(200, json.dumps(body).encode(), headers=provenance(pointer))


def check_served(pointer: Pointer, version: str | None) -> None:
    """Refuse to speak for a version that is not the served one.

    Raises:
        ProblemError: 404.
    """
    if version is not None and version != str(pointer.version):
        detail = f"that version is not served: version {pointer.version} is; leave the version out of the address"
        raise ProblemError(404, "no-such-version", detail)


def refusal(problem: ProblemError) -> Answer:
    """A problem as the protocol writes errors; what is wrong with a request is a 400 there."""
    status = 400 if problem.status == 422 else problem.status
    return Answer(status, json.dumps({"error": problem.detail}).encode(), headers=problem.headers)


def _outputs(recipe: Recipe, answers: Answers) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Name, type and shape per input of each output."""
    if recipe.task == "regression":
        return (("value", "FP32", (1,)),)
    if answers is Answers.TOP1:
        return (("label", "BYTES", ()), ("score", "FP32", ()))
    return (("label", "BYTES", ()), ("probabilities", "FP32", (len(recipe.classes),)))


def _data(recipe: Recipe, logits: Any, answers: Answers) -> dict[str, list[Any]]:
    """The outputs' data in row-major order."""
    if recipe.task == "regression":
        return {"value": values_of(recipe, logits, answers)}
    if answers is Answers.TOP1:
        best = top1(recipe.classes, logits)
        return {"label": [label for label, _ in best], "score": [score for _, score in best]}
    return {
        "label": [recipe.classes[int(row.argmax())] for row in logits],
        "probabilities": [round(float(share), DIGITS) for share in softmax(logits).ravel()],
    }


def _tensor(value: Any) -> Tensor:
    fields = value if isinstance(value, dict) else {}
    name, datatype, shape = fields.get("name"), fields.get("datatype"), fields.get("shape")
    if not (isinstance(name, str) and isinstance(datatype, str) and isinstance(fields.get("data"), list)):
        raise _invalid(f"inputs[0] must have name, shape, datatype and data: {EXAMPLE}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or any(type(size) is not int for size in shape):
        raise _invalid("inputs[0].shape must be [n], or [n, m]")
    data = _flat(fields["data"], DEPTH)
    if len(data) != math.prod(shape) or min(shape) < 0:
        raise _invalid("inputs[0].data must hold as many values as its shape says")
    return Tensor(name, datatype, tuple(shape), data)


def _flat(values: list[Any], depth: int) -> list[Any]:
    """Values of lists in lists, which the protocol allows."""
    if not depth:
        raise _invalid("inputs[0].data must be a list of values, or a list of rows")
    if not any(isinstance(value, list) for value in values):
        return values
    return [each for value in values for each in (_flat(value, depth - 1) if isinstance(value, list) else [value])]


def _vectors(tensor: Tensor, width: int) -> list[str]:
    """Rows of numbers as the JSON texts that models of vectors take."""
    if tensor.datatype not in {"FP32", "FP64"} or tensor.shape[1:] != (width,):
        raise _invalid(f"inputs[0] must be of datatype FP32 and of shape [n, {width}]")
    if any(type(each) not in {int, float} or not abs(each) <= LARGEST for each in tensor.data):
        raise _invalid("inputs[0].data must hold finite numbers that FP32 has room for")
    count = tensor.shape[0]
    return [json.dumps(list(tensor.data[row * width : (row + 1) * width])) for row in range(count)]


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _invalid(detail: str) -> ProblemError:
    return ProblemError(422, "invalid-body", detail)
