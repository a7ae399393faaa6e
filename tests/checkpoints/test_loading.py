import ast
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GPTNeoXConfig, T5Config

from sinklm.checkpoints import checks, load_model, load_tokenizer, loading
from sinklm.checkpoints.folders import resolve_model_folder
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.modeling import SinkGPTNeoXModel

from ..models.tiny import tiny_model


@pytest.fixture
def run_folder(tmp_path):
    for step, complete in ((2, True), (10, True), (20, False)):
        checkpoint = tmp_path / "checkpoints" / f"step-{step}"
        model = tiny_model(1, dtype=torch.float32)
        with torch.no_grad():
            model.gpt_neox.final_layer_norm.bias.fill_(step)
        model.save_pretrained(checkpoint / "model")
        if complete:
            (checkpoint / "COMPLETE").touch()
    return tmp_path


def test_a_run_folder_gives_its_newest_complete_checkpoint(run_folder):
    assert load_model(run_folder, device="cpu").gpt_neox.final_layer_norm.bias[0] == 10
    assert load_model(run_folder / "checkpoints" / "step-2", device="cpu").gpt_neox.final_layer_norm.bias[0] == 2
    assert resolve_model_folder(run_folder / "checkpoints/step-2/model").endswith("step-2/model")


def test_transformers_loads_the_model_of_a_checkpoint(run_folder):
    folder = run_folder / "checkpoints" / "step-10" / "model"
    for loader, kind in ((AutoModelForCausalLM, SinkGPTNeoXForCausalLM), (AutoModel, SinkGPTNeoXModel)):
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        assert type(model) is kind
        assert not info["missing_keys"]
        assert model.base_model.final_layer_norm.bias[0] == 10


@pytest.mark.parametrize("loader", [SinkGPTNeoXForCausalLM, SinkGPTNeoXModel, AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("inner", [".", "checkpoints/step-10"])
def test_from_pretrained_of_a_run_names_the_model_to_load(loader, inner, run_folder):
    with pytest.raises(OSError, match=r"of a training run.*pass .*checkpoints/step-10/model"):
        loader.from_pretrained(run_folder / inner)
    loaded = loader.from_pretrained(run_folder, subfolder="checkpoints/step-10/model")
    assert loaded.base_model.final_layer_norm.bias[0] == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_native", [True, False])
def test_a_cpu_uses_a_dtype_that_it_has_instructions_for(dtype, is_native, tmp_path, monkeypatch):
    tiny_model(1, dtype=dtype).save_pretrained(tmp_path)
    names = [name for names in loading.HALF_PRECISION_INSTRUCTIONS.values() for name in names]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, is_native))
    assert load_model(tmp_path, device="cpu").dtype == (dtype if is_native else torch.float32)
    assert load_model(tmp_path, device="cpu", dtype="auto").dtype == dtype
    assert load_model(tmp_path, device="cpu", dtype=torch.float64).dtype == torch.float64


def test_a_missing_model_is_an_error_with_its_path(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="step-20 is an incomplete checkpoint"):
        load_model(run_folder / "checkpoints" / "step-20")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no complete checkpoint"):
        load_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a transformers model"):
        load_model(tmp_path / "empty" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_model("./nowhere")
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such folder, and the cache of the Hugging"):
        load_model("nobody/nothing")


def test_a_path_next_to_runs_is_not_searched_on_the_hub(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder.parent.parent)
    name = f"{run_folder.parent.name}/nope"
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder"):
        load_model(name)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    plain = GPTNeoXConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    plain.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json: copy the one that the model was trained"):
        load_tokenizer(tmp_path)


def test_an_encoder_decoder_model_is_an_error_of_one_line(tmp_path):
    T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a causal language model: use a model that predicts the next token$"):
        load_model(tmp_path)


def test_damaged_files_are_named(run_folder):
    folder = run_folder / "checkpoints" / "step-10" / "model"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"the weights in .*step-10/model are damaged"):
        load_model(run_folder)
    with pytest.raises(FileNotFoundError, match="cannot load a tokenizer from"):
        load_tokenizer(run_folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="cannot load a tokenizer from"):
        load_tokenizer(run_folder)


def test_no_call_may_run_code_of_a_model():
    """transformers asks on standard input if the argument is missing."""
    root, num_calls = Path(__file__).parents[2], 0
    for folder in ("benchmarks", "checkpoints", "cli", "data", "docs", "eval", "models", "streaming", "study", "train"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                    if ast.unparse(node.func).startswith("super()"):
                        continue  # passes the caller's arguments on
                    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert arguments.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                    num_calls += 1
    assert num_calls >= 6


def busy(seconds: float) -> None:
    started = time.thread_time()
    while time.thread_time() - started < seconds:
        pass


@pytest.mark.parametrize(("spend", "is_slow"), [(time.sleep, False), (busy, True)])
def test_a_tokenizer_that_waits_for_a_processor_is_not_a_slow_one(spend, is_slow, monkeypatch):
    monkeypatch.setattr(checks, "SLOW", 0.02)
    monkeypatch.setattr(checks, "PROBES", ("a",))

    def tokenizer(text: str) -> None:
        spend(0.05)

    with pytest.raises(ValueError, match=r"more than 0\.02 s of processor time") if is_slow else nullcontext():
        checks.check_tokenizer(tokenizer, "folder")
