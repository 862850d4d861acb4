"""An opt-in page on the API server, ``/s2o``: what S2O does now, for those without Grafana.

The page asks ``/s2o/data`` every two seconds. That is what ``/metrics`` has, the settings, and
lengths and times of the last requests: nothing of what they say, and no names. vLLM's API key does
not guard it, as it does not guard ``/metrics``.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import __version__
from .config import S2OConfig
from .wrapping import wrap

PATH = "/s2o"
LAST_REQUESTS = 20
OF_LAYERS = {
    "s2o:history_tokens_visited_total": "visited",
    "s2o:history_tokens_eligible_total": "eligible",
    "s2o:dropped_mass_total": "dropped",
    "s2o:dropped_mass_rows_total": "dropped_rows",
    "s2o:shadow_error_total": "error",
    "s2o:shadow_rows_total": "error_rows",
}
SUMS = {
    "s2o:attention_tokens_total": "work",
    "s2o:attention_tokens_skipped_total": "skipped",
    "s2o:sparse_requests_total": "sparse_chunks",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:num_preemptions_total": "preempted",
}
REASONS = "s2o:dense_rows_total"
# No script, style or request from elsewhere, and no frame around the page.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}

_settings: S2OConfig | None = None
_requests: deque[dict[str, Any]] = deque(maxlen=LAST_REQUESTS)


def enable(settings: S2OConfig) -> None:
    """Say which settings the page shows; without ``status_page`` there will be none."""
    global _settings
    _settings = settings if settings.status_page else None


def attach(app: Any) -> None:
    """Add the page's routes to vLLM's application if it is asked for, and follow requests that end.

    Args:
        app: a FastAPI application.
    """
    settings = _settings
    if settings is None:
        return
    from fastapi.responses import HTMLResponse, JSONResponse
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    text = Path(__file__).with_name("status_page.html").read_text(encoding="utf-8")
    wrap(PrometheusStatLogger, "record", _record)

    # Not `async`: FastAPI runs them in threads, so that reading the counters delays no token.
    def page() -> Any:
        return HTMLResponse(text, headers=HEADERS)

    def data() -> Any:
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        found = snapshot(get_prometheus_registry().collect(), settings)
        return JSONResponse(found, headers=HEADERS)

    for path, route in ((PATH, page), (f"{PATH}/data", data)):
        app.add_api_route(path, route, methods=["GET"], include_in_schema=False)


def snapshot(metrics: Iterable[Any], settings: S2OConfig) -> dict[str, Any]:
    """Return what the page shows, as JSON types; counters are those since the start.

    Args:
        metrics: of prometheus_client's registry.
        settings: of the server.
    """
    sums = dict.fromkeys(SUMS.values(), 0.0)
    layers: dict[int, dict[str, float]] = {}
    reasons: dict[str, float] = {}
    for metric in metrics:
        for sample in metric.samples:
            if (own := SUMS.get(sample.name)) is not None:
                sums[own] += sample.value
            elif (own := OF_LAYERS.get(sample.name)) and sample.labels.get("layer"):
                number = int(sample.labels["layer"])
                layer = layers.setdefault(number, dict.fromkeys(OF_LAYERS.values(), 0.0))
                layer[own] += sample.value
            elif sample.name == REASONS and sample.value:
                reason = sample.labels["reason"]
                reasons[reason] = reasons.get(reason, 0.0) + sample.value
    return {
        "version": __version__,
        "settings": settings.as_dict(),
        "time": time.time(),
        **sums,
        "layers": [{"layer": number, **layers[number]} for number in sorted(layers)],
        "reasons": reasons,
        "requests": list(_requests),
    }


def _record(original: Callable, self: Any, scheduler: Any, iteration: Any, *args: Any,
            **kwargs: Any) -> Any:  # fmt: skip
    """Keep lengths and times of the requests that a step has ended."""
    for one in getattr(iteration, "finished_requests", ()):
        _requests.append({
            "time": time.time(),
            "prompt_tokens": one.num_prompt_tokens,
            "cached_tokens": getattr(one, "num_cached_tokens", 0),
            "output_tokens": one.num_generation_tokens,
            "queue_s": one.queued_time,
            "prefill_s": one.prefill_time,
            "decode_s": one.decode_time,
            "reason": str(one.finish_reason),
        })  # fmt: skip
    return original(self, scheduler, iteration, *args, **kwargs)
