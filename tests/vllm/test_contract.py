"""Everything of vLLM that s2o_vllm relies on, checked by name in each supported release.

A failure here names the symbol that moved. The installed release is always checked. The newest
supported one is checked where its source can be had: from ``S2O_TEST_VLLM``, the path of a vLLM
wheel or source tree, or in continuous integration (``CI`` is set) from the package index.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from releases import Release
from s2o_vllm import compat

PACKAGE = Path(compat.__file__).parent
NEWEST = ".".join(map(str, compat.SUPPORTED[1]))
SOURCE = "S2O_TEST_VLLM"
DOWNLOAD_SECONDS = 110

LAYER = (
    "num_heads", "num_kv_heads", "head_size", "scale", "logits_soft_cap", "sliding_window",
    "attn_type", "alibi_slopes", "sinks", "kv_cache_dtype",
)  # fmt: skip
FORWARD = (
    "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, "
    "output_block_scale)"
)
IMPLEMENTATION = (
    "__init__(self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, "
    "kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, ...)"
)
BUILDER = (
    "__init__(self, kv_cache_spec, layer_names, vllm_config, device)",
    "build(self, common_prefix_len, common_attn_metadata, fast_build)",
    "update_block_table(self, metadata, blk_table, slot_mapping)",
    "vllm_config",
)
METADATA = ("num_actual_tokens", "block_table", "seq_lens")


def of(owner: str, *members: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{member}" for member in members)


CONTRACT: dict[str, tuple[str, ...]] = {
    # Start: the entry point, the flags, the configuration.
    "vllm.plugins": ("load_general_plugins()", "'vllm.general_plugins'", "'vllm.platform_plugins'"),
    "vllm.envs": ("VLLM_PLUGINS", "VLLM_USE_RUST_FRONTEND"),
    "vllm.entrypoints.cli.main": ("main()",),
    "vllm.entrypoints.cli": ("main",),
    "vllm.utils.argparse_utils": ("FlexibleArgumentParser.parse_args(self, args, namespace)",),
    "vllm.platforms": ("current_platform",),
    "vllm.engine.arg_utils": (
        *of("EngineArgs", "add_cli_args(parser)", "create_engine_config(self, ...)",
            "from_cli_args(cls, args)", "additional_config", "attention_config",
            "attention_backend"),
        "'--attention-backend'", "'--attention-config'", "'-ac'", "'--additional-config'",
        "'--max-model-len'", "'--served-model-name'", "'--enforce-eager'",
        "'--compilation-config'", "'--optimization-level'",
    ),
    "vllm.config": (
        "get_current_vllm_config()", "set_current_vllm_config(vllm_config, ...)",
        "get_layers_from_vllm_config(vllm_config, layer_type, layer_names)",
        *of("VllmConfig", "additional_config", "model_config", "parallel_config", "cache_config",
            "scheduler_config", "speculative_config", "compilation_config"),
        *of("ModelConfig", "model", "served_model_name", "use_mla", "runner_type",
            "is_encoder_decoder", "get_sliding_window(self)", "hf_text_config", "max_model_len",
            "get_total_num_hidden_layers(self)"),
        *of("ParallelConfig", "nnodes", "data_parallel_size_local", "data_parallel_external_lb",
            "data_parallel_hybrid_lb", "data_parallel_size"),
        *of("ParallelConfig", "rank", "data_parallel_index", "tensor_parallel_size",
            "decode_context_parallel_size", "prefill_context_parallel_size", "use_ubatching(self)"),
        *of("CompilationConfig", "max_cudagraph_capture_size", "static_forward_context"),
        *of("CUDAGraphMode", "NONE"),
        *of("CacheConfig", "block_size", "user_specified_block_size"),
        *of("SchedulerConfig", "max_num_batched_tokens", "max_num_seqs"),
        *of("AttentionConfig", "backend", "backend_per_kind"),
    ),
    # The backend's slot.
    "vllm.v1.attention.backends.registry": (
        "register_backend(backend, class_path, ...)",
        *of("AttentionBackendEnum", "CUSTOM", "is_overridden(self)",
            "get_path(self, include_classname)"),
    ),
    "vllm.platforms.interface": of("Platform", "is_cpu(self)"),
    "vllm.platforms.cpu": of(
        "CpuPlatform", "get_attn_backend_cls(cls, selected_backend, attn_selector_config, ...)"
    ),
    "vllm.v1.attention.selector": of("AttentionSelectorConfig", "use_mla"),
    # Requests.
    "vllm.v1.engine.input_processor": of(
        "InputProcessor", "process_inputs(self, request_id, prompt, params, ...)", "vllm_config"
    ),
    "vllm.v1.engine": of("EngineCoreRequest", "cache_salt"),
    "vllm.v1.engine.core": ("get_request_block_hasher",),
    "vllm.v1.core.kv_cache_utils": (
        "get_request_block_hasher(hash_block_size, ...)",
        "generate_block_hash_extra_keys(request, start_token_idx, end_token_idx, ...)",
        "'cache_salt'",
    ),
    "vllm.v1.core.block_pool": ("generate_block_hash_extra_keys",),
    "vllm.v1.simple_kv_offload.manager": ("generate_block_hash_extra_keys",),
    "vllm.v1.metrics.loggers": of(
        "PrometheusStatLogger", "record(self, scheduler_stats, iteration_stats, ...)"
    ),
    "vllm.v1.metrics.prometheus": ("get_prometheus_registry()",),
    "vllm.v1.metrics.stats": (
        "IterationStats.finished_requests",
        *of("FinishedRequestStats", "num_prompt_tokens", "num_generation_tokens", "queued_time",
            "prefill_time", "decode_time", "finish_reason"),
    ),
    "vllm.sampling_params": of("SamplingParams", "extra_args", "clone(self)"),
    "vllm.entrypoints.launchers.app": (
        "init_entrypoints_middleware(args, app, supported_tasks)",
        "build_app(args, supported_tasks, model_config)",
    ),
    "vllm.entrypoints.launchers.run_batch": (
        "run_request(serving_engine_func, request, ...)", *of("BatchRequestInput", "url", "body"),
    ),
    "vllm.entrypoints.generate.beam_search.offline": of(
        "BeamSearchOfflineMixin", "beam_search(self, prompts, params, ...)"
    ),
    "vllm.entrypoints.launchers.api_server.app_state": ("init_app_state(engine_client, ...)",),
    # A model without weights, for `s2o doctor MODEL`.
    "vllm.model_executor.model_loader.utils": ("initialize_model(vllm_config, ...)",),
    "vllm.distributed": ("parallel_state",),
    "vllm.distributed.parallel_state": (
        "init_distributed_environment(world_size, rank, distributed_init_method, local_rank, "
        "backend, ...)",
        "initialize_model_parallel(tensor_model_parallel_size, pipeline_model_parallel_size, ...)",
        "destroy_model_parallel()", "destroy_distributed_environment()",
    ),
    "vllm.exceptions": of("VLLMValidationError", "__init__(self, message, parameter, ...)"),
    # Which row of a step belongs to which request, in both model runners.
    "vllm.v1.worker.gpu_model_runner": of(
        "GPUModelRunner", "_update_states(self, scheduler_output)", "requests", "input_batch",
        "_dummy_run(self, num_tokens, cudagraph_runtime_mode, force_attention, ...)",
    ),
    # The start of a worker.
    "vllm.v1.worker.gpu_worker": (
        "kernel_warmup(worker, ...)",
        *of("Worker", "compile_or_warm_up_model(self)", "model_runner", "vllm_config"),
    ),
    "vllm.v1.worker.gpu_input_batch": (
        "InputBatch.req_ids", "CachedRequestState.sampling_params",
    ),
    "vllm.v1.worker.gpu.model_runner": of(
        "GPUModelRunner", "add_requests(self, scheduler_output)", "req_states",
        "_dummy_run(self, num_tokens, ...)",
    ),
    "vllm.v1.worker.gpu.states": of("RequestState", "req_id_to_index"),
    "vllm.v1.core.sched.output": (
        "SchedulerOutput.scheduled_new_reqs", *of("NewRequestData", "req_id", "sampling_params"),
    ),
    # The backend.
    "vllm.model_executor.layers.attention": of("Attention", "impl", "layer_name"),
    "vllm.v1.attention.backend": (
        "AttentionType.DECODER",
        "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE",
        *of("AttentionLayer", "_q_scale", "_k_scale", "_v_scale", "_q_scale_float",
            "_k_scale_float", "_v_scale_float"),
        *of("AttentionMetadataBuilder", "_cudagraph_support", "reorder_batch_threshold", "device",
            "build_for_cudagraph_capture(self, common_attn_metadata)"),
        *of("CommonAttentionMetadata", "query_start_loc", "query_start_loc_cpu", "seq_lens",
            "num_reqs", "num_actual_tokens", "max_query_len", "block_table_tensor", "slot_mapping",
            "causal", "is_prefilling", "seq_lens_cpu_upper_bound", "req_idx", "mm_req_doc_ranges",
            "rswa_prefix_lens"),
    ),
    "vllm.v1.attention.backends.flash_attn": (
        *of("FlashAttentionBackend", "get_name()", "get_impl_cls()", "get_builder_cls()"),
        *of("FlashAttentionImpl", IMPLEMENTATION, "forward" + FORWARD, *LAYER),
        *of("FlashAttentionMetadataBuilder", *BUILDER, "use_full_cuda_graph"),
        *of("FlashAttentionMetadata", *METADATA),
    ),
    "vllm.v1.attention.backends.cpu_attn": (
        *of("CPUAttentionBackend", "get_name()", "get_impl_cls()", "get_builder_cls()"),
        *of("CPUAttentionBackendImpl", IMPLEMENTATION, "forward" + FORWARD, *LAYER),
        *of("CPUAttentionMetadataBuilder", *BUILDER, "isa", "block_size", "head_dim"),
        *of("CPUAttentionMetadata", *METADATA),
    ),
    "vllm._custom_ops": (
        "cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, "
        "k_scale, v_scale, kv_cache_dtype)",
    ),
    "vllm": ("_custom_ops", "envs"),
}  # fmt: skip


# Fields of a step's metadata that a slice of rows sets itself, keeps, or is never asked to cut.
NOT_CUT = {
    "query_start_loc", "query_start_loc_cpu", "num_reqs", "num_actual_tokens", "max_query_len",
    "max_seq_len", "causal", "logits_indices_padded", "num_logits_indices", "max_logits_per_req",
    "mm_req_doc_ranges",
}  # fmt: skip


def missing(release: Release) -> list[str]:
    sentences = (
        release.lacks(module, requirement)
        for module, requirements in CONTRACT.items()
        for requirement in requirements
    )
    return [sentence for sentence in sentences if sentence]


def uncut(release: Release) -> set[str]:
    """Fields of a step's metadata that compat.slice_rows does not know."""
    fields = release.fields("vllm.v1.attention.backend", "CommonAttentionMetadata")
    return fields - {*compat._PER_ROW, *compat._PER_TOKEN, *compat._DERIVED} - NOT_CUT


