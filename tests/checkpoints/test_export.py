"""An export is the same model for transformers without sinklm, and is never incomplete."""

import json
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import given
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from sinklm.checkpoints import full_attention as module_of_windows
from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.checks import weight_files
from sinklm.checkpoints.export import export_model, is_export
from sinklm.checkpoints.folders import CheckpointState
from sinklm.checkpoints.full_attention import full_attention_cost, use_full_attention
from sinklm.checkpoints.gguf_export import export_gguf
from sinklm.checkpoints.model_card import run_facts
from sinklm.cli.export import export
from sinklm.cli.main import main
from sinklm.data.manifest import read_manifest
from sinklm.models.arms import ARMS
from sinklm.special_tokens import sink_names
from sinklm.train.recipe import config_yaml, load_config

from ..eval.checkpoints import END_OF_TEXT, small_model, small_tokenizer, write_checkpoint
from ..train.tiny import prepare_here
from .exports import KINDS, TEXT, write_exports
from .seal import seal

SHIPPED = [Path(__file__).parents[2] / "examples" / "checkpoints" / name for name in ("vanilla", "learnable-sink")]


def make_checkpoint(folder: Path, num_sinks: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    return write_checkpoint(folder, small_model(num_sinks, dtype))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.mark.slow
@pytest.mark.long
def test_transformers_alone_computes_the_same_logits_and_text(tmp_path):
    """`.ci/exports` does the same with other versions, and trains with peft and trl."""
    program = Path(__file__).with_name("stock.py")
    with pytest.warns(UserWarning, match="does not begin with the sink"):
        folders = write_exports(tmp_path)
    subprocess.run([sys.executable, str(program), *map(str, folders)], check=True)


@pytest.mark.parametrize(("num_sinks", "dtype"), KINDS)
def test_weights_keep_names_values_and_type(tmp_path, num_sinks, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a CPU on which models are loaded in float32
    folder = export_model(make_checkpoint(tmp_path / "checkpoint", num_sinks, dtype), tmp_path / "export")
    trained = load_file(tmp_path / "checkpoint" / "model.safetensors")
    exported = load_file(folder / "model.safetensors")
    assert "embed_out.weight" in exported  # as every Pythia on disk
    assert trained.keys() == exported.keys()
    for name, weight in trained.items():
        assert exported[name].dtype == dtype
        assert torch.equal(exported[name], weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_written_in_another_type(tmp_path, dtype):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    folder = export_model(checkpoint, tmp_path / "export", dtype=dtype)
    trained, exported = load_file(checkpoint / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, weight in trained.items():
        assert torch.equal(exported[name], weight.to(getattr(torch, dtype)))
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)
    assert f"| Weights | {dtype} |" in (folder / "README.md").read_text()


def test_a_value_too_large_for_float16_is_an_error_that_leaves_nothing(tmp_path):
    model = small_model(1)
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.data[0, 0] = 1e5
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.dense_h_to_4h\.weight has values too large for float16: use"
    ):
        export_model(checkpoint, tmp_path / "export", dtype="float16")
    with pytest.raises(ValueError, match=r"dtype is 'int8': choose from auto, float32, bfloat16, float16"):
        export_model(checkpoint, tmp_path / "export", dtype="int8")
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_configuration_is_in_the_old_and_the_new_form(tmp_path, num_sinks):
    model = small_model(num_sinks, use_cache=False)  # as in a training
    folder = export_model(write_checkpoint(tmp_path / "checkpoint", model), tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    sink_ids = model.config.sink_token_ids

    assert config["use_cache"] is True
    assert config["model_type"] == "gpt_neox"
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    assert config["rotary_pct"] == config["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert config["rotary_emb_base"] == config["rope_parameters"]["rope_theta"] == 10_000
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["bos_token_id"] == generation["bos_token_id"] == (sink_ids[0] if num_sinks else 0)
    assert config["eos_token_id"] == generation["eos_token_id"] == 0
    assert generation.get("suppress_tokens") == (sink_ids or None)
    assert "rope_scaling" not in config


def test_scaled_angles_are_in_the_old_and_the_new_form(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000, "partial_rotary_factor": 0.25}
    model = small_model(1, rope_parameters=scaled)
    folder = export_model(write_checkpoint(tmp_path / "checkpoint", model), tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"] == scaled
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert (config["rotary_emb_base"], config["rotary_pct"]) == (10_000, 0.25)
    ids, sinks = torch.arange(1, 20)[None], torch.tensor([model.config.sink_token_ids])
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(folder)(torch.cat((sinks, ids), dim=1)).logits[:, 1:]
        torch.testing.assert_close(exported, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_model_of_another_library_needs_no_export(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=500, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    write_checkpoint(tmp_path / "plain", GPTNeoXForCausalLM(config))
    with pytest.raises(ValueError, match=r"plain is a GPTNeoXForCausalLM, not a model trained by sinklm: it needs no"):
        export_model(tmp_path / "plain", tmp_path / "export")


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_tokenizer_puts_the_sinks_first_and_changes_nothing_else(tmp_path, num_sinks):
    folder = export_model(make_checkpoint(tmp_path / "checkpoint", num_sinks), tmp_path / "export")
    trained, exported = load_tokenizer(tmp_path / "checkpoint"), AutoTokenizer.from_pretrained(folder)
    sinks, ids = small_model(num_sinks).config.sink_token_ids, trained(TEXT)["input_ids"]

    assert exported(TEXT)["input_ids"] == sinks + ids
    assert exported(TEXT, TEXT)["input_ids"] == sinks + ids + ids
    offsets = exported(TEXT, return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(0, 0)] * num_sinks + trained(TEXT, return_offsets_mapping=True)["offset_mapping"]
    assert exported(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert exported.decode(exported(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    assert exported.convert_ids_to_tokens(sinks) == sink_names(num_sinks)
    assert exported.eos_token == END_OF_TEXT
    assert exported.bos_token == (sink_names(num_sinks)[0] if num_sinks else END_OF_TEXT)
    padded = exported(["a", TEXT], padding=True, padding_side="left", return_tensors="pt")
    first_real = int(padded["attention_mask"][0].argmax())
    assert padded["input_ids"][0, first_real : first_real + num_sinks].tolist() == sinks


@pytest.mark.parametrize("num_sinks", [0, 1])
def test_settings_that_change_the_tokens_of_a_text_are_left_out(tmp_path, num_sinks):
    """A tokenizer without a post-processor, which truncates and pads."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", num_sinks)
    tokenizer = small_tokenizer().from_str(small_tokenizer().to_str())
    expected = small_model(num_sinks).config.sink_token_ids + tokenizer.encode(TEXT).ids
    tokenizer.post_processor = None
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    exported = Tokenizer.from_file(str(export_model(checkpoint, tmp_path / "export") / "tokenizer.json"))
    assert exported.encode(TEXT).ids == expected


def test_large_weights_are_several_files_that_others_may_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sinklm.checkpoints.export.LARGEST_SHARD", "50KB")
    folder = export_model(checkpoint, tmp_path / "export")
    files = weight_files(folder)
    assert len(files) > 1
    assert {path.stat().st_mode for path in files} == {(folder / "config.json").stat().st_mode}
    trained, exported = load_model(checkpoint).state_dict(), load_model(folder).state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in trained.items())


def test_export_loads_as_a_plain_model(checkpoint, tmp_path):
    folder = export_model(checkpoint, tmp_path / "export")
    assert type(load_model(folder)) is GPTNeoXForCausalLM
    with pytest.raises(ValueError, match="export is already an export: use or copy it as it is"):
        export_model(folder, tmp_path / "again")
    GPTNeoXForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "sink"}))
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM, not a model trained by sinklm"):
        export_model(tmp_path / "plain", tmp_path / "again")


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_a_batch_is_padded_on_the_left_and_has_no_token_types(tmp_path, num_sinks):
    folder = export_model(make_checkpoint(tmp_path / "checkpoint", num_sinks), tmp_path / "export")
    for path in (folder, *SHIPPED):
        tokenizer = AutoTokenizer.from_pretrained(path)
        batch = tokenizer(["a", TEXT], padding=True)
        assert list(batch) == ["input_ids", "attention_mask"]
        assert batch["attention_mask"][0][0] == 0
        assert tokenizer.pad_token == "<|padding|>"
        settings = json.loads((path / "tokenizer_config.json").read_text())  # transformers 4 reads them
        assert settings["model_input_names"] == ["input_ids", "attention_mask"]
        assert settings["padding_side"] == "left"


@pytest.mark.parametrize("num_sinks", [0, 1])
@pytest.mark.parametrize(("padding", "expected"), [("a", "a"), (END_OF_TEXT, "<|padding|>")])
def test_an_export_pads_with_the_token_of_the_checkpoint(tmp_path, num_sinks, padding, expected):
    """Unless it is the end of a text, which would be masked in fine-tuning."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", num_sinks)
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": padding}))
    assert AutoTokenizer.from_pretrained(export_model(checkpoint, tmp_path / "export")).pad_token == expected


@pytest.mark.parametrize("num_sinks", [1, 2])
def test_a_new_token_does_not_get_the_id_of_a_sink(tmp_path, num_sinks):
    folder = export_model(make_checkpoint(tmp_path / "checkpoint", num_sinks), tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    sinks = small_model(num_sinks).config.sink_token_ids
    assert tokenizer.convert_tokens_to_ids("<new>") == sinks[-1] + 1


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
@pytest.mark.parametrize(
    ("template", "lacks_sink"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", True),
        ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", False),
        ("{{- bos_token + messages[0]['content'] }}", False),
    ],
)
def test_a_chat_template_begins_with_the_sinks_once(tmp_path, num_sinks, template, lacks_sink):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", num_sinks)
    (checkpoint / "chat_template.jinja").write_text(template)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = export_model(checkpoint, tmp_path / "export")
    said = any("does not begin with the sink" in str(warning.message) for warning in caught)
    assert said == (num_sinks > 0 and (lacks_sink or num_sinks > 1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], return_dict=True)["input_ids"]
    sinks = small_model(num_sinks).config.sink_token_ids
    if num_sinks:
        assert ids == sinks + tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    else:
        assert (folder / "chat_template.jinja").read_text() == template


def test_a_template_set_later_without_the_sink_is_a_warning(checkpoint, tmp_path):
    folder = export_model(checkpoint, tmp_path / "export")
    for template, is_wrong in (("{{ messages[0]['content'] }}", True), ("{{ bos_token }}{{ messages }}", False)):
        (folder / "chat_template.jinja").write_text(template)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_tokenizer(folder)
        assert any("put {{ bos_token }} at its beginning" in str(w.message) for w in caught) == is_wrong


def test_tied_embeddings_stay_tied(tmp_path):
    model = small_model(1, tie_word_embeddings=True)
    model.tie_weights()
    folder = export_model(write_checkpoint(tmp_path / "checkpoint", model), tmp_path / "export")
    names = load_file(folder / "model.safetensors").keys()
    assert "gpt_neox.embed_in.weight" in names  # transformers 4 needs it
    assert "embed_out.weight" not in names
    exported = load_model(folder)
    assert exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    ids = torch.tensor([[*model.config.sink_token_ids, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits[:, 1:], model(ids[:, 1:]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ARMS)
def test_an_arm_that_plain_gpt_neox_does_not_support_is_an_error(tmp_path, kind):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_model(0, sink={"kind": kind}))
    with pytest.raises(ValueError, match=rf"checkpoint has sink\.kind '{kind}'.*only the kinds none and token"):
        export_model(checkpoint, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_only_an_empty_folder_becomes_an_export(checkpoint, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    export_model(checkpoint, folder)
    (folder / "README.md").write_text("an edited model card")
    before = files_in(tmp_path)
    other = make_checkpoint(tmp_path / "other", num_sinks=2)
    for source, output in ((checkpoint, folder), (other, folder), (checkpoint, checkpoint)):
        with pytest.raises(FileExistsError, match=f"{output.name} exists: choose another output folder, or delete it"):
            export_model(source, output)
    assert files_in(folder) == {path: data for path, data in before.items() if folder in path.parents}
    assert hidden_files(tmp_path) == []


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_filled_meanwhile_is_not_replaced(checkpoint, tmp_path, monkeypatch):
    def fill(*arguments):
        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "thesis.txt").write_text("years of work")

    monkeypatch.setattr("sinklm.checkpoints.export.write_sums", fill)
    with pytest.raises(OSError, match=r"cannot write the export to .*not empty"):
        export_model(checkpoint, tmp_path / "export")
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["thesis.txt"]
    assert hidden_files(tmp_path) == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_becomes_the_export(checkpoint, tmp_path, exists):
    (tmp_path / "link").symlink_to("disk/target")
    if exists:
        (tmp_path / "disk" / "target").mkdir(parents=True)
    assert export_model(checkpoint, tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert is_export(tmp_path / "disk" / "target")
    assert "# link\n" in (tmp_path / "link" / "README.md").read_text()
    assert hidden_files(tmp_path) == hidden_files(tmp_path / "disk") == []


def test_a_failure_midway_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sinklm.checkpoints.export._write_tokenizer", fails)
    with pytest.raises(OSError, match=rf"cannot write the export to {tmp_path}: .*No space left"):
        export_model(checkpoint, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert hidden_files(tmp_path) == []


@pytest.mark.parametrize("config", [None, "{", "[]", '{"model_type": "gpt_neox"}', '{"sink": {}}'])
def test_other_folders_are_no_exports(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert is_export(tmp_path) is False


def test_files_of_a_killed_export_are_deleted(checkpoint, tmp_path):
    stale = tmp_path / ".export.partial"
    stale.mkdir()
    (stale / "junk").write_text("half a model")
    folder = export_model(checkpoint, tmp_path / "export")
    assert is_export(folder)
    assert not (folder / "junk").exists()
    assert hidden_files(tmp_path) == []


def test_a_full_disk_is_one_clear_error(checkpoint, tmp_path, monkeypatch):
    """A limit on file sizes simulates a full disk: the configuration fits, the weights do not."""
    monkeypatch.setattr(sys, "argv", ["sinklm", "export", str(checkpoint), str(tmp_path / "export")])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"^error: cannot write the export to .*"):
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "export").exists()
    assert hidden_files(tmp_path) == []


def test_a_token_with_the_name_of_a_sink_is_an_error(checkpoint, tmp_path):
    tokenizer = small_tokenizer().from_str(small_tokenizer().to_str())
    tokenizer.add_tokens(["more", "<|sink|>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    taken, sink = tokenizer.token_to_id("<|sink|>"), load_model(checkpoint).config.sink_token_ids[0]
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json already has .*<\|sink\|> with the id {taken}, .* id {sink}:"
    ):
        export_model(checkpoint, tmp_path / "export")


def test_a_tokenizer_of_another_model_is_an_error(checkpoint, tmp_path):
    tokenizer = small_tokenizer().from_str(small_tokenizer().to_str())
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(ValueError, match="not the tokenizer that the model was trained with"):
        export_model(checkpoint, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("init_from", "source"),
    [
        ("EleutherAI/pythia-160m", "EleutherAI/pythia-160m"),
        ("/home/ada/vanilla", "a model in the folder vanilla"),
        ("runs/vanilla", "a model in the folder vanilla"),
        ("/home/ada/run/checkpoints/step-5", "a model in the folder run"),
    ],
)
@pytest.mark.parametrize("only_sinks", [False, True])
def test_the_model_card_names_the_model_that_a_run_started_from(init_from, source, only_sinks, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-200"
    make_checkpoint(checkpoint / "model")
    state = {"data_fingerprint": "", "world_size": 1, "zero_stage": 1, "precision": "fp32"}
    (checkpoint / "state.json").write_text(CheckpointState(step=200, positions=819_200, **state).to_json())
    settings = [f"model.init_from={init_from}", f"train.only_sinks={only_sinks}", "deepspeed.zero_stage=0"]
    settings += ["optimizer.weight_decay=0.0"]
    (checkpoint / "config.yaml").write_text(config_yaml(load_config("quickstart", settings)))
    seal(checkpoint)
    export_model(checkpoint, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| Started from the weights of | {source} |" in card
    assert ("| Trained | the embeddings of the sink tokens alone |" in card) == only_sinks
    assert ("| Trained | all weights |" in card) != only_sinks


@given(st.integers(0, 50))
def test_sinks_have_different_names(num_sinks):
    assert len(set(sink_names(num_sinks))) == num_sinks


def test_the_model_card_has_the_facts_of_the_run(tmp_path, capsys):
    places = [f"data.path={tmp_path / 'store'}", f"train.run_dir={tmp_path / 'run'}"]
    sizes = ["train.num_steps=300", "train.seq_length=256", "train.batch_size_tokens=4096"]
    config = load_config("quickstart", places + sizes)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-200"
    make_checkpoint(checkpoint / "model")
    texts = [{"text": f"word {i}", "meta": {"pile_set_name": name}} for name in ("Books", "Code") for i in range(90)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    store = prepare_here(tmp_path / "corpus.jsonl", tmp_path / "store", tokenizer=str(checkpoint / "model"))
    train = read_manifest(store).splits["train"]
    total, (most, least) = train.total.tokens, sorted(train.sets.items(), key=lambda item: -item[1].tokens)
    sets = ", ".join(f"{name} {counts.tokens / total:.1%}" for name, counts in (most, least))
    fingerprint = read_manifest(store).fingerprint
    state = {"data_fingerprint": fingerprint, "world_size": 1, "zero_stage": 1, "precision": "fp32"}
    (checkpoint / "state.json").write_text(CheckpointState(step=200, positions=819_200, **state).to_json())
    (checkpoint / "config.yaml").write_text(config_yaml(config))
    seal(checkpoint)
    records = [{"step": 190, "loss": 3.5}, {"step": 200, "validation_loss": 3.25}, {"step": 210, "loss": 0.5}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"st')
    environment = {
        "python": "3.11",
        "sinklm": {"version": "0.1.0", "commit": None},
        "torch": "2.13.0",
        "devices": "cpu",
    }
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))

    export(str(tmp_path / "run"), str(tmp_path / "my-model"))

    card = (tmp_path / "my-model" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    for fact in (
        "# my-model",
        "| Steps | 200 of 300 |",
        "| Positions seen, in this run | 819,200 (4,096 a step) |",
        "| Training loss | 3.5000 nats per token at step 190 |",
        "| Validation loss | 3.2500 nats per token |",
        f"| Training data | {total:,} tokens: {sets} |",
        "torch 2.13.0",
        "with a learnable sink token",
        "window=63",
    ):
        assert fact in card
    assert str(tmp_path) not in card  # a published card must not contain local paths
    assert "Started from" not in card
    said = "".join(capsys.readouterr().out.split())  # without the line breaks of rich
    assert "my-modelisaplainGPTNeoXForCausalLM" in said
    for name in ("config.yaml", "state.json"):
        text = (checkpoint / name).read_text()
        (checkpoint / name).write_text(text.replace("0", "1"))
        with pytest.raises(ValueError, match=rf"step-200 is damaged: {name} has another sha256"):
            export_model(tmp_path / "run", tmp_path / "again")
        (checkpoint / name).write_text(text)
    wrong = b'{"step": "1"}\n{"step": 1, "loss": "3"}\n\xff\n' + b"[" * 100_000
    (tmp_path / "run" / "metrics.jsonl").write_bytes(wrong)  # only its README needs it
    export_model(tmp_path / "run", tmp_path / "again")
    for path in (tmp_path / "run" / "environment.json", tmp_path / "store" / "manifest.json"):
        text = path.read_text()
        for damaged in ("{}", "[]", "{", "[" * 100_000):
            path.write_text(damaged)
            with pytest.raises(ValueError, match=rf"{path}(: damaged.*; copy or| is damaged.*: restore or)"):
                export_model(tmp_path / "run", tmp_path / "third")
        path.write_text(text)


def test_a_folder_of_the_root_is_no_checkpoint_of_a_run():
    assert list(run_facts(Path("/model"))) == ["Exported by"]


def hidden_files(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


@pytest.fixture(scope="module")
def windowed_checkpoint(tmp_path_factory) -> Path:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = small_model(1, layer_windows=[3, 3], rope_parameters=rope)
    return write_checkpoint(tmp_path_factory.mktemp("windowed") / "checkpoint", model)


@pytest.mark.parametrize("form", [[], ["--to", "gguf"], ["--to", "hub", "--dry-run"]], ids=str)
def test_windows_are_exported_as_full_attention_only_on_request(
    windowed_checkpoint, tmp_path, capsys, monkeypatch, form
):
    if "gguf" in form:
        pytest.importorskip("gguf")
    target, text = "me/name" if "hub" in form else str(tmp_path / "export"), tmp_path / "text"
    text.write_text(TEXT * 20, encoding="utf-8-sig")  # its byte order mark is not measured
    command = ["sinklm", "export", str(windowed_checkpoint), target, *form]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="which neither plain GPT-NeoX nor llama"):
        main()
    assert not (tmp_path / "export").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--full-attention", "--text", str(text)])
    cost = full_attention_cost(windowed_checkpoint, TEXT * 20)
    assert cost.full != pytest.approx(cost.windowed, abs=1e-3)
    with pytest.raises(SystemExit, match=r"^0$"), pytest.warns(UserWarning, match=re.escape(str(cost))):
        main()
    if "gguf" in form:
        trace = b'"layer_windows": [3, 3]'
        assert trace in (tmp_path / "export" / "model.gguf").read_bytes()
        return
    card = capsys.readouterr().out if "hub" in form else (tmp_path / "export" / "README.md").read_text()
    card = " ".join(card.split())
    assert (
        f"trained with a window of 3 in all layers with 1 kept token. Plain GPT-NeoX has none, so this copy {FULL}"
        in card
    )
    assert f"is {cost.full:.3f} nats per token, and {cost.windowed:.3f} with the windows that the model was" in card
    assert (
        f"({cost.full - cost.windowed:+z.3f} ± {cost.stderr:.3f}, one standard error over {cost.num_samples} " in card
    )
    assert "num_kept=1, window=3" in card


FULL = "has full attention in all layers"


def test_a_refused_export_measures_nothing(windowed_checkpoint, tmp_path, monkeypatch):
    """Refusals come before minutes of measuring."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(module_of_windows, "_sample_losses", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file.gguf").touch()
    for write in (export_model, export_gguf):
        with pytest.raises(FileExistsError):
            write(windowed_checkpoint, tmp_path / "full" / ("file.gguf" * (write is export_gguf)), full_attention=True)
    arm = write_checkpoint(tmp_path / "arm", small_model(0, layer_windows=[3, 3], sink={"kind": "zero"}))
    for write in (export_model, export_gguf):
        with pytest.raises(ValueError, match=r"has sink.kind 'zero'"):
            write(arm, tmp_path / "new", full_attention=True)
        with pytest.raises(ValueError, match="has 2 windowed layers, which neither"):
            write(windowed_checkpoint, tmp_path / "new")


@pytest.mark.parametrize(
    ("trained", "window", "samples"),
    [(128, 3, [127] * 128), (None, 3, [4095] * 4), (None, 3000, [5999] * 2), (None, 99_999, [65_535])],
)
def test_the_cost_is_measured_on_samples_of_limited_length(tmp_path, monkeypatch, trained, window, samples):
    config = {"layer_windows": [window, None], "max_position_embeddings": 65_536}
    checkpoint, measured = write_checkpoint(tmp_path / "model", small_model(1, **config)), []
    if trained is not None:
        for name, text in (("state.json", "{}"), ("config.yaml", f"train: {{seq_length: {trained}}}")):
            (tmp_path / name).write_text(text)

    def record(model, ids, length):
        measured.append([len(sample) for sample in ids.split(length)])
        return torch.zeros(len(samples)), torch.ones(len(samples))

    monkeypatch.setattr(module_of_windows, "_sample_losses", record)
    cost = full_attention_cost(checkpoint, "a b " * (sum(samples) + 1000))  # each word is a token or more
    assert (cost.num_tokens, cost.num_samples) == (sum(samples), len(samples))
    assert cost.stderr == (None if len(samples) == 1 else 0)
    assert str(cost).endswith("(+0.000)" if len(samples) == 1 else f"over {len(samples)} samples)")
    assert measured == [samples] * 2
    with pytest.raises(ValueError, match=r"the text has \d tokens, and the windows hide none of them: pass at least"):
        full_attention_cost(checkpoint, "a b")
    (tmp_path / "state.json").touch()
    for damaged in ("train: {}", "train: [", "[" * 100_000):
        (tmp_path / "config.yaml").write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.yaml is damaged \(.*\): restore it, or use another checkpoint"):
            full_attention_cost(checkpoint)


def test_the_standard_error_of_the_cost_is_that_of_samples_drawn_again():
    """Of many texts of ten samples, the costs vary as much as one text's samples predict."""
    losses, counts = torch.randn(2000, 10, dtype=torch.float64), torch.full((10,), 7.0, dtype=torch.float64)
    predicted = torch.tensor([module_of_windows._ratio_stderr(row, counts) for row in losses])
    assert predicted.square().mean().sqrt().item() == pytest.approx((losses.sum(1) / 70).std().item(), rel=0.05)
    unequal, sizes = torch.tensor([3.0, 12.0, 6.0]), torch.tensor([1.0, 4.0, 2.0])
    assert module_of_windows._ratio_stderr(unequal, sizes) == 0  # 3 for each token in all of them


def test_an_export_of_windows_computes_full_attention(windowed_checkpoint, tmp_path):
    with pytest.warns(UserWarning, match="with full attention, the loss on"):
        folder = export_model(windowed_checkpoint, tmp_path / "export", full_attention=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert not {"layer_windows", "num_kept", "window_range"} & config.keys()
    assert config["trained_windows"] == {"layer_windows": [3, 3], "num_kept": 1, "window_range": None}
    ours, plain, ids = (
        load_model(windowed_checkpoint),
        GPTNeoXForCausalLM.from_pretrained(folder).eval(),
        torch.arange(1, 20)[None],
    )
    sink = torch.tensor([ours.config.sink_token_ids])
    use_full_attention(ours.config)
    torch.testing.assert_close(
        ours(ids).logits, plain(torch.cat((sink, ids), dim=1)).logits[:, 1:], rtol=1e-4, atol=1e-4
    )
