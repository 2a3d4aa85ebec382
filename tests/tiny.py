"""Tiny models from a config, with weights large enough for attention to matter."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


def tiny_llama(seed=0, dtype=torch.float32, **settings):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | settings
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()


def random_ids(batch, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, count), generator=generator)


def distinct_ids(batch, count, seed=0):
    """No token twice in a row: no two keys of the first layer, and so no two scores, are the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([1 + torch.randperm(VOCABULARY - 1, generator=generator)[:count] for _ in range(batch)])


def read_in_chunks(model, ids, sizes, mask=None, cache=None):
    """Logits [B, n, V] of `ids` read in chunks whose sizes repeat, with one kept cache; and that cache."""
    logits, start, turn = [], 0, 0
    past = 0 if cache is None else cache.get_seq_length()
    while start < ids.shape[1]:
        stop = min(start + sizes[turn % len(sizes)], ids.shape[1])
        part = None if mask is None else mask[:, : past + stop]
        output = model(ids[:, start:stop], attention_mask=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
        start, turn = stop, turn + 1
    return torch.cat(logits, dim=1), cache
