"""The vision transformer against timm and transformers, and weights that move between shapes."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.synthetic.vit import (
    VisionTransformer,
    ViTConfig,
    load_weights,
    rebuilt,
    resize_positions,
    vit,
)

# shapes of timm's vit_tiny_patch16_224 and deit_tiny_patch16_224, one block of twelve
TINY = {"cls_token": (1, 1, 192), "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16), "patch_embed.proj.bias": (192,),
        "norm.weight": (192,), "norm.bias": (192,), "head.weight": (1000, 192),
        "head.bias": (1000,)}
BLOCK = {"norm1.weight": (192,), "norm1.bias": (192,), "attn.qkv.weight": (576, 192),
         "attn.qkv.bias": (576,), "attn.proj.weight": (192, 192), "attn.proj.bias": (192,),
         "norm2.weight": (192,), "norm2.bias": (192,), "mlp.fc1.weight": (768, 192),
         "mlp.fc1.bias": (768,), "mlp.fc2.weight": (192, 768), "mlp.fc2.bias": (192,)}
PARTS = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))


def small(**changes):
    return VisionTransformer(ViTConfig(**{**dict(size=16, patch=4, channels=2, classes=5, dim=24,
                                                 depth=2, heads=3), **changes}), seed=1)


def test_names_and_shapes_are_timms():
    expected = TINY | {f"blocks.{i}.{n}": s for i in range(12) for n, s in BLOCK.items()}
    assert {n: tuple(w.shape) for n, w in vit("tiny", seed=None).state_dict().items()} == expected


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_against_timm(name):
    try:
        import timm
    except (ImportError, RuntimeError) as e: pytest.skip(f"no timm: {e}")
    theirs = timm.create_model(f"vit_{name}_patch16_224").eval()
    ours = vit(name, seed=None).eval()
    load_weights(ours, theirs.state_dict())
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    from timm.layers import resample_abs_pos_embed
    pos = theirs.pos_embed.detach()
    torch.testing.assert_close(resize_positions(pos, 9), resample_abs_pos_embed(pos, (9, 9)))


def test_against_transformers():
    try:
        from transformers import ViTConfig as Config
        from transformers import ViTModel
    except (ImportError, RuntimeError) as e: pytest.skip(f"no transformers with a ViT: {e}")
    ours = small(classes=0).double().eval()
    config = Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                    intermediate_size=96, image_size=16, patch_size=4, num_channels=2,
                    layer_norm_eps=1e-6, qkv_bias=True, attn_implementation="eager")
    theirs = ViTModel(config, add_pooling_layer=False).double().eval()
    s = ours.state_dict()
    want = list(theirs.state_dict())
    new = {}
    for n in want:
        i = next((p for p in n.split(".") if p.isdigit()), None)
        b = f"blocks.{i}."
        kind = "." + n.rsplit(".", 1)[1]
        if n.endswith("cls_token"): new[n] = s["cls_token"]
        elif n.endswith("position_embeddings"): new[n] = s["pos_embed"]
        elif "patch_embeddings" in n: new[n] = s["patch_embed.proj" + kind]
        elif "layernorm_before" in n: new[n] = s[b + "norm1" + kind]
        elif "layernorm_after" in n: new[n] = s[b + "norm2" + kind]
        elif i is None: new[n] = s["norm" + kind]
        elif any(q in n for q in sum(PARTS, ())):
            part = next(k for k, p in enumerate(PARTS) if any(q in n for q in p))
            new[n] = s[b + "attn.qkv" + kind].chunk(3)[part]
        elif "attention" in n: new[n] = s[b + "attn.proj" + kind]
        elif "intermediate" in n or "fc1" in n: new[n] = s[b + "mlp.fc1" + kind]
        else: new[n] = s[b + "mlp.fc2" + kind]
    theirs.load_state_dict(new)
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.tokens(x), theirs(x).last_hidden_state)


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([(8, 2), (16, 4), (12, 3)]), st.integers(1, 3),
       st.sampled_from(["token", "mean"]), st.integers(0, 7))
def test_attention_is_the_plain_formula(shape, channels, pool, classes):
    net = small(size=shape[0], patch=shape[1], channels=channels, pool=pool,
                classes=classes).double()
    x = torch.randn(2, channels, shape[0], shape[0], dtype=torch.float64)
    tokens = net.patch_embed(x)
    torch.testing.assert_close(tokens, net.patch_embed.proj(x).flatten(2).mT)
    att = net.blocks[0].attn
    q, k, v = (att.qkv(tokens).chunk(3, -1)[i].unflatten(-1, (3, 8)).transpose(1, 2)
               for i in range(3))
    y = ((q @ k.mT)/8**0.5).softmax(-1) @ v
    torch.testing.assert_close(att(tokens), att.proj(y.transpose(1, 2).flatten(2)))
    assert net(x).shape == (2, classes or 24)


def test_gradients_are_those_of_finite_differences():
    net = small().double()
    x, y = torch.randn(2, 2, 16, 16, dtype=torch.float64), torch.tensor([1, 3])
    loss = lambda: F.cross_entropy(net(x), y)
    loss().backward()
    for name in ("cls_token", "blocks.1.attn.qkv.weight", "patch_embed.proj.weight"):
        w = dict(net.named_parameters())[name]
        d = torch.randn_like(w)
        with torch.no_grad():
            w += 1e-5*d; up = loss(); w -= 2e-5*d; down = loss(); w += 1e-5*d
        assert abs((up - down)/2e-5 - (w.grad*d).sum()) < 1e-5


def test_weights_keep_what_they_can():
    old, new = small(), small(size=32, channels=1, classes=3)
    loaded = load_weights(new, old.state_dict() | {"head_dist.weight": torch.zeros(1)})
    assert set(loaded.resized) == {"pos_embed", "patch_embed.proj.weight"}
    assert loaded.kept == ("head.weight", "head.bias") and loaded.ignored == ("head_dist.weight",)
    with pytest.raises(ValueError, match="only to or from one channel"):
        load_weights(small(channels=3), old.state_dict())
    with pytest.raises(ValueError, match="no square grid"):
        resize_positions(torch.zeros(1, 19, 4), 3)


def test_token_and_mean_exchange_positions():
    mean = small(pool="mean")
    load_weights(mean, small().state_dict())
    assert torch.equal(mean.pos_embed, small().pos_embed[:, 1:])
    old = small(pool="mean")                                    # no token: nothing to split off
    new = rebuilt(old, size=2*old.config.size)
    assert torch.equal(new.pos_embed, resize_positions(old.pos_embed, new.config.grid, 0))
    state = small().state_dict()                                # DeiT's second token comes second
    first, rest = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    net = small()
    load_weights(net, state | {"pos_embed": torch.cat([first, first + 1, rest], 1)})
    assert torch.equal(net.pos_embed, state["pos_embed"])
