//! What is kept of a job in the object store, beside the broker.
//!
//! - `results/<id>`: the terminal record, the JSON of the result. Made once, by a conditional create;
//!   who comes second reads what is there. Whatever is told of a job's end is these bytes.
//! - `cancelled/<id>`: somebody wishes that the job be cancelled.
//! - `attempts/<id>/…`: the attempt ledger. Brokers count deliveries, each version in its own way
//!   (3.10 counts what was put back on purpose, 4.3 does not), and none knows which deliveries were
//!   attempts. A job's first delivery is not written down: no entry costs anything until something
//!   goes wrong. Entries are objects of their own, so that two workers never overwrite each other's:
//!   `started-<n>` for the n-th delivery, `unspent-<uuid>` for a delivery that was no attempt, and
//!   `failed-<n>-<uuid>` with the reason.
//! - `bands/<queue>/<priority>`: the queue has a queue of its own for this priority.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt as _;
use hutch_proto::{JobId, JobResult, Reason};
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use uuid::Uuid;

use crate::QueueError;

/// Longest wait for the store to do one thing.
const LIMIT: Duration = Duration::from_secs(20);
/// More than this is no result of ours.
const MAX_RECORD: u64 = 256 << 20;

/// A terminal record: a result, and the bytes that are told of it.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) result: JobResult,
    pub(super) json: Bytes,
}

impl Record {
    pub(super) fn new(result: JobResult) -> Result<Self, QueueError> {
        let json = serde_json::to_vec(&result)
            .map_err(|e| QueueError::Setup(format!("the result of {} is no JSON: {e}", result.id)))?;
        Ok(Self { result, json: json.into() })
    }

    pub(super) fn read(json: Bytes) -> Result<Self, QueueError> {
        let result = serde_json::from_slice(&json)
            .map_err(|e| QueueError::Unavailable(format!("a stored result cannot be read: {e}")))?;
        Ok(Self { result, json })
    }
}

/// What the ledger says of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ledger {
    /// The highest delivery that was written down.
    pub(super) started: u32,
    /// Deliveries that were no attempts.
    pub(super) unspent: u32,
    /// The last failure: of which delivery, and its object.
    failed: Option<(u32, Path)>,
}

/// Why an attempt failed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) reason: Reason,
    pub(super) message: String,
    pub(super) worker: String,
}

/// The store, by what is kept there.
#[derive(Debug, Clone)]
pub(super) struct Records(Arc<dyn ObjectStore>);

