"""A server that speaks the part of vLLM's protocol that `VllmServer` uses, with a transformers model.

    python fake_vllm.py MODEL [PORT]

It prints its port. Below ``/stale`` it goes on with the adapter that it loaded first, or with its own weights; below
``/cached`` it remembers with which weights it first read a prompt, although told to forget; below ``/short`` it ends
completions early, below ``/static`` it has no endpoints for weights.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

LOCK = threading.Lock()
ADAPTERS: dict[str, Any] = {}
BASE: dict[str, Any] = {}
PREFIXES: dict[tuple[int, ...], Any] = {}  # with which of the whole models a prompt was read
READ = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "logprobs",
    "return_token_ids", "repetition_penalty", "presence_penalty", "frequency_penalty", "skip_special_tokens",
}  # fmt: skip


class Refused(Exception):
    pass


def load(fault: str, lora_name: str, lora_path: str) -> str:
    if lora_name in ADAPTERS:
        raise Refused(f"The lora adapter '{lora_name}' has already been loaded.")
    known = ADAPTERS.get("first") if fault == "stale" else None
    if known is None:
        base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
        known = PeftModel.from_pretrained(base, lora_path).eval()
    if fault == "stale":
        ADAPTERS["first"] = known
    ADAPTERS[lora_name] = known
    return f"Success: LoRA adapter '{lora_name}' added successfully."


def unload(fault: str, lora_name: str) -> str:
    del ADAPTERS[lora_name]
    return f"Success: LoRA adapter '{lora_name}' removed successfully."


def reload(fault: str, method: str, kwargs: dict[str, str]) -> str:
    assert method == "reload_weights", method
    if fault != "stale":
        BASE["base"] = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"], dtype=torch.float32).eval()
    return json.dumps({"results": [None]})


def forget(fault: str) -> str:
    if fault != "cached":
        PREFIXES.clear()
    return ""


@torch.no_grad()
def complete(fault: str, asked: dict[str, Any]) -> dict[str, Any]:
    if asked.keys() != READ or (asked["top_p"], asked["top_k"], asked["min_p"]) != (1.0, 0, 0.0):
        raise Refused(f"this fake reads {sorted(READ)}, without filters")
    if asked["model"] not in ADAPTERS | BASE:
        raise Refused(f"The model `{asked['model']}` does not exist.")
    ids = list(asked["prompt"])
    model = ADAPTERS.get(asked["model"]) or PREFIXES.setdefault(tuple(ids), BASE["base"])
    draws = torch.Generator().manual_seed(asked["seed"])
    tokens: list[int] = []
    log_probs: list[float] = []
    while len(tokens) < asked["max_tokens"] - (fault == "short"):
        scores = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        shaped = (scores / asked["temperature"]).softmax(-1) if asked["temperature"] else None
        token = int(scores.argmax() if shaped is None else torch.multinomial(shaped, 1, generator=draws))
        tokens.append(token)
        log_probs.append(float(scores.log_softmax(-1)[token]))
        ids.append(token)
        if token in asked["stop_token_ids"]:
            break
    reason = "stop" if tokens[-1] in asked["stop_token_ids"] else "length"
    choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": tokens}
    return {"model": asked["model"], "choices": [{**choice, "logprobs": {"token_logprobs": log_probs}}]}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault, path = re.fullmatch(r"/(?:(stale|cached|short|static)/)?(?:v1/)?(\w+)", self.path).groups("")
        answer: Any
        try:
            with LOCK:
                if path == "completions":
                    status, answer = 200, json.dumps(complete(fault, asked))
                elif path == "load_lora_adapter" and fault != "static":
                    status, answer = 200, load(fault, **asked)
                elif path == "unload_lora_adapter" and fault != "static":
                    status, answer = 200, unload(fault, **asked)
                elif path == "collective_rpc" and fault != "static":
                    status, answer = 200, reload(fault, **asked)
                elif path == "reset_prefix_cache" and fault != "static":
                    status, answer = 200, forget(fault)
                else:
                    status, answer = 404, json.dumps({"detail": "Not Found"})
        except Refused as error:
            status, answer = 400, json.dumps({"error": {"message": str(error)}})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer.encode())

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            json.dumps({"data": [{"id": "base"}, *({"id": name, "parent": "base"} for name in ADAPTERS)]}).encode()
        )

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    BASE["base"] = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