@pytest.fixture(scope="session")
def installed() -> Release:
    package = importlib.util.find_spec("vllm")
    assert package, "vLLM is not installed"
    return Release(Path(package.origin).parents[1])


@pytest.fixture(scope="session")
def newest(tmp_path_factory) -> Release:
    """The newest supported release; its tests are skipped where its source cannot be had."""
    if SOURCE in os.environ:
        return Release(Path(os.environ[SOURCE]))
    if "CI" not in os.environ:
        pytest.skip(f"{SOURCE} names no wheel or source tree of vLLM {NEWEST}, and CI is not set")
    folder = tmp_path_factory.mktemp("vllm")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"vllm=={NEWEST}.*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"vLLM {NEWEST} was not downloaded in {DOWNLOAD_SECONDS} s")
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"pip offers no wheel of vLLM {NEWEST}: {done.stderr.strip()[-200:]}")
    return Release(wheels[0])


@pytest.mark.parametrize("which", ["installed", "newest"])
def test_a_release_has_everything_we_rely_on(which, request):
    assert not missing(request.getfixturevalue(which))


@pytest.mark.parametrize("which", ["installed", "newest"])
def test_every_field_of_a_steps_metadata_is_cut_with_its_rows(which, request):
    assert not uncut(request.getfixturevalue(which))


