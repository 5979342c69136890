//! What a gateway knows of jobs, since a broker cannot be asked.
//!
//! A table of its own in SQLite, fed by three streams: what is submitted here, what workers say when
//! they begin, and the results. It is a view and may be lost: the jobs are on the broker, the
//! results in the store. A job is `submitting` until the broker has confirmed it, and not shown
//! before; if the gateway dies in between, the next submission of the id publishes it again.
//!
//! One thread writes, several calls in one transaction, as in [`crate::embedded`].

use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use hutch_proto::{JobId, JobSpec, JobView, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, Savepoint, Transaction, TransactionBehavior, params};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::records::Record;
use crate::sqlite::{self, Owned, Readers};
use crate::views::{self, id_bytes, state};
use crate::{ListFilter, QueueDepth, QueueError};

const VERSION: i64 = 1;
const SCHEMA: &str = "
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE,
    queue TEXT NOT NULL,
    state INTEGER NOT NULL,
    submitted_at INTEGER NOT NULL,
    expires_at INTEGER,
    status TEXT,
    finished_at INTEGER,
    labels TEXT NOT NULL
);
CREATE INDEX jobs_unfinished ON jobs (queue, state) WHERE state < 2;
CREATE INDEX jobs_expiring ON jobs (expires_at) WHERE state = 0 AND expires_at IS NOT NULL;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE INDEX jobs_status ON jobs (status, seq);
CREATE INDEX jobs_finished_at ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE results (seq INTEGER PRIMARY KEY, result BLOB NOT NULL);
CREATE TABLE job_labels (
    name TEXT NOT NULL, value TEXT NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY (name, value, seq)
) WITHOUT ROWID;
CREATE INDEX job_labels_seq ON job_labels (seq);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
";

/// Calls of one transaction.
const BATCH: usize = 128;

/// What the index says of a job that is submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun {
    /// The broker has to confirm it yet; since when it is known here.
    Unconfirmed(Timestamp),
    /// It was accepted before.
    Known,
}

/// A job of the index, as far as cancelling and expiry need it.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) id: JobId,
    pub(super) queue: String,
    pub(super) state: i64,
    pub(super) submitted_at: Timestamp,
    pub(super) labels: std::collections::BTreeMap<String, String>,
}

