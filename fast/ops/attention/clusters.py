"""Attention cluster by cluster in dense products (paper sec. 3.2): forward and backward, on any device.

The tokens of one cluster see nearly the same clusters. The union of those is gathered once for all of them; which of
its tokens each one really sees is a mask. Nothing of the size tokens x neighbourhood x channels is made. Beyond the
features below, which a stage's blocks share, nothing of the size tokens x neighbourhood is kept for the backward pass,
which computes the weights anew.

A pair of tokens has six features (``attention_plan``): the five of Eq. 5, and 0 or minus infinity for the mask; so
position term and mask are one product of (H, 6) by (6, pairs). The bias shifts all of a token's neighbours alike: it is
added to the logarithm of their sum. Then the blank token is joined, which all see and which has no position.

Letters: B images, G clusters of a geometry (of all its images), m tokens a cluster, H heads, d channels a head,
u clusters in a union, S = u m tokens of them, c copies: images that share a geometry.
"""

import torch

NUMBERS_AT_ONCE = 1 << 20  # gathered at a time on a CPU: a slice should fit its cache
NUMBERS_AT_ONCE_ELSEWHERE = 1 << 28  # to bound memory


def forward(query, key_value, blank, weight, bias, which, union, *features):
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
    which, union, *features : tensors
        Of ``attention_plan.cluster_plan``; for all images, or for one that stands for all.

    Returns
    -------
    out : (B, k, m, H, d) tensor
    lse : (B, k, m, H) tensor
        Logarithm of the sum of the exponentials of a token's logits, in float32 or wider.
    """
    layout = _Layout(query, which, union, features)
    q, keys, values = (layout.rows(x) for x in (query, *key_value.unbind(4)))
    position, shift = _position(weight, bias, features, q)
    out, lse = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
    room = layout.room(keys)
    for own, seen, pairs in layout.slices:
        logits = _logits(_pick(q, own), _pick(keys, seen, room, len(own)), position, pairs)
        highest = logits.amax(dim=-1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        out.index_copy_(0, own, (logits @ _pick(values, seen, room, len(own))).div_(total))
        lse.index_copy_(0, own, total.log_().add_(highest))
    key, value = blank.to(q.dtype).contiguous()[:, None].unbind(2)  # (H, 1, d)
    logits, out, before = (layout.by_head(x) for x in (q, out, lse))
    logits = logits @ key.mT
    lse = torch.logaddexp(before.add_(shift), logits)
    out = out.mul_(before.sub_(lse).exp_()).baddbmm_(logits.sub_(lse).exp_(), value)
    return layout.tokens(out).to(query.dtype), layout.tokens(lse).squeeze(-1)


def backward(grad, out, lse, query, key_value, blank, weight, bias, which, union, *features):
    """Gradients of query, key_value, blank, weight and bias, from that of ``out``; arguments as for ``forward``."""
    layout = _Layout(query, which, union, features)
    q, keys, values = (layout.rows(x) for x in (query, *key_value.unbind(4)))
    position, shift = _position(weight, bias, features, q)
    grad, out, lse = layout.rows(grad), layout.rows(out), layout.rows(lse[..., None])
    mean = (grad * out).sum(dim=-1, keepdim=True)
    query_grad, keys_grad, values_grad = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    position_grad, before = position.new_zeros(len(position), 5), (layout.by_head(lse) - shift).view_as(lse)
    room, other = layout.room(keys), layout.room(keys)
    for own, seen, pairs in layout.slices:
        here, upstream, normaliser, middle = (_pick(x, own) for x in (q, grad, before, mean))
        rise = upstream @ _pick(values, seen, room, len(own)).transpose(1, 2)
        near = _pick(keys, seen, room, len(own))
        weights = _logits(here, near, position, pairs).sub_(normaliser).exp_()
        rise.sub_(middle).mul_(weights)  # gradient of the logits
        query_grad.index_copy_(0, own, rise @ near)
        _add_products(keys_grad, seen, rise, here, other)
        _add_products(values_grad, seen, weights, upstream, other)
        if layout.copies > 1:
            rise = rise.view(len(position), -1, layout.copies, *rise.shape[1:]).sum(dim=2)
        position_grad += rise.view(len(position), -1) @ pairs[:5].flatten(1).T.to(rise.dtype)
    key, value = blank.to(q.dtype).contiguous()[:, None].unbind(2)  # (H, 1, d)
    q, grad, lse, mean = (layout.by_head(x) for x in (q, grad, lse, mean))
    weights = (q @ key.mT).sub_(lse).exp_()  # of the blank token
    rise = (grad @ value.mT).sub_(mean).mul_(weights)
    layout.by_head(query_grad).baddbmm_(rise, key)
    of_blank = torch.stack([rise.mT @ q, weights.mT @ grad], dim=2).squeeze(1)
    of_pairs = torch.stack([layout.tokens(keys_grad), layout.tokens(values_grad)], dim=-2)
    of_bias = -rise.sum(dim=(1, 2))  # a token's gradients of logits sum to 0
    grads = layout.tokens(query_grad), of_pairs, of_blank, position_grad, of_bias
    return tuple(x.to(like.dtype) for x, like in zip(grads, (query, key_value, blank, weight, bias), strict=True))


class _Layout:
    """Rows (H G c, m, d) of queries, keys, values: a cluster's tokens in one head; and the slices worked on at a time.

    ``slices`` lists row numbers (H r c,) of queries, row numbers (H r c u,) of what they see, features (6, r, m, S).
    """

    def __init__(self, query, which, union, features):
        self.batch, self.k, self.m, self.heads, self.d = query.shape
        self.copies = self.batch * self.k // len(which)
        limit = NUMBERS_AT_ONCE if query.device.type == "cpu" else NUMBERS_AT_ONCE_ELSEWHERE
        copy, self.slices, end = torch.arange(self.copies, device=which.device), [], 0
        for group in features:
            start, end, width = end, end + group.shape[1], group.shape[3] // max(1, self.m)
            rows = max(1, limit // max(1, self.copies * self.heads * self.m * self.d * width))
            for first in range(start, end, rows):
                part = slice(first, min(first + rows, end))
                own, seen = which[part, None], union[part, None, :width]
                own, seen = (self._of_heads(x * self.copies + c) for x, c in ((own, copy), (seen, copy[:, None])))
                self.slices.append((own, seen, group[:, first - start : part.stop - start]))

    def _of_heads(self, number):
        """Numbers of clusters -> numbers of rows, head after head."""
        head = torch.arange(self.heads, device=number.device)[:, None]
        return (head * self.batch * self.k + number.flatten()).flatten()

    def rows(self, x):
        """(B, k, m, H, d) -> (H G c, m, d), in float32 or wider; contiguous, also where a view of x would do."""
        x = x.reshape(self.copies, -1, *x.shape[2:]).permute(3, 1, 0, 2, 4)
        return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, self.m, x.shape[-1]).contiguous()

    def by_head(self, x):
        """(H G c, m, d) -> (H, G c m, d)."""
        return x.view(self.heads, -1, x.shape[-1])

    def tokens(self, x):
        """The inverse of ``rows``."""
        x = x.view(self.heads, -1, self.copies, self.m, x.shape[-1]).permute(2, 1, 3, 0, 4)
        return x.reshape(self.batch, self.k, self.m, self.heads, -1).contiguous()

    def room(self, like):
        """Memory for what the largest slice gathers: fresh pages would cost more time than what is put there."""
        return like.new_empty(max(len(seen) for _, seen, _ in self.slices), self.m * self.d)


def _position(weight, bias, features, like):
    """What the six features are multiplied with, (H, 6); and the bias, (H, 1, 1)."""
    position = torch.nn.functional.pad(weight, (0, 1), value=1).to(features[0].dtype)
    return position, bias.to(like.dtype)[:, None, None]


def _pick(x, rows, room=None, count=None):
    """Rows of x (N, m, d) -> (len(rows), m, d); or, in the memory of ``room``, (count, S, d)."""
    out = None if room is None else room[: len(rows)]
    return torch.index_select(x.flatten(1), 0, rows, out=out).view(count or len(rows), -1, x.shape[2])


def _add_products(total, rows, a, b, room):
    """Add a^T b, with a (N, m, S) and b (N, m, d), to rows (N u,) of ``total``.

    The products lie in ``room`` without gaps: with gaps, a batched product on a CPU starts its threads anew for each
    matrix, and takes ten times as long.
    """
    products = room[: len(rows)]
    torch.bmm(a.transpose(1, 2), b, out=products.view(len(a), -1, b.shape[2]))
    total.flatten(1).index_add_(0, rows, products)


def _logits(query, key, position, features):
    """query (H r c, m, d), key (H r c, S, d), position (H, 6), features (6, r, m, S) -> logits (H r c, m, S)."""
    heads, (r, m, tokens) = len(position), features.shape[1:]
    term = (position @ features.flatten(1)).to(query.dtype).view(heads, r, 1, m, tokens)
    term = term.expand(-1, -1, len(query) // (heads * r), -1, -1).reshape(len(query), m, tokens)
    return term.contiguous().baddbmm_(query, key.transpose(1, 2))
