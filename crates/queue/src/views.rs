//! What both homes tell of jobs, read from SQLite.
//!
//! The embedded queue and the index beside a broker differ in their tables, but share these columns:
//! `jobs(seq, id, queue, state, status, submitted_at, finished_at, labels)`, `results(seq, result)`
//! and `job_labels(name, value, seq)`. `seq` grows with each submission; `state` is a [`state`] number;
//! moments are milliseconds since 1970; `labels` and `result` are JSON.

use hutch_proto::{JobId, JobState, JobView, Timestamp};
use rusqlite::types::{Type, Value};
use rusqlite::{Connection, OptionalExtension as _, Row, ToSql, params, params_from_iter};

use crate::{ListFilter, QueueDepth};

/// How a [`JobState`] is stored.
pub(crate) mod state {
    /// Not accepted yet; not shown.
    pub(crate) const SUBMITTING: i64 = -1;
    pub(crate) const QUEUED: i64 = 0;
    pub(crate) const RUNNING: i64 = 1;
    pub(crate) const FINISHED: i64 = 2;
}

const COLUMNS: &str = "j.id, j.state, j.submitted_at, j.labels, r.result";

/// The job as it is now.
pub(crate) fn get(connection: &Connection, id: JobId) -> rusqlite::Result<Option<JobView>> {
    let mut query = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM jobs j LEFT JOIN results r ON r.seq = j.seq WHERE j.id = ?1 AND j.state >= 0"
    ))?;
    query.query_row(params![id_bytes(id)], view).optional()
}

/// Jobs by the filter, newest first.
pub(crate) fn list(connection: &Connection, filter: &ListFilter) -> rusqlite::Result<Vec<JobView>> {
    let mut sql = format!("SELECT {COLUMNS} FROM jobs j LEFT JOIN results r ON r.seq = j.seq");
    let mut wheres = vec!["j.state >= 0"];
    let mut values: Vec<Value> = Vec::new();
    if let Some((name, value)) = &filter.label {
        sql.push_str(" JOIN job_labels l ON l.seq = j.seq");
        wheres.push("l.name = ? AND l.value = ?");
        values.push(name.clone().into());
        values.push(value.clone().into());
    }
    if let Some(wanted) = filter.state {
        wheres.push("j.state = ?");
        values.push(state_number(wanted).into());
    }
    if let Some(status) = filter.status {
        wheres.push("j.status = ?");
        values.push(status.as_str().to_owned().into());
    }
    if let Some(after) = filter.after {
        wheres.push("j.seq < (SELECT seq FROM jobs WHERE id = ?)");
        values.push(id_bytes(after).to_vec().into());
    }
    sql.push_str(" WHERE ");
    sql.push_str(&wheres.join(" AND "));
    sql.push_str(" ORDER BY j.seq DESC LIMIT ?");
    values.push(i64::try_from(filter.limit).unwrap_or(i64::MAX).into());
    let mut query = connection.prepare_cached(&sql)?;
    let rows = query.query_map(params_from_iter(values), view)?;
    rows.collect()
}

/// How many jobs wait and run, by queue, in the order of their names.
pub(crate) fn depths(connection: &Connection) -> rusqlite::Result<Vec<QueueDepth>> {
    let mut query = connection.prepare_cached(
        "SELECT queue, sum(state = 0), sum(state = 1) FROM jobs WHERE state BETWEEN 0 AND 1 GROUP BY queue ORDER BY queue",
    )?;
    let rows = query.query_map([], |row| {
        Ok(QueueDepth { queue: row.get(0)?, queued: count(row, 1)?, running: count(row, 2)? })
    })?;
    rows.collect()
}

/// Forgets jobs that ended before `moment`, at most `limit` of them, in these tables; how many there were.
pub(crate) fn prune(
    connection: &Connection,
    moment: Timestamp,
    limit: u32,
    tables: &[&str],
) -> rusqlite::Result<usize> {
    let mut query = connection
        .prepare_cached("SELECT seq FROM jobs WHERE finished_at < ?1 ORDER BY finished_at LIMIT ?2")?;
    let old: Vec<i64> =
        query.query_map(params![moment.unix_ms(), limit], |row| row.get(0))?.collect::<Result<_, _>>()?;
    for seq in &old {
        for table in tables {
            connection.prepare_cached(&format!("DELETE FROM {table} WHERE seq = ?1"))?.execute([seq])?;
        }
    }
    Ok(old.len())
}

/// A job's id as it is stored.
pub(crate) fn id_bytes(id: JobId) -> [u8; 16] {
    id.uuid().into_bytes()
}

/// The id in a column.
pub(crate) fn id_at(row: &Row<'_>, index: usize) -> rusqlite::Result<JobId> {
    let bytes: [u8; 16] = row.get(index)?;
    Ok(uuid::Uuid::from_bytes(bytes).into())
}

/// The labels in a row of `jobs`, and in `job_labels` so that they can be searched for.
pub(crate) fn insert_labels(
    connection: &Connection,
    seq: i64,
    labels: &std::collections::BTreeMap<String, String>,
) -> rusqlite::Result<()> {
    let mut insert = connection
        .prepare_cached("INSERT OR REPLACE INTO job_labels (name, value, seq) VALUES (?1, ?2, ?3)")?;
    for (name, value) in labels {
        insert.execute([name as &dyn ToSql, value, &seq])?;
    }
    Ok(())
}

/// Reads JSON from a column.
pub(crate) fn json_at<T: serde::de::DeserializeOwned>(row: &Row<'_>, index: usize) -> rusqlite::Result<T> {
    let bytes = row.get_ref(index)?.as_bytes()?;
    serde_json::from_slice(bytes)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(index, Type::Blob, Box::new(e)))
}

fn count(row: &Row<'_>, index: usize) -> rusqlite::Result<u64> {
    let number: i64 = row.get(index)?;
    Ok(u64::try_from(number).unwrap_or(0))
}

fn state_number(state: JobState) -> i64 {
    match state {
        JobState::Queued => state::QUEUED,
        JobState::Running => state::RUNNING,
        JobState::Finished => state::FINISHED,
    }
}

fn view(row: &Row<'_>) -> rusqlite::Result<JobView> {
    let state = match row.get::<_, i64>(1)? {
        state::QUEUED => JobState::Queued,
        state::RUNNING => JobState::Running,
        _ => JobState::Finished,
    };
    let result = if matches!(row.get_ref(4)?, rusqlite::types::ValueRef::Null) {
        None
    } else {
        Some(json_at(row, 4)?)
    };
    Ok(JobView {
        id: id_at(row, 0)?,
        state,
        submitted_at: Timestamp::from_unix_ms(row.get(2)?),
        labels: json_at(row, 3)?,
        result,
    })
}
