//! The one thread that writes.
//!
//! Each turn, in order: wait for a command, or for the next deadline; drain what else waits; carry
//! all of it out in one `BEGIN IMMEDIATE` transaction, then end the leases and the jobs whose time
//! is over, then hand jobs to those who wait for one; commit, which syncs once for all; and only
//! then answer. What fails is rolled back as a whole and tried again command by command, so that one
//! that cannot be written takes no other with it.
//!
//! What lives in memory alone: how long a lease still lives (by the monotonic clock, which no
//! change of the wall clock touches; a lease cannot outlive this process anyway), the expiry of jobs
//! (the same, from what was left at the start), and who waits.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use hutch_proto::{JobId, Reason, Timestamp};
use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::schema::{self, Ended, NewJob, Record, Returned, Taken};
use crate::sqlite::Owned;
use crate::{CancelOutcome, Finished, GiveBack, Lease, QueueError, Submitted, Token};

/// Commands of one transaction.
const BATCH: usize = 256;
/// Old jobs that one turn removes.
const PRUNE_BATCH: u32 = 200;
/// How often old jobs are looked for.
const PRUNE_EVERY: Duration = Duration::from_secs(600);

/// How long a disk that cannot be written rests.
const PAUSE: Duration = Duration::from_millis(500);

pub(super) type Reply<T> = oneshot::Sender<Result<T, QueueError>>;

/// What the writer is asked to do.
pub(super) enum Command {
    Submit {
        job: Box<NewJob>,
        _room: OwnedSemaphorePermit,
        reply: Reply<Submitted>,
    },
    Cancel {
        id: JobId,
        reply: Reply<CancelOutcome>,
    },
    Take(Waiter),
    Keep {
        token: u64,
    },
    Finish {
        token: u64,
        id: JobId,
        record: Arc<Record>,
        reply: Reply<Finished>,
    },
    /// Without a reply: the holder is gone.
    GiveBack {
        token: u64,
        how: GiveBack,
        id: JobId,
        reply: Option<Reply<()>>,
    },
    Close {
        reply: oneshot::Sender<()>,
    },
}

/// Somebody who waits for a job.
pub(super) struct Waiter {
    pub(super) queues: Vec<String>,
    pub(super) worker: String,
    pub(super) lease: Duration,
    pub(super) reply: Reply<Granted>,
}

/// A job on its way to whoever waited. If it never gets there, it goes back.
pub(super) struct Granted {
    lease: Option<Lease>,
    pub(super) wanted_off: CancellationToken,
    commands: Sender<Command>,
}

impl Granted {
    /// The lease; from here on its end is the caller's to tell.
    pub(super) fn accept(mut self) -> Option<(Lease, CancellationToken)> {
        self.lease.take().map(|lease| (lease, self.wanted_off.clone()))
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            let (token, id) = (lease.token.0, lease.job.id);
            // A closed channel means that the writer has ended; the job goes back at the next start.
            let _ = self.commands.send(Command::GiveBack { token, how: GiveBack::Unspent, id, reply: None });
        }
    }
}

/// A lease, as the writer knows it.
struct Held {
    until: Instant,
    length: Duration,
    wanted_off: CancellationToken,
}

/// What follows from a command once it is committed.
#[derive(Default)]
struct Effect {
    answer: Answer,
    /// Jobs that were settled, to be told of.
    settled: Vec<Ended>,
    /// The row of a job that its holder finished.
    finished: Option<i64>,
    /// A lease that is over.
    over: Option<u64>,
    /// A lease whose holder is to stop.
    call_off: Option<u64>,
    /// A new job that expires.
    expires: Option<(i64, Instant)>,
}

#[derive(Default)]
enum Answer {
    #[default]
    Nothing,
    Submitted(Submitted),
    Cancelled(CancelOutcome),
    Finished(Finished),
    GivenBack,
    Fenced,
}

/// What one committed transaction did.
#[derive(Default)]
struct Turn {
    /// One for each command.
    effects: Vec<Effect>,
    /// Of leases and jobs whose time was over.
    due: Vec<Effect>,
    /// Up to which moment; none where that was not looked at.
    due_at: Option<Instant>,
    /// Jobs handed out, with the index of who waited.
    granted: Vec<(usize, Taken)>,
    /// The first token that was not used.
    next_token: u64,
}

