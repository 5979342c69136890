//! What was told of jobs lately.
//!
//! One task hears all events of the queue and keeps them: a bounded ring for each job, and a bound on
//! all rings together, beyond which the job that was quiet for longest is forgotten. Readers keep an
//! index of their own into a ring, so that a slow one costs nothing but what it misses.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hutch_proto::{Event, EventKind, JobId};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The most bytes of output that are kept for one job.
const JOB_BYTES: usize = 2 << 20;
/// The most events that are kept for one job.
const JOB_EVENTS: usize = 4096;
/// The most bytes that are kept for all jobs.
const ALL_BYTES: usize = 64 << 20;
/// What an event costs besides its output.
const EVENT_BYTES: usize = 300;
/// What a job costs besides its events.
const RING_BYTES: usize = 300;

/// What was told of jobs lately.
#[derive(Debug, Default)]
pub(crate) struct Hub(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    rings: HashMap<JobId, Ring>,
    /// The jobs by when they were last heard of, the quietest first.
    quiet: BTreeMap<u64, JobId>,
    listeners: HashMap<JobId, watch::Sender<()>>,
    bytes: usize,
    clock: u64,
}

/// The latest events of one job.
#[derive(Debug, Default)]
struct Ring {
    events: VecDeque<Arc<Event>>,
    /// The index of the first of them, counted from the job's first.
    first: u64,
    bytes: usize,
    touched: u64,
    finished: bool,
}

/// What a reader gets.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// The events from the reader's index on.
    pub(crate) events: Vec<Arc<Event>>,
    /// The index to go on from.
    pub(crate) next: u64,
    /// How many events are no longer kept.
    pub(crate) lost: u64,
}

/// Wakes when something is told of a job.
#[derive(Debug)]
pub(crate) struct Listener {
    hub: Arc<Hub>,
    id: JobId,
    /// Always there but while it is dropped.
    changes: Option<watch::Receiver<()>>,
}

