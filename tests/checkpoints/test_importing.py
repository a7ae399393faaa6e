"""An imported model computes what transformers computes, and differs in the sink's row only."""

import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.checksums import write_sums
from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.importing import import_model
from sinklm.checkpoints.sink_rows import start_sink_rows
from sinklm.checkpoints.warm_start import load_weights

from .hub_server import serve_model
from .pythia import FORMS, num_tokens, padded, put_in_cache, pythia_tokenizer, write_pythia

NAME = "EleutherAI/pythia-160m-seed3"
URL = "ADDRESS/{repo_id}/resolve/{revision}/{filename}"
TEXT = "The old man    went down\n\n\tto the sea"


@pytest.fixture(scope="module")
def pythia(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return write_pythia(tmp_path_factory.mktemp("hub") / "pythia")


@pytest.fixture
def theirs(pythia) -> GPTNeoXForCausalLM:
    return AutoModelForCausalLM.from_pretrained(pythia, dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_sink_the_logits_are_those_of_transformers(tmp_path, form):
    source = write_pythia(tmp_path / "source", form)
    imported = import_model(source, tmp_path / "imported", sink="none").folder
    safetensors = write_pythia_of(source, tmp_path)
    ids = load_tokenizer(imported)(TEXT, return_tensors="pt").input_ids
    assert ids.tolist() == AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt").input_ids.tolist()
    for implementation in ("eager", "sdpa"):
        plain = GPTNeoXForCausalLM.from_pretrained(
            safetensors, dtype=torch.float32, attn_implementation=implementation
        ).eval()
        ours = load_model(imported, dtype=torch.float32, device="cpu")
        ours.set_attn_implementation(implementation)
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, plain(ids).logits)
    assert load_model(imported, dtype="auto", device="cpu").dtype == torch.float16


def write_pythia_of(source: Path, tmp_path: Path) -> Path:
    """The same model as safetensors, written by transformers, which also reads pickles."""
    folder = tmp_path / "safetensors"
    GPTNeoXForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(folder)
    return folder


def test_with_a_sink_token_only_its_row_differs(pythia, theirs, tmp_path):
    imported = import_model(pythia, tmp_path / "imported")
    ours = load_model(imported.folder, dtype=torch.float32, device="cpu")
    sink = num_tokens()
    assert (ours.config.sink_token_ids, imported.num_new_rows) == ([sink], 0)
    assert ours.config.vocab_size == theirs.config.vocab_size == padded(sink)
    before, after = theirs.state_dict(), ours.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        rows = (after[name] != weight).reshape(len(weight), -1).any(dim=1).nonzero().flatten().tolist()
        assert rows == ([sink] if name == "gpt_neox.embed_in.weight" else []), name

    with torch.no_grad():
        theirs.gpt_neox.embed_in.weight[sink] = before["gpt_neox.embed_in.weight"][:sink].mean(dim=0).half().float()
        ids = torch.tensor([[5, 7, 300, 2]])
        expected = theirs.eval()(torch.cat([torch.tensor([[sink]]), ids], dim=1)).logits[:, 1:]
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row", ["mean", "endoftext", "random"])
def test_the_row_of_the_sink_is_the_one_asked_for(pythia, theirs, tmp_path, row):
    sink = num_tokens()
    weight = theirs.gpt_neox.embed_in.weight
    first, again, other = (
        load_model(import_model(pythia, tmp_path / str(i), sink_row=row, seed=seed).folder, dtype=torch.float32)
        .get_input_embeddings()
        .weight[sink]
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (row != "random")
    if row == "random":
        assert 0.5 < first.std() / (2 / (5 * len(first))) ** 0.5 < 1.5
    else:
        expected = weight[0] if row == "endoftext" else weight[:sink].double().mean(dim=0)
        torch.testing.assert_close(first, expected.float(), rtol=1e-3, atol=1e-5)


def test_random_rows_have_the_size_of_those_of_a_new_model():
    embedding = torch.nn.Embedding(4, 20_000)
    before = embedding.weight.detach().clone()
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    start_sink_rows(model, [1, 3], "random", seed=0)
    assert torch.equal(embedding.weight[[0, 2]], before[[0, 2]])
    drawn = embedding.weight.detach()[[1, 3]]
    assert drawn.std(dim=1).tolist() == pytest.approx([(2 / (5 * 20_000)) ** 0.5] * 2, rel=0.03)
    assert drawn.mean(dim=1).abs().max() < 5 * (2 / 5) ** 0.5 / 20_000
    assert abs(torch.corrcoef(drawn)[0, 1]) < 0.05


def test_an_embedding_without_an_unused_row_grows(tmp_path):
    size = num_tokens()
    source = write_pythia(tmp_path / "source", vocab_size=size)
    imported = import_model(source, tmp_path / "imported")
    assert imported.num_new_rows == padded(size + 1) - size
    assert f"have {imported.num_new_rows} unused rows more" in " ".join(
        (imported.folder / "README.md").read_text().split()
    )
    ours = load_model(imported.folder, dtype=torch.float32, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name][: len(weight)], weight), name
    head = ours.get_output_embeddings().weight
    torch.testing.assert_close(head[size], head[:size].mean(dim=0), rtol=1e-2, atol=1e-4)
    without = import_model(source, tmp_path / "none", sink="none")
    assert (without.num_new_rows, without.config.vocab_size) == (0, size)


@pytest.mark.parametrize("sink", ["zero", "logit", "kv_bias"])
def test_other_sinks_start_with_a_column_of_score_0(pythia, theirs, tmp_path, sink):
    ours = load_model(import_model(pythia, tmp_path / sink, sink=sink).folder, dtype=torch.float32, device="cpu")
    assert ours.config.sink_kind == sink
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    added = {name: weight for name, weight in ours.state_dict().items() if name not in theirs.state_dict()}
    assert bool(added) == (sink != "zero")
    assert not any(weight.any() for weight in added.values())


def test_settings_that_recipes_have_no_key_for_are_kept(tmp_path):
    settings = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "rotary_emb_base": 500, "rotary_pct": 0.5}
    source = write_pythia(tmp_path / "source", **settings, use_parallel_residual=False)
    ours = load_model(import_model(source, tmp_path / "imported", sink="none").folder, dtype=torch.float32)
    plain = GPTNeoXForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    default = AutoConfig.from_pretrained(import_model(write_pythia(tmp_path / "other"), tmp_path / "default").folder)
    with pytest.raises(ValueError, match=r"model\.parallel_residual is True, .*, but model\.init_from=.* has False"):
        load_weights(tmp_path / "imported", default)
    source = write_pythia(tmp_path / "new", hidden_act="gelu_new")
    with pytest.raises(ValueError, match=r"model\.init_from=.*new has hidden_act 'gelu_new', for which recipes"):
        load_weights(source, default)
    source = write_pythia(tmp_path / "rope", rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match=r"model\.init_from=.*rope has rope_type 'linear', for which recipes"):
        load_weights(source, default)


