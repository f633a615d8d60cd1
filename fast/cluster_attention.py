"""Attention cluster by cluster in dense products (paper sec. 3.2): forward and backward, on any device.

The tokens of one cluster see nearly the same clusters. The union of those is gathered once for all of them; which of
its tokens each one really sees is a mask. Nothing of the size tokens x neighbourhood x channels is made, and nothing of
the size tokens x neighbourhood is kept for the backward pass, which computes the weights anew.

The blank token is one more cluster that every cluster sees, with one token in it. A pair of tokens has seven features
(``attention_plan``): the five of Eq. 5, a one for the bias, and 0 or minus infinity for the mask; so position term,
bias and mask are one product of (H, 7) by (7, pairs).

Letters: B images, G clusters of a geometry (of all its images), m tokens a cluster, H heads, d channels a head,
U clusters in a union (the blank one last), S tokens in a union, c copies: images that share a geometry.
"""

import torch

NUMBERS_AT_ONCE = 1 << 20  # gathered at a time on a CPU: a slice should fit its cache
NUMBERS_AT_ONCE_ELSEWHERE = 1 << 28  # to bound memory


def forward(query, key_value, blank, weight, bias, union, features):
    """Attend: every token to its neighbourhood and to the blank token.

    Parameters
    ----------
    query : (B, k, m, H, d) tensor
        Already scaled by d^-1/2.
    key_value : (B, k, m, H, 2, d) tensor
    blank : (H, 2, d) tensor
        Key and value of the blank token.
    weight, bias : (H, 5) and (H,) tensors
        Of the position term.
    union, features : tensors
        Of ``attention_plan.cluster_plan``; for all images, or for one that stands for all.

    Returns
    -------
    out : (B, k, m, H, d) tensor
    lse : (B, k, m, H) tensor
        Logarithm of the sum of the exponentials of a token's logits, in float32 or wider.
    """
    copies = len(query) * query.shape[1] // len(union)
    q, (keys, values), position = (
        _spread(query, copies),
        _sources(key_value, blank, copies),
        _row(weight, bias, features),
    )
    out, lse = torch.empty_like(q), q.new_empty(*q.shape[:-1], 1)
    room = None
    for part, places in _parts(union, copies, keys):
        room = _room(keys, places) if room is None else room
        logits = _logits(q[:, part], _gather(keys, places, room), position, features[:, part])
        highest = logits.amax(dim=-1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        out[:, part] = (logits @ _gather(values, places, room)).div_(total).view_as(out[:, part])
        lse[:, part] = total.log_().add_(highest).view_as(lse[:, part])
    return _collect(out, query.shape).to(query.dtype), _collect(lse, (*query.shape[:-1], 1)).squeeze(-1)


def backward(grad, out, lse, query, key_value, blank, weight, bias, union, features):
    """Gradients of query, key_value, blank, weight and bias, from that of ``out``; arguments as for ``forward``."""
    copies = len(query) * query.shape[1] // len(union)
    q, (keys, values), position = (
        _spread(query, copies),
        _sources(key_value, blank, copies),
        _row(weight, bias, features),
    )
    grad, out, lse = _spread(grad, copies), _spread(out, copies), _spread(lse[..., None], copies)
    mean = (grad * out).sum(dim=-1, keepdim=True)
    query_grad, keys_grad, values_grad = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    position_grad = torch.zeros_like(position)
    rooms = None
    for part, places in _parts(union, copies, keys):
        rooms = (_room(keys, places), _room(keys, places)) if rooms is None else rooms
        here, upstream, normaliser, shift = (x[:, part].flatten(1, 2) for x in (q, grad, lse, mean))
        near = _gather(values, places, rooms[0])
        rise = upstream @ near.transpose(-1, -2)
        near = _gather(keys, places, rooms[0])
        weights = _logits(q[:, part], near, position, features[:, part]).sub_(normaliser).exp_()
        rise.sub_(shift).mul_(weights)  # gradient of the logits
        query_grad[:, part] = (rise @ near).view_as(query_grad[:, part])
        _add_products(keys_grad, places, rise, here, rooms[1])
        _add_products(values_grad, places, weights, upstream, rooms[1])
        shared = rise.unflatten(1, (-1, copies)).sum(dim=2) if copies > 1 else rise  # (H, r, m, S)
        position_grad[:, :6] += shared.flatten(1) @ features[:6, part].flatten(1).T.to(shared.dtype)
    own = [_collect(x[:, :-1].unflatten(1, (-1, copies)), query.shape) for x in (keys_grad, values_grad)]
    of_blank = torch.stack([x[:, -1, 0] for x in (keys_grad, values_grad)], dim=1)
    of_position = position_grad[:, :5].clone(), position_grad[:, 5].clone()  # an operator's results share no memory
    grads = _collect(query_grad, query.shape), torch.stack(own, dim=-2), of_blank, *of_position
    return tuple(x.to(like.dtype) for x, like in zip(grads, (query, key_value, blank, weight, bias), strict=True))


def _spread(x, copies):
    """(B, k, m, H, d) -> (H, G, c, m, d), in float32 or wider."""
    shape = (copies, -1, *x.shape[2:])
    return x.reshape(shape).permute(3, 1, 0, 2, 4).to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _collect(x, shape):
    """The inverse of ``_spread``."""
    return x.permute(2, 1, 3, 0, 4).reshape(shape).contiguous()


def _sources(key_value, blank, copies):
    """Keys and values (B, k, m, H, 2, d) -> each (H, G c + 1, m, d); the blank token is first in the last."""
    sources = []
    for x, last in zip(key_value.unbind(4), blank.unbind(1), strict=True):
        source = torch.nn.functional.pad(_spread(x, copies).flatten(1, 2), (0, 0, 0, 0, 0, 1))
        source[:, -1, 0] = last
        sources.append(source)
    return sources


def _row(weight, bias, features):
    """One row of seven a head: what the seven features are multiplied with."""
    return torch.cat([weight, bias[:, None], torch.ones_like(bias)[:, None]], dim=1).to(features.dtype)


def _parts(union, copies, source):
    """Slices of clusters, each with the places (r, c, U) in ``source`` of the clusters that it sees."""
    limit = NUMBERS_AT_ONCE if source.device.type == "cpu" else NUMBERS_AT_ONCE_ELSEWHERE
    numbers = copies * union.shape[1] * source[:, 0].numel()
    rows, copy = max(1, limit // max(1, numbers)), torch.arange(copies, device=union.device)
    for start in range(0, len(union), rows):
        part = slice(start, start + rows)
        yield part, (union[part, None] * copies + copy[:, None]).clamp(max=source.shape[1] - 1)


def _room(source, places):
    """Memory for the largest slice, which is the first: fresh pages would cost more time than what is put there."""
    return source.new_empty(source[:, 0].numel() * places.numel())


def _gather(source, places, room):
    """Keys or values of the clusters at places (r, c, U) -> (H, r c, S, d), in the memory of ``room``."""
    (r, c, u), (h, _, m, d) = places.shape, source.shape
    near = room[: h * r * c * u * m * d].view(h, r * c * u, m, d)
    return torch.index_select(source, 1, places.flatten(), out=near).view(h, r * c, u * m, d)


def _add_products(total, places, a, b, room):
    """Add a^T b to the clusters at places (r, c, U) of ``total``: a (H, r c, m, S), b (H, r c, m, d).

    The products lie in ``room`` without gaps: with gaps, a batched product on a CPU starts its threads anew for each
    matrix, and takes ten times as long.
    """
    products = room[: a.numel() // a.shape[2] * b.shape[-1]].view(-1, a.shape[-1], b.shape[-1])
    torch.bmm(a.flatten(0, 1).transpose(-1, -2), b.flatten(0, 1), out=products)
    total.index_add_(1, places.flatten(), products.view(len(total), -1, *total.shape[2:]))


def _logits(query, key, position, features):
    """query (H, r, c, m, d), key (H, r c, S, d), position (H, 7), features (7, r, m, S) -> logits (H, r c, m, S)."""
    h, r, c, m, d = query.shape
    term = (position @ features.flatten(1)).to(query.dtype).view(h, r, 1, m, -1).expand(-1, -1, c, -1, -1)
    logits = (
        term.reshape(h * r * c, m, -1)
        .contiguous()
        .baddbmm_(query.reshape(-1, m, d), key.flatten(0, 1).transpose(-1, -2))
    )
    return logits.view(h, r * c, m, -1)
