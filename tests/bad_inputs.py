"""Bad inputs, and the message for each, as data. `test_bad_inputs` gives them to the commands."""

import os
from typing import NamedTuple

import torch

from .damages import (
    Damage,
    as_missing_shards,
    as_pickle,
    config,
    edit_tokens,
    recipe,
    regex,
    set_first,
    template,
    truncated,
    weights,
    with_code,
    with_index,
    with_tokenizer_code,
    write,
)


class Case(NamedTuple):
    """A bad input.

    Attributes:
        damage: changes the folder ``{model}``, a copy of a valid model, or makes other files in
            ``{here}``, the current folder.
        command: arguments of ``sinklm``.
        message: regular expression of the whole line after ``error:``.
        environment: environment variables.
    """

    name: str
    command: str
    message: str
    damage: Damage = lambda model: None
    environment: dict[str, str] | None = None


GENERATE = "generate {model} hi --max-new-tokens 2"
CHAT = "chat {model}"
TRAIN = "train pythia-14m --dry-run "
MINE = "train mine.yaml --dry-run"
EVAL = "eval streaming {model} --text text.txt "
RANKS = "start the run with deepspeed, torchrun or srun, or unset the variables for a single process"
SAME = "use the weights and the config.json of the same model"
DENSE = "gpt_neox.layers.0.attention.dense.weight"

