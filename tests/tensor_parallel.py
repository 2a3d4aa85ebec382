"""One process of a tensor-parallel model; run by test_around.py with a converted model's folder and a file to write."""

import sys

import torch
import torch.distributed

from longpatch import from_pretrained
from tests.tiny import random_ids


def main(folder: str, output: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = from_pretrained(folder, tensor_parallel=True)
    ids = random_ids(1, 40)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    written = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    key_heads = written.past_key_values.layers[0].keys.shape[1]
    if torch.distributed.get_rank() == 0:
        torch.save({"logits": logits, "written": written.sequences, "key_heads": key_heads}, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
