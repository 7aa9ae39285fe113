"""An experiment as data: the model, the stages and everything that decides the numbers of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mllm_jax.data.pipeline import Mixture
from mllm_jax.data.video import FIVE_FRAMES, FrameSampling
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.models.part_names import is_inside, new_names, part_differences, with_inner_parts
from mllm_jax.models.protocol import TakesFromExperiment, produced
from mllm_jax.sharding.logical import PartRules
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.objectives.protocol import Objective

VOCAB_SIZE = 1024  # of a tokenizer, where nothing in an experiment gives the number of its tokens


@dataclass(frozen=True)
class AdamW:
    """AdamW with linear warm-up, a schedule, clipping by global norm and a decay mask.

    Attributes:
        schedule: after the warm-up, "cosine" falls to `end_factor` of the peak at the stage's last step, so that every
            learning rate depends on the number of steps; "constant" stays at the peak and depends on no end.
        end_factor: the learning rate at the end as a share of the peak, with the cosine.
        weight_decay: applies to kernels and embeddings, never to norms and biases.
        factors: pairs of a pattern over parameter paths, such as "encoder_image/*", and the factor of the learning rate
            of the parameters that match; the first pattern that matches counts.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    end_factor: float = 0.05
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    clip_norm: float = 1.0
    factors: tuple[tuple[str, float], ...] = ()
    schedule: str = "cosine"

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"optimizer.schedule {self.schedule!r}", '"cosine" or "constant"', "change it")

    def transform(self, learning_rate: Any, mask: Any) -> Any:
        """Builds the optax transformation of clipped gradients into updates; a subclass overrides it for another one.

        Args:
            learning_rate: the schedule.
            mask: marks the parameters that decay.
        """
        import optax

        moments = dict(b1=self.b1, b2=self.b2, eps=self.eps)
        return optax.adamw(learning_rate, **moments, weight_decay=self.weight_decay, mask=mask)


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        trainable: patterns over parameter paths such as "llm/*" (`*` also matches `/`). All other parameters are
            frozen: they have no gradient and no optimizer state.
        model: the composition that the stage trains, such as a dual encoder for a contrastive stage; None: the
            experiment's model. A part with the name of one of the experiment's model, such as encoder_image, is that
            part: later stages continue with its trained parameters.
        accumulate: number of pieces of a batch that are computed one after the other; their gradients are summed.
        validation: data of the validation loss: `validation_batches` batches every `validate_every` steps; None: no
            validation loss.
        patience: ends the stage after this many validations without a smaller validation loss, and keeps the parameters
            of the best one. Each improvement saves a checkpoint. None: no early stopping.
        evaluate_every: number of steps between evaluations of the current parameters by tasks of the experiment; None:
            only when the run has ended. One task must take less time than `mllm train --hang-seconds`.
        evaluate: names of these tasks; empty: all of them.
        evaluate_limit: number of examples of each; None: all of them.
        ema: decay of a moving average of the trained parameters, such as 0.999. Validation, evaluation, later stages
            and the finished run use the average. None: the parameters themselves.
        frozen_dtype: dtype of frozen parameters during the stage; None: as they are.
        cache_features: frozen encoders read each image, frame and sound once, and generators' text encoders each
            caption; their features are kept in the run folder.
        signal_tokens: whether the rows of signal and query tokens in the LLM's embedding, and in a head that is not its
            transpose, train too, while all other rows of these tables stay frozen; for a model with `outputs`. The
            optimizer's state is that of these rows.
    """

    name: str
    objective: Objective
    trainable: tuple[str, ...]
    data: Mixture
    steps: int
    optimizer: AdamW = AdamW()
    accumulate: int = 1
    validation: Mixture | None = None
    validate_every: int = 200
    validation_batches: int = 4
    frozen_dtype: str | None = None
    cache_features: bool = False
    model: Any = None
    patience: int | None = None
    evaluate_every: int | None = None
    evaluate: tuple[str, ...] = ()
    evaluate_limit: int | None = None
    ema: float | None = None
    signal_tokens: bool = False

    def __post_init__(self):
        _check_name("a stage", self.name)
        if not isinstance(self.objective, Objective) or isinstance(self.objective, type):
            raise ConfigError(
                f"stage {self.name!r}: objective {self.objective!r:.80}",
                "an objective with `loss` and `check`, such as NextToken()",
                "change the stage's objective",
            )
        if self.steps < 1 or self.accumulate < 1 or self.data.rows % self.accumulate:
            raise ConfigError(
                f"stage {self.name!r}: {self.steps} steps, {self.data.rows} rows in {self.accumulate} piece(s)",
                "at least one step, and pieces that divide the rows",
                "change steps, data.rows or accumulate",
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"stage {self.name!r}: ema {self.ema}", "a decay between 0 and 1", "change ema")
        counts = ("validate_every", "patience", "evaluate_every", "evaluate_limit")
        if low := [f"{name} {value}" for name in counts if (value := getattr(self, name)) is not None and value < 1]:
            raise ConfigError(f"stage {self.name!r}: {', '.join(low)}", "at least 1", "change it")
        needs = {"patience": ("validation", self.validation), "evaluate": ("evaluate_every", self.evaluate_every)}
        needs["evaluate_limit"] = needs["evaluate"]
        for name, (needed, value) in needs.items():
            if getattr(self, name) and value is None:
                raise ConfigError(f"stage {self.name!r}: {name} without {needed}", f"both, or no {name}", "change it")

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """Returns the mixtures that the stage reads: its data, and its validation if it has one."""
        return (self.data,) if self.validation is None else (self.data, self.validation)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Returns the modalities of the media in these mixtures."""
        return tuple(dict.fromkeys(m for mixture in self.mixtures for m, slots in mixture.slots.items() if slots))


