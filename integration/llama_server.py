#!/usr/bin/env python3
"""llama-server with the flags that the tests use, out of the xllamacpp wheel.

The wheel holds llama.cpp's own HTTP server as a library for any x86-64 CPU. This gives it
the command line of the program of that name.
"""

import argparse
import signal
import sys

import xllamacpp


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-a", "--alias", help="the name in /v1/models and in answers")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-c", "--ctx-size", type=int, default=0, help="0: as the model says")
    parser.add_argument("-np", "--parallel", type=int, default=4, help="slots")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--jinja", action="store_true", help="accepted: it is always on")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--embedding", "--embeddings", action="store_true")
    only.add_argument("--rerank", "--reranking", action="store_true")
    return parser.parse_args()


def parameters(args: argparse.Namespace) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.model_alias = {args.alias or args.model}
    params.hostnames = [args.host]
    params.port = args.port
    params.n_ctx = args.ctx_size
    params.n_parallel = args.parallel
    params.kv_unified = True  # each slot may use the whole context, as in the real program
    params.endpoint_metrics = args.metrics
    if args.threads:
        params.cpuparams.n_threads = args.threads
    if args.api_key:
        params.api_keys = [args.api_key]
    params.embedding = args.embedding or args.rerank
    if args.rerank:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    return params


def main() -> None:
    params = parameters(arguments())
    for number in (signal.SIGTERM, signal.SIGINT):  # end at once, also while the model loads
        signal.signal(number, signal.SIG_DFL)
    try:
        _server = xllamacpp.Server(params)  # listens, loads, and returns when it is ready
    except RuntimeError as error:  # no such model, port taken, …: the reason is in the log above
        sys.exit(f"llama-server: {error}")
    signal.pause()


if __name__ == "__main__":
    main()
