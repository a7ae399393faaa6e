"""Windows in a run: the pattern of the layers, and the window that each step draws."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinklm.models.cost import flops_per_token
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.summary import attention_notes, describe_model, epochs
from sinklm.train.windows import layer_kinds, window_of_step

from ..checkpoints.seal import seal
from .plain import plain_training
from .tiny import assert_same_weights, copy_checkpoint, losses, metrics, weights

WINDOWS = ["model.attention.pattern=window", "model.attention.window=[2,20]"]
RANGES = st.integers(1, 5000).flatmap(lambda low: st.tuples(st.just(low), st.integers(low + 1, 10_000)))


def plan(*overrides: str) -> Plan:
    return Plan(load_config("quickstart", overrides), world_size=1, tokenizer_size=300)


@given(num_windowed=st.integers(1, 5), num_full=st.integers(1, 5), num_layers=st.integers(1, 40))
def test_a_ratio_repeats_over_the_layers(num_windowed, num_full, num_layers):
    kinds = layer_kinds(f"{num_windowed}:{num_full}", num_layers)
    period = num_windowed * ["window"] + num_full * ["full"]
    assert kinds == (period * num_layers)[:num_layers]


def test_a_ratio_is_read_with_and_without_quotes():
    for text in ("3:1", "60:1", "1:59"):  # to the base 60, numbers in YAML 1.1
        for written in (text, f"'{text}'"):
            config = load_config("quickstart", [f"model.attention.pattern={written}", "model.attention.window=9"])
            assert config.model.attention.pattern == text
            assert config.model.layer_windows[1] == (None if text == "1:59" else 9)


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(1, 10**15), limits=RANGES)
def test_a_drawn_window_is_in_its_range_and_depends_on_seed_and_step_alone(seed, step, limits):
    window = window_of_step(seed, step, *limits)
    assert limits[0] <= window <= limits[1]
    assert window == window_of_step(seed, step, *limits)


def test_drawn_windows_are_these_so_that_runs_of_older_versions_resume():
    drawn = [window_of_step(1234, step, 32, 2047) for step in range(1, 9)]
    assert drawn == [99, 1360, 47, 69, 71, 89, 1138, 360]


@pytest.mark.parametrize(("low", "high"), [(32, 2047), (1, 3), (7, 1000)])
def test_drawn_windows_are_log_uniform(low, high):
    num_steps = 20_000
    drawn = [window_of_step(5, step, low, high) for step in range(1, num_steps + 1)]
    for middle in (low, low + 1, round(math.sqrt(low * high)), high - 1):
        share = math.log((middle + 1) / low) / math.log((high + 1) / low)
        deviation = math.sqrt(share * (1 - share) / num_steps)
        assert sum(window <= middle for window in drawn) / num_steps == pytest.approx(share, abs=5 * deviation)


def test_the_model_has_the_largest_window():
    fixed = plan("model.attention.pattern=1:1", "model.attention.window=9", "model.attention.num_kept=4").model_config
    assert (fixed.layer_windows, fixed.num_kept, fixed.window_range) == ([9, None, 9, None], 4, None)
    drawn = plan(*WINDOWS).model_config
    assert (drawn.layer_windows, drawn.num_kept, drawn.window_range) == ([20] * 4, 1, [2, 20])
    assert plan().model_config.layer_windows is None


def test_operations_count_the_keys_in_the_windows():
    full, hybrid, drawn = plan(), plan("model.attention.pattern=3:1", "model.attention.window=9"), plan(*WINDOWS)
    fewer = 12 * 128 * 3 * (256 - 11)  # in three layers a query has 1 + 9 + 1 keys
    assert hybrid.flops_per_token() == flops_per_token(hybrid.model_config, 256) == full.flops_per_token() - fewer
    assert drawn.flops_per_token(20) == full.flops_per_token() - 12 * 128 * 4 * (256 - 22)
    by_step = [drawn.flops_per_token(drawn.window(step)) for step in range(1, 2001)]
    assert drawn.flops_per_token() == pytest.approx(sum(by_step) / 2000, rel=0.01)
    assert plan("model.attention.pattern=window", "model.attention.window=999").flops_per_token() == (
        full.flops_per_token()
    )


@settings(max_examples=25)
@given(limits=st.integers(1, 60).flatmap(lambda low: st.tuples(st.just(low), st.integers(low + 1, 400))))
def test_the_mean_number_of_keys_is_that_over_all_windows(limits):
    drawn = plan("model.attention.pattern=window", f"model.attention.window={[*limits]}")
    shares = {window: math.log((window + 1) / window) for window in range(limits[0], limits[1] + 1)}
    by_window = math.fsum(share * drawn.flops_per_token(window) for window, share in shares.items())
    assert drawn.flops_per_token() == pytest.approx(by_window / math.fsum(shares.values()), rel=1e-12)


def test_a_huge_range_of_windows_costs_no_time():
    huge = plan("model.attention.pattern=window", "model.attention.window=[1,2147483647]")
    assert plan().flops_per_token() * 0.9 < huge.flops_per_token() < plan().flops_per_token()


def test_a_run_says_what_its_layers_see():
    assert describe_model(plan(*WINDOWS)).endswith(
        "a window of 2 to 20 (drawn for each step) in all layers with 1 kept token"
    )
    hybrid = plan("model.attention.pattern=3:1", "model.attention.window=1023", "model.attention.num_kept=4")
    assert describe_model(hybrid).endswith("a window of 1,023 in 3 of 4 layers with 4 kept tokens")


@pytest.mark.parametrize(
    ("attention", "length", "line"),
    [
        ("{pattern: window, window: 255}", 256, "the window hides no token of a sample of 256 positions"),
        ("{pattern: window, window: 253}", 256, None),
        ("{pattern: '5:1', window: 9}", 256, "the pattern 5:1 has no layer with full attention in 4 layers"),
        ("{pattern: '1:1', window: 251, num_kept: 4}", 256, "the window hides no token"),
        ("{pattern: window, window: [4, 1023]}", 257, "from 255 on, in 25% of the steps, the window hides no token"),
        ("{pattern: window, window: [32, 100]}", 16, "from 32 on, in 100% of the steps, the window hides no token"),
        ("{pattern: full}", 256, None),
    ],
)
def test_windows_that_hide_nothing_are_said_at_the_start(attention, length, line):
    sizes = [f"train.seq_length={length}", f"train.batch_size_tokens={length}", "train.micro_batch_size=1"]
    found = attention_notes(plan(f"model.attention={attention}", *sizes))
    assert [note.startswith(line or "") for note in found] == [True] * (line is not None)


@pytest.mark.parametrize(
    ("attention", "remedy"),
    [
        ("{pattern: window, window: 255}", "lower model.attention.window or raise"),
        ("{pattern: window, window: 9, num_kept: 250}", "lower model.attention.num_kept or raise"),
        ("{pattern: window, window: 255, num_kept: 254}", "lower model.attention.window and num_kept or raise"),
    ],
)
def test_the_remedy_is_the_setting_that_hides_nothing(attention, remedy):
    assert remedy in attention_notes(plan(f"model.attention={attention}"))[0]


def test_segments_shorter_than_the_window_are_said_at_the_start():
    windows = ["model.attention.pattern=window", "model.attention.window=128"]
    assert attention_notes(plan(*windows, "train.segment_length=128")) == []
    (line,) = attention_notes(plan(*windows, "train.segment_length=64"))
    assert line.startswith("train.segment_length=64 is shorter than the window of 128")


@pytest.mark.parametrize(
    ("num_samples", "text"),
    [(1, "1 epoch"), (0.5, "0.5 epochs"), (3561, "3,560 epochs"), (3.561e6, "3,560,000 epochs")],
)
def test_the_number_of_epochs_in_words(num_samples, text):
    assert epochs(SimpleNamespace(num_samples=num_samples), [0]) == text


@pytest.fixture(scope="module")
def drawn_run(recipe, tmp_path_factory):
    """Eight steps with drawn windows, saved at 4 and 8."""
    run = tmp_path_factory.mktemp("drawn") / "run"
    train(recipe, [f"train.run_dir={run}", *WINDOWS])
    return run


def test_each_step_trains_with_its_own_window(recipe, drawn_run):
    drawn = {line["step"]: line["window"] for line in metrics(drawn_run) if "window" in line}
    assert drawn == {step: window_of_step(7, step, 2, 20) for step in range(1, 9)}
    assert len(set(drawn.values())) > 3
    plan = Plan(load_config(recipe, WINDOWS), 1, 300)
    expected, norms, _ = plain_training(plan, num_steps=8)
    assert list(losses(drawn_run).values()) == pytest.approx(expected, abs=1e-5)
    assert [line["grad_norm"] for line in metrics(drawn_run) if "loss" in line] == pytest.approx(norms, rel=1e-4)


def test_a_run_with_drawn_windows_resumes_bit_for_bit(recipe, drawn_run, tmp_path):
    copy_checkpoint(drawn_run, 4, tmp_path)
    train(recipe, [f"train.run_dir={tmp_path}", *WINDOWS])
    assert losses(tmp_path) == losses(drawn_run)
    assert_same_weights(weights(tmp_path, 8), weights(drawn_run, 8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["model.attention.window=[2,21]"], r"model.attention.window is \[2, 21\], but .* was trained with \[2, 20\]"),
        (["model.attention.window=20"], r"model.attention.window is 20, but .* was trained with \[2, 20\]"),
        (["model.attention.pattern=1:1"], r"model.attention.pattern is \['window', 'full'\], but .* was trained with"),
        (["model.attention.num_kept=4"], r"model.attention.num_kept is 4, but .* was trained with"),
    ],
)
def test_a_run_does_not_resume_with_other_windows(recipe, drawn_run, changed, message):
    with pytest.raises(ValueError, match=message):
        train(recipe, [f"train.run_dir={drawn_run}", *WINDOWS, *changed])


def test_the_same_windows_in_other_words_resume(recipe, drawn_run, tmp_path):
    copy_checkpoint(drawn_run, 8, tmp_path)
    same = ["model.attention.pattern=[window,window]", "model.attention.num_kept=1", WINDOWS[1]]
    train(recipe, [f"train.run_dir={tmp_path}", *same])


def test_a_checkpoint_from_before_there_were_windows_resumes(recipe, whole_run, tmp_path):
    copy_checkpoint(whole_run, 8, tmp_path)
    config = tmp_path / "checkpoints" / "step-8" / "config.yaml"
    text = config.read_text()
    begin = text.index("  attention:\n")
    end = begin + text[begin:].index("data:\n")
    config.write_text(text[:begin] + text[end:])
    seal(tmp_path / "checkpoints" / "step-8")
    train(recipe, [f"train.run_dir={tmp_path}"])
    with pytest.raises(ValueError, match=r"model.attention.pattern is \['window', .* was trained with \['full'"):
        train(recipe, [f"train.run_dir={tmp_path}", *WINDOWS])
