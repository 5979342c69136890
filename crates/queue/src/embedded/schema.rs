//! The tables of the embedded queue, and every change that a job can go through there.
//!
//! ```text
//!              take                    finish
//!   queued ------------> running ------------------> finished
//!     ^  |                |   |                          ^
//!     |  | cancel, expiry |   | cancelled before, or     |
//!     |  |                |   | no attempts left         |
//!     |  +--------------------+--------------------------+
//!     +-------------------+
//!       give back, lease ran out, process died
//! ```
//!
//! Each function runs inside the writer's transaction and tells what must follow once it is
//! committed. A lease is a token in the job's row: whoever brings another token has lost it. How
//! long a lease still lives is not in here; see [`super::writer`].

use std::collections::BTreeMap;

use hutch_proto::{JobId, JobResult, JobSpec, Reason, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::DeadLetter;
use crate::views::{self, id_bytes, state};
use crate::{CancelOutcome, Finished, GiveBack};

pub(super) const VERSION: i64 = 1;

/// `attempts` counts those begun. Specs and results are tables of their own, so that a change of
/// state does not rewrite megabytes.
pub(super) const SCHEMA: &str = "
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE,
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,
    state INTEGER NOT NULL,
    submitted_at INTEGER NOT NULL,
    expires_at INTEGER,
    attempts INTEGER NOT NULL DEFAULT 0,
    max_attempts INTEGER NOT NULL,
    token INTEGER NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '',
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    status TEXT,
    finished_at INTEGER,
    labels TEXT NOT NULL
);
CREATE INDEX jobs_ready ON jobs (queue, priority DESC, seq) WHERE state = 0;
CREATE UNIQUE INDEX jobs_token ON jobs (token) WHERE token > 0;
CREATE INDEX jobs_unfinished ON jobs (queue, state) WHERE state < 2;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE INDEX jobs_status ON jobs (status, seq);
CREATE INDEX jobs_finished_at ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE specs (seq INTEGER PRIMARY KEY, spec BLOB NOT NULL);
CREATE TABLE results (seq INTEGER PRIMARY KEY, result BLOB NOT NULL);
CREATE TABLE job_labels (
    name TEXT NOT NULL, value TEXT NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY (name, value, seq)
) WITHOUT ROWID;
CREATE INDEX job_labels_seq ON job_labels (seq);
CREATE TABLE dead_letters (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    queue TEXT NOT NULL,
    at INTEGER NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    spec BLOB NOT NULL
);
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta (name, value) VALUES ('opened', 0);
";

/// A job on its way in, with all that would cost the writer time already done.
#[derive(Debug)]
pub(super) struct NewJob {
    pub(super) id: JobId,
    pub(super) queue: String,
    pub(super) priority: u8,
    pub(super) max_attempts: u32,
    pub(super) expires_in_ms: Option<u64>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) spec: Vec<u8>,
}

/// A job's terminal record, ready to be written.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) result: JobResult,
    pub(super) json: Vec<u8>,
}

impl Record {
    /// # Errors
    /// What serde says; no result that can be built makes it fail.
    pub(super) fn new(result: JobResult) -> serde_json::Result<Self> {
        let json = serde_json::to_vec(&result)?;
        Ok(Self { result, json })
    }
}

/// A job taken out for somebody.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) id: JobId,
    pub(super) token: u64,
    pub(super) attempt: u32,
    pub(super) submitted_at: Timestamp,
    pub(super) spec: JobSpec,
}

/// A job that has ended, and the number of its row.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) seq: i64,
    pub(super) queue: String,
    pub(super) result: JobResult,
}

/// What became of a job that came back.
#[derive(Debug)]
pub(super) enum Returned {
    /// It waits again.
    Queued,
    /// It was settled instead.
    Settled(Box<Ended>),
    /// The lease was another's.
    Fenced,
}

/// Counts the openings of this file; the upper half of every token, so that tokens only grow.
pub(super) fn count_opening(db: &Connection) -> rusqlite::Result<i64> {
    db.query_row("UPDATE meta SET value = value + 1 WHERE name = 'opened' RETURNING value", [], |row| {
        row.get(0)
    })
}

