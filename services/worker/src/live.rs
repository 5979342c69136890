//! What is read at the moment of a scrape: the cgroups of running jobs and the state of the queue.
//!
//! A slot's counters never go back: what a cgroup counts from zero for each job is added up here.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use hutch_layers::Layers;
use hutch_queue::Queue;
use hutch_sandbox::{EngineHandle, SlotGauges};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, IntCounter, IntGauge, Opts};

use crate::metrics::seconds;

/// Reads the gauges of an engine and the counters of a queue, whenever it is collected.
pub(crate) struct Live {
    engine: EngineHandle,
    queue: Arc<dyn Queue>,
    layers: Layers,
    state: Mutex<State>,
    memory: GaugeVec,
    memory_anonymous: GaugeVec,
    memory_file: GaugeVec,
    memory_limit: GaugeVec,
    pids: GaugeVec,
    cpu: CounterVec,
    throttled: CounterVec,
    io: CounterVec,
    pressure: CounterVec,
    connected: IntGauge,
    reconnects: IntCounter,
    redeliveries: IntCounter,
    reaped: IntCounter,
    cache_hits: IntCounter,
    cache_misses: IntCounter,
    store_bytes: IntGauge,
    build: GaugeVec,
}

/// What the last scrape saw.
#[derive(Debug, Default)]
struct State {
    slots: BTreeSet<u32>,
    counted: HashMap<(u32, &'static str, &'static str), u64>,
}

impl State {
    /// By how much a counter of a slot has grown since it was last looked at.
    fn grown(&mut self, slot: u32, what: &'static str, kind: &'static str, now: u64) -> u64 {
        let before = self.counted.insert((slot, what, kind), now).unwrap_or(0);
        now.checked_sub(before).unwrap_or(now)
    }

    /// A new job begins in this slot: its cgroup counts from zero.
    fn begin(&mut self, slot: u32) {
        self.counted.retain(|(of, _, _), _| *of != slot);
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Live {
    pub(crate) fn new(
        engine: EngineHandle,
        queue: Arc<dyn Queue>,
        layers: Layers,
    ) -> prometheus::Result<Self> {
        let slot = &["slot"][..];
        Ok(Self {
            engine,
            queue,
            layers,
            state: Mutex::default(),
            memory: gauge("hutch_cgroup_memory_bytes", "Memory of the job in a slot.", slot)?,
            memory_anonymous: gauge(
                "hutch_cgroup_memory_anonymous_bytes",
                "Anonymous memory of the job in a slot: heaps and stacks.",
                slot,
            )?,
            memory_file: gauge(
                "hutch_cgroup_memory_file_bytes",
                "Memory of files of the job in a slot: page cache and tmpfs.",
                slot,
            )?,
            memory_limit: gauge(
                "hutch_cgroup_memory_limit_bytes",
                "Memory that the job in a slot may have.",
                slot,
            )?,
            pids: gauge("hutch_cgroup_pids", "Processes and threads of the job in a slot.", slot)?,
            cpu: counter("hutch_cgroup_cpu_seconds_total", "Processor time of the jobs in a slot.", slot)?,
            throttled: counter(
                "hutch_cgroup_cpu_throttled_seconds_total",
                "Time for which the jobs in a slot were held back by their limit.",
                slot,
            )?,
            io: counter(
                "hutch_cgroup_io_bytes_total",
                "Bytes that the jobs in a slot read from and wrote to block devices.",
                &["slot", "op"],
            )?,
            pressure: counter(
                "hutch_cgroup_pressure_seconds_total",
                "Time that the jobs in a slot waited for a resource.",
                &["slot", "resource", "kind"],
            )?,
            connected: IntGauge::new("hutch_broker_connected", "Whether the queue can be reached: 1 or 0.")?,
            reconnects: IntCounter::new(
                "hutch_broker_reconnects_total",
                "How often the connection to the queue was made anew.",
            )?,
            redeliveries: IntCounter::new("hutch_redeliveries_total", "Jobs that came a second time.")?,
            reaped: IntCounter::new(
                "hutch_reaped_sandboxes_total",
                "Sandboxes of a killed predecessor that were removed at the start.",
            )?,
            cache_hits: IntCounter::new("hutch_layer_cache_hits_total", "Layers that were there already.")?,
            cache_misses: IntCounter::new(
                "hutch_layer_cache_misses_total",
                "Layers that had to be fetched.",
            )?,
            store_bytes: IntGauge::new("hutch_layer_store_bytes", "Bytes of the layers that are kept here.")?,
            build: gauge("hutch_build_info", "Which build this is; always 1.", &["version"])?,
        })
    }

    /// A new job begins in this slot.
    pub(crate) fn begin(&self, slot: u32) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).begin(slot);
    }

