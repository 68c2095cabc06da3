"""A small server that speaks as vLLM and as a repository of the Open Inference Protocol do, to stand behind the proxy.

`python tests/stand_in.py PORT DIRECTORY [BACKBONE]` loads real exported adapters from DIRECTORY. Without a backbone it
says one number of the adapter again and again; with one it answers as plain PEFT does. POST /fault makes it misbehave.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import safetensors.numpy


class Adapter:
    """What is in memory of one adapter."""

    def __init__(self, directory: Path) -> None:
        tensors = safetensors.numpy.load((directory / "adapter_model.safetensors").read_bytes())
        self.rank = json.loads((directory / "adapter_config.json").read_bytes())["r"]
        self.number = float(sum(tensor.sum() for name, tensor in sorted(tensors.items()) if "lora_B" in name))


class Plain:
    """The adapter on its backbone, by transformers and peft alone."""

    def __init__(self, directory: Path, backbone: str) -> None:
        from peft import PeftModel  # noqa: PLC0415
        from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415

        base = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2)
        self.model = PeftModel.from_pretrained(base, str(directory)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(backbone)

    def shares(self, texts: list[str]) -> np.ndarray:
        import torch  # noqa: PLC0415

        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
        return torch.softmax(logits.double(), 1).numpy()


class Upstream(ThreadingHTTPServer):
    """State of the server."""

    daemon_threads = True

    def __init__(self, port: int, directory: Path, backbone: str) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.directory = directory
        self.backbone = backbone
        self.adapters: dict[str, Any] = {}
        self.faults: dict[str, Any] = {}
        self.asked: list[str] = []
        self.under_way = 0
        self.lock = threading.Lock()

    def load(self, name: str, directory: Path) -> None:
        time.sleep(self.faults.get("load_seconds", 0))
        self.adapters[name] = Plain(directory, self.backbone) if self.backbone else Adapter(directory)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            time.sleep(self.server.faults.get("list_seconds", 0))
            self.json({"object": "list", "data": [{"id": name} for name in ["base", *self.server.adapters]]})
        elif self.path == "/seen":
            self.json({"asked": self.server.asked, "under_way": self.server.under_way})
        elif self.path.startswith("/v2/models/") and (name := unquote(self.path.split("/")[3])) in self.server.adapters:
            self.json({"name": name, "platform": "stand_in", "inputs": [], "outputs": []})
        else:
            self.json({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        match self.path.strip("/").split("/"):
            case ["fault"]:
                self.server.faults = body
                self.json({})
            case ["v1", "load_lora_adapter"]:
                self.put(body["lora_name"], Path(body["lora_path"]))
            case ["v1", "unload_lora_adapter"]:
                self.drop(body["lora_name"])
            case ["v2", "repository", "index"]:
                self.json([{"name": name, "state": "READY"} for name in self.server.adapters])
            case ["v2", "repository", "models", name, "load"]:
                self.put(unquote(name), self.server.directory / unquote(name))
            case ["v2", "repository", "models", name, "unload"]:
                self.drop(unquote(name))
            case ["v2", "models", name, "infer"]:
                self.ask(unquote(name), lambda: self.infer(unquote(name), body))
            case ["v1", "completions"] | ["v1", "chat", "completions"]:
                self.ask(body["model"], lambda: self.talk(body))
            case _:
                self.json({"error": "not found"}, 404)

    def put(self, name: str, directory: Path) -> None:
        if name in self.server.adapters:
            self.json({"error": "already loaded"}, 400)
            return
        self.server.load(name, directory)
        self.json({"message": "Success"})

    def drop(self, name: str) -> None:
        if not self.server.faults.get("keeps"):
            self.server.adapters.pop(name, None)
        self.json({"message": "Success"})

    def ask(self, name: str, answer: Any) -> None:
        with self.server.lock:
            self.server.asked.append(name)
            self.server.under_way += 1
        try:
            time.sleep(self.server.faults.get("seconds", 0))
            if status := self.server.faults.get("status"):
                self.json({"error": {"message": f"{name} says no"}}, status)
            elif name not in self.server.adapters:
                self.json({"error": {"message": f"The model {name} does not exist."}}, 404)
            else:
                answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def infer(self, name: str, body: dict[str, Any]) -> None:
        adapter = self.server.adapters[name]
        texts = body["inputs"][0]["data"]
        shares = adapter.shares(texts) if self.server.backbone else np.full((len(texts), 2), adapter.number)
        shape = [len(texts), 2]
        outputs = [{"name": "probabilities", "datatype": "FP32", "shape": shape, "data": shares.ravel().tolist()}]
        self.json({"model_name": self.server.faults.get("as", name), "id": body.get("id"), "outputs": outputs})

    def talk(self, body: dict[str, Any]) -> None:
        name, count = body["model"], body.get("max_tokens", 4)
        adapter = self.server.adapters[name]
        head = {"id": "x", "object": "text_completion", "model": self.server.faults.get("as", name)}

        def words() -> Iterator[str]:
            for _ in range(count):
                time.sleep(self.server.faults.get("pace", 0))
                yield f"{adapter.number:g};"

        if not body.get("stream"):
            self.json(head | {"choices": [{"index": 0, "text": "".join(words()), "finish_reason": "length"}]})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number, word in enumerate(words()):
            if number == self.server.faults.get("hang_up_after"):
                self.close_connection = True
                self.connection.close()
                return
            self.chunk(b"data: " + json.dumps(head | {"choices": [{"index": 0, "text": word}]}).encode() + b"\r\n\r\n")
        if not self.server.faults.get("no_end"):
            self.chunk(b": a comment\n\ndata: [DONE]\n\n")
        self.chunk(b"")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def json(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    Upstream(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "").serve_forever()
