"""Problems and float64 references shared by the attention tests of the CPU and the GPU."""

from dataclasses import dataclass

import torch

UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


@dataclass
class Problem:
    """Arguments of one attention call; the cache holds random positions and NaN beyond each length."""

    qkv: torch.Tensor
    cos_sin: torch.Tensor
    lengths: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    num_heads: int

    def arguments(self):
        """As `decode_attention` takes them, with caches of their own."""
        return (self.qkv, self.cos_sin, self.lengths, self.k_cache.clone(), self.v_cache.clone(), self.num_heads)


def rotary_table(positions, head_dim, base=10000.0):
    """cos and sin of Transformers' LLaMA angles: fp32 [positions, head_dim]."""
    inverse = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def problem(lengths, num_heads, kv_heads, head_dim, max_len, dtype, device="cpu", seed=0):
    """A random problem; unused positions of the cache are NaN, so that reading one shows."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    qkv = torch.randn(batch, (num_heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    caches = []
    for _ in range(2):
        cache = torch.randn(batch, kv_heads, max_len, head_dim, generator=generator).to(dtype)
        for row, length in enumerate(lengths):
            cache[row, :, length:] = torch.nan
        caches.append(cache.to(device))
    table = rotary_table(max_len, head_dim).to(device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Problem(qkv.to(device), table, lengths, *caches, num_heads)


def rotate(x, cos_sin):
    """RoPE in float64 of x [T, heads, D]."""
    half = x.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half].double(), cos_sin[:, None, half:].double()
    x1, x2 = x[..., :half].double(), x[..., half:].double()
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def split_heads(qkv, num_heads, kv_heads):
    """(q, k, v), each [T, heads, D]."""
    head_dim = qkv.shape[1] // (num_heads + 2 * kv_heads)
    return qkv.view(qkv.shape[0], -1, head_dim).split((num_heads, kv_heads, kv_heads), dim=1)


def attend(p, softmax_scale=None, window=None):
    """float64 attention over keys and queries rounded to the model's dtype, from one softmax over all positions."""
    kv_heads, head_dim = p.k_cache.shape[1], p.k_cache.shape[3]
    q, k, v = split_heads(p.qkv, p.num_heads, kv_heads)
    angles = p.cos_sin[p.lengths.long()]
    q, k = (rotate(t, angles).to(p.qkv.dtype).double() for t in (q, k))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = []
    for row, length in enumerate(p.lengths.tolist()):
        keys = torch.cat((p.k_cache[row, :, :length].double(), k[row, :, None]), dim=1)
        values = torch.cat((p.v_cache[row, :, :length].double(), v[row, :, None].double()), dim=1)
        if window is not None:
            keys, values = keys[:, -window:], values[:, -window:]
        group = p.num_heads // kv_heads
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        weights = ((keys @ q[row, :, :, None])[..., 0] * scale).softmax(dim=-1)
        out.append((weights[:, None] @ values).flatten())
    return torch.stack(out)


def assert_rounded(got, exact, dtype, slack=0.0):
    """`got` is the value nearest to `exact` in its dtype, up to `slack` of the row's size and fp32 arithmetic."""
    error = (got.double() - exact).abs()
    allowed = UNIT[dtype] * 1.01 * exact.abs() + (slack + 2**-20) * exact.abs().amax(dim=-1, keepdim=True)
    assert (error <= allowed).all(), float((error - allowed).max())