def test_an_import_is_a_model_folder_with_checksums(pythia, tmp_path):
    imported = import_model(pythia, tmp_path / "imported")
    folder, sink = imported.folder, num_tokens()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.token_to_id("<|sink|>") == sink
    assert tokenizer.encode(TEXT).ids == pythia_tokenizer().encode(TEXT).ids
    assert f"token {sink} is the mean of those of all tokens" in (folder / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported"]
    exported = export_model(folder, tmp_path / "export")
    assert AutoTokenizer.from_pretrained(exported)(TEXT).input_ids[0] == sink
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: model\.safetensors has another sha256"):
        load_model(folder)


# -- the Hub ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub; `conftest` sets HF_HUB_OFFLINE."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("form", ["safetensors", "sharded pickle"])
def test_a_name_and_a_revision_are_read_from_the_cache_of_the_hub(cache, tmp_path, form):
    for commit, revision in (("a" * 40, "main"), ("b" * 40, "step3000")):
        put_in_cache(write_pythia(tmp_path / revision, form), cache, NAME, revision, commit)
    newest = import_model(NAME, tmp_path / "newest", sink="none")
    early = import_model(NAME, tmp_path / "early", sink="none", revision="step3000")
    assert (newest.commit, early.commit) == ("a" * 40, "b" * 40)
    assert f"{NAME}@step3000 (commit {'b' * 40})" in (early.folder / "README.md").read_text()
    for imported, revision in ((newest, "main"), (early, "step3000")):
        source = GPTNeoXForCausalLM.from_pretrained(tmp_path / revision, dtype="auto")
        ours = load_model(imported.folder, dtype="auto", device="cpu").state_dict()
        assert all(torch.equal(ours[name], weight) for name, weight in source.state_dict().items())


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            NAME,
            "step3",
            rf"{NAME}: no such folder, and the cache .* no model of this name at revision step3: check",
        ),
        ("EleutherAI/pythia-16m", None, r"the cache of the Hugging Face Hub has no model of this name: check"),
        ("no folder", None, r"no folder: no such folder; check the path"),
        ("./no-folder", None, "no such folder"),
    ],
)
def test_what_is_not_there_is_an_error_of_one_line(cache, tmp_path, pythia, name, revision, message):
    put_in_cache(pythia, cache, NAME, "main", "a" * 40)
    with pytest.raises(FileNotFoundError, match=message) as raised:
        import_model(name, tmp_path / "imported", revision=revision)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "imported").exists()


