"""TurboMind's config.ini: every key of v0.2.3 in its order, read strictly (spec section 3)."""

from __future__ import annotations

import configparser
import io
import math
import re
from dataclasses import dataclass, fields, replace

from device_runtime.errors import PackageError
from device_runtime.package_format.model_config import ModelConfig, RopeScaling, WeightType
from device_runtime.package_format.names import CONFIG_INI

SECTION = "llama"
MAX_CONFIG_BYTES = 64 * 1024
MAX_NAME_CHARACTERS = 256
QUANT_POLICY_STATIC_INT8 = 4
QUANT_POLICY_ONLINE_INT8 = 8

_POSITIVE = (
    "tensor_para_size",
    "head_num",
    "vocab_size",
    "num_layer",
    "inter_size",
    "size_per_head",
    "rotary_embedding",
)
_SIGNED = ("cache_chunk_size",)
_WEIGHT_TYPES: dict[str, WeightType] = {
    "fp16": "fp16",
    "fp32": "fp16",  # written as fp16 all the same (section 1.2)
    "bf16": "bf16",
    "int4": "int4",
}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?")
_BOOLEANS = {"true": 1, "false": 0}


@dataclass(frozen=True)
class TurboMindConfig:
    """The keys of ``[llama]`` in the order LMDeploy v0.2.3 writes them.

    Defaults are the values its ``convert`` writes. `from_text` gives a key that is absent the
    engine's default instead, and `resolved` replaces zeros as the engine does.

    ``model_arch``, the checkpoint's class, came with 0.5.0, which ends without it; where it is
    empty it is not written. Releases before take no notice of keys that they do not know.
    """

    model_name: str
    tensor_para_size: int
    head_num: int
    kv_head_num: int
    vocab_size: int
    num_layer: int
    inter_size: int
    norm_eps: float
    attn_bias: int
    start_id: int
    end_id: int
    session_len: int
    weight_type: str = "fp16"
    rotary_embedding: int = 128
    rope_theta: float = 10000.0
    size_per_head: int = 128
    group_size: int = 0
    max_batch_size: int = 64
    max_context_token_num: int = 1
    step_length: int = 1
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 128
    cache_chunk_size: int = -1
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1
    extra_tokens_per_iter: int = 0
    use_context_fmha: int = 1
    quant_policy: int = 0
    max_position_embeddings: int = 0
    rope_scaling_factor: float = 0.0
    use_logn_attn: int = 0
    model_arch: str = ""

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            PackageError: a value is outside its range.
        """
        if not (0 < len(self.model_name) <= MAX_NAME_CHARACTERS and self.model_name.isprintable()):
            raise PackageError(
                f"{CONFIG_INI} has model_name {self.model_name[:60]!a}, expected 1 to "
                f"{MAX_NAME_CHARACTERS} printable characters"
            )
        if len(self.model_arch) > MAX_NAME_CHARACTERS or not self.model_arch.isprintable():
            raise PackageError(
                f"{CONFIG_INI} has model_arch {self.model_arch[:60]!a}, expected at most "
                f"{MAX_NAME_CHARACTERS} printable characters"
            )
        if self.weight_type not in _WEIGHT_TYPES:
            raise PackageError(
                f"{CONFIG_INI} has weight_type {self.weight_type[:60]!a}, "
                f"expected one of {', '.join(_WEIGHT_TYPES)}"
            )
        for name in _number_keys():
            value = getattr(self, name)
            least = 1 if name in _POSITIVE else 0
            if not math.isfinite(value) or (value < least and name not in _SIGNED):
                raise PackageError(f"{CONFIG_INI} has {name} {value}, expected at least {least}")

    def to_text(self) -> str:
        """Return the file byte for byte as LMDeploy's ConfigParser writes it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.model_arch:
            del values["model_arch"]
        lines = [f"{name} = {value}\n" for name, value in values.items()]
        return f"[{SECTION}]\n{''.join(lines)}\n"

    @classmethod
    def from_text(cls, text: str) -> TurboMindConfig:
        """Read a config.ini of LMDeploy 0.1 to 0.2.5, or ours, hand edits included.

        Raises:
            PackageError: the text is too long or not INI, a key is unknown, missing without an
                engine default or repeated, or a value has the wrong type or range.
        """
        values = _parse(text)
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise PackageError(
                    f"{CONFIG_INI} has the key {key[:60]!a}, which LMDeploy 0.1 to 0.2.5 "
                    "does not know; remove it"
                )
        arguments = {key: _convert(key, value) for key, value in values.items()}
        for key, value in _engine_defaults(arguments).items():
            arguments.setdefault(key, value)
        for field in fields(cls):
            if field.name not in arguments:
                raise PackageError(f"{CONFIG_INI} lacks the key {field.name}")
        return cls(**arguments)  # type: ignore[arg-type]

    @classmethod
    def from_model(
        cls, model: ModelConfig, *, model_name: str, start_id: int, end_id: int, session_len: int
    ) -> TurboMindConfig:
        """Return what ``convert`` writes for a model; use `dataclasses.replace` for settings.

        As v0.2.3 does, it leaves rope_scaling_factor at 0 even for a model of dynamic rope scaling
        (spec section 3); ours is in the manifest.
        """
        return cls(
            model_name=model_name,
            tensor_para_size=model.tensor_para_size,
            head_num=model.num_attention_heads,
            kv_head_num=model.num_kv_heads,
            vocab_size=model.vocab_size,
            num_layer=model.num_hidden_layers,
            inter_size=model.intermediate_size,
            norm_eps=float(model.rms_norm_eps),
            attn_bias=int(model.has_attention_bias),
            start_id=start_id,
            end_id=end_id,
            session_len=session_len,
            weight_type=model.weight_type,
            rotary_embedding=model.head_dim,
            rope_theta=float(model.rope_theta),
            size_per_head=model.head_dim,
            group_size=model.group_size,
            max_position_embeddings=model.max_position_embeddings,
            use_logn_attn=int(model.use_logn_attn),
        )

    def resolved(self) -> TurboMindConfig:
        """Return the values the engine works with where the file says 0 (spec section 3)."""
        max_positions = self.max_position_embeddings or 2048
        session_len = self.session_len or max_positions
        max_batch_size = self.max_batch_size or 64
        max_context = self.max_context_token_num or session_len
        if max_context <= max_batch_size:
            max_context *= session_len
        return replace(
            self,
            kv_head_num=self.kv_head_num or self.head_num,
            max_position_embeddings=max_positions,
            session_len=session_len,
            max_batch_size=max_batch_size,
            max_context_token_num=max_context,
            step_length=self.step_length or 1,
            cache_max_entry_count=self.cache_max_entry_count or 0.95,
            cache_block_seq_len=self.cache_block_seq_len or 128,
            num_tokens_per_iter=self.num_tokens_per_iter or max_context,
            rope_theta=self.rope_theta or 10000.0,
        )

    def model_config(self) -> ModelConfig:
        """Return the model of a plain workspace, whose only facts are these keys.

        TurboMind takes hidden_size to be head_num * size_per_head and knows neither tied heads
        nor q/k norms; a model with them has a manifest.

        Raises:
            PackageError: the sizes do not go together.
        """
        resolved = self.resolved()
        weight_type = _WEIGHT_TYPES[self.weight_type]
        is_dynamic = self.rope_scaling_factor >= 1.0
        return ModelConfig(
            hidden_size=self.head_num * self.size_per_head,
            intermediate_size=self.inter_size,
            num_hidden_layers=self.num_layer,
            num_attention_heads=self.head_num,
            num_kv_heads=resolved.kv_head_num,
            head_dim=self.size_per_head,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.norm_eps,
            rope_theta=resolved.rope_theta,
            max_position_embeddings=resolved.max_position_embeddings,
            weight_type=weight_type,
            group_size=self.group_size if weight_type == "int4" else 0,
            rope_scaling=RopeScaling(
                kind="dynamic" if is_dynamic else "none",
                factor=self.rope_scaling_factor if is_dynamic else 1.0,
            ),
            has_attention_bias=bool(self.attn_bias),
            use_logn_attn=bool(self.use_logn_attn),
            tensor_para_size=self.tensor_para_size,
        )

    def check_model(self, model: ModelConfig) -> None:
        """Compare the sizes with those of a manifest, which rules.

        Raises:
            PackageError: a size differs.
        """
        expected = TurboMindConfig.from_model(
            model, model_name="any", start_id=0, end_id=0, session_len=0
        )
        for name in (*_POSITIVE, "kv_head_num", "attn_bias", "weight_type", "group_size"):
            if getattr(self, name) != getattr(expected, name):
                raise PackageError(
                    f"{CONFIG_INI} has {name} {getattr(self, name)}, "
                    f"the manifest {getattr(expected, name)}; convert again"
                )


