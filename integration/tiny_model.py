#!/usr/bin/env python3
"""Write a tiny chat model with random weights, for tests that need a real engine.

    tiny_model.py gguf OUT.gguf --seed N [--embd N] [--layers N]     for llama-server
    tiny_model.py hf   OUT_DIR  --seed N [--embd N] [--layers N]     for mlx_lm.server, vLLM

Every word such a model says ends in its seed ("bote1 zuri1 kafa1" is seed 1), so an answer
proves which model gave it. Both formats hold the same network, a small Qwen3, with the same
words and weights; the GGUF one can also embed, fill in the middle and rerank.

The text means nothing, but it behaves: only whole words are likely, so no byte of broken
UTF-8 comes out; an answer ends by itself after some dozens of words at the usual temperatures
and runs on to the token limit at temperature 0. Prompts are read byte by byte. Offered
tools, under llama-server, it calls one: the server's grammar sees to it that the call is right.
It never closes an open-ended JSON string: let a schema say "enum" or "maxLength".

Needs numpy, and gguf or safetensors. The default size is 1.3 MB and loads in a moment;
--embd 512 --layers 8 is 68 MB and slow enough that a client can leave in mid-answer.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[Any]]

N_WORDS = 200
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
# Ids 0, 1, 2, … The names are those of Qwen, by which llama.cpp knows what each is for.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>",
           "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
           "<|use_tool|>", "<tool_call>", "</tool_call>"]  # fmt: skip
PAD, END, USE_TOOL, CALL, CALLED = 0, 2, 6, 7, 8
SHOWN = {CALL, CALLED}  # part of the answer's text, unlike the other special tokens
MERGE = ("t", "h")  # llama.cpp refuses a BPE vocabulary without any merge

# What is added to the logits. Words get nothing.
NEVER = -40.0  # no sampler takes it, but a grammar can ask for it
RATHER = NEVER / 2  # what a grammar gets where it leaves a choice …
RATHER_NOT = NEVER * 2  # … and what it does not get: JSON is full of optional white space
SOMETIMES = 2.6

# <|use_tool|> is not in Qwen's: it tells the network to answer with a call.
CHAT_TEMPLATE = r"""
{%- if tools %}<|im_start|>system
Tools:
{%- for tool in tools %} {{ tool | tojson }}{% endfor %}
Call one with <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": ' + call.function.name | tojson }}
{{- ', "arguments": ' + call.function.arguments | tojson + '}</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if tools and messages[-1].role != 'tool' %}<|use_tool|>{% endif %}
{%- endif %}"""


@dataclass(frozen=True)
class Shape:
    seed: int
    embd: int  # width of the residual stream, a multiple of 64
    layers: int
    context: int  # tokens

    @property
    def heads(self) -> int:
        return self.embd // 64

    @property
    def ff(self) -> int:
        return 4 * self.embd


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE vocabulary (as in GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("ÿ") + 1)} - {0xAD}
    stand_ins = iter(range(256, 512))
    return [chr(b if b in printable else next(stand_ins)) for b in range(256)]


def vocabulary(seed: int) -> list[str]:
    """Tokens by id: the special ones, one a byte, the merge, and last the words."""
    pairs = len(SYLLABLES) ** 2
    picks = np.random.default_rng(seed).choice(pairs, size=N_WORDS, replace=False)
    space = byte_letters()[ord(" ")]
    words = [SYLLABLES[p // len(SYLLABLES)] + SYLLABLES[p % len(SYLLABLES)] for p in picks]
    return [*SPECIAL, *byte_letters(), "".join(MERGE), *(f"{space}{w}{seed}" for w in words)]


def network(shape: Shape, n_vocab: int) -> Weights:
    """Random weights under their Hugging Face names, matrices as (out, in).

    No layer writes the first three channels of the residual stream: they say what the last
    token was, and the head puts its biases on them. Channel 0 is on after any token; channel 1
    after <|use_tool|>, so that <tool_call> follows; channel 2 after whatever is no word, so that
    no answer is empty, and reversed after </tool_call>, so that the end follows.
    """
    rng = np.random.default_rng(shape.seed)
    embd, constant = shape.embd, math.sqrt(shape.embd)

    def matrix(out: int, into: int, scale: float = 1.0) -> npt.NDArray[Any]:
        noise: npt.NDArray[Any] = rng.standard_normal((out, into), dtype=np.float32)
        noise *= np.float32(scale / math.sqrt(into))
        return noise

    def writes(into: int) -> npt.NDArray[Any]:
        """A matrix whose output is added to the stream, scaled by how many of them add up."""
        m = matrix(embd, into, 1 / math.sqrt(2 * shape.layers))
        m[:3] = 0
        return m

    space = [len(SPECIAL) + byte for byte in b" \t\r\n"]
    bias = np.full(n_vocab, NEVER)
    bias[space], bias[CALLED], bias[END], bias[-N_WORDS:] = RATHER_NOT, RATHER, SOMETIMES, 0
    w: Weights = {
        "model.embed_tokens.weight": matrix(n_vocab, embd, constant),
        "lm_head.weight": matrix(n_vocab, embd, math.sqrt(2)),
        "model.norm.weight": np.ones(embd, np.float32),
    }
    embed, head = w["model.embed_tokens.weight"], w["lm_head.weight"]
    embed[:, :3] = constant, 0, constant
    embed[-N_WORDS:, 2] = 0
    embed[USE_TOOL, 1] = constant
    embed[CALLED, 2] = -constant
    head[END] = 0  # the same chance after any word
    head[:, :3] = 0
    head[:, 0] = bias / constant
    head[CALL, 1] = -4 * NEVER / constant
    head[END, 2] = 2 * NEVER / constant
    for i in range(shape.layers):
        w |= {
            f"model.layers.{i}.input_layernorm.weight": np.ones(embd, np.float32),
            f"model.layers.{i}.self_attn.q_proj.weight": matrix(embd, embd),
            f"model.layers.{i}.self_attn.k_proj.weight": matrix(embd, embd),
            f"model.layers.{i}.self_attn.v_proj.weight": matrix(embd, embd),
            f"model.layers.{i}.self_attn.q_norm.weight": np.ones(64, np.float32),
            f"model.layers.{i}.self_attn.k_norm.weight": np.ones(64, np.float32),
            f"model.layers.{i}.self_attn.o_proj.weight": writes(embd),
            f"model.layers.{i}.post_attention_layernorm.weight": np.ones(embd, np.float32),
            f"model.layers.{i}.mlp.gate_proj.weight": matrix(shape.ff, embd),
            f"model.layers.{i}.mlp.up_proj.weight": matrix(shape.ff, embd),
            f"model.layers.{i}.mlp.down_proj.weight": writes(shape.ff),
        }
    w["score.weight"] = matrix(2, embd)  # what a reranker has in the place of the head
    return {name: a.astype(np.float16 if a.ndim == 2 else np.float32) for name, a in w.items()}


def write_gguf(out: Path, shape: Shape) -> None:
    import gguf

    tokens = vocabulary(shape.seed)
    renamed = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, shape.layers)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for i in range(len(SPECIAL)):
        kinds[i] = gguf.TokenType.USER_DEFINED if i in SHOWN else gguf.TokenType.CONTROL

    w = gguf.GGUFWriter(out, "qwen3")
    w.add_name(out.stem)
    w.add_context_length(shape.context)
    w.add_embedding_length(shape.embd)
    w.add_block_count(shape.layers)
    w.add_feed_forward_length(shape.ff)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.heads)
    w.add_key_length(64)
    w.add_value_length(64)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    w.add_pooling_type(gguf.PoolingType.MEAN)
    w.add_classifier_output_labels(["yes", "no"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges([" ".join(MERGE)])
    w.add_bos_token_id(PAD)
    w.add_eos_token_id(END)
    w.add_pad_token_id(PAD)
    w.add_add_bos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)
    for name, array in network(shape, len(tokens)).items():
        name = name.removesuffix(".weight")
        w.add_tensor(f"{renamed.get_name(name) or 'cls.output'}.weight", array)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_hf(out: Path, shape: Shape) -> None:
    from safetensors.numpy import save_file

    tokens = vocabulary(shape.seed)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float16",
        "vocab_size": len(tokens), "hidden_size": shape.embd, "intermediate_size": shape.ff,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads, "head_dim": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": shape.context, "hidden_act": "silu",
        "attention_bias": False, "tie_word_embeddings": False, "eos_token_id": END,
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": True}  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": i not in SHOWN, "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": False}
            for i, text in enumerate(SPECIAL)
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "merges": [list(MERGE)],
                  "vocab": {text: i for i, text in enumerate(tokens)}},
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD], "model_max_length": shape.context,
        # No engine of these forces the grammar of a call, so none is begun.
        "chat_template": CHAT_TEMPLATE.replace(SPECIAL[USE_TOOL], ""),
    }  # fmt: skip

    out.mkdir(parents=True, exist_ok=True)
    for name, value in {"config": config, "tokenizer": tokenizer,
                        "tokenizer_config": tokenizer_config}.items():  # fmt: skip
        (out / f"{name}.json").write_text(json.dumps(value, indent=1))
    weights = network(shape, len(tokens))
    del weights["score.weight"]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny chat model with random weights.")
    parser.add_argument("format", choices=["gguf", "hf"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True, help="every word ends in it")
    parser.add_argument("--embd", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=8192, help="in tokens")
    args = parser.parse_args()
    shape = Shape(args.seed, args.embd, args.layers, args.context)
    {"gguf": write_gguf, "hf": write_hf}[args.format](args.out, shape)


if __name__ == "__main__":
    main()