@pytest.fixture(params=["pickle", "safetensors and pickle"])
def online(cache, tmp_path, monkeypatch, request):
    """Make `huggingface_hub` ask a server on this machine. Yields the files that it downloads."""
    source = write_pythia(tmp_path / "source", "pickle")
    if request.param != "pickle":
        shutil.copy(write_pythia(tmp_path / "other") / "model.safetensors", source)
    with serve_model(source, NAME, ["step3000"], "c" * 40) as (address, downloaded):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", URL.replace("ADDRESS", address))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield downloaded


def test_a_revision_is_downloaded_from_one_commit(online, tmp_path):
    imported = import_model(NAME, tmp_path / "imported", revision="step3000")
    assert imported.commit == "c" * 40
    has_safetensors = (tmp_path / "source" / "model.safetensors").exists()
    weights = [name for name in online if "model" in name]
    assert weights == ["model.safetensors" if has_safetensors else "pytorch_model.bin"]
    assert "special_tokens_map.json" not in online  # not used
    with pytest.raises(FileNotFoundError, match=rf"{NAME} has no revision 'step3001': Pythia's are step0, step1"):
        import_model(NAME, tmp_path / "none", revision="step3001")


# -- what is refused -------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_pythia(tmp_path / "source", "pickle")
    torch.save({"gpt_neox.embed_in.weight": Code()}, source / "pytorch_model.bin")
    for content in (
        None,
        pickle.dumps(Code(), protocol=2),
        b"",
        (source / "pytorch_model.bin").read_bytes()[:-90],
    ):
        if content is not None:
            (source / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin (is damaged|cannot be read safely)") as raised:
            import_model(source, tmp_path / "imported")
        assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "ran").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncated_index(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def edit_pickle(folder: Path, name: object = "gpt_neox.embed_in.weight", change=lambda weight: weight) -> None:
    """Change a tensor, and store it under ``name``."""
    state = torch.load(folder / "pytorch_model.bin")
    state[name] = change(state.pop("gpt_neox.embed_in.weight").float())
    torch.save(state, folder / "pytorch_model.bin")


def quantized(weight: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


NOT_ORDINARY = r"source/pytorch_model\.bin contains something other than ordinary tensors with names: "
OF_SOURCE = "the weights in .*/source "  # not in the temporary folder of the conversion
PICKLES = {
    "an integer key": (lambda folder: edit_pickle(folder, name=1), NOT_ORDINARY + "1;"),
    "no tensor": (lambda folder: edit_pickle(folder, change=lambda weight: 1), NOT_ORDINARY + "'gpt_neox"),
    "sparse": (lambda folder: edit_pickle(folder, change=torch.Tensor.to_sparse), NOT_ORDINARY + "'gpt_neox"),
    "meta": (lambda folder: edit_pickle(folder, change=lambda weight: weight.to("meta")), NOT_ORDINARY + "'gpt_neox"),
    "quantized": (lambda folder: edit_pickle(folder, change=quantized), NOT_ORDINARY + "'gpt_neox"),
    "a list": (
        lambda folder: torch.save([1], folder / "pytorch_model.bin"),
        r"model\.bin contains a list, not tensors",
    ),
    "NaN": (lambda folder: edit_pickle(folder, change=lambda weight: weight / 0), OF_SOURCE + "are not finite"),
    "int8": (lambda folder: edit_pickle(folder, change=torch.Tensor.char), OF_SOURCE + ".* of type I8"),
    "a pointer": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        r"source/pytorch_model\.bin is a pointer of Git LFS, .*: run git lfs pull",
    ),
    "lists in an index": (
        lambda folder: (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": ["b"]}}'),
        r"source/pytorch_model\.bin\.index\.json has no weight_map",
    ),
}


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_something_else_is_an_error_that_names_it(tmp_path, name):
    source = write_pythia(tmp_path / "source", "pickle")
    change, message = PICKLES[name]
    change(source)
    with pytest.raises(ValueError, match=message) as raised:
        import_model(source, tmp_path / "imported")
    assert ".partial" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("decoder", [5, [1, 2]])
def test_a_wrong_added_tokens_decoder_is_an_error_that_names_the_file(tmp_path, decoder):
    source = write_pythia(tmp_path / "source")
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": decoder}))
    with pytest.raises(ValueError, match=r"source/tokenizer_config\.json: added_tokens_decoder is not an object"):
        import_model(source, tmp_path / "imported")


def test_a_tokenizer_that_has_a_sink_is_an_error_that_says_so(tmp_path):
    source = write_pythia(tmp_path / "source")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|sink|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json already has the token <\|sink\|> with the id {num_tokens()},"
    ):
        import_model(source, tmp_path / "imported")


def test_a_link_stays_and_its_target_becomes_the_import(pythia, tmp_path):
    (tmp_path / "link").symlink_to("target")
    assert import_model(pythia, tmp_path / "link").folder == tmp_path / "link"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
    assert (tmp_path / "link").is_symlink()
    load_tokenizer(tmp_path / "target")


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("safetensors", lambda folder: edit_config(folder, tie_word_embeddings=True), "shares one matrix"),
        (
            "safetensors",
            lambda folder: edit_config(folder, eos_token_id=[0, 1]),
            r"eos_token_id in .* is \[0, 1\]: set",
        ),
        ("safetensors", lambda folder: edit_config(folder, model_type="llama"), "has model type llama: use a GPT-NeoX"),
        ("safetensors", lambda folder: edit_config(folder, num_hidden_layers=1), "which the model of its config"),
        ("safetensors", lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        ("safetensors", lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        ("sharded pickle", lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink(), "copy the missing"),
        ("sharded pickle", truncated_index, "has no weight_map"),
        ("safetensors", lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "are damaged"),
    ],
)
def test_a_wrong_folder_is_an_error_that_leaves_nothing(tmp_path, form, change, message):
    source = write_pythia(tmp_path / "source", form)
    change(source)
    with pytest.raises((ValueError, OSError), match=message):
        import_model(source, tmp_path / "imported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_token_that_only_another_file_has_is_not_taken_for_a_sink(tmp_path):
    source = write_pythia(tmp_path / "source")
    path, token = source / "tokenizer_config.json", num_tokens()
    added = {"content": "<|im_start|>", "special": True, "normalized": False}
    decoder = {"added_tokens_decoder": {str(token): added | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)}}
    path.write_text(json.dumps(json.loads(path.read_text()) | decoder))
    with pytest.raises(ValueError, match=rf"tokenizer\.json lacks the token {token}, which tokenizer_config"):
        import_model(source, tmp_path / "imported")


@pytest.mark.parametrize("form", FORMS)
def test_a_source_that_differs_from_its_checksums_is_refused(tmp_path, form):
    source = write_pythia(tmp_path / "source", form)
    write_sums(source)
    import_model(source, tmp_path / "intact")
    weights = max(source.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=f"source is damaged: {re.escape(weights.name)} has another sha256"):
        import_model(source, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    source = write_pythia(tmp_path / "source", vocab_size=num_tokens() - 1)
    with pytest.raises(ValueError, match=rf"has {num_tokens() - 1} rows in its embedding, but its tokenizer"):
        import_model(source, tmp_path / "imported")


def test_wrong_arguments_are_refused(pythia, tmp_path):
    imported = import_model(pythia, tmp_path / "imported").folder
    exported = export_model(imported, tmp_path / "export")
    for source in (imported, exported):
        with pytest.raises(ValueError, match=r"sink\.kind token: it needs no import; .*model\.init_from="):
            import_model(source, tmp_path / "other")
    without_sink = import_model(pythia, tmp_path / "without", sink="none").folder
    with pytest.raises(ValueError, match=r"sink\.kind none: it needs no import"):
        import_model(without_sink, tmp_path / "other")
    with pytest.raises(FileExistsError, match="imported exists: choose another output folder, or delete it"):
        import_model(pythia, imported)
    with pytest.raises(ValueError, match=r"gate is not possible: .*choose one of token, none, zero"):
        import_model(pythia, tmp_path / "other", sink="gate")
    with pytest.raises(ValueError, match="--sink-row is 'zero': choose one of mean, endoftext, random"):
        import_model(pythia, tmp_path / "other", sink_row="zero")
    with pytest.raises(ValueError, match="--sink-row mean is for a sink token, but --sink is none"):
        import_model(pythia, tmp_path / "other", sink="none", sink_row="mean")
    with pytest.raises(ValueError, match=re.escape("which has no revision 'step3000': leave --revision out")):
        import_model(pythia, tmp_path / "other", revision="step3000")
    assert not (tmp_path / "other").exists()


# -- model.init_from reads the same ----------------------------------------------------------------


def test_init_from_starts_a_new_sink_as_an_import_does(pythia, tmp_path):
    imported = import_model(pythia, tmp_path / "imported")
    direct, through = (load_weights(source, imported.config).state_dict() for source in (pythia, imported.folder))
    for name in direct:
        torch.testing.assert_close(direct[name], through[name], rtol=1e-3, atol=1e-5)
    exported = load_weights(export_model(imported.folder, tmp_path / "export"), imported.config).state_dict()
    assert all(torch.equal(exported[name], through[name]) for name in through)


def test_init_from_adds_a_second_sink_and_refuses_other_ids(pythia, tmp_path):
    imported = import_model(pythia, tmp_path / "imported")
    sink = num_tokens()
    config = AutoConfig.from_pretrained(imported.folder)
    config.sink = config.sink | {"num_tokens": 2}
    one = load_model(imported.folder, dtype=torch.float32).get_input_embeddings().weight
    two = load_weights(imported.folder, config).get_input_embeddings().weight
    fresh = load_weights(pythia, config).get_input_embeddings().weight
    assert torch.equal(two[sink], one[sink])
    assert not torch.equal(fresh[sink], fresh[sink + 1])
    config.sink = config.sink | {"first_token_id": sink + 1}
    with pytest.raises(ValueError, match=rf"its first sink token at id {sink}, but .* is {sink + 1}: prepare the data"):
        load_weights(imported.folder, config)
