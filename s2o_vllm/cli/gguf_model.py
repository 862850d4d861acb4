"""Turn SmolLM2's GGUF file into the Hugging Face folder that vLLM serves.

Only what that one file needs: the llama architecture with tied embeddings, and SmolLM's way
of splitting text. Weights are dequantised to bfloat16.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN, USER_TOKEN, UNUSED_TOKEN = 3, 4, 5  # GGUF's token types


def convert(source: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer of a GGUF file into an existing folder."""
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    weights = read_weights(reader, metadata)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model_config(metadata)
    stop = sorted({config["eos_token_id"], config["pad_token_id"]} - {None}, reverse=True)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": stop},
    )
    write_tokenizer(metadata, folder)


def read_weights(reader: GGUFReader, metadata: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return every tensor as bfloat16 of its own shape, under its Hugging Face name."""
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if name is None or name[2] not in TENSORS:
            raise ValueError(f"{tensor.name} has no place in a llama model with tied embeddings")
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name[2] in heads:
            weight = undo_rotary_permutation(weight, heads[name[2]])
        layer = f"model.layers.{name[1]}." if name[1] else ""
        weights[f"{layer}{TENSORS[name[2]]}.weight"] = torch.tensor(weight).to(torch.bfloat16)
    return weights


def undo_rotary_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the two halves of each head apart again; GGUF interleaves them for its own RoPE."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json."""
    llama = {
        key.removeprefix("llama."): value
        for key, value in metadata.items()
        if key.startswith("llama.")
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "transformers_version": "5.0.0",  # unnamed, some readers warn of another model's bug
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["embedding_length"] // llama["attention.head_count"],
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": round(llama["attention.layer_norm_rms_epsilon"], 9),
        "rope_parameters": {"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"tokenizer is {metadata['tokenizer.ggml.pre']!r}, must be 'smollm'")
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    pieces = list(zip(tokens, kinds, strict=True))
    vocabulary = {
        token: number for number, (token, kind) in enumerate(pieces) if kind != UNUSED_TOKEN
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL_TOKEN, normalized=False)
            for token, kind in pieces
            if kind in (CONTROL_TOKEN, USER_TOKEN)
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    for role, name in roles.items():
        if (number := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{role}_token"] = tokens[number]
    _write_json(folder / "tokenizer_config.json", config)
    template = metadata["tokenizer.chat_template"]
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