pub(super) struct Writer {
    db: Owned,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    keep_finished: Option<Duration>,
    next_token: u64,
    leases: HashMap<u64, Held>,
    /// When each job expires that has not ended; and the same by time.
    expiry: HashMap<i64, Instant>,
    expiries: BTreeSet<(Instant, i64)>,
    waiters: VecDeque<Waiter>,
    next_prune: Instant,
    /// After a failed transaction: when the next is tried of the writer's own accord.
    pause: Option<Instant>,
}

impl Writer {
    /// Makes the writer and settles what the file's last owner left behind.
    pub(super) fn new(
        db: Owned,
        shared: Arc<Shared>,
        commands: Sender<Command>,
        keep_finished: Option<Duration>,
    ) -> rusqlite::Result<Self> {
        let opened = schema::count_opening(&db.connection)?;
        let now = Instant::now();
        let mut writer = Self {
            db,
            shared,
            commands,
            keep_finished,
            next_token: opened.cast_unsigned() << 32 | 1,
            leases: HashMap::new(),
            expiry: HashMap::new(),
            expiries: BTreeSet::new(),
            waiters: VecDeque::new(),
            next_prune: now,
            pause: None,
        };
        writer.recover(now)?;
        Ok(writer)
    }

    fn recover(&mut self, now: Instant) -> rusqlite::Result<()> {
        let wall = Timestamp::now().unix_ms();
        let tx = self.db.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let lost = GiveBack::Failed {
            reason: Reason::WorkerLost,
            message: "the process that ran it ended without a word".to_owned(),
        };
        let mut settled = Vec::new();
        for token in schema::orphans(&tx)? {
            if let Returned::Settled(ended) = schema::give_back(&tx, token, &lost, |_| false)? {
                settled.push(ended);
            }
        }
        for (seq, expires_at) in schema::expiring(&tx)? {
            let left = Duration::from_millis(u64::try_from(expires_at - wall).unwrap_or(0));
            let at = now + left;
            self.expiry.insert(seq, at);
            self.expiries.insert((at, seq));
        }
        tx.commit()?;
        for ended in settled {
            self.shared.unrun.count(&ended.queue, &ended.result);
        }
        Ok(())
    }

    /// Works until the queue is closed.
    pub(super) fn run(mut self, inbox: &Receiver<Command>) {
        let mut stirred = true;
        loop {
            let mut work = Vec::new();
            let mut next = match inbox.recv_timeout(self.sleep(stirred)) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            stirred = false;
            while let Some(command) = next {
                match command {
                    Command::Take(waiter) => {
                        self.waiters.push_back(waiter);
                        stirred = true;
                    }
                    Command::Keep { token } => self.keep(token),
                    Command::Close { reply } => {
                        self.turn(work, true);
                        return self.end(reply);
                    }
                    other => work.push(other),
                }
                next = if work.len() < BATCH { inbox.try_recv().ok() } else { None };
            }
            stirred = self.turn(work, stirred);
        }
    }

