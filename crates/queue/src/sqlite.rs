//! How a database of ours is opened and read.
//!
//! Opening, in order: the file is made and locked against a second owner, then switched to WAL with
//! `synchronous=FULL` (a commit is on the disk when it returns), then its directory is synced, so
//! that the file's name survives a power cut as well. SQLite syncs the directory for its own WAL
//! file; see <https://www.sqlite.org/atomiccommit.html>, section 3.5, and <https://www.sqlite.org/wal.html>.
//!
//! One connection writes. Readers have connections of their own, which a WAL never makes wait.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::QueueError;

/// Connections that a reader leaves open for the next one.
const IDLE_READERS: usize = 8;

/// A database that this process owns alone, until it is dropped.
#[derive(Debug)]
pub(crate) struct Owned {
    pub(crate) connection: Connection,
    _lock: File,
}

/// Opens the database at `path` for writing; `schema` is applied where it is new.
pub(crate) fn open(path: &Path, schema: &str, version: i64) -> Result<Owned, QueueError> {
    let lock = lock(path)?;
    let setup = |e: rusqlite::Error| QueueError::Setup(format!("open {}: {e}", path.display()));
    let connection = Connection::open(path).map_err(setup)?;
    connection.busy_timeout(Duration::from_secs(5)).map_err(setup)?;
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA journal_size_limit = 67108864;",
        )
        .map_err(setup)?;
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(setup)?;
    if found == 0 {
        connection
            .execute_batch(&format!("BEGIN IMMEDIATE; {schema} PRAGMA user_version = {version}; COMMIT;"))
            .map_err(setup)?;
    } else if found != version {
        return Err(QueueError::Setup(format!(
            "{} has schema {found}, this program knows {version}: use the program that made it, or another path",
            path.display()
        )));
    }
    sync_directory(path)?;
    Ok(Owned { connection, _lock: lock })
}

/// Takes the lock file beside the database; it is let go when the file is closed, so also by a crash.
fn lock(path: &Path) -> Result<File, QueueError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock = PathBuf::from(name);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock)
        .map_err(|e| QueueError::Setup(format!("open {}: {e}", lock.display())))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(QueueError::Setup(format!(
            "{} is in use by another process, and one alone may own it: stop that one, or use another data directory",
            path.display()
        ))),
        Err(TryLockError::Error(e)) => Err(QueueError::Setup(format!("lock {}: {e}", lock.display()))),
    }
}

fn sync_directory(path: &Path) -> Result<(), QueueError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| QueueError::Setup(format!("sync directory {}: {e}", parent.display())))
}

/// Connections that only read.
#[derive(Debug, Clone)]
pub(crate) struct Readers {
    path: Arc<PathBuf>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Readers {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: Arc::new(path.to_owned()), idle: Arc::default() }
    }

    /// Runs `query` on a thread that may block.
    pub(crate) async fn read<T, F>(&self, query: F) -> Result<T, QueueError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let readers = self.clone();
        tokio::task::spawn_blocking(move || readers.read_here(query))
            .await
            .map_err(|e| QueueError::Unavailable(format!("a read was broken off: {e}")))?
            .map_err(|e| QueueError::Unavailable(format!("read: {e}")))
    }

    fn read_here<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let answer = query(&connection)?;
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_READERS {
            idle.push(connection);
        }
        Ok(answer)
    }

    fn connect(&self) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(self.path.as_path(), flags)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        Ok(connection)
    }
}