def _number_keys() -> list[str]:
    return [field.name for field in fields(TurboMindConfig) if field.type != "str"]


def _engine_defaults(values: dict[str, str | int | float]) -> dict[str, str | int | float]:
    """Return what the engine takes for keys that are absent (spec section 3)."""
    defaults: dict[str, str | int | float] = {
        field.name: field.default
        for field in fields(TurboMindConfig)
        if isinstance(field.default, (str, int, float))
    }
    # These four rule the layout; only the file can tell them.
    for name in ("weight_type", "size_per_head", "rotary_embedding", "group_size"):
        del defaults[name]
    if "size_per_head" in values:
        defaults["rotary_embedding"] = values["size_per_head"]
    if values.get("weight_type") != "int4":
        defaults["group_size"] = 0
    if "head_num" in values:
        defaults["kv_head_num"] = values["head_num"]
    return defaults | {"cache_max_entry_count": 0.95, "session_len": 0, "attn_bias": 0}


def _parse(text: str) -> dict[str, str]:
    if len(text) > MAX_CONFIG_BYTES:
        raise PackageError(
            f"{CONFIG_INI} has {len(text)} characters, expected at most {MAX_CONFIG_BYTES}"
        )
    parser = configparser.RawConfigParser(
        interpolation=None, inline_comment_prefixes=(";",), default_section=""
    )
    try:
        parser.read_file(io.StringIO(text))
    except configparser.Error as error:
        reason = ascii(" ".join(str(error).split())[:200])
        raise PackageError(f"{CONFIG_INI} is not an INI file: {reason}") from error
    if parser.sections() != [SECTION]:
        found = ", ".join(parser.sections())[:60]
        raise PackageError(f"{CONFIG_INI} has the sections {found!a}, expected {SECTION!r} alone")
    return dict(parser.items(SECTION))


def _convert(key: str, text: str) -> str | int | float:
    kinds = {field.name: str(field.type) for field in fields(TurboMindConfig)}
    if kinds[key] == "str":
        return text
    if kinds[key] == "int":
        if text.lower() in _BOOLEANS:
            return _BOOLEANS[text.lower()]
        if not _INTEGER.fullmatch(text):
            raise PackageError(f"{CONFIG_INI} has {key} {text[:60]!a}, expected an integer")
        return int(text)
    if not _NUMBER.fullmatch(text):
        raise PackageError(f"{CONFIG_INI} has {key} {text[:60]!a}, expected a number")
    return float(text)