impl Listener {
    /// Waits for the next thing that is told of the job.
    pub(crate) async fn changed(&mut self) {
        if let Some(changes) = &mut self.changes {
            // The hub outlives its listeners, so that an error cannot be.
            let _ = changes.changed().await;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.changes = None;
        let mut state = self.hub.state();
        if state.listeners.get(&self.id).is_some_and(|sender| sender.receiver_count() == 0) {
            state.listeners.remove(&self.id);
        }
    }
}

impl Hub {
    /// Hears events until the gateway ends.
    pub(crate) async fn listen(
        self: Arc<Self>,
        mut events: broadcast::Receiver<Event>,
        closing: CancellationToken,
    ) {
        loop {
            let event = tokio::select! {
                () = closing.cancelled() => return,
                event = events.recv() => event,
            };
            match event {
                Ok(event) => self.hear(event),
                Err(RecvError::Lagged(missed)) => tracing::debug!(missed, "events were lost"),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Keeps an event and wakes those who wait for it.
    pub(crate) fn hear(&self, event: Event) {
        let id = event.id;
        let mut state = self.state();
        state.keep(event);
        while state.bytes > ALL_BYTES && state.rings.len() > 1 {
            state.forget_quietest();
        }
        if let Some(listener) = state.listeners.get(&id) {
            listener.send_replace(());
        }
    }

    /// A listener to one job.
    pub(crate) fn listener(self: &Arc<Self>, id: JobId) -> Listener {
        let mut state = self.state();
        let sender = state.listeners.entry(id).or_insert_with(|| watch::Sender::new(()));
        Listener { changes: Some(sender.subscribe()), hub: Arc::clone(self), id }
    }

    /// Whether it was told that the job has ended.
    pub(crate) fn has_finished(&self, id: JobId) -> bool {
        self.state().rings.get(&id).is_some_and(|ring| ring.finished)
    }

    /// The events of a job from this index on; none if nothing is kept of it.
    pub(crate) fn read(&self, id: JobId, from: u64) -> Option<Batch> {
        let state = self.state();
        let ring = state.rings.get(&id)?;
        let skip = usize::try_from(from.saturating_sub(ring.first)).unwrap_or(usize::MAX);
        Some(Batch {
            events: ring.events.iter().skip(skip).cloned().collect(),
            next: (ring.first + ring.events.len() as u64).max(from),
            lost: ring.first.saturating_sub(from),
        })
    }

    /// The index after the event of this attempt and number; none if nothing is kept of the job.
    pub(crate) fn index_after(&self, id: JobId, attempt: u32, seq: u64) -> Option<u64> {
        let state = self.state();
        let ring = state.rings.get(&id)?;
        let seen = ring.events.iter().rposition(|event| (event.attempt, event.seq) <= (attempt, seq));
        Some(ring.first + seen.map_or(0, |index| index as u64 + 1))
    }

    /// What is kept of a job's output: stdout, or else stderr.
    pub(crate) fn output(&self, id: JobId, stdout: bool) -> Vec<u8> {
        let events = self.read(id, 0).map(|batch| batch.events).unwrap_or_default();
        let last = events.last().map_or(0, |event| event.attempt);
        let mut output = Vec::new();
        for event in events.iter().filter(|event| event.attempt == last) {
            match &event.kind {
                EventKind::Stdout(chunk) if stdout => output.extend(chunk.bytes()),
                EventKind::Stderr(chunk) if !stdout => output.extend(chunk.bytes()),
                _ => {}
            }
        }
        output
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn keep(&mut self, event: Event) {
        let id = event.id;
        self.clock += 1;
        let ring = self.rings.entry(id).or_default();
        let before = ring.cost();
        self.quiet.remove(&ring.touched);
        ring.touched = self.clock;
        self.quiet.insert(ring.touched, id);
        // A job's first event brings the cost of its ring along.
        let known = if ring.events.is_empty() && ring.first == 0 { 0 } else { before };
        ring.push(event);
        self.bytes = self.bytes + ring.cost() - known;
    }

    fn forget_quietest(&mut self) {
        let quietest = self.quiet.pop_first().and_then(|(_, id)| self.rings.remove(&id));
        if let Some(ring) = quietest {
            self.bytes -= ring.cost();
        }
    }
}

impl Ring {
    fn cost(&self) -> usize {
        RING_BYTES + self.bytes
    }

    fn push(&mut self, event: Event) {
        self.finished |= matches!(event.kind, EventKind::Finished { .. });
        self.bytes += cost(&event);
        self.events.push_back(Arc::new(event));
        while self.bytes > JOB_BYTES || self.events.len() > JOB_EVENTS {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= cost(&oldest);
            self.first += 1;
        }
    }
}

fn cost(event: &Event) -> usize {
    let output = match &event.kind {
        EventKind::Stdout(chunk) | EventKind::Stderr(chunk) => {
            chunk.text.as_ref().or(chunk.base64.as_ref()).map_or(0, String::len)
        }
        _ => 0,
    };
    EVENT_BYTES + output
}

#[cfg(test)]
mod tests {
    use hutch_proto::{OutputChunk, Status, Timestamp};

    use super::*;

    fn event(id: JobId, seq: u64, kind: EventKind) -> Event {
        Event { id, attempt: 1, seq, at: Timestamp::now(), kind }
    }

    fn stdout(id: JobId, seq: u64, text: &str) -> Event {
        event(id, seq, EventKind::Stdout(OutputChunk::new("main", text.as_bytes())))
    }

    #[test]
    fn a_reader_goes_on_where_it_was() {
        let (hub, id) = (Hub::default(), JobId::generate());
        assert!(hub.read(id, 0).is_none());
        hub.hear(stdout(id, 1, "a"));
        hub.hear(stdout(id, 2, "b"));
        let batch = hub.read(id, 0).expect("kept");
        assert_eq!((batch.events.len(), batch.next, batch.lost), (2, 2, 0));
        assert!(hub.read(id, batch.next).expect("kept").events.is_empty());
        assert_eq!(hub.index_after(id, 1, 1), Some(1));
        assert_eq!(hub.index_after(id, 1, 9), Some(2));
        assert_eq!(hub.index_after(id, 0, 0), Some(0));
        assert_eq!(hub.output(id, true), b"ab");
        assert!(!hub.has_finished(id));
        let finished = EventKind::Finished { status: Status::Succeeded, reason: None };
        hub.hear(event(id, 3, finished));
        assert!(hub.has_finished(id));
    }

    #[test]
    fn a_flood_costs_no_more_than_its_bound() {
        let (hub, id) = (Hub::default(), JobId::generate());
        let piece = "x".repeat(64 << 10);
        for seq in 0..100 {
            hub.hear(stdout(id, seq, &piece));
        }
        let batch = hub.read(id, 0).expect("kept");
        assert!(batch.lost > 60 && batch.next == 100, "{} {}", batch.lost, batch.next);
        for _ in 0..200 {
            let other = JobId::generate();
            for seq in 0..10 {
                hub.hear(stdout(other, seq, &piece));
            }
        }
        let state = hub.state();
        assert!(state.bytes <= ALL_BYTES && state.rings.len() < 200);
        assert_eq!(state.bytes, state.rings.values().map(Ring::cost).sum::<usize>());
        assert_eq!(state.quiet.len(), state.rings.len());
    }

    #[tokio::test]
    async fn those_who_wait_are_woken_and_forgotten() {
        let (hub, id) = (Arc::new(Hub::default()), JobId::generate());
        let mut listener = hub.listener(id);
        hub.hear(stdout(id, 1, "a"));
        listener.changed().await;
        drop(hub.listener(id));
        assert_eq!(hub.state().listeners.len(), 1);
        drop(listener);
        assert!(hub.state().listeners.is_empty());
    }
}
