"""The T5 encoder against the golden vectors, Hugging Face's code, and itself as it is captured and legalised."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from passes.partition import Partition
from targets.forms.attention import ATTENTION_IN_BATCHES, attend_in_batches
from targets.forms.gelu import GELU_FORMULA, GELU_SIGMOID, gelu_formula, gelu_sigmoid
from targets.forms.residual_stream import RESIDUAL_SCALE, SMALL_RESIDUAL_STREAM
from toolchain.ir.blocks import extract_blocks
from toolchain.ir.graph import Graph, capture
from toolchain.ir.leaves import Leaf, LegalForm
from toolchain.ir.legalise import legalise
from toolchain.models.open_sora_v1_2.t5 import TIED, LoweredT5, T5Config, T5Encoder
from toolchain.models.open_sora_v1_2.t5_leaves import BiasedAttention, GatedMlp, PositionBias

GOLDEN = Path(__file__).parents[1] / "golden"
META = json.loads((GOLDEN / "t5.json").read_text())
CONFIG = T5Config.from_json(META["config"] | {"feed_forward_proj": META["feed_forward_proj"]})


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(GOLDEN / "t5_weights.safetensors")
    return weights


@pytest.fixture(scope="module")
def model(weights: dict[str, torch.Tensor]) -> Any:  # modules by name are beyond mypy
    model = T5Encoder(CONFIG).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model


def assert_close(got: torch.Tensor, want: torch.Tensor, relative: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= relative * want.abs().max()


def captured(config: T5Config, prompts: int, length: int, weights: dict[str, torch.Tensor] | None = None) -> Graph:
    """A graph captured without weights, and then given some."""
    with torch.device("meta"):
        model = T5Encoder(config)
    graph = capture(LoweredT5(model, prompts=prompts, length=length))
    if weights is not None:
        model.load_state_dict(weights, assign=True)
    return graph


def legalised(model: nn.Module, *forms: LegalForm) -> Any:
    """A copy of ``model`` with every leaf in its legal forms."""
    model = copy.deepcopy(model)
    for form in forms:
        for path, leaf in [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, Leaf)]:
            if leaf.is_a(form.of):
                legal = form.make(leaf)
                assert legal is not None
                model.set_submodule(path, legal.leaf)
    return model


# --- against the goldens -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["L24", "L300"])
def test_output_is_golden_at_real_and_padded_places(model: Any, case: str) -> None:
    golden = load_file(GOLDEN / f"t5_case_{case}.safetensors")
    y = model(golden["in.input_ids"], golden["in.attention_mask"])
    assert (golden["mask"] == 0).any()
    assert_close(y, golden["y"][:, 0])


def test_intermediates_are_golden(model: Any) -> None:
    golden = load_file(GOLDEN / "t5_case_L24.safetensors")
    assert_close(model.shared(golden["in.input_ids"]), golden["mid.embed"])
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda *a: outputs.append(a[-1])) for block in model.encoder.block]
    model(golden["in.input_ids"], golden["in.attention_mask"])
    for hook in hooks:
        hook.remove()
    for i, x in enumerate(outputs):
        assert_close(x, golden[f"mid.block_{i}"])


def test_position_bias_is_golden(model: Any) -> None:
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert_close(table(24), load_file(GOLDEN / "t5_case_L24.safetensors")["mid.position_bias"])
    rows = load_file(GOLDEN / "t5_case_L300.safetensors")["mid.position_bias_first4rows"]
    assert_close(table(300)[:, :, :4], rows)


def test_keys_are_the_official_ones(model: Any) -> None:
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == META["keys"]


@pytest.mark.parametrize("left_out", [*TIED, *TIED.values()])
def test_either_name_of_the_token_table_will_do(weights: dict[str, torch.Tensor], left_out: str) -> None:
    model = T5Encoder(CONFIG)
    model.load_state_dict({k: v for k, v in weights.items() if k != left_out})
    assert torch.equal(model.shared.weight, weights["shared.weight"])
    assert model.encoder.embed_tokens is model.shared


def test_two_different_token_tables_are_refused(weights: dict[str, torch.Tensor]) -> None:
    other = weights | {"encoder.embed_tokens.weight": weights["shared.weight"] + 1}
    with pytest.raises(RuntimeError, match="one tensor in a T5 encoder, but differ"):
        T5Encoder(CONFIG).load_state_dict(other)


def test_a_missing_key_is_an_error(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match="final_layer_norm"):
        T5Encoder(CONFIG).load_state_dict({k: v for k, v in weights.items() if "final" not in k})


# --- against Hugging Face ----------------------------------------------------------------------------


@pytest.mark.parametrize(("buckets", "reach", "length"), [(32, 128, 150), (12, 40, 60)])
def test_output_is_hugging_faces(buckets: int, reach: int, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(buckets)
    sizes = {"vocab_size": 97, "d_model": 40, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_heads": 3}
    positions = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": reach}
    theirs = transformers.T5EncoderModel(transformers.T5Config(**sizes, **positions, feed_forward_proj="gated-gelu"))
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.4)
    ours = T5Encoder(T5Config.from_json(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 97, (2, length))
    mask = (torch.arange(length) < torch.tensor([[length], [7]])).long()
    with torch.no_grad():
        assert_close(ours(ids.int(), mask), theirs.eval()(ids, mask).last_hidden_state)


# --- configuration -----------------------------------------------------------------------------------


def test_defaults_are_xxl() -> None:
    xxl = {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
    rest = {"feed_forward_proj": "gated-gelu", "model_type": "t5", "num_decoder_layers": 24, "dropout_rate": 0.1}
    assert T5Config.from_json(xxl | rest) == T5Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "gated-gelu"),
        ({"feed_forward_proj": None}, "gated-gelu"),
        ({"feed_forward_proj": "gated-silu"}, "gated-silu"),
        ({"model_type": "umt5"}, "umt5"),
        ({"d_kv": None}, "d_kv: None"),
        ({"num_layers": 0}, "num_layers: 0"),
        ({"num_heads": 2.5}, "num_heads: 2.5"),
        ({"relative_attention_num_buckets": 31}, "buckets must be even"),
    ],
)
def test_other_configurations_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        T5Config.from_json(META["config"] | {"feed_forward_proj": "gated-gelu"} | change)


def test_a_missing_size_is_not_guessed() -> None:
    some = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "num_layers": 1}
    with pytest.raises(ValueError, match="lacks d_ff, num_heads"):
        T5Config.from_json(some | {"feed_forward_proj": "gated-gelu"})


# --- capture -----------------------------------------------------------------------------------------


def test_graph_equals_eager(model: Any, weights: dict[str, torch.Tensor]) -> None:
    golden = load_file(GOLDEN / "t5_case_L24.safetensors")
    graph = captured(CONFIG, 3, 24, weights)
    (y,) = graph.functions["base"](golden["in.input_ids"].int(), golden["in.attention_mask"].float())
    assert_close(y, model(golden["in.input_ids"], golden["in.attention_mask"]), 1e-6)
    assert_close(y, golden["y"][:, 0])


def test_graph_names_its_values() -> None:
    graph = captured(CONFIG, 1, 24)
    assert [(i.name, i.shape, i.rate, i.dtype) for i in graph.inputs] == [
        ("input_ids", (1, 24), "prompt", torch.int32),
        ("mask", (1, 24), "prompt", torch.float32),
    ]
    assert graph.outputs == ("y",)
    named = [n.meta for n in graph.functions["base"].graph.nodes if "wire" in n.meta]
    assert [(m["wire"], m["unit"], m["rate"]) for m in named] == [
        ("position_bias", ("embed",), "build"),
        ("attention_bias", ("embed",), "prompt"),
        ("x", ("embed",), "prompt"),
        ("x", ("layer.0",), "prompt"),
        ("x", ("layer.1",), "prompt"),
        ("x", ("layer.2",), "prompt"),
        ("y", ("final",), "prompt"),
    ]


def test_weights_have_official_names() -> None:
    assert set(captured(CONFIG, 1, 24).weights) == set(META["keys"]) - set(TIED.values())


def test_full_size_capture_allocates_nothing() -> None:
    start = time.monotonic()
    graph = captured(T5Config(), 1, 300)
    assert time.monotonic() - start < 10
    assert all(p.is_meta for p in graph.functions["base"].parameters())
    assert sum(torch.Size(w.shape).numel() for w in graph.weights.values()) == 4_762_310_656
    assert graph.dims == {"B": 1, "L": 300, "C": 4096, "h": 64}


def test_all_layers_are_of_one_structure(weights: dict[str, torch.Tensor], model: Any) -> None:
    graph = Partition()(captured(CONFIG, 1, 24, weights))
    embed, *layers, final = extract_blocks(graph)
    assert [embed.name, *(b.name for b in layers), final.name] == ["embed", "layer_0", "layer_1", "layer_2", "final"]
    assert len({b.structure() for b in layers}) == 1
    assert embed.sources["position_bias"] == "tables.position_bias"
    assert not any("relative_attention_bias" in n for b in layers for w in b.weights.values() for n in w.source.tensors)
    for i, block in enumerate(layers):
        assert sorted(p.name for p in block.inputs) == ["attention_bias", "x"]
        module = block.module("base", {k: w.source.value(weights.__getitem__) for k, w in block.weights.items()})
        args = {"x": torch.randn(1, 24, 48), "attention_bias": torch.randn(1, 6, 24, 24)}
        (out,) = module(*(args[p.name] for p in block.inputs))
        assert_close(out, model.encoder.block[i](args["x"], args["attention_bias"]), 1e-6)


# --- legal forms -------------------------------------------------------------------------------------


def test_batched_attention_is_golden(weights: dict[str, torch.Tensor]) -> None:
    golden = load_file(GOLDEN / "t5_case_L24.safetensors")
    graph = legalise(captured(CONFIG, 3, 24, weights), (ATTENTION_IN_BATCHES,))
    leaves = [m for m in graph.functions["base"].modules() if isinstance(m, BiasedAttention)]
    assert len(leaves) == 3
    assert {leaf.kernel for leaf in leaves} == {attend_in_batches}
    (y,) = graph.functions["base"](golden["in.input_ids"].int(), golden["in.attention_mask"].float())
    assert_close(y, golden["y"][:, 0])


@pytest.mark.parametrize(("form", "gelu"), [(GELU_FORMULA, gelu_formula), (GELU_SIGMOID, gelu_sigmoid)])
def test_written_out_gelu_is_golden(model: Any, form: LegalForm, gelu: Any) -> None:
    golden = load_file(GOLDEN / "t5_case_L24.safetensors")
    legal = legalised(model, form)
    assert [m.gelu for m in legal.modules() if isinstance(m, GatedMlp)] == [gelu] * 3
    assert_close(legal(golden["in.input_ids"], golden["in.attention_mask"]), golden["y"][:, 0])


def test_sigmoid_gelu_is_gelu() -> None:
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-6e4, -300.0, 300.0, 6e4])))
    assert torch.allclose(gelu_sigmoid(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    want = F.gelu(x.half().float(), approximate="tanh")
    assert torch.allclose(gelu_sigmoid(x.half()).float(), want, rtol=1e-2, atol=2e-4)


def test_float16_form_keeps_the_output_and_scales_the_stream(model: Any) -> None:
    golden = load_file(GOLDEN / "t5_case_L24.safetensors")
    legal = legalised(model, SMALL_RESIDUAL_STREAM, ATTENTION_IN_BATCHES, GELU_SIGMOID)
    streams: list[torch.Tensor] = []
    legal.encoder.block[1].register_forward_hook(lambda *a: streams.append(a[-1]))
    assert_close(legal(golden["in.input_ids"], golden["in.attention_mask"]), golden["y"][:, 0])
    assert_close(streams[0], golden["mid.block_1"] * RESIDUAL_SCALE)


@pytest.mark.parametrize("growth", [1.0, 300.0, 30_000.0])
def test_float16_form_survives_a_stream_beyond_float16(model: Any, growth: float) -> None:
    golden = load_file(GOLDEN / "t5_case_L24.safetensors")
    ids, mask = golden["in.input_ids"], golden["in.attention_mask"]
    big = copy.deepcopy(model)
    for block in big.encoder.block:  # trained T5s add ever larger values to the stream
        block.layer[1].DenseReluDense.wo.weight.mul_(growth)
    want = big(ids, mask)

    def error(m: nn.Module) -> float:
        return float((m.half()(ids, mask).float() - want).norm() / want.norm())

    assert error(legalised(big, SMALL_RESIDUAL_STREAM)) < 2e-2
    plain = error(copy.deepcopy(big))
    assert plain < 2e-2 if growth == 1.0 else not plain < 0.5  # "not <" as it may be nan


def test_buckets_are_symmetric_and_monotonic() -> None:
    table = PositionBias(32, 128, 1)
    offsets = torch.arange(0, 300)
    after, before = table.buckets(offsets), table.buckets(-offsets)
    assert (after[1:] - before[1:] == 16).all()
    assert before[:8].tolist() == list(range(8))
    assert (before.diff() >= 0).all()
    assert [int((before < b).sum()) for b in range(9, 16)] == [12, 16, 23, 32, 46, 64, 91]  # 8 · 2^(k/2), rounded up