type Answer = Box<dyn FnOnce(Option<String>) + Send>;
type Call = Box<dyn FnOnce(&mut Transaction<'_>) -> Answer + Send>;

/// The index; the process owns its file.
#[derive(Debug)]
pub(super) struct Index {
    calls: Mutex<Option<Sender<Call>>>,
    readers: Readers,
    writer: Mutex<Option<JoinHandle<()>>>,
    gateway: String,
}

impl Index {
    pub(super) fn open(path: &Path) -> Result<Self, QueueError> {
        let db = sqlite::open(path, SCHEMA, VERSION)?;
        let setup = |e: &dyn std::fmt::Display| QueueError::Setup(format!("open {}: {e}", path.display()));
        let fresh = Uuid::now_v7().simple().to_string();
        db.connection
            .execute("INSERT INTO meta VALUES ('gateway', ?1) ON CONFLICT (name) DO NOTHING", [fresh])
            .map_err(|e| setup(&e))?;
        let gateway: String = db
            .connection
            .query_row("SELECT value FROM meta WHERE name = 'gateway'", [], |row| row.get(0))
            .map_err(|e| setup(&e))?;
        let (calls, inbox) = mpsc::channel();
        let writer = std::thread::Builder::new()
            .name("hutch-index".to_owned())
            .spawn(move || write(db, &inbox))
            .map_err(|e| setup(&e))?;
        Ok(Self {
            calls: Mutex::new(Some(calls)),
            readers: Readers::new(path),
            writer: Mutex::new(Some(writer)),
            gateway: format!("hutch.gateway.{gateway}"),
        })
    }

    /// Name of the queue in which this gateway hears of results.
    pub(super) fn gateway(&self) -> &str {
        &self.gateway
    }

    /// Notes a job that is about to be published.
    pub(super) async fn begin(&self, job: &JobSpec) -> Result<Begun, QueueError> {
        let now = Timestamp::now().unix_ms();
        let expires_at =
            job.expires_in_ms.map(|ms| now.saturating_add(i64::try_from(ms).unwrap_or(i64::MAX)));
        let (id, queue, labels) = (job.id, job.queue.clone(), job.labels.clone());
        self.call(move |db| {
            let found: Option<(i64, i64)> = db
                .prepare_cached("SELECT state, submitted_at FROM jobs WHERE id = ?1")?
                .query_row([id_bytes(id)], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            match found {
                Some((state::SUBMITTING, at)) => return Ok(Begun::Unconfirmed(Timestamp::from_unix_ms(at))),
                Some(_) => return Ok(Begun::Known),
                None => {}
            }
            let seq: i64 = db
                .prepare_cached(
                    "INSERT INTO jobs (id, queue, state, submitted_at, expires_at, labels)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6) RETURNING seq",
                )?
                .query_row(
                    params![id_bytes(id), queue, state::SUBMITTING, now, expires_at, to_json(&labels)],
                    |row| row.get(0),
                )?;
            views::insert_labels(db, seq, &labels)?;
            Ok(Begun::Unconfirmed(Timestamp::from_unix_ms(now)))
        })
        .await
    }

    /// Notes that the broker has the job.
    pub(super) async fn confirm(&self, id: JobId) -> Result<(), QueueError> {
        self.call(move |db| {
            db.prepare_cached("UPDATE jobs SET state = ?2 WHERE id = ?1 AND state = ?3")?
                .execute(params![id_bytes(id), state::QUEUED, state::SUBMITTING])
                .map(drop)
        })
        .await
    }

    /// Notes that a worker has begun with a job.
    pub(super) async fn running(&self, id: JobId, at: Timestamp) -> Result<(), QueueError> {
        self.call(move |db| {
            db.prepare_cached(
                "INSERT INTO jobs (id, queue, state, submitted_at, labels) VALUES (?1, '', ?2, ?3, '{}')
                 ON CONFLICT (id) DO UPDATE SET state = ?2 WHERE state < ?2",
            )?
            .execute(params![id_bytes(id), state::RUNNING, at.unix_ms()])
            .map(drop)
        })
        .await
    }

    /// Notes results, each with its queue; whether each was news.
    pub(super) async fn finished(&self, results: Vec<(Record, String)>) -> Result<Vec<bool>, QueueError> {
        self.call(move |db| results.iter().map(|(record, queue)| finish(db, record, queue)).collect()).await
    }

    /// The job, as far as cancelling needs it; none that is not accepted yet.
    pub(super) async fn entry(&self, id: JobId) -> Result<Option<Entry>, QueueError> {
        self.readers
            .read(move |db| {
                db.prepare_cached(
                    "SELECT id, queue, state, submitted_at, labels FROM jobs WHERE id = ?1 AND state >= 0",
                )?
                .query_row([id_bytes(id)], entry)
                .optional()
            })
            .await
    }

    /// Jobs that wait although their time is over; and when the next one's will be.
    pub(super) async fn expired(&self) -> Result<(Vec<Entry>, Option<Timestamp>), QueueError> {
        let now = Timestamp::now().unix_ms();
        self.readers
            .read(move |db| {
                let due = db
                    .prepare_cached(
                        "SELECT id, queue, state, submitted_at, labels FROM jobs
                         WHERE state = 0 AND expires_at <= ?1 LIMIT 1000",
                    )?
                    .query_map([now], entry)?
                    .collect::<Result<_, _>>()?;
                let next: Option<i64> = db
                    .prepare_cached("SELECT min(expires_at) FROM jobs WHERE state = 0 AND expires_at > ?1")?
                    .query_row([now], |row| row.get(0))?;
                Ok((due, next.map(Timestamp::from_unix_ms)))
            })
            .await
    }

    /// Leaves a job's expiry to the worker that takes it.
    pub(super) async fn drop_expiry(&self, id: JobId) -> Result<(), QueueError> {
        self.call(move |db| {
            db.prepare_cached("UPDATE jobs SET expires_at = NULL WHERE id = ?1")?
                .execute([id_bytes(id)])
                .map(drop)
        })
        .await
    }

    /// Forgets jobs that ended before `moment`; at most some hundreds at a time. How many there were.
    pub(super) async fn prune(&self, moment: Timestamp) -> Result<usize, QueueError> {
        self.call(move |db| views::prune(db, moment, 200, &["job_labels", "results", "jobs"])).await
    }

    pub(super) async fn get(&self, id: JobId) -> Result<Option<JobView>, QueueError> {
        self.readers.read(move |db| views::get(db, id)).await
    }

    pub(super) async fn list(&self, filter: &ListFilter) -> Result<Vec<JobView>, QueueError> {
        let filter = filter.clone();
        self.readers.read(move |db| views::list(db, &filter)).await
    }

    pub(super) async fn depths(&self) -> Result<Vec<QueueDepth>, QueueError> {
        self.readers.read(views::depths).await
    }

    /// Lets go of the file.
    pub(super) fn close(&self) {
        drop(self.calls.lock().unwrap_or_else(PoisonError::into_inner).take());
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer
            && writer.join().is_err()
        {
            tracing::error!("the index's writer panicked");
        }
    }

    /// Runs `work` in the next transaction, and answers once it is committed.
    async fn call<T, F>(&self, work: F) -> Result<T, QueueError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let call: Call = Box::new(move |transaction| {
            let outcome = in_savepoint(transaction, work).map_err(|e| e.to_string());
            Box::new(move |failed: Option<String>| {
                let outcome = match failed {
                    Some(why) => Err(why),
                    None => outcome,
                };
                // Nobody waits any more: nobody needs to know.
                let _ = reply.send(outcome);
            })
        });
        let sent = match &*self.calls.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(calls) => calls.send(call).is_ok(),
            None => false,
        };
        if !sent {
            return Err(QueueError::Closed);
        }
        match answer.await {
            Ok(outcome) => outcome.map_err(|why| QueueError::Unavailable(format!("write the index: {why}"))),
            Err(_) => Err(QueueError::Unavailable("the index cannot be written".to_owned())),
        }
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        self.close();
    }
}

