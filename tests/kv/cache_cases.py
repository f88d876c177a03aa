"""Caches of several layers with random bits, dense and paged, and what must become of them, told by naive code."""

import torch

POISON = 7.5
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def ids(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_bits(shape, dtype, seed, device="cpu"):
    """Any bits at all: NaN of every kind, infinities, denormals."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator(seed))
    return raw.view(dtype).view(shape).to(device)


def bits(tensor):
    """A copy as integers on the CPU, so that NaN equals NaN of the same bits."""
    return tensor.view(BITS[tensor.dtype.itemsize]).cpu().clone()


def equal(tensor, wanted_bits):
    return torch.equal(bits(tensor), wanted_bits)


def caches(layers, shape, dtype, device, seed=0, dims=None):
    """K and V of some layers [*shape, dim], each a list; dims of K and V."""
    k_dim, v_dim = dims or (8, 8)
    return tuple(
        [random_bits((*shape, dim), dtype, seed + 100 * part + layer, device) for layer in range(layers)]
        for part, dim in enumerate((k_dim, v_dim))
    )


def numbers(layers, shape, dtype, dims=(8, 8)):
    """The same of small integers, for what is compared as numbers."""
    return tuple(
        [
            torch.randint(0, 100, (*shape, dim), generator=generator(100 * part + layer)).to(dtype)
            for layer in range(layers)
        ]
        for part, dim in enumerate(dims)
    )


def scattered(dense, page_size, seed=0, spare=2):
    """The same contents in pages of any order: pages and a table [batch, max_pages]. Unused pages hold other bits."""
    batch, slots = dense.shape[:2]
    each = -(-slots // page_size)
    order = torch.randperm(batch * each + spare, generator=generator(seed))[: batch * each].view(batch, each)
    pages = random_bits((batch * each + spare, page_size, *dense.shape[2:]), dense.dtype, seed + 50, dense.device)
    for request in range(batch):
        for slot in range(slots):
            pages[order[request, slot // page_size], slot % page_size] = dense[request, slot]
    return pages, order.to(dense.device, torch.int32)


def gathered(pages, table, slots):
    """What the pages hold for each request [batch, slots, ...], as bits."""
    return bits(pages)[table.cpu().long()].flatten(1, 2)[:, :slots]


def sound_part(path, start, capacity):
    """The leading part of a path that is to be moved."""
    kept = []
    for node in path if start >= 0 else []:
        if node <= (kept[-1] if kept else -1) or start + node >= capacity:
            break
        kept.append(node)
    return kept


def committed(cache, nodes, context_lens):
    """A dense cache [batch, slots, ...] as bits, after: the rows of each path, selected and put behind the context.

    Nothing is in place here: it is index_select of the accepted rows and cat, as engines without such an op do it.
    """
    result = []
    for request, path, start in zip(bits(cache), nodes, context_lens, strict=True):
        kept = sound_part(path, start, len(request))
        if not kept:
            result.append(request)
            continue
        accepted = request.index_select(0, torch.tensor([start + node for node in kept]))
        result.append(torch.cat([request[:start], accepted, request[start + len(kept) :]]))
    return torch.stack(result)


def random_path(nodes, steps, seed):
    """A path of ascending nodes, padded with -1."""
    length = int(torch.randint(0, min(nodes, steps) + 1, (1,), generator=generator(seed)))
    path = torch.randperm(nodes, generator=generator(seed + 1))[:length].sort().values.tolist()
    return path + [-1] * (steps - length)