    /// How long to wait for a command: until the next deadline.
    fn sleep(&self, stirred: bool) -> Duration {
        let now = Instant::now();
        if stirred && self.pause.is_none() {
            return Duration::ZERO;
        }
        let lease = self.leases.values().map(|held| held.until).min();
        let expiry = self.expiries.first().map(|(at, _)| *at);
        let prune = self.keep_finished.map(|_| self.next_prune);
        let next = [lease, expiry, prune].into_iter().flatten().min();
        let next = match (next, self.pause) {
            (Some(next), Some(pause)) => Some(next.max(pause)),
            (None, pause) => pause,
            (next, None) => next,
        };
        next.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(now))
    }

    fn keep(&mut self, token: u64) {
        if let Some(held) = self.leases.get_mut(&token) {
            held.until = Instant::now() + held.length;
        }
    }

    /// Carries out `work`, what is due, and what can be handed out. Returns whether more can be done at once.
    fn turn(&mut self, work: Vec<Command>, stirred: bool) -> bool {
        let now = Instant::now();
        let rested = self.pause.is_some_and(|pause| now >= pause);
        if rested {
            self.pause = None;
        }
        let due = self.pause.is_none() && self.is_due(now);
        let stirred = stirred || rested;
        if work.is_empty() && !stirred && !due {
            return false;
        }
        match self.transact(&work, now, due) {
            Ok(turn) => {
                self.apply(work, turn);
                self.prune(now)
            }
            Err(e) if work.len() > 1 => {
                tracing::warn!(error = %e, commands = work.len(), "a transaction failed; trying its commands one by one");
                for command in work {
                    self.single(command, now);
                }
                true
            }
            Err(e) => {
                self.give_up(work, &e, now);
                false
            }
        }
    }

    fn single(&mut self, command: Command, now: Instant) {
        let work = vec![command];
        match self.transact(&work, now, false) {
            Ok(turn) => self.apply(work, turn),
            Err(e) => self.give_up(work, &e, now),
        }
    }

    /// Answers that nothing was done, and lets the disk rest, where that may help.
    fn give_up(&mut self, work: Vec<Command>, error: &rusqlite::Error, now: Instant) {
        if is_too_big(error) && !work.is_empty() {
            tracing::error!(error = %error, "one thing is too big to be written");
        } else {
            tracing::error!(error = %error, "the queue cannot be written");
            self.pause = Some(now + PAUSE);
        }
        for command in work {
            command.fail(error);
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.leases.values().any(|held| held.until <= now)
            || self.expiries.first().is_some_and(|(at, _)| *at <= now)
            || (self.keep_finished.is_some() && self.next_prune <= now)
    }

    /// One transaction; nothing in memory changes before it is committed.
    fn transact(&self, work: &[Command], now: Instant, due: bool) -> rusqlite::Result<Turn> {
        let tx = Transaction::new_unchecked(&self.db.connection, TransactionBehavior::Immediate)?;
        let mut turn = Turn { next_token: self.next_token, ..Turn::default() };
        for command in work {
            turn.effects.push(self.execute(&tx, command, now)?);
        }
        if due {
            self.end_due(&tx, now, &mut turn)?;
            turn.due_at = Some(now);
        }
        if self.pause.is_none() {
            self.hand_out(&tx, &mut turn)?;
        }
        tx.commit()?;
        Ok(turn)
    }

    fn execute(&self, db: &Connection, command: &Command, now: Instant) -> rusqlite::Result<Effect> {
        match command {
            Command::Submit { job, .. } => {
                let seq = schema::submit(db, job, Timestamp::now())?;
                if let (Some(seq), Some(0)) = (seq, job.expires_in_ms) {
                    let settled = schema::expire(db, seq)?.into_iter().collect();
                    let answer = Answer::Submitted(Submitted::New);
                    return Ok(Effect { answer, settled, ..Effect::default() });
                }
                let expires = seq
                    .zip(job.expires_in_ms)
                    .and_then(|(seq, ms)| Some((seq, now.checked_add(Duration::from_millis(ms))?)));
                let answer = if seq.is_some() { Submitted::New } else { Submitted::Known };
                Ok(Effect { answer: Answer::Submitted(answer), expires, ..Effect::default() })
            }
            Command::Cancel { id, .. } => {
                let (outcome, settled, call_off) = schema::cancel(db, *id)?;
                let settled = settled.into_iter().collect();
                Ok(Effect { answer: Answer::Cancelled(outcome), settled, call_off, ..Effect::default() })
            }
            Command::Finish { token, record, .. } => match schema::finish(db, *token, record)? {
                Some((finished, seq)) => {
                    let recorded = (finished == Finished::Recorded).then_some(seq);
                    let answer = Answer::Finished(finished);
                    Ok(Effect { answer, finished: recorded, over: Some(*token), ..Effect::default() })
                }
                None => Ok(Effect { answer: Answer::Fenced, ..Effect::default() }),
            },
            Command::GiveBack { token, how, .. } => self.give_back(db, *token, how, now),
            Command::Take(_) | Command::Keep { .. } | Command::Close { .. } => Ok(Effect::default()),
        }
    }

    fn give_back(
        &self,
        db: &Connection,
        token: u64,
        how: &GiveBack,
        now: Instant,
    ) -> rusqlite::Result<Effect> {
        let expired = |seq| self.expiry.get(&seq).is_some_and(|at| *at <= now);
        let (answer, settled) = match schema::give_back(db, token, how, expired)? {
            Returned::Queued => (Answer::GivenBack, Vec::new()),
            Returned::Settled(ended) => (Answer::GivenBack, vec![*ended]),
            Returned::Fenced => (Answer::Fenced, Vec::new()),
        };
        Ok(Effect { answer, settled, over: Some(token), ..Effect::default() })
    }

    /// Ends the leases that ran out and the jobs that expired.
    fn end_due(&self, db: &Connection, now: Instant, turn: &mut Turn) -> rusqlite::Result<()> {
        for (token, held) in self.leases.iter().filter(|(_, held)| held.until <= now) {
            let message = format!("its holder gave no sign of life for {} ms", held.length.as_millis());
            let lost = GiveBack::Failed { reason: Reason::WorkerLost, message };
            let mut effect = self.give_back(db, *token, &lost, now)?;
            effect.call_off = Some(*token);
            turn.due.push(effect);
        }
        for (_, seq) in self.expiries.range(..=(now, i64::MAX)) {
            let settled = schema::expire(db, *seq)?.into_iter().collect();
            turn.due.push(Effect { settled, ..Effect::default() });
        }
        Ok(())
    }

    /// Gives jobs to those who wait, in the order in which they came.
    fn hand_out(&self, db: &Connection, turn: &mut Turn) -> rusqlite::Result<()> {
        let mut dry: HashSet<&[String]> = HashSet::new();
        let mut unreadable = Vec::new();
        for (index, waiter) in self.waiters.iter().enumerate() {
            if waiter.reply.is_closed() || dry.contains(waiter.queues.as_slice()) {
                continue;
            }
            let taken =
                schema::take(db, &waiter.queues, &waiter.worker, &mut turn.next_token, &mut unreadable)?;
            match taken {
                Some(taken) => turn.granted.push((index, taken)),
                None => {
                    dry.insert(&waiter.queues);
                }
            }
        }
        if !unreadable.is_empty() {
            turn.due.push(Effect { settled: unreadable, ..Effect::default() });
        }
        Ok(())
    }

    /// What was committed becomes true in memory, and is told.
    fn apply(&mut self, work: Vec<Command>, turn: Turn) {
        self.next_token = turn.next_token;
        if let Some(now) = turn.due_at {
            // A running job's moment stays in `expiry`: it counts when the job comes back.
            self.expiries = self.expiries.split_off(&(now, i64::MAX));
        }
        for effect in turn.due {
            self.absorb(&effect, None);
        }
        for (command, effect) in work.into_iter().zip(turn.effects) {
            self.absorb(&effect, Some(&command));
            command.answer(effect.answer);
        }
        self.grant(turn.granted);
    }

    fn absorb(&mut self, effect: &Effect, command: Option<&Command>) {
        if let Some(held) = effect.call_off.and_then(|token| self.leases.get(&token)) {
            held.wanted_off.cancel();
        }
        if let Some(token) = effect.over {
            self.leases.remove(&token);
        }
        if let Some((seq, at)) = effect.expires {
            self.expiry.insert(seq, at);
            self.expiries.insert((at, seq));
        }
        if let (Some(seq), Some(Command::Finish { record, .. })) = (effect.finished, command) {
            self.forget(seq);
            self.shared.tell_finished(&record.result);
        }
        for ended in &effect.settled {
            self.forget(ended.seq);
            self.shared.unrun.count(&ended.queue, &ended.result);
            self.shared.tell_finished(&ended.result);
        }
    }

    fn forget(&mut self, seq: i64) {
        if let Some(at) = self.expiry.remove(&seq) {
            self.expiries.remove(&(at, seq));
        }
    }

    fn grant(&mut self, granted: Vec<(usize, Taken)>) {
        let mut granted: HashMap<usize, Taken> = granted.into_iter().collect();
        for (index, waiter) in std::mem::take(&mut self.waiters).into_iter().enumerate() {
            match granted.remove(&index) {
                Some(taken) => self.hand_over(waiter, taken),
                None if waiter.reply.is_closed() => {}
                None => self.waiters.push_back(waiter),
            }
        }
    }

    fn hand_over(&mut self, waiter: Waiter, taken: Taken) {
        let wanted_off = CancellationToken::new();
        let until = Instant::now() + waiter.lease;
        let held = Held { until, length: waiter.lease, wanted_off: wanted_off.clone() };
        self.leases.insert(taken.token, held);
        self.shared.begin(taken.id, taken.attempt);
        let lease = Lease {
            job: taken.spec,
            attempt: taken.attempt,
            submitted_at: taken.submitted_at,
            token: Token(taken.token),
        };
        let granted = Granted { lease: Some(lease), wanted_off, commands: self.commands.clone() };
        // Where nobody listens any more, the grant drops here and sends the job back.
        let _ = waiter.reply.send(Ok(granted));
    }

    /// Removes old jobs, a few at a time. Returns whether there are more.
    fn prune(&mut self, now: Instant) -> bool {
        let Some(keep) = self.keep_finished.filter(|_| self.next_prune <= now) else { return false };
        let age = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
        let moment = Timestamp::from_unix_ms(Timestamp::now().unix_ms().saturating_sub(age));
        let removed = Transaction::new_unchecked(&self.db.connection, TransactionBehavior::Immediate)
            .and_then(|tx| schema::prune(&tx, moment, PRUNE_BATCH).and_then(|n| tx.commit().map(|()| n)));
        match removed {
            Ok(removed) if removed == PRUNE_BATCH as usize => true,
            Ok(_) => {
                self.next_prune = now + PRUNE_EVERY;
                false
            }
            Err(e) => {
                tracing::warn!(error = %e, "old jobs cannot be removed");
                self.next_prune = now + PRUNE_EVERY;
                false
            }
        }
    }

    /// Lets go of the file before it says so.
    fn end(self, reply: oneshot::Sender<()>) {
        let Self { db, waiters, shared, .. } = self;
        shared.close();
        for waiter in waiters {
            let _ = waiter.reply.send(Err(QueueError::Closed));
        }
        drop(db);
        let _ = reply.send(());
    }
}

