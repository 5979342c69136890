//! Numbers the events that the queue itself tells of.
//!
//! A worker counts the events of its attempt; the `finished` event comes from the queue, and its
//! number must follow the worker's last one. So each event that passes is noted, for jobs that are
//! in somebody's hands, and forgotten when the job ends.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use hutch_proto::{Event, EventKind, JobId, JobResult, Timestamp};

/// The last number told of each job that is in somebody's hands.
#[derive(Debug, Default)]
pub(crate) struct Sequences(Mutex<HashMap<JobId, (u32, u64)>>);

impl Sequences {
    /// Begins to watch an attempt.
    pub(crate) fn begin(&self, id: JobId, attempt: u32) {
        self.lock().insert(id, (attempt, 0));
    }

    /// Notes an event that passes.
    pub(crate) fn note(&self, event: &Event) {
        if let Some((attempt, seq)) = self.lock().get_mut(&event.id)
            && *attempt == event.attempt
        {
            *seq = (*seq).max(event.seq);
        }
    }

    /// Stops watching: the job went back.
    pub(crate) fn forget(&self, id: JobId) {
        self.lock().remove(&id);
    }

    /// The `finished` event of a job that ends now.
    pub(crate) fn finished(&self, result: &JobResult) -> Event {
        let last = self.lock().remove(&result.id);
        let seq = last.filter(|(attempt, _)| *attempt == result.attempt).map_or(0, |(_, seq)| seq);
        Event {
            id: result.id,
            attempt: result.attempt,
            seq: seq + 1,
            at: Timestamp::now(),
            kind: EventKind::Finished { status: result.status, reason: result.reason },
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, (u32, u64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