def imported_names() -> set[tuple[str, str]]:
    """Each (module, name) of vLLM that s2o_vllm imports; the name is "" for a module alone."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(a.name, "") for a in node.names if a.name.split(".")[0] == "vllm"}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = node.value.split(".")
                dotted = len(parts) > 2 and all(part.isidentifier() for part in parts)
                if dotted and parts[0] == "vllm":
                    found.add((node.value, ""))
    return found


def test_the_table_names_everything_that_is_imported():
    names = imported_names()
    assert ("vllm.engine.arg_utils", "EngineArgs") in names
    assert ("vllm.v1.worker.gpu.model_runner", "") in names
    for module, name in names:
        assert module in CONTRACT, f"CONTRACT does not name {module}"
        roots = {requirement.split("(")[0].split(".")[0] for requirement in CONTRACT[module]}
        assert not name or name in roots, f"CONTRACT does not name {name} of {module}"


@pytest.fixture
def release(tmp_path) -> Release:
    """A small package that has each of the forms that the table asks about."""
    sources = {
        "__init__": "from .inner import Thing as Renamed\n",
        "inner": (
            "from pkg.base import Base\n"
            "class Thing(Base[int]):\n"
            "    field: int = 3\n"
            "    def __init__(self):\n        self.made, self.flag = 1, '--flag'\n"
            "        self.later: int = 2\n"
            "    def method(self, first, second=1, *, only=None): ...\n"
        ),
        "base": (
            "if True:\n    class Base:\n        @property\n        def inherited(self): ...\n"
            "def function(): ...\n"
        ),
    }  # fmt: skip
    (tmp_path / "pkg").mkdir()
    for name, text in sources.items():
        (tmp_path / "pkg" / f"{name}.py").write_text(text)
    return Release(tmp_path)


def test_only_declared_fields_are_fields(release):
    assert release.fields("pkg", "Renamed") == {"field"}


@pytest.mark.parametrize(
    ("module", "requirement"),
    [
        ("pkg", "Renamed.field"),
        ("pkg", "Renamed.inherited"),
        ("pkg", "base"),
        ("pkg.inner", "Thing.flag"),
        ("pkg.inner", "Thing.later"),
        ("pkg.inner", "Thing.method(self, first, second, only)"),
        ("pkg.inner", "Thing.method(self, first, ...)"),
        ("pkg.inner", "'--flag'"),
        ("pkg.base", "function()"),
    ],
)
def test_what_a_release_has_is_found(release, module, requirement):
    assert release.lacks(module, requirement) is None


@pytest.mark.parametrize(
    ("module", "requirement", "sentence"),
    [
        ("pkg.gone", "Thing", "there is no module pkg.gone"),
        ("pkg", "Thing", "pkg has no Thing"),
        ("pkg", "Renamed.gone", "Renamed of pkg has no gone"),
        ("pkg.base", "function.member", "function of pkg.base has no member"),
        ("pkg.base", "function(x)", r"function of pkg.base takes \(\), must be \(x\)"),
        ("pkg.inner", "Thing.field(self)", "Thing.field of pkg.inner is no function"),
        ("pkg.inner", "Thing.method(self, second, ...)", r"takes \(self, first, second, only\)"),
        ("pkg.inner", "Thing.method(self, first)", r"must be \(self, first\)"),
        ("pkg.inner", "'--gone'", "pkg.inner does not contain '--gone'"),
    ],
)
def test_what_a_release_lacks_is_named_in_a_sentence(release, module, requirement, sentence):
    found = release.lacks(module, requirement)
    assert found is not None
    assert re.search(sentence, found), found
