"""Which keys a query recalls, by definition: dense and in float64, for every family."""

import torch


def best_tokens(scores, middle, top_k):
    """[B, H, n, n]: of the keys in `middle` [B, 1, n, n] the `top_k` of the best `scores`, where there are so many."""
    seen = scores.masked_fill(~middle, -torch.inf)
    enough = middle.sum(dim=-1, keepdim=True) >= top_k
    return middle & enough & (seen >= seen.topk(top_k).values[..., -1:])


def best_blocks(query, key, middle, number, top_k, group):
    """The same for the keys in `middle` of the best blocks; `number` [B, n] tells each key's block.

    `query` [B, H, n, d] is scaled and turned to the distance of recall, `key` is raw. The query heads of a group choose
    together, by the sum of their softmax over blocks of sum_c max(q_c max_c, q_c min_c).
    """
    chosen = torch.zeros_like(middle).repeat(1, query.shape[1], 1, 1)
    for row in range(len(query)):
        of_block = torch.stack([number[row] == block for block in range(int(number[row].max()) + 1)])  # [blocks, n]
        keys = [key[row, :, tokens] for tokens in of_block]
        largest, smallest = (torch.stack([f(k, dim=1) for k in keys], dim=1) for f in (torch.amax, torch.amin))
        q = query[row, :, :, None]  # [H, n, 1, d]
        bounds = torch.maximum(q * largest[:, None], q * smallest[:, None]).sum(dim=-1)  # [H, n, blocks]
        candidate = (middle[row, 0, :, None] & of_block).any(dim=-1)  # [n, blocks]
        share = bounds.masked_fill(~candidate, -torch.inf).softmax(dim=-1).nan_to_num()
        worth = share.unflatten(0, (-1, group)).sum(dim=1).masked_fill(~candidate, -1)
        best = worth.topk(min(top_k, len(keys))).indices
        picked = torch.zeros_like(worth).scatter(-1, best, 1) * candidate
        chosen[row] = (picked @ of_block.to(picked.dtype) > 0).repeat_interleave(group, 0) & middle[row]
    return chosen
