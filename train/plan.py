"""Values that a run derives from its recipe, its data and its number of ranks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..models.config import SinkGPTNeoXConfig, tokens_per_sample
from ..models.cost import flops_per_token
from .config import TrainingConfig
from .only_sinks import count_frozen_parameters
from .windows import window_of_step

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Plan:
    """Derived values of a run.

    Attributes:
        config: the recipe.
        world_size: number of data-parallel ranks.
        tokenizer_size: the store's largest token id + 1.
        eod_id: the id at the end of each document.

    Raises:
        ValueError: at construction, if the batch cannot be divided among the ranks or the
            vocabulary is too small. The message names the key.
    """

    config: TrainingConfig
    world_size: int
    tokenizer_size: int
    eod_id: int = 0

    def __post_init__(self):
        self._check_batch()
        self._check_vocabulary()

    @property
    def num_sinks(self) -> int:
        return self.config.model.num_sinks

    @property
    def tokens_per_sample(self) -> int:
        return tokens_per_sample(self.config.train.seq_length, self.num_sinks)

    @property
    def stride(self) -> int:
        """Tokens between the starts of two samples; without sinks they overlap by one token."""
        return self.tokens_per_sample if self.num_sinks else self.tokens_per_sample - 1

    @property
    def targets_per_sample(self) -> int:
        return self.tokens_per_sample if self.num_sinks else self.tokens_per_sample - 1

    @property
    def samples_per_step(self) -> int:
        """Global batch size in samples."""
        return self.config.train.batch_size_tokens // self.config.train.seq_length

    @property
    def num_accumulation_steps(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.samples_per_step // (self.config.train.micro_batch_size * self.world_size)

    @property
    def num_segments(self) -> int:
        """Forward and backward passes over a micro-batch."""
        return self.config.train.seq_length // (self.config.train.segment_length or self.config.train.seq_length)

    @property
    def num_passes(self) -> int:
        """Forward and backward passes of a rank in a step."""
        return self.num_accumulation_steps * self.num_segments

    def window(self, step: int) -> int | None:
        """Return the window that step ``step`` (from 1) draws; None if it is fixed."""
        found = self.config.model.attention.window_range
        return None if found is None else window_of_step(self.config.train.seed, step, *found)

    @property
    def num_pass_shapes(self) -> int:
        """Passes of different shapes: the number of carried keys grows up to the window."""
        if self.num_segments == 1:
            return 1
        window = max(window or 0 for window in self.config.model.layer_windows or [0])
        return min(self.num_segments, 2 + window * self.num_segments // self.config.train.seq_length)

    @property
    def largest_window(self) -> int | None:
        """The end of the range of drawn windows, for evaluation; None if the window is fixed."""
        found = self.config.model.attention.window_range
        return None if found is None else found[1]

    @property
    def num_positions(self) -> int:
        """Positions of the whole run, sinks included."""
        return self.config.train.batch_size_tokens * self.config.train.num_steps

    @property
    def num_samples(self) -> int:
        return self.samples_per_step * self.config.train.num_steps

    @property
    def vocab_size(self) -> int:
        if self.config.model.vocab_size is not None:
            return self.config.model.vocab_size
        needed = self.tokenizer_size + self.num_sinks
        return -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @cached_property
    def model_config(self) -> SinkGPTNeoXConfig:
        """The model's configuration. The sink tokens have the first ids unused by the tokenizer."""
        model = self.config.model
        sink: dict[str, Any] = {"kind": model.sink.kind}
        if self.num_sinks:
            sink |= {"num_tokens": self.num_sinks, "first_token_id": self.tokenizer_size}
        windows: dict[str, Any] = {}
        if model.layer_windows is not None:
            drawn = model.attention.window_range
            windows = {"layer_windows": model.layer_windows, "num_kept": model.num_kept}
            windows["window_range"] = None if drawn is None else list(drawn)
        return SinkGPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=model.intermediate_size or 4 * model.hidden_size,
            max_position_embeddings=model.max_position_embeddings or self.config.train.seq_length,
            use_parallel_residual=model.parallel_residual,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": model.rope_theta,
                "partial_rotary_factor": model.rotary_pct,
            },
            tie_word_embeddings=False,
            bos_token_id=self.eod_id,
            eos_token_id=self.eod_id,
            sink=sink,
            **windows,
        )

    def flops_per_token(self, window: int | None = None) -> float:
        """FLOPs of a position in a step that drew ``window``; None: the mean over all draws.

        Frozen weights have no gradient of their own, a third of their work.
        """
        num_frozen = count_frozen_parameters(self.config, self.model_config)
        return flops_per_token(self.model_config, self.config.train.seq_length, window) - 2 * num_frozen

    def _check_batch(self) -> None:
        num_samples, world_size = self.samples_per_step, self.world_size
        micro_batch_size = self.config.train.micro_batch_size
        batch = (
            f"the batch of {num_samples} samples (train.batch_size_tokens {self.config.train.batch_size_tokens} / "
            f"train.seq_length {self.config.train.seq_length})"
        )
        if num_samples % world_size:
            raise ValueError(
                f"{batch} cannot be divided among {world_size} ranks: set train.batch_size_tokens to a multiple of "
                f"{world_size * self.config.train.seq_length}, or use another number of ranks"
            )
        share = num_samples // world_size
        if share % micro_batch_size:
            largest = max(n for n in range(1, min(share, micro_batch_size) + 1) if share % n == 0)
            raise ValueError(
                f"{batch} gives each of {world_size} ranks {share} samples, which is not a multiple of "
                f"train.micro_batch_size {micro_batch_size}: set train.micro_batch_size={largest}"
            )

    def _check_vocabulary(self) -> None:
        needed = self.tokenizer_size + self.num_sinks
        if needed > self.vocab_size:
            sinks = f" and {self.num_sinks} sink token{'s' * (self.num_sinks > 1)}" if self.num_sinks else ""
            raise ValueError(
                f"model.vocab_size {self.vocab_size} is too small for a tokenizer of {self.tokenizer_size} ids{sinks}: "
                f"set it to {needed} or more, or to null to derive it"
            )
