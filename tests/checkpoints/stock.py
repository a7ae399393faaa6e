"""Checks exports in an environment without sinklm: ``python stock.py [--train] FOLDER…``.

`tests.checkpoints.exports` writes the folders, each with the results of the checkpoint in
``expected.pt``. The suite runs this program with its transformers. `.ci/exports` does so with
others and with ``--train``, which also trains by LoRA (peft) and SFT (trl).
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, pipeline

sys.modules["sinklm"] = None  # type: ignore[assignment]  # any import of it fails
torch.set_num_threads(1)


def check(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(expected["text"], return_tensors="pt")
    assert inputs["input_ids"].tolist() == expected["ids"]
    with torch.no_grad():
        logits = model(inputs["input_ids"]).logits
    assert logits.dtype == expected["logits"].dtype
    num_sinks = len(expected["sinks"])
    torch.testing.assert_close(logits[:, num_sinks:], expected["logits"], rtol=0, atol=1e-5)

    generated = model.generate(**inputs, max_new_tokens=50, do_sample=False)  # as on docs/export.md
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == expected["generated"]
    check_chat(tokenizer, expected)
    if model.dtype == torch.float32 and num_sinks:  # in bfloat16, a batch of another size rounds differently
        check_batches(model, tokenizer, expected)


def check_chat(tokenizer: PreTrainedTokenizerBase, expected: dict) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids[: len(expected["sinks"])] == expected["sinks"]
    assert not set(expected["sinks"]) & set(ids[len(expected["sinks"]) :])


def check_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, expected: dict) -> None:
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
    options["clean_up_tokenization_spaces"] = False  # the pipeline's default removes spaces before punctuation
    for batch_size in (1, 3):
        outputs = generate(expected["texts"], batch_size=batch_size, **options)
        assert [output[0]["generated_text"] for output in outputs] == expected["continuations"]


def check_lora(folder: Path) -> None:
    """LoRA learns with the sink first, and saves a tokenizer and a model that still have it."""
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    expected = torch.load(folder / "expected.pt")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    before = model.get_input_embeddings().weight.detach().clone()
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"], r=2))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
    batch = tokenizer(expected["texts"], padding=True, return_tensors="pt")
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()][: len(expected["sinks"])].tolist() == expected["sinks"]
    for _ in range(2):
        adapted(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
    target = folder / "lora"
    adapted.save_pretrained(target)
    tokenizer.save_pretrained(target)
    merged = AutoPeftModelForCausalLM.from_pretrained(target).merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, before)
    inputs = AutoTokenizer.from_pretrained(target)(expected["text"], return_tensors="pt")
    assert inputs["input_ids"].tolist() == expected["ids"]
    with torch.no_grad():
        trained, changed = merged(**inputs).logits, adapted(**inputs).logits
    torch.testing.assert_close(trained, changed, rtol=0, atol=1e-4)
    made = merged.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert not set(made.tolist()) & set(expected["sinks"])


def check_sft(folder: Path) -> None:
    """SFT tokenizes texts and conversations with the sink first, once."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    expected = torch.load(folder / "expected.pt")
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    sets = {"text": [{"text": text} for text in expected["texts"]], "messages": [{"messages": talk}] * 3}
    for name, rows in sets.items():
        settings = SFTConfig(
            output_dir=str(folder / name),
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            processing_class=AutoTokenizer.from_pretrained(folder),
            args=settings,
            train_dataset=Dataset.from_list(rows),
        )
        for row in trainer.train_dataset:
            ids = row["input_ids"]
            assert ids[: len(expected["sinks"])] == expected["sinks"], (name, ids)
            assert not set(expected["sinks"]) & set(ids[len(expected["sinks"]) :]), (name, ids)
        trainer.train()
        trainer.save_model(str(folder / name))
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer(expected["text"])["input_ids"] == expected["ids"][0]


def main(*arguments: str) -> None:
    folders = [Path(argument) for argument in arguments if argument != "--train"]
    for folder in folders:
        check(folder)
    if "--train" in arguments:
        (folder,) = (folder for folder in folders if folder.name == "1-sinks-float32")
        check_lora(folder)
        check_sft(folder)
    print(f"transformers {transformers.__version__}: {len(folders)} exports are right")


if __name__ == "__main__":
    main(*sys.argv[1:])