fn in_savepoint<T>(
    transaction: &mut Transaction<'_>,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let savepoint: Savepoint<'_> = transaction.savepoint()?;
    let done = work(&savepoint)?;
    savepoint.commit()?;
    Ok(done)
}

fn write(mut db: Owned, inbox: &Receiver<Call>) {
    while let Ok(first) = inbox.recv() {
        let mut calls = vec![first];
        calls.extend(inbox.try_iter().take(BATCH - 1));
        let mut answers = Vec::with_capacity(calls.len());
        let committed = db.connection.transaction_with_behavior(TransactionBehavior::Immediate).and_then(
            |mut transaction| {
                answers.extend(calls.drain(..).map(|call| call(&mut transaction)));
                transaction.commit()
            },
        );
        let failed = committed.err().map(|e| e.to_string());
        if let Some(why) = &failed {
            tracing::error!(why, "the index cannot be written");
        }
        // Calls that were not even begun are dropped here, and their callers hear of that.
        for answer in answers {
            answer(failed.clone());
        }
    }
}

fn finish(db: &Connection, record: &Record, queue: &str) -> rusqlite::Result<bool> {
    let result = &record.result;
    let seq: Option<i64> = db
        .prepare_cached(
            "INSERT INTO jobs (id, queue, state, submitted_at, status, finished_at, labels)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
             ON CONFLICT (id) DO UPDATE SET queue = ?2, state = ?3, status = ?5, finished_at = ?6, labels = ?7
             WHERE state < ?3 RETURNING seq",
        )?
        .query_row(
            params![
                id_bytes(result.id),
                queue,
                state::FINISHED,
                result.timeline.submitted_at.unix_ms(),
                result.status.as_str(),
                Timestamp::now().unix_ms(),
                to_json(&result.labels),
            ],
            |row| row.get(0),
        )
        .optional()?;
    let Some(seq) = seq else { return Ok(false) };
    views::insert_labels(db, seq, &result.labels)?;
    db.prepare_cached("INSERT INTO results (seq, result) VALUES (?1, ?2)")?
        .execute(params![seq, record.json.as_ref()])?;
    Ok(true)
}

fn entry(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        id: views::id_at(row, 0)?,
        queue: row.get(1)?,
        state: row.get(2)?,
        submitted_at: Timestamp::from_unix_ms(row.get(3)?),
        labels: views::json_at(row, 4)?,
    })
}

fn to_json(labels: &std::collections::BTreeMap<String, String>) -> String {
    serde_json::to_string(labels).unwrap_or_else(|_| "{}".to_owned())
}