impl Command {
    fn answer(self, answer: Answer) {
        match (self, answer) {
            (Self::Submit { reply, .. }, Answer::Submitted(outcome)) => drop(reply.send(Ok(outcome))),
            (Self::Cancel { reply, .. }, Answer::Cancelled(outcome)) => drop(reply.send(Ok(outcome))),
            (Self::Finish { reply, .. }, Answer::Finished(outcome)) => drop(reply.send(Ok(outcome))),
            (Self::Finish { reply, id, .. }, Answer::Fenced) => {
                drop(reply.send(Err(QueueError::Fenced(id))));
            }
            (Self::GiveBack { reply: Some(reply), id, .. }, answer) => {
                let fenced = matches!(answer, Answer::Fenced);
                drop(reply.send(if fenced { Err(QueueError::Fenced(id)) } else { Ok(()) }));
            }
            _ => {}
        }
    }

    fn fail(self, error: &rusqlite::Error) {
        let error = if is_too_big(error) {
            QueueError::Setup(format!("write: {error}: SQLite keeps at most 1 GB in one row"))
        } else {
            QueueError::Unavailable(format!("write: {error}"))
        };
        match self {
            Self::Submit { reply, .. } => drop(reply.send(Err(error))),
            Self::Cancel { reply, .. } => drop(reply.send(Err(error))),
            Self::Finish { reply, .. } => drop(reply.send(Err(error))),
            Self::GiveBack { reply: Some(reply), .. } => drop(reply.send(Err(error))),
            Self::GiveBack { .. } | Self::Take(_) | Self::Keep { .. } | Self::Close { .. } => {}
        }
    }
}

/// Whether the same would be refused again, on whatever disk.
fn is_too_big(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::TooBig)
}