    fn refresh(&self) {
        let gauges = self.engine.gauges();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now: BTreeSet<u32> = gauges.iter().map(|slot| slot.slot).collect();
        for gone in state.slots.difference(&now) {
            let slot = &[gone.to_string()];
            for gauge in
                [&self.memory, &self.memory_anonymous, &self.memory_file, &self.memory_limit, &self.pids]
            {
                // An error says that the row is not there, which is what is wanted.
                let _ = gauge.remove_label_values(slot);
            }
        }
        for slot in &gauges {
            self.refresh_slot(&mut state, slot);
        }
        state.slots = now;
        self.refresh_queue();
    }

    fn refresh_slot(&self, state: &mut State, now: &SlotGauges) {
        let slot = now.slot.to_string();
        self.memory.with_label_values(&[&slot]).set(seconds(now.memory_bytes, 1.0));
        self.memory_anonymous.with_label_values(&[&slot]).set(seconds(now.memory_anonymous_bytes, 1.0));
        self.memory_file.with_label_values(&[&slot]).set(seconds(now.memory_file_bytes, 1.0));
        self.memory_limit.with_label_values(&[&slot]).set(seconds(now.memory_limit_bytes, 1.0));
        self.pids.with_label_values(&[&slot]).set(seconds(now.pids, 1.0));
        let cpu = state.grown(now.slot, "cpu", "", now.cpu_us);
        self.cpu.with_label_values(&[&slot]).inc_by(seconds(cpu, 1e6));
        let throttled = state.grown(now.slot, "throttled", "", now.cpu_throttled_us);
        self.throttled.with_label_values(&[&slot]).inc_by(seconds(throttled, 1e6));
        for (op, bytes) in [("read", now.io_read_bytes), ("write", now.io_write_bytes)] {
            let grown = state.grown(now.slot, "io", op, bytes);
            self.io.with_label_values(&[slot.as_str(), op]).inc_by(seconds(grown, 1.0));
        }
        for (resource, kind, total) in now.pressure_us.iter().flatten() {
            let grown = state.grown(now.slot, resource, kind, *total);
            self.pressure.with_label_values(&[slot.as_str(), resource, kind]).inc_by(seconds(grown, 1e6));
        }
    }

    fn refresh_queue(&self) {
        self.connected.set(i64::from(self.queue.connected()));
        let counters = self.queue.counters();
        raise(&self.reconnects, counters.reconnects);
        raise(&self.redeliveries, counters.redeliveries);
        raise(&self.reaped, self.engine.reaped());
        let cached = self.layers.counts();
        raise(&self.cache_hits, cached.hits);
        raise(&self.cache_misses, cached.misses);
        // A store that cannot be read keeps the number that it had.
        if let Ok(layers) = self.layers.trees().list() {
            let bytes = layers.iter().map(|(_, facts, _)| facts.bytes).sum::<u64>();
            self.store_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
        self.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
    }

    fn parts(&self) -> [&dyn Collector; 17] {
        [
            &self.memory,
            &self.memory_anonymous,
            &self.memory_file,
            &self.memory_limit,
            &self.pids,
            &self.cpu,
            &self.throttled,
            &self.io,
            &self.pressure,
            &self.connected,
            &self.reconnects,
            &self.redeliveries,
            &self.reaped,
            &self.cache_hits,
            &self.cache_misses,
            &self.store_bytes,
            &self.build,
        ]
    }
}

impl Collector for Live {
    fn desc(&self) -> Vec<&Desc> {
        self.parts().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.refresh();
        self.parts().into_iter().flat_map(Collector::collect).collect()
    }
}

/// A collector that a registry can own while others still see it.
#[derive(Debug, Clone)]
pub(crate) struct Shared(pub(crate) Arc<Live>);

impl Collector for Shared {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.collect()
    }
}

fn gauge(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<GaugeVec> {
    GaugeVec::new(Opts::new(name, help), labels)
}

fn counter(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<CounterVec> {
    CounterVec::new(Opts::new(name, help), labels)
}

/// Brings a counter up to a total that is counted elsewhere.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_s_counters_never_go_back() {
        let mut state = State::default();
        assert_eq!(state.grown(0, "cpu", "", 5), 5);
        assert_eq!(state.grown(0, "cpu", "", 7), 2);
        assert_eq!(state.grown(0, "cpu", "", 3), 3, "a cgroup that was not seen to end");
        state.begin(0);
        assert_eq!(state.grown(0, "cpu", "", 9), 9, "a new job");
        assert_eq!(state.grown(1, "cpu", "", 1), 1);
    }
}