@dataclass(frozen=True)
class TokenizerConfig:
    """A byte-level BPE trained on the stages' text, unless a file or a folder is named.

    Attributes:
        vocab_size: of a tokenizer that is trained; None: the number of tokens that the model holds.
        path: a tokenizer.json that an earlier run wrote.
        folder: a chat model's folder: its tokenizer and its chat template are used.
        system: with `folder`, the system message; None: the template's own.
        template: for a named model, the chat template to train with instead of the folder's.
        phrases: groups of words, each of which becomes one token of a tokenizer that is trained.
        places: words in the text before each media token of an image that name its position in the image, such as
            "top left", "top right", ... for 2 x 2 tokens; empty: no words.
        frames: the choice of frames of a video's file, for a composed model with a branch "video".
        frame_time: text before the media tokens of each frame of a video, with its seconds, such as "{:.1f} s"; empty:
            no text.
    """

    vocab_size: int | None = None
    path: str | None = None
    folder: str | None = None
    system: str | None = None
    template: str | None = None
    places: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    frames: FrameSampling = FIVE_FRAMES
    frame_time: str = ""

    def __post_init__(self):
        if (self.path and self.folder) or (self.system is not None and not self.folder):
            raise ConfigError(
                f"{self}", "path or folder, and a system message only with a folder", "drop one of the two"
            )


