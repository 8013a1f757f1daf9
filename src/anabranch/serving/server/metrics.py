"""What /metrics tells, for Prometheus."""

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from anabranch.serving.server.backend import Backend, State
from anabranch.serving.server.gate import Gate
from anabranch.serving.server.worker import resident_bytes

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts requests; reads the rest where it is when asked."""

    def __init__(self, backend: Backend, gate: Gate) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "anabranch_requests", "Requests ended; 499: the client left", ("endpoint", "status"),
            registry=self._registry,
        )  # fmt: skip
        self.request_s = Histogram(
            "anabranch_request_seconds", "Of answered requests, from head to end", ("endpoint",),
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Now(backend, gate))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Now(Collector):
    def __init__(self, backend: Backend, gate: Gate) -> None:
        self._backend, self._gate = backend, gate

    def collect(self) -> Iterator[Metric]:
        backend, gate, stats = self._backend, self._gate, self._backend.stats
        yield _gauge("requests_running", "Requests being computed", gate.running)
        yield _gauge("requests_inside", "Requests let in: running, waiting or sending", gate.inside)
        yield _gauge("worker_ready", "Whether the engine answers", backend.state is State.READY)
        yield _gauge("worker_pid", "Process of the engine", backend.pid or 0)
        yield CounterMetricFamily(
            "anabranch_worker_restarts", "Workers that died and were replaced", backend.restarts
        )
        memory = GaugeMetricFamily(
            "anabranch_resident_bytes", "Memory of the front and the worker", labels=["process"]
        )
        memory.add_metric(["front"], resident_bytes())
        if stats is not None:
            memory.add_metric(["worker"], stats.resident_bytes)
            pages = GaugeMetricFamily("anabranch_kv_pages", "Pages of keys and values", labels=["state"])
            pages.add_metric(["free"], stats.free)
            pages.add_metric(["cached"], stats.cached)
            pages.add_metric(["total"], stats.pages)
            yield pages
            yield _gauge("kv_pages_leaked", "Held by nobody, at the last check", stats.leaked)
            yield _gauge("chains_running", "Chains in a slot", stats.running)
            yield _gauge("chains_waiting", "Chains without a slot", stats.waiting)
            yield CounterMetricFamily("anabranch_page_checks", "Checks of pages at idle", stats.checks)
            for name, count in asdict(stats.tally).items():
                yield CounterMetricFamily(f"anabranch_engine_{name}", "Of this worker: see Tally", count)
        yield memory


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"anabranch_{name}", what, float(value))
