"""Training speed against a plain loop of the same model: `python benchmarks/language_loop.py`.

Both train a 10-million-parameter model on the same rows in the same order: here with the library's
model, batches and trainer, there with a module and a loop written without it. The losses must
agree, the times are taken in turn in one process, and the result is the median of the ratios of
neighbouring times. Afterwards a run that is interrupted in the middle is held against the run that
is not, bit for bit.
"""

import argparse
import json
import math
import tempfile
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from yokolab.lab import bench
from yokolab.language.counting import parameters, training_flops
from yokolab.language.model import Config, Transformer
from yokolab.language.packing import pack
from yokolab.language.recipe import Recipe
from yokolab.language.text import Bytes, corpus
from yokolab.language.training import Trainer

SHAPE = Config(vocab_size=257, d_model=320, n_layers=8, n_heads=5, d_ff=864, context=128)


class PlainBlock(nn.Module):
    """A block as one writes it by hand."""

    def __init__(self, d, heads, d_ff):
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.RMSNorm(d, 1e-6), nn.RMSNorm(d, 1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, d_ff, bias=False), nn.Linear(d, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d, bias=False)

    def forward(self, h, cos, sin):
        """(B, S, d) to (B, S, d)."""
        B, S, d = h.shape
        x = self.n1(h)
        q, k, v = (p(x).view(B, S, self.heads, -1).transpose(1, 2)
                   for p in (self.q, self.k, self.v))

        def turn(y):
            a, b = y.chunk(2, -1)
            return torch.cat([a*cos - b*sin, b*cos + a*sin], -1)
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        h = h + self.o(y.transpose(1, 2).reshape(B, S, d))
        x = self.n2(h)
        return h + self.down(F.silu(self.gate(x))*self.up(x))


class Plain(nn.Module):
    """The same model without the library."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(PlainBlock(c.d_model, c.n_heads, c.d_ff)
                                    for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model, 1e-6)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        dim = c.d_model//c.n_heads
        angle = torch.outer(torch.arange(c.context), 1e4**(-torch.arange(0, dim, 2)/dim))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        """(B, S) to (B, S, V)."""
        h, S = self.embedding(tokens), tokens.shape[1]
        for b in self.blocks: h = b(h, self.cos[:S], self.sin[:S])
        return self.head(self.norm(h))


def copy_weights(source, target):
    """Weights of the library's model into the plain one, by order of their roles."""
    roles = [("attention_norm", "n1"), ("ffn_norm", "n2"), *((f"attention.{x}", x) for x in "qkvo"),
             *((f"ffn.{x}", x) for x in ("gate", "up", "down"))]
    with torch.no_grad():
        for name in ("embedding", "norm", "head"):
            getattr(target, name).weight.copy_(getattr(source, name).weight)
        for a, b in zip(source.blocks, target.blocks, strict=True):
            for mine, theirs in roles:
                b.get_submodule(theirs).weight.copy_(a.get_submodule(mine).weight)


class PlainLoop:
    """Training as one writes it by hand."""

    def __init__(self, model, data, rows, recipe):
        self.model, self.rows, self.r, self.t, self.losses = model, rows, recipe, 0, []
        self.x, self.y = data.tokens.long(), data.targets.long()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self.opt = torch.optim.AdamW([dict(params=matrices, weight_decay=recipe.weight_decay),
                                      dict(params=vectors, weight_decay=0)], lr=recipe.lr,
                                     betas=recipe.betas, eps=recipe.eps, fused=True)

    def step(self):
        """One optimizer step."""
        r, t = self.r, self.t
        lr = r.lr*(t + 1)/r.warmup if t < r.warmup else r.lr*(
            r.final + (1 - r.final)*(1 + math.cos(math.pi*(t - r.warmup)/(r.steps - r.warmup)))/2)
        for g in self.opt.param_groups: g["lr"] = lr
        i = self.rows[t]
        logits = self.model(self.x[i])
        loss = F.cross_entropy(logits.flatten(0, 1), self.y[i].flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), r.clip)
        self.opt.step()
        self.opt.zero_grad()
        self.losses.append(loss.item())
        self.t += 1


def resumed(model, data, recipe):
    """Whether a run interrupted in the middle has the weights of the run that is not."""
    runs = []
    with tempfile.TemporaryDirectory() as d:
        for stops in ((None,), (recipe.steps//2, None)):
            for until in stops:
                t = Trainer(model(), data, recipe)
                t.run(until, checkpoint=f"{d}/{len(runs)}.pt")
            runs.append(torch.cat([p.detach().flatten() for p in t.model.parameters()]))
    return torch.equal(*runs)


def measure(repeats, batch_size):
    """Times of both loops and the checks, as a dict."""
    data = pack(Bytes().encode_all(corpus("python_source", limit=150)), SHAPE.context, end=256)
    recipe = Recipe(steps=4*repeats + 40, batch_size=batch_size, lr=6e-4, warmup=10,
                    document_mask=False)
    ours = Trainer(Transformer(SHAPE), data, recipe)
    masked = Trainer(Transformer(SHAPE), data, replace(recipe, document_mask=True))
    plain = Plain(SHAPE)
    copy_weights(ours.model, plain)
    rows = [torch.from_numpy(ours.batches.rows(s)) for s in range(recipe.steps)]
    loop = PlainLoop(plain, data, rows, recipe)
    fns = {"library": ours.step, "plain": loop.step, "library, documents masked": masked.step}
    times = bench.interleave(fns, repeats=repeats, warmup=1)
    n = min(ours.done, loop.t)
    gap = max(abs(a - b) for a, b in zip(ours.history.losses[:n], loop.losses[:n], strict=True))
    tokens = batch_size*SHAPE.context
    median = {k: float(np.median(t)) for k, t in times.items()}
    pairs = times["plain"]/times["library"]
    short = replace(recipe, steps=4, warmup=1, batch_size=2)
    return dict(
        hardware=bench.hardware(), torch=torch.__version__, threads=torch.get_num_threads(),
        parameters=parameters(SHAPE).total, rows=batch_size, tokens_per_step=tokens,
        repeats=repeats,
        seconds_per_step=median, tokens_per_second={k: tokens/t for k, t in median.items()},
        speed_over_plain=float(np.median(pairs)),
        speed_over_plain_quartiles=[float(np.quantile(pairs, q)) for q in (0.25, 0.75)],
        speed_over_plain_by_medians=median["plain"]/median["library"],
        gflops=training_flops(SHAPE, batch_size, SHAPE.context)/median["library"]/1e9,
        steps_compared=n, largest_gap_of_losses=gap,
        resumed_run_is_bitwise_equal=resumed(lambda: Transformer(SHAPE), data, short))


def main():
    """Measure, show, and fail where a target is missed."""
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--repeats", type=int, default=9, help="samples of each loop")
    a.add_argument("--rows", type=int, default=4, help="rows of 128 tokens in a step")
    a = a.parse_args()
    r = measure(a.repeats, a.rows)
    print(json.dumps(r, indent=2))
    good = (r["speed_over_plain"] >= 0.9 and r["largest_gap_of_losses"] < 1e-3
            and r["resumed_run_is_bitwise_equal"])
    raise SystemExit(0 if good else 1)


if __name__ == "__main__": main()
