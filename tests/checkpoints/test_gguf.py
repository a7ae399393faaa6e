"""A GGUF file has the weights and the tokenizer of the checkpoint, in the form of llama.cpp."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedModel

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.gguf_export import check_tokenizer_form, export_gguf, sorted_by_part
from sinklm.extras import MissingExtraError
from sinklm.models.arms import ARMS

from ..eval import checkpoints
from ..eval.checkpoints import small_tokenizer, write_checkpoint
from .llama_cpp import ENGINE, HAS_LLAMA_CPP, TIE, distance_to_greedy

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "checkpoints"
needs_llama_cpp = pytest.mark.skipif(not HAS_LLAMA_CPP, reason="needs llama.cpp; .ci/llama-cpp installs it")
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def small_model(num_sinks: int, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A model with an even number of rotary dimensions."""
    return checkpoints.small_model(num_sinks, dtype, **{"hidden_size": 64, **overrides})


def values(file: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in file.fields.items()}


def arrays(file: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """The tensors as float32, in the shapes of torch."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in file.tensors}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", small_model(1))


@pytest.mark.parametrize("dtype", ["auto", *TYPES])
def test_each_tensor_is_that_of_the_checkpoint(checkpoint, tmp_path, dtype):
    file = gguf.GGUFReader(export_gguf(checkpoint, tmp_path / "out", dtype=dtype))
    model = load_model(checkpoint)
    types = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    expected = expected_tensors(model)
    assert types.keys() == expected.keys()
    stored = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    for name, array in arrays(file).items():
        is_matrix = array.ndim == 2
        assert types[name] == (TYPES.get(dtype, "F32") if is_matrix else "F32")
        weight = expected[name].to(stored).float() if is_matrix else expected[name]
        assert np.array_equal(array, weight.numpy())


def expected_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """llama.cpp's names and layout, written out."""
    decoder, heads = model.gpt_neox, model.config.num_attention_heads
    size = model.config.hidden_size // heads
    tensors = {
        "token_embd.weight": decoder.embed_in.weight,
        "output_norm.weight": decoder.final_layer_norm.weight,
        "output_norm.bias": decoder.final_layer_norm.bias,
        "output.weight": model.get_output_embeddings().weight,
    }
    for i, layer in enumerate(decoder.layers):
        modules = {
            "attn_norm": layer.input_layernorm,
            "ffn_norm": layer.post_attention_layernorm,
            "attn_output": layer.attention.dense,
            "ffn_up": layer.mlp.dense_h_to_4h,
            "ffn_down": layer.mlp.dense_4h_to_h,
        }
        for name, module in modules.items():
            tensors |= {f"blk.{i}.{name}.{kind}": getattr(module, kind) for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            rows = getattr(layer.attention.query_key_value, kind)
            parts = [
                rows[(3 * head + part) * size :][:size]  # in the checkpoint: q, k, v of head 0, q, k, v of head 1, …
                for part in range(3)
                for head in range(heads)
            ]
            tensors[f"blk.{i}.attn_qkv.{kind}"] = torch.cat(parts)
    return {name: tensor.detach() for name, tensor in tensors.items()}


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_rows_are_sorted_by_query_key_and_value(num_heads, size, width):
    labels = [(part, head, i) for head in range(num_heads) for part in range(3) for i in range(size)]
    matrix = torch.arange(len(labels))[:, None].expand(-1, width)
    assert [labels[row] for row in sorted_by_part(matrix, num_heads)[:, 0]] == sorted(labels)
    assert torch.equal(sorted_by_part(matrix[:, 0], num_heads), sorted_by_part(matrix, num_heads)[:, 0])


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_graph_of_llama_cpp_computes_the_logits_of_the_checkpoint(tmp_path, parallel, bias):
    """From the file alone: its tensors and keys, in numpy."""
    overrides = {"use_parallel_residual": parallel, "attention_bias": bias, "hidden_act": "gelu_new"}
    model = small_model(1, **overrides)
    write_checkpoint(tmp_path / "checkpoint", model)
    file = gguf.GGUFReader(export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf"))
    ids = load_tokenizer(tmp_path / "checkpoint")("The old man went down to the sea")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    computed = llama_cpp_logits(file, [values(file)["tokenizer.ggml.bos_token_id"], *ids])
    np.testing.assert_allclose(computed[1:], logits.numpy(), rtol=0, atol=1e-4)


def llama_cpp_logits(file: gguf.GGUFReader, ids: list[int]) -> np.ndarray:
    """The graph ``gptneox`` of llama.cpp, from the keys and tensors of a file."""
    keys, tensors = values(file), arrays(file)
    heads, epsilon = keys["gptneox.attention.head_count"], keys["gptneox.attention.layer_norm_epsilon"]
    num_rotary, theta = keys["gptneox.rope.dimension_count"], keys["gptneox.rope.freq_base"]
    width, length = keys["gptneox.embedding_length"], len(ids)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def rotate(x: np.ndarray) -> np.ndarray:  # (heads, T, head size)
        angles = np.arange(length)[:, None] * theta ** (-np.arange(0, num_rotary, 2) / num_rotary)
        first, second, rest = np.split(x, [num_rotary // 2, num_rotary], axis=-1)
        rotated = first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)
        return np.concatenate([*rotated, rest], axis=-1)

    def attention(x: np.ndarray, layer: str) -> np.ndarray:
        qkv = linear(x, f"{layer}.attn_qkv")
        query, key, value = (part.reshape(length, heads, -1).swapaxes(0, 1) for part in np.split(qkv, 3, axis=-1))
        scores = rotate(query) @ rotate(key).swapaxes(1, 2) / np.sqrt(width // heads)
        scores = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
        mixed = scores / scores.sum(-1, keepdims=True) @ value
        return linear(mixed.swapaxes(0, 1).reshape(length, width), f"{layer}.attn_output")

    def feed_forward(x: np.ndarray, layer: str) -> np.ndarray:
        up = linear(norm(x, f"{layer}.ffn_norm"), f"{layer}.ffn_up")
        return linear(0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))), f"{layer}.ffn_down")

    x = tensors["token_embd.weight"][ids]
    for i in range(keys["gptneox.block_count"]):
        attended = attention(norm(x, f"blk.{i}.attn_norm"), f"blk.{i}") + x
        is_parallel = keys["gptneox.use_parallel_residual"]
        x = attended + feed_forward(x if is_parallel else attended, f"blk.{i}")
    return norm(x, "output_norm") @ tensors["output.weight"].T


@pytest.mark.parametrize("num_sinks", [0, 1])
@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_the_keys_are_those_of_the_model_and_its_tokenizer(tmp_path, num_sinks, source):
    model = small_model(num_sinks, torch.bfloat16)
    folder = write_checkpoint(tmp_path / "checkpoint", model)
    if source == "export":
        folder = export_model(folder, tmp_path / "export")
    keys = values(gguf.GGUFReader(export_gguf(folder, tmp_path / "model.gguf")))
    config = model.config
    assert keys["general.architecture"] == "gptneox"
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    expected = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads // 4,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "use_parallel_residual": True,
        "attention.layer_norm_epsilon": pytest.approx(config.layer_norm_eps),
    }
    assert {name.removeprefix("gptneox."): value for name, value in keys.items() if "gptneox." in name} == expected

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    size = small_tokenizer().get_vocab_size()
    assert tokens[:size] == [tokenizer.id_to_token(i) for i in range(size)]
    assert len(tokens) == len(types) == config.vocab_size == size + 8
    assert types[:2] == [gguf.TokenType.CONTROL] * 2
    assert set(types[2:size]) == {gguf.TokenType.NORMAL}
    assert tokens[size : size + num_sinks] == ["<|sink|>"][:num_sinks]
    assert types[size : size + num_sinks] == [gguf.TokenType.CONTROL] * num_sinks
    assert set(types[size + num_sinks :]) == {gguf.TokenType.UNUSED}
    assert keys["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert keys["tokenizer.ggml.bos_token_id"] == (size if num_sinks else 0)
    assert keys["tokenizer.ggml.add_bos_token"] is bool(num_sinks)
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.padding_token_id"]) == (0, 1)


@pytest.mark.parametrize("kind", ARMS)
def test_an_arm_is_refused_by_name(tmp_path, kind):
    folder = write_checkpoint(tmp_path / "checkpoint", small_model(0, sink={"kind": kind}))
    with pytest.raises(ValueError, match=rf"sink\.kind '{kind}', which llama\.cpp cannot compute"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("num_sinks", "overrides", "message"),
    [
        (2, {}, "has 2 sink tokens, and llama.cpp puts only one token before a text"),
        (1, {"hidden_size": 48}, "rotates 3 of the dimensions of a head"),
        (1, {"hidden_act": "relu"}, "has hidden_act 'relu'"),
        (1, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "has rope_type 'linear'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path, num_sinks, overrides, message):
    folder = write_checkpoint(tmp_path / "checkpoint", small_model(num_sinks, **overrides))
    with pytest.raises(ValueError, match=message):
        export_gguf(folder, tmp_path / "model.gguf")


def test_a_model_of_others_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, not a model trained by sinklm: .*convert_hf_to_gguf"):
        export_gguf(tmp_path / "llama", tmp_path / "model.gguf")


def changed(change: Callable[[Tokenizer], None]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    change(tokenizer)
    return tokenizer


def changed_model(**options: Any) -> Tokenizer:
    state = json.loads(small_tokenizer().to_str())
    state["model"] |= options
    return Tokenizer.from_str(json.dumps(state))


OTHER_TOKENIZERS = {
    "the pre-tokenizer Metaspace": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
    "the pre-tokenizer Whitespace": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
    "the pre-tokenizer none": lambda t: setattr(t, "pre_tokenizer", None),
    "the pre-tokenizer Sequence": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    ),
    "the pre-tokenizer ByteLevel": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
    "the normalizer Lowercase": lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
    "the normalizer NFKC": lambda t: setattr(t, "normalizer", normalizers.NFKC()),
    "the decoder Metaspace": lambda t: setattr(t, "decoder", decoders.Metaspace()),
    "the added token '<x>' with lstrip": lambda t: t.add_tokens([AddedToken("<x>", lstrip=True)]),
}


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_a_tokenizer_of_another_form_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^t.json has {name}.*gpt-2 does not do"):
        check_tokenizer_form(changed(OTHER_TOKENIZERS[name]), Path("t.json"))


@pytest.mark.parametrize("options", [{"ignore_merges": True}, {"dropout": 0.1}, {"byte_fallback": True}])
def test_options_of_a_bpe_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"t.json has {next(iter(options))} in its BPE"):
        check_tokenizer_form(changed_model(**options), Path("t.json"))


def test_only_bytes_that_no_text_has_may_be_missing():
    """Pythia's tokenizer has no tokens for the 13 bytes that are never in UTF-8."""
    of_utf8 = {byte for code in (*range(0xD800), *range(0xE000, 0x110000, 64)) for byte in chr(code).encode()}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    needed = alphabet - {chr(byte) for byte in range(0xA1, 0x100) if byte not in of_utf8}  # these stand for themselves
    assert len(alphabet - needed) == 13
    check_tokenizer_form(with_vocabulary(needed), Path("t"))
    with pytest.raises(ValueError, match="a vocabulary without 1 of the bytes of UTF-8"):
        check_tokenizer_form(with_vocabulary(needed - {"a"}), Path("t"))


def with_vocabulary(names: set[str]) -> Tokenizer:
    state = json.loads(small_tokenizer().to_str())
    vocab = {name: i for i, name in enumerate(sorted(names))}
    return Tokenizer.from_str(
        json.dumps(state | {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []})
    )


def test_a_normalizer_is_a_warning(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", small_model(1))
    changed(lambda t: setattr(t, "normalizer", normalizers.NFC())).save(str(folder / "tokenizer.json"))
    with pytest.warns(UserWarning, match="composes characters .NFC. and llama.cpp does not"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_a_value_too_large_for_float16_is_an_error_that_leaves_nothing(tmp_path):
    model = small_model(1)
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.data[0, 0] = 1e5
    folder, path = write_checkpoint(tmp_path / "checkpoint", model), tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has values too large for float16"):
        export_gguf(folder, path, dtype="float16")
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]


def test_more_tokens_than_rows_are_refused(tmp_path):
    folder = export_model(write_checkpoint(tmp_path / "checkpoint", small_model(1)), tmp_path / "export")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<{i}>" for i in range(8)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json has the id 408, but the model has only 408 rows"):
        export_gguf(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize("sink", [{"kind": "token", "num_tokens": "x"}, {"kind": "other"}, {"kin": "token"}])
def test_a_wrong_sink_in_an_export_is_refused(tmp_path, sink):
    folder = export_model(write_checkpoint(tmp_path / "checkpoint", small_model(1)), tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sink": sink}))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"sink\.(num_tokens|kind|kin)"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_a_file_is_not_replaced_and_a_link_stays(checkpoint, tmp_path):
    (tmp_path / "model.gguf").symlink_to("disk/target.gguf")
    assert export_gguf(checkpoint, tmp_path) == tmp_path / "model.gguf"
    before = (tmp_path / "disk" / "target.gguf").read_bytes()
    for output in (tmp_path, tmp_path / "disk" / "target.gguf"):
        with pytest.raises(FileExistsError, match=r"\.gguf exists: choose another output file, or delete it"):
            export_gguf(checkpoint, output)
    assert (tmp_path / "disk" / "target.gguf").read_bytes() == before
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target.gguf"]


def test_without_the_library_the_extra_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sinklm.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "sinklm\[gguf\]"'):
        export_gguf(checkpoint, tmp_path / "model.gguf")


def in_llama_cpp(model: Path, texts: list[str], prompts: list[list[int]] = [], num_tokens: int = 0) -> dict[str, Any]:  # noqa: B006
    job = {"model": str(model), "texts": texts, "prompts": prompts, "numTokens": num_tokens}
    command = ["node", str(Path(__file__).with_name("llama_cpp.mjs")), str(ENGINE)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def some_texts() -> list[str]:
    """Prose, code, other scripts, spaces, numbers and special tokens."""
    book = (SHIPPED / "book.txt").read_text(encoding="utf-8")
    pieces = [book[start : start + 200] for start in range(0, len(book), len(book) // 150)]
    return [
        *pieces,
        *Path(__file__).read_text(encoding="utf-8").split("\n\n")[:60],
        "",
        " ",
        "\n",
        "a" * 300,
        " " * 40,
        "tab\tand\r\nline ends \n\n\n   ",
        "Don't, we've, I'LL 's 't",
        "1234567890 3.14159 ½ ²",
        "Ünïcödé naïve café, Привет мир, 你好世界, こんにちは, שלום, مرحبا, 🙂👩‍👩‍👧",
        "\u00a0\u2003\u200b\ufeff",
        "<|endoftext|> in a text <|padding|><|sink|>",
    ]


@needs_llama_cpp
def test_llama_cpp_tokenizes_and_generates_as_the_export_does(tmp_path):
    from transformers import AutoTokenizer

    folder = SHIPPED / "learnable-sink"
    path = export_gguf(folder, tmp_path / "model.gguf", dtype="float32")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder, dtype=torch.float32, device="cpu")
    texts = some_texts()
    prompts = [tokenizer(text)["input_ids"][:40] for text in texts[::120]]
    result = in_llama_cpp(path, texts, prompts, num_tokens=100)
    sink = model.config.sink["first_token_id"]
    assert result["metadata"] == {"bos": sink, "eos": 0, "architecture": "gptneox", "contextLength": 256}
    assert len(texts) > 200
    assert result["tokens"] == tokenizer(texts)["input_ids"]
    assert all(tokens[0] == sink for tokens in result["tokens"])
    for prompt, generated in zip(prompts, result["generated"], strict=True):
        assert len(generated) == 100
        assert distance_to_greedy(model, prompt, generated) < TIE


@needs_llama_cpp
def test_llama_cpp_tokenizes_as_a_tokenizer_of_pythias_form(tmp_path):
    """NFC, and runs of spaces as added tokens that are not special."""
    tokenizer = changed(lambda t: setattr(t, "normalizer", normalizers.NFC()))
    tokenizer.add_tokens([AddedToken(" " * count, special=False, normalized=True) for count in range(24, 1, -1)])
    model = small_model(1, vocab_size=512, sink={"kind": "token", "first_token_id": tokenizer.get_vocab_size()})
    folder = write_checkpoint(tmp_path / "checkpoint", model)
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.warns(UserWarning, match="NFC"):
        path = export_gguf(folder, tmp_path / "model.gguf")
    exported = Tokenizer.from_file(str(export_model(folder, tmp_path / "export") / "tokenizer.json"))
    texts = some_texts()
    assert in_llama_cpp(path, texts)["tokens"] == [exported.encode(text).ids for text in texts]
