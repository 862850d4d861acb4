"""A tiny random Llama that tests write themselves: no hub, no download."""

import json
from pathlib import Path

VOCABULARY = 512

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path, **changes) -> str:
    """Write config and tokenizer; the weights are made by vLLM's dummy loader.

    Those are so small that attention hardly changes an answer: see :func:`write_weights`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    (folder / "config.json").write_text(json.dumps(TINY_LLAMA | changes))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(more | names))
    return str(folder)


def write_weights(folder: Path, seed: int = 0, gain: float = 3, rank: int | None = None) -> str:
    """Write random weights to a folder of :func:`write_model`; what is attended to matters.

    ``gain`` scales queries and keys. At 3 an attention is a few peaks, which any ranking finds;
    at 1.5 it is spread over enough tokens that skipping some changes an output. ``rank`` is that of
    each head's queries and keys: those of trained models have few directions that matter.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = (
        config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads")
    )
    projections = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {
        "model.embed_tokens.weight": draw(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in projections.items():
            factor = gain if name.endswith(("q_proj", "k_proj")) else 1
            weight = draw(*shape)
            if factor != 1 and rank is not None:
                count = shape[0] // config["head_dim"]
                each = [draw(config["head_dim"], rank) @ draw(rank, hidden) for _ in range(count)]
                weight = torch.cat(each)
            weights[f"{prefix}{name}.weight"] = factor * weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = torch.ones(hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
