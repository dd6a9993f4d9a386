"""Published layouts against the `transformers` package, both directions."""
import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch

from yokolab.language.hub import config_from_hub, config_to_hub, family, hub_names
from yokolab.language.model import Config, Transformer
from yokolab.language.weights import Folder, hub_tensors, load_pretrained, save_pretrained

pytest.importorskip("safetensors")
SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=40, max_position_embeddings=64, initializer_range=0.15)
MOE = dict(num_local_experts=6, num_experts_per_tok=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16, rope_theta=100.0)
CASES = {
    "llama": ("Llama", {}),
    "llama-grouped-tied": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-wide-heads": ("Llama", dict(num_key_value_heads=1, head_dim=12, rms_norm_eps=1e-3)),
    "llama3-rotation": ("Llama", dict(rope_parameters=LLAMA3)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16)),
    "qwen3-tied": ("Qwen3", dict(num_key_value_heads=4, head_dim=8, tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3Moe", MOE | dict(num_key_value_heads=2, moe_intermediate_size=24,
                                         norm_topk_prob=True)),
    "qwen3_moe-plain": ("Qwen3Moe", MOE | dict(num_key_value_heads=4, moe_intermediate_size=24,
                                               norm_topk_prob=False, head_dim=16)),
    "mixtral": ("Mixtral", MOE | dict(num_key_value_heads=2, sliding_window=None)),
}


@pytest.fixture(scope="module")
def transformers():
    """The package; a torchvision that cannot be imported is hidden from it."""
    try: importlib.import_module("torchvision")
    except Exception: sys.modules["torchvision"] = None
    return pytest.importorskip("transformers")


def theirs(transformers, kind, options):
    """A small random model of the package, gains of the norms not all one."""
    if "Moe" in kind or kind == "Mixtral": pytest.importorskip("yokolab.language.experts")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n: p.uniform_(0.5, 1.5)
    return model


def tokens(n=33):
    return torch.randint(61, (3, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_from_the_hub(transformers, case, tmp_path):
    peer = theirs(transformers, *CASES[case])
    peer.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), peer(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_to_the_hub(transformers, case, tmp_path):
    peer = theirs(transformers, *CASES[case])
    config = replace(config_from_hub(json.loads(peer.config.to_json_string(use_diff=False))),
                     init_std=0.15)
    ours = Transformer(config, seed=5).eval()
    save_pretrained(ours, tmp_path)
    kind = f"{CASES[case][0]}ForCausalLM"
    back = getattr(transformers, kind).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(tokens()).logits, ours(tokens()), rtol=1e-5, atol=1e-5)
    assert back.state_dict().keys() == peer.state_dict().keys()


@pytest.mark.filterwarnings("ignore")
def test_stored_names_are_those_of_the_package(transformers, tmp_path):
    for kind, options in CASES.values():
        try: peer = theirs(transformers, kind, options)
        except pytest.skip.Exception: continue
        peer.save_pretrained(tmp_path/kind)
        there = Folder(tmp_path/kind)
        ours = load_pretrained(tmp_path/kind)
        assert hub_tensors(ours).keys() == there.where.keys()
        for name, value in hub_tensors(ours).items(): assert torch.equal(value, there[name]), name


def small(**kw):
    base = dict(vocab_size=20, d_model=16, n_layers=2, n_heads=2, d_ff=24, context=16)
    return Config(**base | kw)


def test_several_files_with_an_index(tmp_path):
    from safetensors.torch import save_file
    model = Transformer(small())
    save_pretrained(model, tmp_path)
    tensors = hub_tensors(model)
    (tmp_path/"model.safetensors").unlink()
    half, names = len(tensors) // 2, list(tensors)
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for f, some in parts.items(): save_file({n: tensors[n] for n in some}, tmp_path/f)
    index = {n: f for f, some in parts.items() for n in some}
    (tmp_path/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))
    x = torch.arange(9)[None]
    assert torch.equal(load_pretrained(tmp_path)(x), model(x))
    (tmp_path/"b.safetensors").unlink()
    with pytest.raises(ValueError, match="index names a file that is missing"):
        load_pretrained(tmp_path)


def test_stacked_experts_are_read(tmp_path):
    pytest.importorskip("yokolab.language.experts")
    from safetensors.torch import save_file
    c = small(qk_norm=True, ffn="moe", ffn_options=dict(n_experts=3, top_k=2))
    model = Transformer(c)
    save_pretrained(model, tmp_path)
    tensors = {k: v for k, v in hub_tensors(model).items() if ".experts." not in k}
    for i, b in enumerate(model.blocks):
        stem = f"model.layers.{i}.mlp.experts."
        tensors[stem + "gate_up_proj"] = torch.cat([b.ffn.w1, b.ffn.w3], 1).detach()
        tensors[stem + "down_proj"] = b.ffn.w2.detach().clone()
    save_file(tensors, tmp_path/"model.safetensors")
    x = torch.arange(9)[None]
    assert torch.equal(load_pretrained(tmp_path)(x), model(x))


def test_dtype_context_and_global_state(tmp_path):
    model = Transformer(small())
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    back = load_pretrained(tmp_path, dtype=torch.bfloat16, context=8)
    assert torch.equal(before, torch.get_rng_state())
    assert back.embedding.weight.dtype == torch.bfloat16 and back.config.context == 8
    assert json.loads((tmp_path/"config.json").read_text())["dtype"] == "bfloat16"
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("change, text", [
    (dict(sliding_window=8), "sliding_window=8"), (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (dict(mlp_only_layers=[0]), "mlp_only_layers"), (dict(decoder_sparse_step=2), "mlp_only")])
def test_what_is_not_built_in_is_refused(change, text):
    c = small(ffn="moe", ffn_options=dict(n_experts=3, top_k=2))
    with pytest.raises(ValueError, match=text): config_from_hub(config_to_hub(c) | change)


def test_families_and_names():
    assert family(small()) == "llama" and family(small(qk_norm=True)) == "qwen3"
    for kw in (dict(ffn="gelu"), dict(ffn_options=dict(bias=True)),
               dict(ffn="moe", ffn_options=dict(n_experts=3, top_k=1, normalize=False))):
        with pytest.raises(ValueError, match="no published family"): family(small(**kw))
    assert "lm_head.weight" not in hub_names(small(tie_embeddings=True)).values()
