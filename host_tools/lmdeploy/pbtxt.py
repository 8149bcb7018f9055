"""The three config.pbtxt of a Triton model repository over TurboMind (spec section 1.1).

Names, element types and ranks of the tensors are the interface of LMDeploy's `turbomind` backend
and of its clients, 0.1.0 to 0.5.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Port:
    """One input or output of a Triton model.

    Attributes:
        name: as clients spell it.
        kind: element type without ``TYPE_``.
        dims: of one request; -1 is any length. Empty stands for one number, which the server
            passes on without an axis.
        is_optional: a client may leave it out.
    """

    name: str
    kind: str
    dims: tuple[int, ...] = ()
    is_optional: bool = False

    def to_text(self) -> str:
        """Return the message's fields, one per line."""
        dims = ", ".join(str(size) for size in self.dims or (1,))
        lines = [f'name: "{self.name}"', f"data_type: TYPE_{self.kind}", f"dims: [ {dims} ]"]
        if not self.dims:
            lines.append("reshape: { shape: [ ] }")
        if self.is_optional:
            lines.append("optional: true")
        return "".join(f"    {line}\n" for line in lines)


def _options(kind: str, *names: str) -> tuple[Port, ...]:
    return tuple(Port(name, kind, is_optional=True) for name in names)


INTERACTIVE_INPUTS = (
    Port("input_ids", "UINT32", (-1,)),
    Port("input_lengths", "UINT32"),
    Port("request_output_len", "UINT32", (-1,)),
    Port("input_embeddings", "INT8", (-1,), is_optional=True),
    Port("input_embedding_ranges", "UINT32", (-1, 2), is_optional=True),
    *_options("INT32", "step"),
    *_options("UINT32", "session_len", "runtime_top_k"),
    *_options("FP32", "runtime_top_p", "beam_search_diversity_rate", "temperature", "len_penalty"),
    *_options("FP32", "repetition_penalty"),
    *_options("UINT64", "random_seed"),
    *_options("BOOL", "is_return_log_probs"),
    *_options("UINT32", "beam_width", "start_id", "end_id"),
    Port("bad_words_list", "INT32", (2, -1), is_optional=True),
    Port("stop_words_list", "INT32", (2, -1), is_optional=True),
    *_options("UINT32", "prompt_learning_task_name_ids"),
    *_options("FP32", "top_p_decay", "top_p_min"),
    *_options("UINT32", "top_p_reset_ids"),
    *_options("INT32", "START", "END", "STOP"),
    *_options("UINT64", "CORRID"),
)
INTERACTIVE_OUTPUTS = (
    Port("output_ids", "UINT32", (-1, -1)),
    Port("sequence_length", "UINT32", (-1,)),
    Port("cum_log_probs", "FP32", (-1,)),
    Port("output_log_probs", "FP32", (-1, -1)),
)
PREPROCESSING_INPUTS = (Port("QUERY", "STRING", (-1,)),)
PREPROCESSING_OUTPUTS = (
    Port("INPUT_ID", "UINT32", (-1,)),
    Port("REQUEST_INPUT_LEN", "UINT32", (1,)),
)
POSTPROCESSING_INPUTS = (
    Port("TOKENS_BATCH", "UINT32", (-1, -1)),
    Port("sequence_length", "UINT32", (-1,)),
    # Clients of 0.1.0 do not send it, those of 0.2 do.
    Port("skip_special_tokens", "INT32", (-1,), is_optional=True),
)
POSTPROCESSING_OUTPUTS = (Port("OUTPUT", "STRING", (-1, -1)),)


def interactive_config(tp: int, model_name: str) -> str:
    """Return the config of the engine itself, which the server calls ``turbomind``."""
    head = (
        'name: "turbomind"\nbackend: "turbomind"\ndefault_model_filename: "weights"\n'
        "max_batch_size: 1\nmodel_transaction_policy { decoupled: True }\n"
    )
    parameters = {
        "pipeline_para_size": "1",
        "data_type": "fp16",
        "model_type": "Llama",
        "enable_custom_all_reduce": "0",
        "tensor_para_size": str(tp),
        "model_name": model_name,
    }
    return _config(head, 48, INTERACTIVE_INPUTS, INTERACTIVE_OUTPUTS, parameters)


def preprocessing_config(parameters: Mapping[str, str]) -> str:
    """Return the config of the model that turns text into ids."""
    head = 'name: "preprocessing"\nbackend: "python"\nmax_batch_size: 1\n'
    return _config(head, 4, PREPROCESSING_INPUTS, PREPROCESSING_OUTPUTS, parameters)


def postprocessing_config(parameters: Mapping[str, str]) -> str:
    """Return the config of the model that turns ids into text."""
    head = 'name: "postprocessing"\nbackend: "python"\nmax_batch_size: 1\n'
    return _config(head, 16, POSTPROCESSING_INPUTS, POSTPROCESSING_OUTPUTS, parameters)


def _config(
    head: str,
    count: int,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    parameters: Mapping[str, str],
) -> str:
    group = f"instance_group [\n  {{\n    count: {count}\n    kind: KIND_CPU\n  }}\n]\n"
    settings = "".join(
        f'parameters {{\n  key: "{key}"\n  value: {{ string_value: "{value}" }}\n}}\n'
        for key, value in parameters.items()
    )
    return f"{head}{group}{_ports('input', inputs)}{_ports('output', outputs)}{settings}"


def _ports(field: str, ports: Sequence[Port]) -> str:
    texts = ",\n".join(f"  {{\n{port.to_text()}  }}" for port in ports)
    return f"{field} [\n{texts}\n]\n"