/// Tokens of jobs that were running when the last owner of the file ended.
pub(super) fn orphans(db: &Connection) -> rusqlite::Result<Vec<u64>> {
    let mut query = db.prepare_cached("SELECT token FROM jobs WHERE state = ?1")?;
    let rows = query.query_map([state::RUNNING], |row| row.get::<_, i64>(0))?;
    rows.map(|token| token.map(i64::cast_unsigned)).collect()
}

/// Sequence numbers of waiting jobs that expire, and when, in milliseconds since 1970.
pub(super) fn expiring(db: &Connection) -> rusqlite::Result<Vec<(i64, i64)>> {
    let mut query =
        db.prepare_cached("SELECT seq, expires_at FROM jobs WHERE state = ?1 AND expires_at IS NOT NULL")?;
    let rows = query.query_map([state::QUEUED], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

/// Writes a new job; the number of its row, or `None` where the id was there before.
pub(super) fn submit(db: &Connection, job: &NewJob, now: Timestamp) -> rusqlite::Result<Option<i64>> {
    let expires_at =
        job.expires_in_ms.map(|ms| now.unix_ms().saturating_add(i64::try_from(ms).unwrap_or(i64::MAX)));
    let labels = serde_json::to_string(&job.labels).unwrap_or_else(|_| "{}".to_owned());
    let seq: Option<i64> = db
        .prepare_cached(
            "INSERT INTO jobs (id, queue, priority, state, submitted_at, expires_at, max_attempts, labels)
             VALUES (?1, ?2, ?3, 0, ?4, ?5, ?6, ?7) ON CONFLICT (id) DO NOTHING RETURNING seq",
        )?
        .query_row(
            params![
                id_bytes(job.id),
                job.queue,
                job.priority,
                now.unix_ms(),
                expires_at,
                job.max_attempts,
                labels
            ],
            |row| row.get(0),
        )
        .optional()?;
    if let Some(seq) = seq {
        db.prepare_cached("INSERT INTO specs (seq, spec) VALUES (?1, ?2)")?
            .execute(params![seq, job.spec])?;
        views::insert_labels(db, seq, &job.labels)?;
    }
    Ok(seq)
}

/// Takes the best waiting job of these queues: highest priority, then oldest.
///
/// A spec that cannot be read any more is settled and passed over; such results are added to `settled`.
pub(super) fn take(
    db: &Connection,
    queues: &[String],
    worker: &str,
    next_token: &mut u64,
    settled: &mut Vec<Ended>,
) -> rusqlite::Result<Option<Taken>> {
    loop {
        let Some(seq) = best(db, queues)? else { return Ok(None) };
        let token = *next_token;
        *next_token += 1;
        let (id, attempt, submitted_at) = db
            .prepare_cached(
                "UPDATE jobs SET state = 1, token = ?2, worker = ?3, attempts = attempts + 1
                 WHERE seq = ?1 RETURNING id, attempts, submitted_at",
            )?
            .query_row(params![seq, token.cast_signed(), worker], |row| {
                Ok((views::id_at(row, 0)?, row.get(1)?, Timestamp::from_unix_ms(row.get(2)?)))
            })?;
        let spec: Vec<u8> =
            db.prepare_cached("SELECT spec FROM specs WHERE seq = ?1")?.query_row([seq], |row| row.get(0))?;
        match serde_json::from_slice(&spec) {
            Ok(spec) => return Ok(Some(Taken { id, token, attempt, submitted_at, spec })),
            Err(e) => {
                let message = format!("the stored spec cannot be read: {e}");
                if let Some(job) = Job::by_token(db, token)? {
                    bury(db, &job, Reason::SpecInvalid, &message)?;
                    settled.push(settle(db, &job, Reason::SpecInvalid, message)?);
                }
            }
        }
    }
}

fn best(db: &Connection, queues: &[String]) -> rusqlite::Result<Option<i64>> {
    let mut query = db.prepare_cached(
        "SELECT priority, seq FROM jobs WHERE state = 0 AND queue = ?1 ORDER BY priority DESC, seq LIMIT 1",
    )?;
    let mut best: Option<(i64, i64)> = None;
    for queue in queues {
        let head: Option<(i64, i64)> =
            query.query_row([queue], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        if let Some((priority, seq)) = head
            && best.is_none_or(|(p, s)| (priority, -seq) > (p, -s))
        {
            best = Some((priority, seq));
        }
    }
    Ok(best.map(|(_, seq)| seq))
}

/// Makes `record` the terminal record, if the token still holds the job; `None` where it does not.
/// With it, the number of the job's row.
pub(super) fn finish(
    db: &Connection,
    token: u64,
    record: &Record,
) -> rusqlite::Result<Option<(Finished, i64)>> {
    let Some(job) = Job::by_token(db, token)? else { return Ok(None) };
    match job.state {
        state::RUNNING if job.id == record.result.id => {
            write_record(db, job.seq, record)?;
            Ok(Some((Finished::Recorded, job.seq)))
        }
        state::FINISHED => Ok(Some((Finished::AlreadyFinished, job.seq))),
        _ => Ok(None),
    }
}

/// Puts a job back, or settles it where it may not be tried again.
pub(super) fn give_back(
    db: &Connection,
    token: u64,
    how: &GiveBack,
    expired: impl Fn(i64) -> bool,
) -> rusqlite::Result<Returned> {
    let Some(job) = Job::by_token(db, token)?.filter(|job| job.state == state::RUNNING) else {
        return Ok(Returned::Fenced);
    };
    if job.cancel_requested {
        return settle(db, &job, Reason::Requested, CANCELLED.to_owned()).map(settled);
    }
    let spent = match how {
        GiveBack::Failed { reason, message } if job.attempts >= job.max_attempts => {
            let message = format!("attempt {} of {}: {message}", job.attempts, job.max_attempts);
            bury(db, &job, *reason, &message)?;
            return settle(db, &job, *reason, message).map(settled);
        }
        GiveBack::Failed { .. } => job.attempts,
        GiveBack::Unspent => job.attempts.saturating_sub(1),
    };
    if expired(job.seq) {
        return settle(db, &job, Reason::Expired, EXPIRED.to_owned()).map(settled);
    }
    db.prepare_cached("UPDATE jobs SET state = 0, token = 0, worker = '', attempts = ?2 WHERE seq = ?1")?
        .execute(params![job.seq, spent])?;
    Ok(Returned::Queued)
}

fn settled(ended: Ended) -> Returned {
    Returned::Settled(Box::new(ended))
}

/// Settles a job whose time is over, if it still waits.
pub(super) fn expire(db: &Connection, seq: i64) -> rusqlite::Result<Option<Ended>> {
    match Job::by_seq(db, seq)? {
        Some(job) if job.state == state::QUEUED => {
            settle(db, &job, Reason::Expired, EXPIRED.to_owned()).map(Some)
        }
        _ => Ok(None),
    }
}

/// Cancels a job: at once if it waits; else the wish is kept, and the token of its holder returned.
pub(super) fn cancel(
    db: &Connection,
    id: JobId,
) -> rusqlite::Result<(CancelOutcome, Option<Ended>, Option<u64>)> {
    let Some(job) = Job::by_id(db, id)? else { return Ok((CancelOutcome::Unknown, None, None)) };
    match job.state {
        state::QUEUED => {
            let ended = settle(db, &job, Reason::Requested, CANCELLED.to_owned())?;
            Ok((CancelOutcome::Accepted, Some(ended), None))
        }
        state::RUNNING => {
            db.prepare_cached("UPDATE jobs SET cancel_requested = 1 WHERE seq = ?1")?.execute([job.seq])?;
            Ok((CancelOutcome::Accepted, None, Some(job.token)))
        }
        _ => Ok((CancelOutcome::AlreadyFinished, None, None)),
    }
}

/// Forgets jobs that ended before `moment`, at most `limit` of them; how many there were.
pub(super) fn prune(db: &Connection, moment: Timestamp, limit: u32) -> rusqlite::Result<usize> {
    db.prepare_cached("DELETE FROM dead_letters WHERE at < ?1")?.execute([moment.unix_ms()])?;
    views::prune(db, moment, limit, &["job_labels", "results", "specs", "jobs"])
}

/// Jobs that were given up, oldest first.
pub(super) fn dead_letters(db: &Connection, limit: usize) -> rusqlite::Result<Vec<DeadLetter>> {
    let mut query =
        db.prepare_cached("SELECT id, queue, at, reason, message FROM dead_letters ORDER BY seq LIMIT ?1")?;
    let rows = query.query_map([i64::try_from(limit).unwrap_or(i64::MAX)], |row| {
        let reason: String = row.get(3)?;
        Ok(DeadLetter {
            id: views::id_at(row, 0)?,
            queue: row.get(1)?,
            at: Timestamp::from_unix_ms(row.get(2)?),
            reason: Reason::ALL.iter().copied().find(|r| r.as_str() == reason).unwrap_or(Reason::HostError),
            message: row.get(4)?,
        })
    })?;
    rows.collect()
}

const CANCELLED: &str = "cancelled as asked";
const EXPIRED: &str = "not started within expires_in_ms";

/// What of a job decides over its way.
struct Job {
    seq: i64,
    id: JobId,
    queue: String,
    state: i64,
    attempts: u32,
    max_attempts: u32,
    token: u64,
    worker: String,
    cancel_requested: bool,
    submitted_at: Timestamp,
    labels: BTreeMap<String, String>,
}

impl Job {
    fn by_id(db: &Connection, id: JobId) -> rusqlite::Result<Option<Self>> {
        Self::find(db, "id = ?1", params![id_bytes(id)])
    }

    fn by_seq(db: &Connection, seq: i64) -> rusqlite::Result<Option<Self>> {
        Self::find(db, "seq = ?1", params![seq])
    }

    fn by_token(db: &Connection, token: u64) -> rusqlite::Result<Option<Self>> {
        Self::find(db, "token = ?1 AND token > 0", params![token.cast_signed()])
    }

    fn find(db: &Connection, which: &str, values: &[&dyn rusqlite::ToSql]) -> rusqlite::Result<Option<Self>> {
        db.prepare_cached(&format!(
            "SELECT seq, id, queue, state, attempts, max_attempts, token, worker, cancel_requested,
             submitted_at, labels FROM jobs WHERE {which}"
        ))?
        .query_row(values, |row| {
            Ok(Self {
                seq: row.get(0)?,
                id: views::id_at(row, 1)?,
                queue: row.get(2)?,
                state: row.get(3)?,
                attempts: row.get(4)?,
                max_attempts: row.get(5)?,
                token: row.get::<_, i64>(6)?.cast_unsigned(),
                worker: row.get(7)?,
                cancel_requested: row.get(8)?,
                submitted_at: Timestamp::from_unix_ms(row.get(9)?),
                labels: views::json_at(row, 10)?,
            })
        })
        .optional()
    }
}

/// Ends a job that no program decided over.
fn settle(db: &Connection, job: &Job, reason: Reason, message: String) -> rusqlite::Result<Ended> {
    let mut result = JobResult::without_run(job.id, job.labels.clone(), job.submitted_at, reason, message);
    result.attempt = job.attempts;
    result.worker.clone_from(&job.worker);
    let record = Record::new(result).map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
    write_record(db, job.seq, &record)?;
    Ok(Ended { seq: job.seq, queue: job.queue.clone(), result: record.result })
}

fn write_record(db: &Connection, seq: i64, record: &Record) -> rusqlite::Result<()> {
    db.prepare_cached("INSERT INTO results (seq, result) VALUES (?1, ?2)")?
        .execute(params![seq, record.json])?;
    db.prepare_cached("UPDATE jobs SET state = 2, status = ?2, finished_at = ?3 WHERE seq = ?1")?
        .execute(params![seq, record.result.status.as_str(), Timestamp::now().unix_ms()])?;
    db.prepare_cached("DELETE FROM specs WHERE seq = ?1")?.execute([seq])?;
    Ok(())
}

/// Keeps a copy of a job that was given up, with the reason.
fn bury(db: &Connection, job: &Job, reason: Reason, message: &str) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO dead_letters (id, queue, at, reason, message, spec)
         SELECT ?1, ?2, ?3, ?4, ?5, spec FROM specs WHERE seq = ?6",
    )?
    .execute(params![
        id_bytes(job.id),
        job.queue,
        Timestamp::now().unix_ms(),
        reason.as_str(),
        message,
        job.seq
    ])?;
    Ok(())
}
