"""Attention cluster by cluster in dense products (paper sec. 3.2): forward and backward, on any device.

The tokens of one cluster see nearly the same clusters. The union of those is gathered once for all of them; which of
its tokens each one really sees is a mask. Nothing of the size tokens x neighbourhood x channels is made. Beyond the
features below, which a stage's blocks share, nothing of the size tokens x neighbourhood is kept for the backward pass,
which computes the weights anew.

A pair of tokens has six features (``clusters_plan``): the five of Eq. 5, and 0 or minus infinity for the mask; so
position term and mask are one product of (H, 6) by (6, pairs). The bias shifts all of a token's neighbours alike: it is
added to the logarithm of their sum. Then the blank token is joined, which all see and which has no position.

Letters: B images, G clusters of a geometry (of all its images), m tokens a cluster, H heads, d channels a head,
u clusters in a union, S = u m tokens of them, c copies: images that share a geometry.
"""

import torch

NUMBERS_AT_ONCE = 1 << 20  # gathered at a time on a CPU: a slice should fit its cache
NUMBERS_AT_ONCE_ELSEWHERE = 1 << 28  # to bound memory


def forward(query, kv, blank, weight, bias, plan):
    """Attend: every token to its neighbourhood and to the blank token.

    Parameters
    ----------
    query : (B, k, m, H, d) tensor
        Already scaled by d^-1/2.
    kv : (B, k, m, H, 2, d) tensor
    blank : (H, 2, d) tensor
        Key and value of the blank token.
    weight, bias : (H, 5) and (H,) tensors
        Of the position term.
    plan : clusters_plan.Plan
        For all images, or for one that stands for all.

    Returns
    -------
    out : (B, k, m, H, d) tensor
    lse : (B, k, m, H) tensor
        Logarithm of the sum of the exponentials of a token's logits, in float32 or wider.
    """
    layout = _Layout(query, plan)
    q, keys, values = (layout.rows(x) for x in (query, *kv.unbind(4)))
    position, shift = _position(weight, bias, plan.features, q)
    out, lse = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
    workspace = layout.workspace(keys)
    for query_rows, kv_rows, pairs in layout.slices:
        logits = _logits(_pick(q, query_rows), _pick(keys, kv_rows, workspace, len(query_rows)), position, pairs)
        highest = logits.amax(dim=-1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        out.index_copy_(0, query_rows, (logits @ _pick(values, kv_rows, workspace, len(query_rows))).div_(total))
        lse.index_copy_(0, query_rows, total.log_().add_(highest))
    key, value = blank.to(q.dtype).contiguous()[:, None].unbind(2)  # (H, 1, d)
    logits, out, before = (layout.by_head(x) for x in (q, out, lse))
    logits = logits @ key.mT
    lse = torch.logaddexp(before.add_(shift), logits)
    out = out.mul_(before.sub_(lse).exp_()).baddbmm_(logits.sub_(lse).exp_(), value)
    return layout.tokens(out).to(query.dtype), layout.tokens(lse).squeeze(-1)


def backward(grad_out, out, lse, query, kv, blank, weight, bias, plan):
    """Gradients of query, kv, blank, weight and bias, from that of ``out``; arguments as for ``forward``."""
    layout = _Layout(query, plan)
    q, keys, values = (layout.rows(x) for x in (query, *kv.unbind(4)))
    position, shift = _position(weight, bias, plan.features, q)
    grad_out, out, lse = layout.rows(grad_out), layout.rows(out), layout.rows(lse[..., None])
    mean = (grad_out * out).sum(dim=-1, keepdim=True)
    query_grad, keys_grad, values_grad = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    position_grad, before = position.new_zeros(len(position), 5), (layout.by_head(lse) - shift).view_as(lse)
    workspace, other = layout.workspace(keys), layout.workspace(keys)
    for query_rows, kv_rows, pairs in layout.slices:
        here, grad, normaliser, middle = (_pick(x, query_rows) for x in (q, grad_out, before, mean))
        grad_logits = grad @ _pick(values, kv_rows, workspace, len(query_rows)).transpose(1, 2)
        near = _pick(keys, kv_rows, workspace, len(query_rows))
        weights = _logits(here, near, position, pairs).sub_(normaliser).exp_()
        grad_logits.sub_(middle).mul_(weights)
        query_grad.index_copy_(0, query_rows, grad_logits @ near)
        _add_products(keys_grad, kv_rows, grad_logits, here, other)
        _add_products(values_grad, kv_rows, weights, grad, other)
        if layout.copies > 1:
            grad_logits = grad_logits.view(len(position), -1, layout.copies, *grad_logits.shape[1:]).sum(dim=2)
        position_grad += grad_logits.view(len(position), -1) @ pairs[:5].flatten(1).T.to(grad_logits.dtype)
    key, value = blank.to(q.dtype).contiguous()[:, None].unbind(2)  # (H, 1, d)
    q, grad_out, lse, mean = (layout.by_head(x) for x in (q, grad_out, lse, mean))
    weights = (q @ key.mT).sub_(lse).exp_()  # of the blank token
    grad_logits = (grad_out @ value.mT).sub_(mean).mul_(weights)
    layout.by_head(query_grad).baddbmm_(grad_logits, key)
    of_blank = torch.stack([grad_logits.mT @ q, weights.mT @ grad_out], dim=2).squeeze(1)
    of_pairs = torch.stack([layout.tokens(keys_grad), layout.tokens(values_grad)], dim=-2)
    of_bias = -grad_logits.sum(dim=(1, 2))  # a token's gradients of logits sum to 0
    grads = layout.tokens(query_grad), of_pairs, of_blank, position_grad, of_bias
    return tuple(x.to(like.dtype) for x, like in zip(grads, (query, kv, blank, weight, bias), strict=True))


class _Layout:
    """Rows (H G c, m, d) of queries, keys, values: a cluster's tokens in one head; and the slices worked on at a time.

    ``slices`` lists row numbers (H r c,) of queries, row numbers (H r c u,) of what they see, features (6, r, m, S).
    """

    def __init__(self, query, plan):
        which, union, features = plan
        self.batch, self.k, self.m, self.heads, self.d = query.shape
        self.copies = self.batch * self.k // len(which)
        limit = NUMBERS_AT_ONCE if query.device.type == "cpu" else NUMBERS_AT_ONCE_ELSEWHERE
        copy, self.slices, end = torch.arange(self.copies, device=which.device), [], 0
        for group in features:
            start, end, width = end, end + group.shape[1], group.shape[3] // max(1, self.m)
            rows = max(1, limit // max(1, self.copies * self.heads * self.m * self.d * width))
            for first in range(start, end, rows):
                part = slice(first, min(first + rows, end))
                query_rows = self._of_heads(which[part, None] * self.copies + copy)
                kv_rows = self._of_heads(union[part, None, :width] * self.copies + copy[:, None])
                self.slices.append((query_rows, kv_rows, group[:, first - start : part.stop - start]))

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

    def workspace(self, like):
        """Memory for what the largest slice gathers: fresh pages would cost more time than what is put there."""
        return like.new_empty(max(len(kv_rows) for _, kv_rows, _ in self.slices), self.m * self.d)


def _position(weight, bias, features, like):
    """What the six features are multiplied with, (H, 6); and the bias, (H, 1, 1)."""
    position = torch.nn.functional.pad(weight, (0, 1), value=1).to(features[0].dtype)
    return position, bias.to(like.dtype)[:, None, None]


def _pick(x, rows, workspace=None, count=None):
    """Rows of x (N, m, d) -> (len(rows), m, d); or, in the memory of ``workspace``, (count, S, d)."""
    out = None if workspace is None else workspace[: len(rows)]
    return torch.index_select(x.flatten(1), 0, rows, out=out).view(count or len(rows), -1, x.shape[2])


def _add_products(total, rows, a, b, workspace):
    """Add a^T b, with a (N, m, S) and b (N, m, d), to rows (N u,) of ``total``.

    The products lie in ``workspace`` without gaps: with gaps, a batched product on a CPU starts its threads anew for
    each matrix, and takes ten times as long.
    """
    products = workspace[: len(rows)]
    torch.bmm(a.transpose(1, 2), b, out=products.view(len(a), -1, b.shape[2]))
    total.flatten(1).index_add_(0, rows, products)


def _logits(query, key, position, features):
    """query (H r c, m, d), key (H r c, S, d), position (H, 6), features (6, r, m, S) -> logits (H r c, m, S)."""
    heads, (r, m, tokens) = len(position), features.shape[1:]
    term = (position @ features.flatten(1)).to(query.dtype).view(heads, r, 1, m, tokens)
    term = term.expand(-1, -1, len(query) // (heads * r), -1, -1).reshape(len(query), m, tokens)
    return term.contiguous().baddbmm_(query, key.transpose(1, 2))
