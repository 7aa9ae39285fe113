"""The branch of a multimodal model for one modality: encoder -> projector."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from mllm_jax.data.batch import ROW, SLOTS, ArraySpec, BatchSpec, images_spec, instruction_spec, sounds_spec
from mllm_jax.errors import ConfigError
from mllm_jax.models.protocol import SequenceProjectorConfig, SoundEncoderConfig

INSTRUCTION = 128  # the most tokens of an instruction in training: max_txt_len in LAVIS' configs
KINDS = ("encoder", "projector")  # kinds of parts of a branch
_PATCHES = ("patches", "patch_segments", "patch_coordinates", "patch_grids")
MEDIA = ("images", "sounds", "masks")  # the arrays that an encoder of media of one size reads
# The arrays of one branch in a batch.
ARRAYS = (*MEDIA, "features", "query_tokens", "query_segments", *_PATCHES)


@dataclass(frozen=True)
class Connection:
    """The features of the encoder that the projector reads.

    Attributes:
        layers: indices of hidden states, which are concatenated: 0 is the input of the first layer, -1 the output of
            the last. None: the encoder's last hidden state, after its final norm.
        class_token: whether the vectors of the whole image are read too.
    """

    layers: tuple[int, ...] | None = None
    class_token: bool = False


@dataclass(frozen=True)
class Branch:
    """The encoder and the projector of one modality.

    Attributes:
        encoder: of media of one size, or of packed patches; or the modality of the branch whose encoder this branch
            shares.
        projector: None for an encoder that projects itself, see `projects`; or the modality of the branch whose
            projector it shares.
        seconds: for an encoder of sounds: the longest sound in one slot; a longer one takes several.
    """

    encoder: Any
    projector: Any = None
    connection: Connection = Connection()
    seconds: float = 30.0

    @property
    def packed(self) -> bool:
        """True if the encoder reads packed patches of media of any size, not tiles of one size."""
        return getattr(self.encoder, "packed", False)

    @property
    def projects(self) -> bool:
        """True if the encoder merges its vectors and projects them to the LLM's width itself."""
        return self.packed or getattr(self.encoder, "projects", False)

    @property
    def fires(self) -> bool:
        """True if the projector decides the number of media tokens, of which `tokens` is the most."""
        return getattr(self.projector, "fires", False)

    @property
    def sound(self) -> bool:
        """True if the encoder reads sounds."""
        return isinstance(self.encoder, SoundEncoderConfig)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of the encoder's input for a sound of `seconds`; steps in time are its last axis."""
        return self.encoder.inputs(self.seconds)

    def joined(self, hidden_size: int) -> Branch:
        """Returns the branch with open widths filled in, from the LLM and the encoder."""
        if self.projects:
            return replace(self, encoder=filled(self.encoder, output_size=hidden_size))
        features = read_from(self.encoder) if self.connection.layers is None else {}
        return replace(self, projector=filled(self.projector, output_size=hidden_size, **features))

    @property
    def tokens(self) -> int:
        """The number of media tokens of one medium, of one tile, or of a sound of `seconds`."""
        if self.sound:
            return self.length(self.inputs[-1])
        kept = self.connection.class_token and self.encoder.class_token
        if kept and getattr(self.projector, "needs_grid", False):
            raise ConfigError(
                f"connection.class_token with projector {type(self.projector).__name__}, which reads squares",
                "patches alone",
                "leave out the class token, or change the projector",
            )
        return self.projector.num_tokens(self.encoder.grid) + int(kept and self.projector.pointwise)

    def length(self, steps: int) -> int:
        """Returns the media tokens of a sound of that many of the encoder's input steps, samples or mel frames.

        Raises:
            ConfigError: the projector reads only images.
        """
        if self.projects:
            return self.encoder.frames(steps)
        if not isinstance(self.projector, SequenceProjectorConfig):
            raise ConfigError(
                f"projector {type(self.projector).__name__} after {type(self.encoder).__name__}",
                "a projector of sequences",
                "take StackedProjectorConfig, or MLPProjectorConfig",
            )
        return self.projector.length(self.encoder.frames(steps))

    @property
    def instruction_length(self) -> int:
        """The most tokens of an instruction that the projector reads in training; 0: it reads none."""
        return min(INSTRUCTION, self.projector.max_length) if getattr(self.projector, "reads_text", False) else 0

    def check(self, hidden_size: int) -> None:
        """Raises ConfigError if the parts do not fit each other, or the LLM's width."""
        if self.projects != (self.projector is None):
            raise ConfigError(
                f"encoder {type(self.encoder).__name__} with projector {type(self.projector).__name__}",
                "a projector for an encoder of whole images, and None for one that projects, as of packed patches",
                "change the projector",
            )
        where, width = ("encoder", self.encoder) if self.projects else ("projector", self.projector)
        if width.output_size != hidden_size:
            raise ConfigError(
                f"{where}.output_size {width.output_size}", f"the LLM's hidden_size {hidden_size}", "make the two equal"
            )
        if not self.packed:
            self.tokens  # noqa: B018 - refuses a grid that the projector cannot divide

    def batch_spec(self, modality: str, rows: int, slots: int) -> BatchSpec:
        """Returns the arrays of a batch that hold its media.

        Args:
            slots: the number of tiles or sounds in a row, or of patches for an encoder that packs them.
        """
        media = (rows, slots)
        if self.packed:
            spec = BatchSpec(
                dict(
                    patches=ArraySpec((*media, self.encoder.patch_values), "float32", axes=(ROW, SLOTS)),
                    patch_segments=ArraySpec(media, axes=(ROW, SLOTS)),
                    patch_coordinates=ArraySpec((*media, 2), axes=(ROW, SLOTS)),
                    patch_grids=ArraySpec((*media, 2), axes=(ROW, SLOTS)),
                )
            )
        elif self.sound:
            spec = sounds_spec(rows, slots, self.inputs)
        else:
            spec = images_spec(rows, slots, self.encoder.image_size)
        if self.instruction_length:
            spec |= instruction_spec(rows, slots, self.instruction_length)
        return BatchSpec({array_name(modality, name): array for name, array in spec.items()})


def read_from(encoder: Any) -> dict[str, Any]:
    """Returns the fields of a projector that its encoder decides, such as the width of its input, if it has them."""
    found = {name: getattr(encoder, name, None) for name in ("feature_size", "widths")}
    found["input_size"] = found["feature_size"]
    return {name: value for name, value in found.items() if value is not None}


def filled(part: Any, **values: Any) -> Any:
    """Returns the part's config with its None fields set to the values of the same names."""
    fields = {field.name for field in dataclasses.fields(part)} if is_dataclass(part) else set()
    given = {name: value for name, value in values.items() if name in fields and getattr(part, name) is None}
    return replace(part, **given) if given else part


def array_name(modality: str, name: str) -> str:
    """Returns the name in a batch of a branch's array; arrays of images have no prefix."""
    return name if modality == "image" else f"{modality}_{name}"