@dataclass(frozen=True)
class Pretrained:
    """The source of the initial parameters of a part, instead of random ones.

    Checkpoints name the source and hold the fingerprint of the frozen parameters: the source may move, but not change.

    Attributes:
        part: "llm", "encoder_image" or another part of the model, or a part inside one, such as "generator_image/unet";
            "*": the whole model, from a folder that holds it.
        folder: a Hugging Face or native model folder, which may be a whole model's that has the part, such as a
            diffusers pipeline; with `stage`, the folder of a run. An LLM in a folder may have fewer tokens than the
            model: its rows are kept, and new ones begin at their mean with a little noise.
        stage: the stage of that run which trained the part.
        made_by: the Experiment that trains the run, up to that stage, if the folder does not hold it yet.
    """

    part: str
    folder: str
    stage: str | None = None
    made_by: Any = None

    def __post_init__(self):
        if self.made_by is not None and self.stage not in [stage.name for stage in self.made_by.stages]:
            raise ConfigError(
                f"{self.folder}: stage {self.stage!r} made by experiment {self.made_by.name!r}",
                f"one of its stages {[stage.name for stage in self.made_by.stages]}",
                f"change the source of {self.part}",
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """Schedule of checkpoints, and the number to keep: the newest `keep_last`, and the best by validation loss."""

    every_steps: int = 200
    keep_last: int = 2


@dataclass(frozen=True)
class Experiment:
    """Everything `mllm train` needs.

    Attributes:
        model: config of the model that is evaluated when the run has ended: a multimodal LLM, a dual encoder, the model
            of BLIP-2's first stage or that of P-Former training. Each stage without a `model` of its own trains it.
        pretrained: sources of the parts that do not begin at random.
        part_rules: rules for single parts of the model in the table of logical axes, such as
            `data_parallel("encoder_image")`.
        cpu_devices: number of devices that a CPU is presented as. None: at most one a core and at most 8, a number that
            divides the rows of every stage and fits the mesh. Ignored on other devices.
        nonfinite: "stop" at a loss or gradient that is not finite, or "skip" that step (it is never applied).
        evaluation: evaluations of the trained model at the end of the run, such as `mllm_jax.Task`; see
            `mllm_jax.training.evaluation`.
    """

    name: str
    model: Any
    stages: tuple[Stage, ...]
    tokenizer: TokenizerConfig = TokenizerConfig()
    pretrained: tuple[Pretrained, ...] = ()
    mesh: MeshConfig = MeshConfig()
    part_rules: tuple[PartRules, ...] = ()
    cpu_devices: int | None = None
    seed: int = 0
    nonfinite: str = "stop"
    log_every: int = 10
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: tuple[Any, ...] = ()

    def __post_init__(self):
        _check_name("an experiment", self.name)
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"stages {names}", "at least one, with names that differ", "rename the stages")
        known, inner = list(self.parts), list(with_inner_parts(self.parts))
        parts = [source.part for source in self.pretrained]
        twice = [part for i, part in enumerate(parts) if is_inside(part, parts[:i] + parts[i + 1 :])]
        if parts != ["*"] and (twice or not set(parts) <= set(inner)):
            todo = f"change experiment.pretrained{new_names(parts)}"
            raise ConfigError(f"pretrained parts {parts}", f"some of {inner}, each once, or '*' alone", todo)
        ruled = [rules.part for rules in self.part_rules]
        if len(set(ruled)) != len(ruled) or not set(ruled) <= set(known):
            todo = f"change experiment.part_rules{new_names(ruled)}"
            raise ConfigError(f"rules of parts {ruled}", f"some of {known}, each once", todo)
        if self.nonfinite not in ("stop", "skip"):
            raise ConfigError(f"nonfinite {self.nonfinite!r}", '"stop" or "skip"', "change it")
        if self.tokenizer.folder is None and self.tokenizer.path is None:
            require_vocabulary(self, self.vocab_size)
        if self.cpu_devices is not None and self.cpu_devices < 1:
            raise ConfigError(f"cpu_devices {self.cpu_devices}", "at least 1, or None", "change cpu_devices")
        _check_evaluation(self)
        for stage in self.stages:
            _check_signals(stage, self.model_of(stage))
            stage.objective.check(stage, self.model_of(stage))
            for mixture in stage.mixtures:
                _check_length(stage, mixture, self.mesh)

    def model_of(self, stage: Stage | None = None) -> Any:
        """Returns the complete config of the composition that a stage trains, or of the experiment's model.

        Fields that a composition leaves open take the values of the experiment's model and tokenizer.
        """
        own = self.model if stage is None or stage.model is None else stage.model
        if own is not self.model and isinstance(self.model, WithCompute):
            own = within(own, self.model.compute)
        return own.beside(self.model, self.vocab_size) if isinstance(own, TakesFromExperiment) else own

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary: the tokenizer's own, else the smallest one of the models' parts."""
        if self.tokenizer.vocab_size is not None:
            return self.tokenizer.vocab_size
        models = [self.model, *(stage.model for stage in self.stages if stage.model is not None)]
        sizes = [size for model in models for size in model.vocab_sizes.values() if size is not None]
        return min(sizes, default=VOCAB_SIZE)

    def tasks_of(self, stage: Stage) -> tuple[Any, ...]:
        """Returns the tasks that evaluate a stage while it trains.

        Raises:
            ConfigError: names that no task has.
        """
        if stage.evaluate_every is None:
            return ()
        known = {task.name: task for task in self.evaluation}
        if not known or not set(stage.evaluate) <= set(known):
            given = f"stage {stage.name!r} that evaluates by {list(stage.evaluate) or 'all tasks'}"
            raise ConfigError(given, f"tasks of experiment.evaluation: {list(known)}", "add or rename tasks")
        return tuple(known[name] for name in stage.evaluate or known)

    @property
    def compositions(self) -> tuple[Any, ...]:
        """The experiment's model and the other compositions of its stages, each once."""
        found = [self.model_of()]
        for stage in self.stages:
            found += [model] if (model := self.model_of(stage)) not in found else []
        return tuple(found)

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by name, over all compositions.

        Raises:
            ConfigError: two compositions with different parts of one name.
        """
        found: dict[str, Any] = {}
        for model in self.compositions:
            for name, part in model.parts.items():
                if changed := part_differences(found.setdefault(name, part), part):
                    raise ConfigError(
                        f"{name} of a {type(model).__name__}, which differs from that of a"
                        f" {type(self.model).__name__}: {'; '.join(changed[:5])}",
                        "equal configs for parts of one name, which are one part",
                        "build both from one config, such as model.image.encoder",
                    )
        return found


def _check_evaluation(experiment: Experiment) -> None:
    tasks = experiment.evaluation
    if not isinstance(tasks, tuple) or not all(callable(getattr(task, "measure", None)) for task in tasks):
        raise ConfigError(f"evaluation {tasks!r:.100}", "a tuple of tasks, such as (mllm_jax.Task(...),)", "change it")
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"two tasks of evaluation named {twice}", "names that differ", "rename one of them")
    for task in tasks:
        task.check(experiment.model_of())
    for stage in experiment.stages:
        for task in experiment.tasks_of(stage):
            task.check(experiment.model_of(stage))


def _check_signals(stage: Stage, model: Any) -> None:
    if stage.signal_tokens and not (produced(model) and "llm" in model.parts):
        raise ConfigError(
            f"stage {stage.name!r}: signal_tokens of a {type(model).__name__} that writes none",
            "a multimodal LLM with output branches",
            "leave out signal_tokens, or give the model outputs",
        )


def _check_name(what: str, name: str) -> None:
    """Checks a name, which becomes part of paths in the run folder."""
    if not re.fullmatch(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,99}", name):
        raise ConfigError(
            f"{what} named {name!r}",
            r"1 to 100 characters, no dot first, and no / \ : or control character",
            "rename it",
        )


def require_vocabulary(experiment: Experiment, size: int) -> None:
    """Raises ConfigError if a tokenizer of `size` ids has more of them than an embedding has rows."""
    for field, held in [item for model in experiment.compositions for item in model.vocab_sizes.items()]:
        if size > held:
            raise ConfigError(
                f"a tokenizer of {size} for {held} tokens in {field}", "a vocabulary that it holds", f"raise {field}"
            )


def _check_length(stage: Stage, mixture: Mixture, mesh: MeshConfig) -> None:
    """Checks that `context` divides the rows; otherwise each of its devices would compute them whole."""
    if mesh.context > 1 and mixture.length % mesh.context:
        raise ConfigError(
            f"stage {stage.name!r}: rows of {mixture.length} positions over mesh.context {mesh.context}",
            f"a multiple of {mesh.context}; of {2 * mesh.context} to balance causal attention",
            "change the mixture's length or mesh.context",
        )