impl Records {
    pub(super) fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self(store)
    }

    /// The terminal record, if the job has ended.
    pub(super) async fn get(&self, id: JobId) -> Result<Option<Record>, QueueError> {
        self.read(&result_path(id)).await?.map(Record::read).transpose()
    }

    /// Makes the terminal record; if there is one, that one is returned.
    pub(super) async fn create(&self, record: &Record) -> Result<Option<Record>, QueueError> {
        let id = record.result.id;
        if self.put_new(&result_path(id), record.json.clone()).await? {
            return Ok(None);
        }
        match self.get(id).await? {
            // Ours: an earlier try arrived, but its answer did not.
            Some(there) if there.json == record.json => Ok(None),
            Some(there) => Ok(Some(there)),
            None => Err(QueueError::Unavailable(format!("the record of {id} is there, but cannot be found"))),
        }
    }

    pub(super) async fn mark_cancelled(&self, id: JobId) -> Result<(), QueueError> {
        self.put_new(&cancel_path(id), Bytes::new()).await.map(drop)
    }

    pub(super) async fn is_cancelled(&self, id: JobId) -> Result<bool, QueueError> {
        match within("look up", self.0.head(&cancel_path(id))).await {
            Ok(_) => Ok(true),
            Err(Failed::NotFound) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    pub(super) async fn ledger(&self, id: JobId) -> Result<Ledger, QueueError> {
        let entries: Vec<_> =
            within("list", self.0.list(Some(&ledger_path(id))).try_collect::<Vec<_>>()).await?;
        let mut ledger = Ledger::default();
        for entry in entries {
            ledger.add(entry.location);
        }
        Ok(ledger)
    }

    /// Writes down the `number`-th delivery.
    pub(super) async fn note_started(&self, id: JobId, number: u32) -> Result<(), QueueError> {
        self.put_new(&ledger_path(id).join(format!("started-{number}")), Bytes::new()).await.map(drop)
    }

    /// Writes down that a delivery was no attempt.
    pub(super) async fn note_unspent(&self, id: JobId) -> Result<(), QueueError> {
        let entry = ledger_path(id).join(format!("unspent-{}", Uuid::now_v7().simple()));
        self.put_new(&entry, Bytes::new()).await.map(drop)
    }

    /// Writes down why the `number`-th delivery failed.
    pub(super) async fn note_failed(&self, id: JobId, number: u32, why: &Failure) -> Result<(), QueueError> {
        let entry = ledger_path(id).join(format!("failed-{number}-{}", Uuid::now_v7().simple()));
        let json = serde_json::to_vec(why).unwrap_or_default();
        self.put_new(&entry, json.into()).await.map(drop)
    }

    /// Why the delivery before this one failed, if its worker lived to tell.
    pub(super) async fn failure_of(
        &self,
        ledger: &Ledger,
        number: u32,
    ) -> Result<Option<Failure>, QueueError> {
        match &ledger.failed {
            Some((failed, path)) if *failed == number => {
                let json = self.read(path).await?;
                Ok(json.and_then(|json| serde_json::from_slice(&json).ok()))
            }
            _ => Ok(None),
        }
    }

    /// Removes what a job that has ended needs no more. Best effort: what stays is only litter.
    pub(super) async fn clean(&self, id: JobId) {
        let entries = within("list", self.0.list(Some(&ledger_path(id))).try_collect::<Vec<_>>()).await;
        for entry in entries.unwrap_or_default() {
            let _ = within("delete", self.0.delete(&entry.location)).await;
        }
        let _ = within("delete", self.0.delete(&cancel_path(id))).await;
    }

    pub(super) async fn add_band(&self, queue: &str, priority: u8) -> Result<(), QueueError> {
        self.put_new(&bands_path(queue).join(priority.to_string()), Bytes::new()).await.map(drop)
    }

    pub(super) async fn bands(&self, queue: &str) -> Result<BTreeSet<u8>, QueueError> {
        let entries = within("list", self.0.list(Some(&bands_path(queue))).try_collect::<Vec<_>>()).await?;
        Ok(entries.iter().filter_map(|entry| entry.location.filename()?.parse().ok()).collect())
    }

    /// Creates an object; false if there is one.
    async fn put_new(&self, path: &Path, bytes: Bytes) -> Result<bool, QueueError> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match within("create", self.0.put_opts(path, PutPayload::from_bytes(bytes), options)).await {
            Ok(_) => Ok(true),
            Err(Failed::Exists) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    async fn read(&self, path: &Path) -> Result<Option<Bytes>, QueueError> {
        let object = match within("get", self.0.get(path)).await {
            Ok(object) if object.meta.size <= MAX_RECORD => object,
            Ok(object) => {
                return Err(QueueError::Unavailable(format!(
                    "{path} has {} bytes, {MAX_RECORD} are read at most",
                    object.meta.size
                )));
            }
            Err(Failed::NotFound) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        Ok(Some(within("get", object.bytes()).await?))
    }
}

impl Ledger {
    fn add(&mut self, location: Path) {
        let Some(name) = location.filename() else { return };
        let mut parts = name.split('-');
        match (parts.next(), parts.next()) {
            (Some("started"), Some(number)) => {
                self.started = self.started.max(number.parse().unwrap_or(0));
            }
            (Some("unspent"), _) => self.unspent += 1,
            (Some("failed"), Some(number)) => {
                let number = number.parse().unwrap_or(0);
                if self.failed.as_ref().is_none_or(|(last, _)| *last <= number) {
                    self.failed = Some((number, location));
                }
            }
            _ => {}
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What of the store's errors makes a difference.
enum Failed {
    NotFound,
    Exists,
    Other(String),
}

impl From<Failed> for QueueError {
    fn from(failed: Failed) -> Self {
        Self::Unavailable(match failed {
            Failed::NotFound => "the object store does not find it".to_owned(),
            Failed::Exists => "the object store has it already".to_owned(),
            Failed::Other(why) => why,
        })
    }
}

async fn within<T>(
    what: &'static str,
    work: impl Future<Output = object_store::Result<T>>,
) -> Result<T, Failed> {
    match timeout(LIMIT, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(Error::NotFound { .. })) => Err(Failed::NotFound),
        Ok(Err(Error::AlreadyExists { .. } | Error::Precondition { .. })) => Err(Failed::Exists),
        Ok(Err(e)) => Err(Failed::Other(format!("object store: {what}: {e}"))),
        Err(_) => Err(Failed::Other(format!("object store: {what}: no answer in {LIMIT:?}"))),
    }
}

fn result_path(id: JobId) -> Path {
    Path::from("results").join(id.to_string())
}

fn cancel_path(id: JobId) -> Path {
    Path::from("cancelled").join(id.to_string())
}

fn ledger_path(id: JobId) -> Path {
    Path::from("attempts").join(id.to_string())
}

fn bands_path(queue: &str) -> Path {
    Path::from("bands").join(queue)
}
