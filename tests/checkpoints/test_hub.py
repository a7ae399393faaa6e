"""An export is published on the Hub: the same files, in one commit, and nothing of others lost."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.hub import describe_publication, publish
from sinklm.cli.export import Form, export

from ..eval.checkpoints import small_model, write_checkpoint
from . import fake_hub

NAME = "me/my-model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", small_model(1))


@pytest.fixture
def hub(monkeypatch) -> Iterator[fake_hub.FakeHub]:
    with fake_hub.running() as server:
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr("sinklm.checkpoints.hub.HfApi", lambda: huggingface_hub.HfApi(server.url, token="hf_x"))
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("private", [True, False])
def test_the_repository_has_the_files_of_an_export(hub, checkpoint, tmp_path, private):
    url = publish(checkpoint, NAME, private=private)
    assert url.startswith(f"{hub.url}/{NAME}/commit/")
    repository = hub.repositories[NAME]
    assert repository.private is private
    expected = contents(export_model(checkpoint, tmp_path / "export", name=NAME))
    assert repository.files == {".gitattributes": b"*"} | expected
    assert f'from_pretrained("{NAME}")' in repository.files["README.md"].decode()
    assert hub.commits == 1


def test_an_export_is_published_as_it_is_under_its_new_name(hub, checkpoint, tmp_path):
    folder = export_model(checkpoint, tmp_path / "export")
    (folder / "thoughts.txt").write_text("not to be published")
    publish(folder, NAME)
    published, local = hub.repositories[NAME].files, contents(folder)
    assert published.keys() - {".gitattributes"} == local.keys() - {"thoughts.txt"}
    assert all(published[name] == data for name, data in local.items() if name not in ("README.md", "thoughts.txt"))
    assert published["README.md"] == local["README.md"].replace(b'_pretrained("export"', b'_pretrained("me/my-model"')
    assert b'from_pretrained("me/my-model")' in published["README.md"]


def test_an_older_export_is_replaced_and_its_other_files_stay(hub, checkpoint):
    publish(checkpoint, NAME)
    files = hub.repositories[NAME].files
    files |= {"model-00001-of-00002.safetensors": b"old", "picture.png": b"of the card", "chat_template.jinja": b""}
    publish(checkpoint, NAME)
    assert "picture.png" in files
    assert not {"model-00001-of-00002.safetensors", "chat_template.jinja"} & set(files)
    assert {"model.safetensors", "config.json", "README.md"} <= set(files)


def test_a_repository_of_others_is_not_changed(hub, checkpoint):
    foreign = fake_hub.Repository(False, {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"precious"})
    hub.repositories[NAME] = foreign
    before = dict(foreign.files)
    with pytest.raises(FileExistsError, match=f"{NAME} exists and is not an export of sinklm"):
        publish(checkpoint, NAME)
    assert foreign.files == before
    assert hub.commits == 0


def test_a_public_repository_is_not_taken_for_a_private_one(hub, checkpoint):
    hub.repositories[NAME] = fake_hub.Repository(False, {".gitattributes": b"*"})
    with pytest.raises(ValueError, match=f"{NAME} exists and is public: make it private"):
        publish(checkpoint, NAME, private=True)
    assert hub.commits == 0


def test_an_error_of_the_hub_is_one_line_that_names_the_repository(hub, checkpoint):
    hub.fails = True
    with pytest.raises(OSError, match=f"^cannot upload to {NAME}: .*no space left for this account") as error:
        publish(checkpoint, NAME)
    assert "\n" not in str(error.value)


def test_without_a_login_nothing_is_exported(checkpoint, monkeypatch):
    monkeypatch.setattr("sinklm.checkpoints.hub.get_token", lambda: None)
    monkeypatch.setattr("sinklm.checkpoints.hub.export_model", lambda *a, **k: pytest.fail("exported"))
    with pytest.raises(ValueError, match=r"nobody is logged in .*: run hf auth login, or set HF_TOKEN"):
        publish(checkpoint, NAME)


@pytest.mark.parametrize("name", ["my-model", "a/b/c", "me/my model", "./me/model", ""])
def test_another_name_is_refused(checkpoint, name):
    with pytest.raises(ValueError, match="is not a name on the Hub"):
        publish(checkpoint, name)


def test_a_dry_run_shows_files_sizes_repository_and_card_without_the_hub(checkpoint, tmp_path, capsys):
    publication = describe_publication(checkpoint, NAME)
    expected = contents(export_model(checkpoint, tmp_path / "export", name=NAME))
    assert publication.files == {name: len(data) for name, data in expected.items()}
    export(str(checkpoint), NAME, to=Form.HUB, private=True, dry_run=True, quiet=True)
    said = capsys.readouterr().out
    assert f"Would upload to {NAME} (a new repository would be private)" in said
    assert f"{sum(publication.files.values()):,} bytes" in said
    assert expected["README.md"].decode() in said
    assert all(name in said for name in publication.files)


def test_another_data_type_is_published(checkpoint, tmp_path):
    publication = describe_publication(checkpoint, NAME, dtype="bfloat16")
    export_folder = export_model(checkpoint, tmp_path / "export", name=NAME, dtype="bfloat16")
    assert publication.files == {name: len(data) for name, data in contents(export_folder).items()}
    with pytest.raises(ValueError, match="is an export, which is uploaded as it is: leave out --dtype, or pass"):
        describe_publication(export_folder, NAME, dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": Form.HF, "dry_run": True}, "--dry-run has no effect without --to hub"),
        (
            {"to": Form.GGUF, "private": True, "dry_run": True},
            "--private and --dry-run have no effect without --to hub",
        ),
    ],
)
def test_options_of_another_form_are_refused(checkpoint, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(str(checkpoint), str(tmp_path / "x"), **options)
