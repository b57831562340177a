"""The HTTP endpoint of a pod: `GET /progress` as JSON, `GET /metrics` in Prometheus' text format."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from sae_job.reporting.progress import ProgressReporter

_SAE_GAUGES = {
    "loss": "Training loss of the last logged step.",
    "explained_variance": "Explained variance on held-out activations.",
    "l0": "Mean number of active latents per token.",
    "mse": "Mean squared error per token, summed over dimensions.",
    "ce_loss_score": "Share of the ablation's cross-entropy loss that is recovered.",
    "kl_divergence_score": "Share of the ablation's divergence from the model's predictions that the SAE avoids.",
    "dead_fraction": "Share of latents that are dead.",
    "dead_features": "Latents that were dead in the last logged step.",
    "learning_rate": "Learning rate of the last logged step.",
}
_RUNNING_HELP = "1 while the SAE is trained, 0 once it has failed or was stopped."
_CHECKPOINT_AGE_HELP = "Seconds since the last checkpoint was stored: what a loss of the pod would cost."


class ProgressCollector(Collector):
    """A reporter's state as Prometheus gauges, read at each scrape.

    The labels are the step and the job's SAEs, of which there are at most 16.
    """

    def __init__(self, reporter: ProgressReporter) -> None:
        self._reporter = reporter

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state = self._reporter.state
        for name, value, help_text in (
            ("tokens", state.tokens, "Tokens done by this pod, earlier attempts included."),
            ("tokens_wanted", state.total_tokens, "Tokens that this pod has to do."),
            ("tokens_per_second", state.tokens_per_second, "Current rate."),
            ("shards_complete", state.shards_complete, "Shards that this pod has stored."),
            ("checkpoint_tokens", state.checkpoint_tokens, "Tokens of the last stored checkpoint."),
            ("checkpoint_age_seconds", self._reporter.checkpoint_age, _CHECKPOINT_AGE_HELP),
        ):
            if value is not None:
                gauge = GaugeMetricFamily(f"sae_job_{name}", help_text, labels=["step"])
                gauge.add_metric([state.step], value)
                yield gauge
        for name, help_text in _SAE_GAUGES.items():
            gauge = GaugeMetricFamily(f"sae_job_sae_{name}", help_text, labels=["sae"])
            for sae in state.saes:
                value = getattr(sae, name)
                if value is not None:
                    gauge.add_metric([sae.name], value)
            if gauge.samples:
                yield gauge
        if state.saes:
            gauge = GaugeMetricFamily("sae_job_sae_running", _RUNNING_HELP, labels=["sae"])
            for sae in state.saes:
                gauge.add_metric([sae.name], float(sae.phase == "Running"))
            yield gauge


@contextmanager
def serve_progress(reporter: ProgressReporter, host: str, port: int) -> Iterator[str]:
    """Serve a reporter's state while the block runs; gives the server's address.

    Raises:
        OSError: the address cannot be bound.
    """
    registry = CollectorRegistry()
    registry.register(ProgressCollector(reporter))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/progress":
                body, content_type = reporter.state.model_dump_json(by_alias=True).encode(), "application/json"
            elif self.path == "/metrics":
                body, content_type = generate_latest(registry), CONTENT_TYPE_LATEST
            else:
                self.send_error(404, "only /progress and /metrics are served")
                return
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Polls are not worth a line in the pod's log."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True, name="progress")
    thread.start()
    try:
        yield f"http://{server.server_address[0]}:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