MODELS = [
    Case("a missing folder", "generate ./no/where hi", r"\./no/where: no such folder; check the path"),
    Case("a mistyped folder", "generate modle hi", r"modle: no such folder; did you mean model\?"),
    Case("a mistyped text", "prepare txt.text -o s", r"txt\.text: no such file or folder; did you mean text\.txt\?"),
    Case(
        "an empty folder",
        "generate empty hi",
        r"empty contains neither a transformers model .*: check the path",
        lambda model: (model.parent / "empty").mkdir(),
    ),
    Case(
        "the folder of a model's folder",
        "generate . hi",
        r"\. contains neither .*: did you mean \./mine\?",
        lambda model: model.rename(model.parent / "mine"),
    ),
    Case("a file", "generate text.txt hi", r"text\.txt is a file: pass the folder of a run, a checkpoint or a model"),
    Case(
        "a file of llama.cpp",
        "generate a.gguf hi",
        r"a\.gguf is a file for llama\.cpp: pass the folder of a run, a checkpoint or a model",
        lambda model: (model.parent / "a.gguf").touch(),
    ),
    Case("a name with control characters", "generate /a\x1b[31m hi", r"/a\\x1b\[31m: no such folder; check the path"),
    Case(
        "a config that is not JSON",
        GENERATE,
        r".*config\.json is not JSON .*: copy it again .*",
        write("config.json", "{"),
    ),
    Case(
        "a binary config", GENERATE, r".*config\.json is not JSON .*: copy it again .*", write("config.json", b"\xff\0")
    ),
    Case("a nested config", GENERATE, r".*config\.json is not JSON .*too deeply.*", write("config.json", "[" * 10**5)),
    Case(
        "a huge config",
        GENERATE,
        r".*config\.json has 67,108,865 bytes, too many for such a file: copy the right file",
        lambda model: os.truncate(model / "config.json", 2**26 + 1),
    ),
    Case("a config that is a list", GENERATE, r".*config\.json is not a JSON object .*", write("config.json", "[]")),
    Case("an unknown type", GENERATE, r".*config\.json: .* no model_type 'x': use .*", config(model_type="x")),
    Case(
        "a type that is a list", GENERATE, r".*config\.json: .* no model_type \['x'\]: use .*", config(model_type=["x"])
    ),
    Case("foreign code", GENERATE, r".* no model_type 'evil': use .*; the code .* is never run", with_code),
    Case(
        "a kernel of the Hub",
        GENERATE,
        r".*config\.json asks for .*'a/b'.*never run: remove .*",
        config(_attn_implementation="a/b"),
    ),
    Case("no hidden size", GENERATE, r".*: hidden_size is 0: it must be a whole number .*", config(hidden_size=0)),
    Case(
        "a huge hidden size",
        GENERATE,
        r".*: hidden_size is 10+: it must be .* from 1 to 2,147,483,647",
        config(hidden_size=10**12),
    ),
    Case("a negative size", GENERATE, r".*: intermediate_size is -3: it must be .*", config(intermediate_size=-3)),
    Case("no heads", GENERATE, r".*: num_attention_heads is 0: it must be .*", config(num_attention_heads=0)),
    Case(
        "heads that do not divide",
        GENERATE,
        r".*config\.json is not .*not divisible.*; correct it.*",
        config(num_attention_heads=5),
    ),
    Case(
        "a billion layers",
        GENERATE,
        r".*: num_hidden_layers is 1000000000: it must be .*",
        config(num_hidden_layers=10**9),
    ),
    Case(
        "more layers than tensors",
        GENERATE,
        rf".*num_hidden_layers is 9000, but .* {SAME}",
        config(num_hidden_layers=9000),
    ),
    Case(
        "a layer too much",
        GENERATE,
        rf"the weights in .* lack gpt_neox\.layers\.2\..*: {SAME}",
        config(num_hidden_layers=3),
    ),
    Case(
        "a layer too few",
        GENERATE,
        rf"the weights in .* contain gpt_neox\.layers\.1\..*: {SAME}",
        config(num_hidden_layers=1),
    ),
    Case(
        "10,001 layers",
        GENERATE,
        r".*: num_hidden_layers is 10001: it must be a whole number from 1 to 10,000",
        config(num_hidden_layers=10_001),
    ),
    Case(
        "too many labels",
        GENERATE,
        r".*: num_labels is 1000001: it must be .* 1 to 1,000,000",
        config(num_labels=10**6 + 1),
    ),
    Case("half a size", GENERATE, r".*: hidden_size is 48\.5: it must be a whole number .*", config(hidden_size=48.5)),
    Case(
        "no size of another family",
        GENERATE,
        r".*: hidden_size is 0: it must be a whole number .*",
        write("config.json", '{"model_type": "gpt2", "n_embd": 0}'),
    ),
    Case(
        "heads of another family that do not divide",
        GENERATE,
        r".*: hidden_size 10 is not a multiple of num_attention_heads 3: correct one",
        write("config.json", '{"model_type": "gpt2", "n_embd": 10, "n_head": 3}'),
    ),
    Case(
        "an unknown activation",
        GENERATE,
        r".*: hidden_act is 'x': .* no such activation function",
        config(hidden_act="x"),
    ),
    Case(
        "two activations",
        GENERATE,
        r".*config\.json is not a valid configuration: .*hidden_act.* list .*; correct it, .*",
        config(hidden_act=["gelu", "relu"]),
    ),
    Case("a dtype of integers", GENERATE, r".*: dtype is 'int8': it must be float32, .*", config(dtype="int8")),
    Case("a dtype that does not exist", GENERATE, r".*: dtype is 'load': it must be float32, .*", config(dtype="load")),
    Case(
        "a dtype as Python prints it",
        GENERATE,
        r".*: dtype is 'torch\.float16': it must be float32, .*",
        config(dtype="torch.float16"),
    ),
    Case("a dtype that is a number", GENERATE, r".*: dtype is 16: it must be float32, .*", config(dtype=16)),
    Case(
        "a vocabulary of 10",
        GENERATE,
        r".*sink token ids 400…400 are outside .* 10: raise vocab_size .*",
        config(vocab_size=10),
    ),
    Case(
        "a billion sinks",
        GENERATE,
        r".*sink token ids 5…1000000004 are outside .*",
        config(sink={"kind": "token", "num_tokens": 10**9, "first_token_id": 5}),
    ),
    Case(
        "an infinite angle",
        GENERATE,
        r".*: rope_parameters\.rope_theta is inf: it must be a finite number above 0",
        config(rope_parameters={"rope_theta": float("inf")}),
    ),
    Case(
        "an angle in words",
        GENERATE,
        r".*: rope_parameters\.rope_theta is 'x': it must be .*",
        config(rope_parameters={"rope_theta": "x"}),
    ),
    Case(
        "an unknown kind of rotation",
        GENERATE,
        r".*: rope_parameters\.rope_type is 'x': it must be one of default, .*",
        config(rope_parameters={"rope_type": "x", "rope_theta": 10000.0}),
    ),
    *(
        Case(
            f"{part} of a head to rotate",
            GENERATE,
            rf".*: rope_parameters\.partial_rotary_factor is {part}: it must be a finite number above 0 and at most 1",
            config(rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": part}),
        )
        for part in (0, 1.5)
    ),
    Case(
        "a negative epsilon",
        GENERATE,
        r".*: layer_norm_eps is -1e-05: it must be .*, and an epsilon at least 0",
        config(layer_norm_eps=-1e-5),
    ),
    Case(
        "a NaN epsilon",
        GENERATE,
        r".*: layer_norm_eps is nan: it must be a finite number.*",
        config(layer_norm_eps=float("nan")),
    ),
    Case(
        "another shape",
        GENERATE,
        rf"the weights in .* shape \(48, 96\), but .* needs \(48, 97\): {SAME}",
        config(intermediate_size=97),
    ),
    Case("truncated weights", GENERATE, r"the weights in .* are damaged .*: copy them again.*", truncated),
    Case(
        "empty weights", GENERATE, r"the weights in .* are damaged .*: copy them again", write("model.safetensors", "")
    ),
    Case(
        "a huge header",
        GENERATE,
        r"the weights in .* are damaged .* length of 67,108,865 bytes, in a file of 134,217,728\): copy .*",
        lambda model: [
            write("model.safetensors", (2**26 + 1).to_bytes(8, "little"))(model),
            os.truncate(model / "model.safetensors", 2**27),
        ],
    ),
    Case(
        "a pointer of git LFS",
        GENERATE,
        r"the weights in .* are damaged .* pointer of Git LFS; run git lfs pull\): copy .*",
        write("model.safetensors", "version https://git-lfs"),
    ),
    Case("a missing tensor", GENERATE, rf"the weights in .* lack {DENSE}, .*: {SAME}", weights(lambda t: t.pop(DENSE))),
    Case(
        "a foreign tensor",
        GENERATE,
        rf"the weights in .* contain more, .*: {SAME}",
        weights(lambda t: t.update(more=torch.ones(2))),
    ),
    Case(
        "integer weights",
        GENERATE,
        rf"the weights in .* {DENSE} of type I32, .*: convert .*",
        weights(lambda t: t.update({DENSE: t[DENSE].int()})),
    ),
    Case(
        "missing shards",
        GENERATE,
        r".* has no model-00001-of-00001\.safetensors, .*: copy the missing file",
        as_missing_shards,
    ),
    Case(
        "an index without a table",
        GENERATE,
        r".*index\.json has no weight_map from tensors to files: copy it again from the model",
        with_index(["model.safetensors"]),
    ),
    Case(
        "an index with numbers",
        GENERATE,
        r".*index\.json has no weight_map from tensors to files: copy it again from the model",
        with_index({DENSE: 1, "more": "model.safetensors"}),
    ),
    Case(
        "an index of another folder's files",
        GENERATE,
        r".*index\.json names the file '\.\./x\.safetensors' outside of its folder: copy it again",
        with_index({DENSE: "../x.safetensors"}),
    ),
    Case("a pickle", GENERATE, r".* only as a pickle .* never read: convert them .*", as_pickle),
    Case("an adapter", GENERATE, r".* contains an adapter .*: merge it .*", write("adapter_config.json", "{}")),
    Case(
        "a bad generation config",
        GENERATE,
        r".*generation_config\.json is not JSON .*",
        write("generation_config.json", "{"),
    ),
    Case(
        "a tokenizer that is not JSON",
        GENERATE,
        r"cannot load a tokenizer from .*; copy the tokenizer files .*",
        write("tokenizer.json", "{"),
    ),
    Case(
        "foreign code of a tokenizer",
        GENERATE,
        r".*/model needs code that comes with it, which is never run: use a model and tokenizer of .*",
        with_tokenizer_code,
    ),
    Case(
        "a regex bomb",
        GENERATE,
        r"the tokenizer in .* fails on the text 'a+'….* retry-limit.*: copy .*",
        regex(r"(a+)+$"),
    ),
    Case(
        "a regex bomb that prepares a store",
        "prepare a.txt -o s --tokenizer {model} --processes 1",
        r"a\.txt: the tokenizer fails on this document \(.*retry-limit.*\): its tokenizer\.json is damaged, .*",
        lambda model: [regex(r"(a+)+$")(model), (model.parent / "a.txt").write_text("a" * 40 + "b")],
    ),
    Case(
        "a template that loops",
        CHAT,
        r"the chat template fails \(Range too big.*: correct it, or use .*",
        template("{% for i in range(10**9) %}{% endfor %}"),
    ),
    Case(
        "a template with an error",
        CHAT,
        r"the chat template fails \(Expected .*: correct it, or use .*",
        template("{% for %}"),
    ),
    Case(
        "a template that looks around",
        CHAT,
        r"the chat template fails \(access .*: correct it, or use .*",
        template("{{ ''.__class__.__mro__ }}"),
    ),
    Case(
        "an import of our own model", "import {model}", r".* with sink\.kind token: it needs no import; .*init_from=.*"
    ),
    Case("an import of nothing", "import ./no/where", r"(\./)?no/where: no such folder; check the path"),
    Case(
        "an import of an unknown sink", "import {model} --sink tokens", r"--sink tokens is not possible: choose one .*"
    ),
]
NOT_FINITE = [
    Case(
        f"{value} weights: {command}",
        command + " {model}" + rest,
        rf"the weights in .* are not finite \({DENSE} .*; use another",
        set_first(DENSE, value),
    )
    for command, rest in {
        "generate": " hi",
        "chat": "",
        "export": " out",
        "eval streaming": " --text text.txt",
        "eval stream-eval": "",
        "eval sinks": " --text text.txt",
        "eval zero-shot": "",
        "bench decode": "",
    }.items()
    for value in (float("nan"), float("inf"))
]
OVERFLOW = [  # finite weights, but logits that are not
    Case(
        f"infinite logits: {case.command}",
        case.command,
        r"the model's outputs are not finite: .*; use another",
        weights(lambda t: t["embed_out.weight"].fill_(3e38)),
    )
    for case in NOT_FINITE[::2]
    if not case.command.startswith(("export", "chat"))
]
RECIPES = [
    Case(
        "an infinite learning rate", TRAIN + "optimizer.lr=.inf", r"optimizer\.lr is inf: it should be a finite number"
    ),
    Case("a NaN learning rate", TRAIN + "optimizer.lr=.nan", r"optimizer\.lr is nan: it should be .*"),
    Case("an infinite clip", TRAIN + "optimizer.clip=.inf", r"optimizer\.clip is inf: it should be a finite number"),
    Case("an infinite epsilon", TRAIN + "optimizer.eps=.inf", r"optimizer\.eps is inf: it should be a finite number"),
    Case(
        "a beta of 1", TRAIN + "optimizer.betas=[0.9,1.0]", r"optimizer\.betas is \[0\.9, 1\.0\]: each value must be .*"
    ),
    Case(
        "an infinite theta", TRAIN + "model.rope_theta=.inf", r"model\.rope_theta is inf: it should be a finite number"
    ),
    Case(
        "steps without an end",
        TRAIN + "train.num_steps=1e30",
        r"train\.num_steps is 1e\+30: it should be a valid integer",
    ),
    Case(
        "too many steps", TRAIN + "train.num_steps=1" + "0" * 30, r"train\.num_steps is 10+: it should be less than .*"
    ),
    Case(
        "a vocabulary of 10^20",
        TRAIN + "model.vocab_size=1" + "0" * 20,
        r"model\.vocab_size is 10+: it should be less than .*",
    ),
    Case(
        "a billion layers of a recipe",
        TRAIN + "model.num_hidden_layers=1000000000",
        r"model\.num_hidden_layers is 10+: it should be less .*",
    ),
    Case("an empty folder name", TRAIN + "\"train.run_dir=''\"", r"train\.run_dir is '': .*at least 1 character"),
    Case(
        "a number for a section",
        TRAIN + "deepspeed.bf16=5",
        r"deepspeed: bf16 is 5: it is a section .* deepspeed\.bf16\.KEY=VALUE",
    ),
    Case(
        "a list for a section",
        TRAIN + "train=[1]",
        r"train: a list cannot replace a section with keys, .*: set its keys",
    ),
    Case(
        "a list for an inner section",
        TRAIN + "model.sink=[1]",
        r"model\.sink is \[1\]: it must be a section with keys, such as model\.sink\.kind",
    ),
    Case(
        "a number of 5000 digits",
        TRAIN + "optimizer.lr=" + "1" * 5000,
        r"optimizer\.lr: the value is not valid YAML .*",
    ),
    Case(
        "an interpolation of itself",
        TRAIN + "train.seed=${train.seed}",
        r"recipe pythia-14m: .*; correct the interpolation .*",
    ),
    Case(
        "a tag of Python", TRAIN + "train.seed=!!python/name:os.system", r"train\.seed: the value is not valid YAML .*"
    ),
    Case("no key", TRAIN + "=5", r"'=5' is not an override: write section\.key=value, .*"),
    Case(
        "a key of several lines",
        MINE,
        r"unknown key 'a\\nb': valid keys are .*",
        recipe('base: pythia-14m\n"a\\nb": 1\n'),
    ),
    Case(
        "a binary recipe",
        MINE,
        r"recipe mine\.yaml is not a text file in UTF-8 .*: pass a recipe",
        recipe(b"\x80\xff\0"),
    ),
    Case(
        "a deep recipe",
        MINE,
        r"recipe mine\.yaml is not valid YAML: it is nested too deeply",
        recipe("[" * 200_000),  # libyaml would crash
    ),
    Case(
        "a billion laughs",
        MINE,
        r"recipe mine\.yaml is not valid YAML: .* limit .*",
        recipe("".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 'x'}]\n" for i in range(9))),
    ),
    Case("a huge recipe", MINE, r"recipe mine\.yaml has 2,000,000 bytes: pass a recipe, .*", recipe("#" * 2_000_000)),
    Case(
        "initial weights that do not exist",
        TRAIN + "model.init_from=./no/where",
        r"model\.init_from=\./no/where: no such folder; check the path",
    ),
    Case(
        "initial weights of another size",
        TRAIN + "model.init_from={model}",
        r"model\.hidden_size is 128, .*, but model\.init_from=\S+ has .*: set model\.hidden_size=.*",
    ),
    Case("a recipe that does not exist", "train no.yaml", r"recipe no\.yaml: no such file; check the path"),
    Case(
        "a folder for a recipe",
        "train model.yaml",
        r"recipe model\.yaml: no such file; check the path",
        lambda model: (model.parent / "model.yaml").mkdir(),
    ),
]
OPTIONS = [
    Case(
        "an infinite temperature",
        GENERATE + " --temperature inf",
        r"--temperature is inf: it must be a finite number.*",
    ),
    Case("a NaN temperature", "chat {model} --temperature nan", r".*--temperature.*"),
    Case("a negative temperature", GENERATE + " --temperature -1", r".*'--temperature'.*; see sinklm generate --help"),
    Case("a seed of 23 digits", GENERATE + " --seed 1" + "0" * 23, r".*'--seed'.*; see sinklm generate --help"),
    Case("a negative seed", GENERATE + " --seed -1", r".*'--seed'.*; see sinklm generate --help"),
    Case("10^20 new tokens", GENERATE[:-1] + "1" + "0" * 20, r".*'--max-new-tokens'.*; see sinklm generate --help"),
    Case("a tiny penalty", GENERATE + " --repetition-penalty 1e-40", r".*'--repetition-penalty'.*; see .* --help"),
    Case("no probability", GENERATE + " --temperature 1 --top-p 0", r"--top-p is 0: it must be above 0; .*"),
    *(
        Case(f"the device {name}", GENERATE + f" --device {name}", rf"--device {name} is not available .*: use cpu.*")
        for name in ("meta", "hpu", "privateuseone", "nonsense")
    ),
    Case(
        "a cache of 10^11",
        GENERATE + " --cache 1+1" + "0" * 11,
        r"a cache of 1\+10+ tokens is too large: use at most .*",
    ),
    Case("a cache as a number", GENERATE + " --cache 1024", r"--cache: '1024' is not a cache: write kept tokens .*"),
    Case("an unknown option", "generate --nope", r"no such option --nope; see sinklm generate --help"),
    Case("an unknown command", "evaluate", r"no such command 'evaluate': did you mean eval\? See sinklm --help"),
    Case("an empty prompt", "generate {model} ''", r"the prompt is empty: pass at least one character"),
    Case(
        "the sink in a text",
        "generate {model} hi",
        r"the text contains the sink token with id 400, .*: remove it .*",
        lambda model: edit_tokens(model, {"hi": 400}),
    ),
    Case(
        "an id too large",
        "generate {model} hi",
        r"token id 999 is outside of the model's vocabulary of 408: use the tokenizer .*",
        lambda model: edit_tokens(model, {"hi": 999}),
    ),
    Case(
        "no text",
        "eval streaming {model} --text no.txt",
        r"--text no\.txt cannot be read: No such file or directory; pass a text file",
    ),
    Case(
        "a mistyped text of an evaluation",
        "eval streaming ./no/where --text txt.text",
        r"--text txt\.text cannot be read: No such file or directory; did you mean text\.txt\?",
    ),
    Case(
        "a mistyped method",
        "eval streaming ./no/where --text text.txt --methods stream",
        r"--methods contains 'stream': did you mean streaming\?",
    ),
    Case(
        "a mistyped set of questions",
        "eval stream-qa ./no/where --tasks arc_eazy",
        r"--tasks contains 'arc_eazy': did you mean arc_easy\?",
    ),
    Case(
        "a mistyped folder of benchmarks",
        "eval stream-qa ./no/where --data-dir modle",
        r"the folder modle does not exist: did you mean model\?",
    ),
    Case(
        "a mistyped tokenizer", "prepare text.txt -o s --tokenizer model/tokeniser.json", r".*did you mean model/tok.*"
    ),
    Case(
        "a tokenizer that does not exist",
        "prepare text.txt -o s --tokenizer ./no/where",
        r"tokenizer \./no/where: no such folder; check the path",
    ),
    Case("a mistyped run", "runs modle", r"modle: no such folder; did you mean model\?"),
    Case("a mistyped result", "eval compare modle model", r"modle: no such file or folder; did you mean model\?"),
    Case(
        "a folder for a text",
        "eval streaming {model} --text .",
        r"--text \. cannot be read: Is a directory; pass a text file",
    ),
    Case(
        "a device for a text",
        "eval streaming {model} --text /dev/zero",
        r"--text /dev/zero is a device: pass a text file",
    ),
    Case(
        "an empty text",
        "eval streaming {model} --text mine.yaml",
        r"mine\.yaml: 0 tokens, but 2 are needed: add a --text",
        recipe(""),
    ),
    Case(
        "a text in latin-1",
        "eval streaming {model} --text mine.yaml",
        r"mine\.yaml is not UTF-8 .*: convert it to UTF-8",
        recipe("é".encode("latin-1")),
    ),
    Case("a binary text", "eval sinks {model} --text mine.yaml", r"mine\.yaml contains NUL bytes, .*", recipe(b"a\0")),
    Case(
        "more tokens than text", EVAL + "--tokens 99999999999", r"text\.txt: \d+ tokens, but 99999999999 are needed: .*"
    ),
    Case("a cache without a window", EVAL + "--caches 4+", r"--caches: '4\+' is not a cache: write kept .*"),
    Case("a huge cache", EVAL + "--caches 0+99999999999", r"a cache of 0\+9+ tokens is too large: use at most .*"),
    Case(
        "a file for an output folder",
        EVAL + "--output text.txt",
        r"cannot write text\.txt/streaming\.json: Not a directory",
    ),
    Case(
        "a folder for an output file",
        EVAL + "--output {here}",
        r"cannot write .*streaming\.json: Is a directory",
        lambda model: (model.parent / "streaming.json").mkdir(),
    ),
    Case("a GGUF file beside another's", "export {model} text.txt --to gguf", r"cannot write text\.txt.*"),
    Case(
        "a model that llama.cpp does not compute",
        "export {model} out.gguf --to gguf",
        r".*model rotates 3 of the dimensions of a head \(rotary_pct\): llama.cpp rotates an odd number .*",
    ),
    Case(
        "a GGUF file without --to gguf",
        "export ./no/where out.gguf",
        r"out\.gguf would be .*: did you mean --to gguf\?",
    ),
    Case("a name of the Hub without owner", "export {model} mine --to hub --dry-run", ".*: write owner/name"),
    Case(
        "a text that is none",
        "export {model} out --full-attention --text mine.yaml",
        r"--text mine\.yaml is not UTF-8 .*: convert it to UTF-8",
        recipe("é".encode("latin-1")),
    ),
    Case(
        "a mistyped text of an export",
        "export {model} out --full-attention --text txt.text",
        r"--text txt\.text cannot be read: No such file or directory; did you mean text\.txt\?",
    ),
    Case("a device as text", "export {model} out --full-attention --text /dev/zero", ".* is not a file: pass a text.*"),
    Case("an output that cannot be made", "export {model} /proc/a/b", r"cannot write /proc/a/b: .*"),
    Case(
        "an output that is a file",
        "export {model} text.txt",
        r"text\.txt exists: choose another output folder, or delete it",
    ),
    Case(
        "a tokenizer in place of a folder",
        "tokenizer train text.txt --vocab-size 300 --output {here}",
        r"--output .* is a folder: pass the name of a file, .*",
    ),
    Case("a small vocabulary", "tokenizer train text.txt --vocab-size 257", r".*'--vocab-size'.*258.*; see .* --help"),
    Case(
        "too many sequences",
        "eval sinks {model} --text text.txt --num-sequences 99999999",
        r"text\.txt has \d+ tokens, but 99999999 sequences .*: use more text, .*",
    ),
    Case(
        "too many lines",
        "eval stream-eval {model} --num-samples 99999999",
        r"--num-samples 99999999 × --num-lines 1000 are more than .*: lower one of them",
    ),
    Case("a GPU that is not there", GENERATE + " --device cuda:99", r"--device cuda:99 is not available .*: use cpu.*"),
    Case("a device that does not exist", GENERATE + " --device gpu", r"--device gpu is not available .*: use cpu.*"),
    Case(
        "10^23 processes", "prepare text.txt -o s --processes 1" + "0" * 23, r".*'--processes'.*; see sinklm prepare.*"
    ),
    Case(
        "a vocabulary of 10^11",
        "tokenizer train text.txt --vocab-size 1" + "0" * 11,
        r".*'--vocab-size'.*; see sinklm tokenizer train --help",
    ),
    Case(
        "10^20 documents",
        "data generate recall -o r.jsonl --num-documents 1" + "0" * 20,
        r".*'--num-documents'.*; see sinklm data generate recall --help",
    ),
    Case("a negative distance", "eval stream-eval {model} --distances=-1", r"--distances contains -1: .*"),
    Case(
        "an unknown task",
        "eval zero-shot {model} --tasks nope --include-path {here}/no",
        r"the folder .*/no does not exist: check --include-path",
    ),
    Case(
        "a batch of -3",
        "eval zero-shot {model} --batch-size=-3",
        r"--batch-size is '-3': it must be a positive number or auto",
    ),
    Case(
        "a cache of nothing",
        "bench decode {model} --caches 0",
        r"--caches: '0' is not a cache: write kept tokens \+ window, such as 4\+1020; .*",
    ),
]
UNUSED = [  # options without effect are refused before a model is loaded: the folder ./no/where does not exist
    Case(f"without effect: {command}", command, message)
    for command, message in {
        "eval streaming ./no/where --text text.txt --caches 0+256,1+255 --methods streaming": r"--caches 0\+256 has no "
        r"effect without window or recompute in --methods: add one of them, or remove this cache",
        "eval streaming ./no/where --text text.txt --caches 1+255 --methods dense,window": r"--caches 1\+255 has no "
        r"effect without streaming or recompute in --methods: add one of them, or remove this cache",
        "eval streaming ./no/where --text text.txt --recompute-every 4": r"--recompute-every has no effect without "
        r"recompute in --methods: add this method, or leave the option out",
        "eval streaming ./no/where --text text.txt --memory 8x64 --methods dense,recompute": r"--memory has no effect "
        r"without window or streaming in --methods: add one of them, or leave the option out",
        "eval stream-qa ./no/where --caches 4+60 --methods one-shot,dense": r"--caches has no effect without stream in "
        r"--methods: add this method, or leave the option out",
        "generate ./no/where hi --temperature 0 --top-k 5 --min-p 0.1": r"--top-k and --min-p have no effect with "
        r"--temperature 0, which .*: leave it out, or raise --temperature",
        "generate ./no/where hi --temperature 0 --seed 3": r"--seed has no effect with --temperature 0, .*",
        "chat ./no/where --temperature 0 --top-p 0.9": r"--top-p has no effect with --temperature 0, .*",
        "export ./no/where out --private": r"--private has no effect without --to hub: add --to hub, or leave it out",
        "export ./no/where out --dry-run": r"--dry-run has no effect without --to hub: add --to hub, or leave it out",
        "export ./no/where out --text text.txt": r"--text has no effect without --full-attention: add it, or remove .*",
        "import ./no/where --seed 3": r"--seed has no effect without --sink-row random: add it, or leave out --seed",
        "import ./no/where --seed 3 --sink-row mean": r"--seed has no effect without --sink-row random: .*",
        "data inspect ./no/where --split validation": r"--split has no effect without --document, .*: add it, or .*",
        "eval zero-shot ./no/where --model-args logits_cache=False,logits_cache=True": r"--model-args has logits_cache "
        r"twice: keep one",
        "eval zero-shot ./no/where --tasks stream_eval --data-dir .": r"--data-dir has no effect, because no data "
        r"of stream_eval is from the Hub: leave it out",
        "train pythia-14m --trust-checkpoint checkpoint.resume=never": r"--trust-checkpoint has no effect with "
        r"checkpoint\.resume=never: leave out one of them",
    }.items()
]
ENVIRONMENTS = [
    Case(
        "a rank that is no number",
        TRAIN,
        rf"RANK is 'abc': it must be a whole number of at least 0; {RANKS}",
        environment={"RANK": "abc"},
    ),
    Case(
        "a Slurm rank that is no number",
        TRAIN,
        rf"SLURM_PROCID is 'x': it must be .*; {RANKS}",
        environment={"SLURM_PROCID": "x"},
    ),
    Case(
        "a negative rank",
        TRAIN,
        rf"RANK is '-1': it must be .*; {RANKS}",
        environment={"RANK": "-1", "WORLD_SIZE": "2"},
    ),
]


CASES = [*MODELS, *NOT_FINITE, *OVERFLOW, *RECIPES, *OPTIONS, *UNUSED, *ENVIRONMENTS]
