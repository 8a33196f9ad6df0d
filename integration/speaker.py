"""A backend that speaks every API that clients of local models use.

It says "I am MODEL.", with the model's name from the request, in two pieces where it streams. It
calls the tool `weather` for Rome when it is offered a tool of that name, and it embeds every text
as VECTOR. The shapes are those of the API references of OpenAI, Anthropic and Ollama.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from test_jano import Backend

VECTOR = [0.5, -0.25, 1.0]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ROME = {"city": "Rome"}

Json = dict[str, Any]


@dataclass
class Reply:
    """What the model answers: a text in pieces, or else a call of the tool `weather`."""

    pieces: list[str]
    calls_tool: bool

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Speaker(Backend):
    """A backend for one model; `place` is put before the model's name in its answers."""

    def __init__(self, name: str, place: str = "") -> None:
        super().__init__(name)
        self.place = place
        self.answer = self.speak
        self.seen = asyncio.Event()  # each stream waits for it after its first piece
        self.seen.set()

    async def speak(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        reply = Reply([f"I am {self.place}{body['model']}", "."], wants_call(body))
        if request.path == "/v1/embeddings":
            return web.json_response(embedding(body))
        if request.path == "/api/embed":
            return web.json_response({"model": body["model"], "embeddings": [VECTOR]})
        if request.path == "/v1/messages/count_tokens":
            return web.json_response({"input_tokens": 1})
        streams = body.get("stream", request.path == "/api/chat")
        match request.path:
            case "/v1/chat/completions":
                whole, events = chat_completion(reply), chat_completion_events(reply)
            case "/v1/messages":
                whole, events = message(reply), message_events(reply)
            case "/v1/responses":
                whole, events = response(reply), response_events(reply)
            case "/api/chat":
                whole, events = (
                    ollama_chat(reply, body["model"]),
                    ollama_lines(reply, body["model"]),
                )
            case _:
                return web.Response(status=404)
        if not streams:
            return web.json_response(whole)
        return await self.stream(request, events)

    async def stream(self, request: web.Request, events: list[Json]) -> web.StreamResponse:
        """Events, or lines of JSON under /api/, each as soon as `seen` allows it."""
        ollama = request.path.startswith("/api/")
        kind = "application/x-ndjson" if ollama else "text/event-stream"
        answer = web.StreamResponse(headers={"Content-Type": kind})
        await answer.prepare(request)
        for event in events:
            data = json.dumps(event)
            if ollama:
                await answer.write(f"{data}\n".encode())
            else:
                name = f"event: {event['type']}\n" if "type" in event else ""
                await answer.write(f"{name}data: {data}\n\n".encode())
            await self.seen.wait()
        if request.path == "/v1/chat/completions":
            await answer.write(b"data: [DONE]\n\n")
        return answer


def wants_call(body: Json) -> bool:
    """Whether `weather` is offered, in any API's shape, and has not been called yet."""
    tools = body.get("tools") or []
    names = [tool.get("name") or tool.get("function", {}).get("name") for tool in tools]
    so_far = json.dumps(body.get("messages") or body.get("input"))
    answered = '"role": "tool"' in so_far or "tool_result" in so_far or "_call_output" in so_far
    return "weather" in names and not answered


# ------------------------------------------------------------------------------- OpenAI's ----

USAGE = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}


def embedding(body: Json) -> Json:
    packed = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()
    vector = packed if body.get("encoding_format") == "base64" else VECTOR
    data = [{"object": "embedding", "index": 0, "embedding": vector}]
    return {"object": "list", "model": "m", "data": data, "usage": USAGE}


def chat_completion(reply: Reply) -> Json:
    said: Json = {"role": "assistant", "content": reply.text}
    end = "stop"
    if reply.calls_tool:
        function = {"name": "weather", "arguments": json.dumps(ROME)}
        call = {"id": "call_1", "type": "function", "function": function}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        end = "tool_calls"
    choice = {"index": 0, "message": said, "finish_reason": end}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
    return {**head, "choices": [choice], "usage": USAGE}


def chat_completion_events(reply: Reply) -> list[Json]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choices: list[Json] = []
    for piece in reply.pieces:
        delta = {"role": "assistant", "content": piece}
        choices.append({"index": 0, "delta": delta, "finish_reason": None})
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    return [{**head, "choices": [choice]} for choice in choices]


def response(reply: Reply) -> Json:
    item = response_message(reply.text)
    if reply.calls_tool:
        call = {"id": "fc_1", "call_id": "call_1", "type": "function_call", "status": "completed"}
        item = {**call, "name": "weather", "arguments": json.dumps(ROME)}
    return {**response_head("completed"), "output": [item]}


def response_head(status: str) -> Json:
    head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": status}
    how = {"parallel_tool_calls": False, "tool_choice": "auto", "tools": [], "output": []}
    details = {"input_tokens_details": {"cached_tokens": 0}}
    details |= {"output_tokens_details": {"reasoning_tokens": 0}}
    usage = {"input_tokens": 1, "output_tokens": 3, "total_tokens": 4, **details}
    return {**head, **how, "error": None, "incomplete_details": None, "usage": usage}


def response_message(text: str) -> Json:
    part = {"type": "output_text", "text": text, "annotations": []}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    return {**head, "content": [part]}


def response_events(reply: Reply) -> list[Json]:
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    item = response_message(reply.text)
    part = item["content"][0]
    begun_item = {**item, "status": "in_progress", "content": []}
    begun = response_head("in_progress")
    events: list[Json] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": begun_item},
        {"type": "response.content_part.added", **where, "part": {**part, "text": ""}},
    ]
    delta = {"type": "response.output_text.delta", **where}
    events += [{**delta, "delta": piece} for piece in reply.pieces]
    events += [
        {"type": "response.output_text.done", **where, "text": reply.text},
        {"type": "response.content_part.done", **where, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": response(reply)},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


# ------------------------------------------------------------------- Anthropic's, Ollama's ----


def message(reply: Reply) -> Json:
    block: Json = {"type": "text", "text": reply.text}
    end = "end_turn"
    if reply.calls_tool:
        block = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": ROME}
        end = "tool_use"
    return {**message_head(), "content": [block], "stop_reason": end}


def message_head() -> Json:
    usage = {"input_tokens": 1, "output_tokens": 3}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": []}
    return {**head, "stop_reason": None, "stop_sequence": None, "usage": usage}


def message_events(reply: Reply) -> list[Json]:
    events: list[Json] = [
        {"type": "message_start", "message": message_head()},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
    ]
    for piece in reply.pieces:
        delta = {"type": "text_delta", "text": piece}
        events.append({"type": "content_block_delta", "index": 0, "delta": delta})
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    events += [
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    return events


def ollama_chat(reply: Reply, model: str) -> Json:
    said: Json = {"role": "assistant", "content": reply.text}
    if reply.calls_tool:
        call = {"function": {"name": "weather", "arguments": ROME}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {**ollama_head(model), "message": said, "done": True, "done_reason": "stop"}


def ollama_head(model: str) -> Json:
    return {"model": model, "created_at": "2026-01-01T00:00:00Z"}


def ollama_lines(reply: Reply, model: str) -> list[Json]:
    lines: list[Json] = []
    for piece in reply.pieces:
        said = {"role": "assistant", "content": piece}
        lines.append({**ollama_head(model), "message": said, "done": False})
    end = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
    lines.append({**ollama_head(model), **end})
    return lines
